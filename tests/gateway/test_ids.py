"""Ids: prefixed, sorted by time, rising strictly in one process."""

import subprocess
import sys
import threading

import pytest

from gateway.ids import ALPHABET, PREFIXES, IdSource, encode, new_id, reserved_prefix


def test_an_id_is_its_prefix_and_26_characters_of_crockfords_alphabet():
    prefix, _, body = new_id("cus").partition("_")
    assert prefix == "cus"
    assert len(body) == 26
    assert set(body) <= set(ALPHABET)


def test_the_alphabet_leaves_out_what_reads_like_something_else():
    assert len(set(ALPHABET)) == 32
    assert not set(ALPHABET) & set("ilou")
    assert list(ALPHABET) == sorted(ALPHABET)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0" * 26), (1, "0" * 25 + "1"), (31, "0" * 25 + "z"), (32, "0" * 24 + "10")]
)
def test_the_body_is_the_number_in_base_32(value: int, text: str):
    assert encode(value) == text


def test_the_largest_number_fits():
    assert encode(2**128 - 1) == "7" + "z" * 25


def test_later_ids_sort_after_earlier_ones():
    times_ms = iter([1_000_000_000, 1_700_000_000_000, 4_000_000_000_000])
    source = IdSource(clock_ns=lambda: next(times_ms) * 1_000_000)
    ids = [source.new("evt") for _ in range(3)]
    assert ids == sorted(set(ids))


@pytest.mark.parametrize("random_byte", [b"\x00", b"\xff"])
def test_ids_of_one_millisecond_rise_whatever_is_drawn(random_byte: bytes):
    source = IdSource(clock_ns=lambda: 5_000_000, entropy=lambda n: random_byte * n)
    ids = [source.new("req") for _ in range(1_000)]
    assert ids == sorted(set(ids))


def test_ids_rise_when_the_clock_steps_back():
    times = iter([9_000_000, 3_000_000, 3_000_000, 10_000_000])
    source = IdSource(clock_ns=lambda: next(times))
    ids = [source.new("req") for _ in range(4)]
    assert ids == sorted(set(ids))


def test_threads_never_get_the_same_id():
    source = IdSource(clock_ns=lambda: 5_000_000)
    ids: list[str] = []
    threads = [threading.Thread(target=lambda: ids.extend(source.new("req") for _ in range(500))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 2_000


def test_a_forked_process_goes_another_way():
    program = (
        "import os\n"
        "from gateway.ids import IdSource\n"
        "source = IdSource(clock_ns=lambda: 5_000_000)\n"
        "source.new('req')\n"
        "child = os.fork()\n"
        "os.write(1, (source.new('req') + '\\n').encode())\n"
        "child and os.waitpid(child, 0)\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert len(out) == 2
    assert len(set(out)) == 2


@pytest.mark.parametrize("prefix", sorted(PREFIXES))
def test_no_external_id_may_look_like_ours(prefix: str):
    assert reserved_prefix(f"{prefix}_1")
    assert not reserved_prefix(prefix)
    assert not reserved_prefix(f"{prefix}1")
    assert not reserved_prefix(f"my_{prefix}_1")
