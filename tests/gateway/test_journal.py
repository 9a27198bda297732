"""The settlement journal and its file: one sync for all who wait, bounded, and honest about a disk that fails."""

import asyncio
import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.ids import new_id
from gateway.proxy.doubts import Doubts
from gateway.proxy.journal import TOLD_AT_ONCE, SettlementJournal
from gateway.proxy.journal_file import COMPACT_BYTES, LEFT_MAX, SUFFIX, JournalFile
from ledger.commands import AnyCommand, Commit, Debit, Reserve, ReserveLeg
from ledger.errors import LedgerUnavailable, NotFound
from ledger.model import Charge, ReservationRef, Scope, Settlement, UsageRecord, WalletRef
from ledger.outcomes import Applied
from tests.gateway.test_journey_ledger_away import files, release

SCOPE = Scope("ten", "live")


class Disk:
    """A disk whose writes and syncs a test counts, holds up, or lets fail."""

    def __init__(self) -> None:
        self.syncs = 0
        self.writes_fail: Callable[[bytes], int | None] = lambda data: None
        self.sync_fails = False
        self.open = threading.Event()
        self.open.set()

    def write(self, descriptor: int, data: bytes) -> int:
        kept = self.writes_fail(data)
        if kept is None:
            return os.write(descriptor, data[:1000])  # As the system may: not everything at once.
        os.write(descriptor, data[:kept])
        raise OSError(errno.ENOSPC, "No space left on device")

    def sync(self, descriptor: int) -> None:
        self.open.wait()
        self.syncs += 1
        if self.sync_fails:
            raise OSError(errno.EIO, "Input/output error")
        os.fsync(descriptor)


@pytest.fixture
def disk() -> Disk:
    return Disk()


def file_on(disk: Disk, folder: Path, **more: Any) -> JournalFile:
    return JournalFile(folder, name="p", write=disk.write, sync=disk.sync, **more)


def journal_on(disk: Disk, folder: Path, **more: Any) -> SettlementJournal:
    file = file_on(disk, folder, **more)
    return SettlementJournal(folder, name="p", report=lambda message: None, file=file)


def heir(folder: Path, report: Callable[[str], None] = lambda message: None) -> SettlementJournal:
    return SettlementJournal(folder, name="heir", report=report)


def debit(name: str, cost: int, *, command_id: str | None = None) -> Debit:
    return Debit(
        id=command_id or new_id("cmd"),
        scope=SCOPE,
        reservation=ReservationRef(*SCOPE, name),
        asset="CREDIT",
        legs=(ReserveLeg((WalletRef(*SCOPE, "customer:a"),), cost, cost),),
        settlement=Settlement((Charge(cost),), UsageRecord(request_id=f"req_{name}")),
        beyond="receivable",
    )


def reserve(name: str) -> Reserve:
    legs = (ReserveLeg((WalletRef(*SCOPE, "customer:a"),), 1, 1),)
    ref = ReservationRef(*SCOPE, name)
    return Reserve(id=new_id("cmd"), scope=SCOPE, reservation=ref, asset="CREDIT", legs=legs, ttl_us=1)


class Told:
    """A ledger that only listens, or is away."""

    def __init__(self) -> None:
        self.commands: list[Any] = []
        self.away: Callable[[AnyCommand], bool] = lambda command: False
        self.at_once = self.most_at_once = 0

    async def execute(self, command: AnyCommand) -> Applied:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        if self.away(command):
            raise LedgerUnavailable("away")
        self.commands.append(command)
        return Applied(result=None)

    @property
    def names(self) -> list[str]:
        return [command.reservation.reservation for command in self.commands]


def content(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob(f"*{SUFFIX}")))


# The file.


async def test_all_who_wait_are_written_with_one_sync(tmp_path: Path, disk: Disk) -> None:
    file = file_on(disk, tmp_path)
    disk.open.clear()
    first = asyncio.create_task(file.append(b"0\n"))
    while not content(tmp_path):  # noqa: ASYNC110 - it is in its thread
        await asyncio.sleep(0.001)
    rest = [asyncio.create_task(file.append(f"{number}\n".encode())) for number in range(1, 100)]
    await asyncio.sleep(0)
    assert not first.done()
    disk.open.set()
    await asyncio.gather(first, *rest)
    assert disk.syncs == 2
    assert content(tmp_path) == b"".join(f"{number}\n".encode() for number in range(100))
    file.close(empty=True)
    assert content(tmp_path) == b""


async def test_a_files_name_is_durable_before_anybody_relies_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is synced can still be lost with the power, if its folder was not."""
    synced: list[str] = []

    def sync(descriptor: int) -> None:
        synced.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    monkeypatch.setattr(os, "fsync", sync)
    file = JournalFile(tmp_path, name="p", sync=sync)
    await file.append(b"0\n")
    await file.append(b"1\n")
    assert synced == ["folder", "file", "file"]
    file.close(empty=True)


async def test_a_full_disk_leaves_no_half_of_a_line(tmp_path: Path, disk: Disk) -> None:
    file = file_on(disk, tmp_path)
    await file.append(b"first\n")
    disk.writes_fail = lambda data: 3
    with pytest.raises(OSError, match="No space left"):
        await file.append(b"second\n")
    assert content(tmp_path) == b"first\n"
    disk.writes_fail = lambda data: None
    await file.append(b"third\n")
    assert content(tmp_path) == b"first\nthird\n"
    file.close(empty=True)


async def test_after_a_sync_that_failed_a_new_file_is_begun(tmp_path: Path, disk: Disk) -> None:
    """Nobody knows what of the old one is on disk, and another sync of it would not tell."""
    file = file_on(disk, tmp_path)
    await file.append(b"first\n")
    disk.sync_fails = True
    with pytest.raises(OSError, match="Input/output"):
        await file.append(b"second\n")
    disk.sync_fails = False
    await file.append(b"third\n")
    assert content(tmp_path) == b"third\n" + b"first\nsecond\n"
    assert len(files(tmp_path)) == 2
    told = Told()
    assert await heir(tmp_path).adopt(told) == 0  # type: ignore[arg-type]  (both are a living process's)
    await file.tidy(list)
    assert content(tmp_path) == b""
    file.close(empty=True)
    assert files(tmp_path) == []


async def test_a_disk_that_always_fails_does_not_use_descriptors_up(tmp_path: Path, disk: Disk) -> None:
    file = file_on(disk, tmp_path)
    disk.sync_fails = True
    for _ in range(3 * LEFT_MAX):
        with pytest.raises(OSError, match=r"Input/output|too often"):
            await file.append(b"line\n")
    assert len(files(tmp_path)) == LEFT_MAX
    disk.sync_fails = False
    await file.tidy(list)
    await file.append(b"line\n")
    assert content(tmp_path) == b"line\n"
    file.close(empty=True)


async def test_a_full_journal_refuses_like_a_full_disk(tmp_path: Path, disk: Disk) -> None:
    file = file_on(disk, tmp_path, bytes_max=100)
    await file.append(b"x" * 60)
    with pytest.raises(OSError, match="full") as refused:
        await file.append(b"x" * 41)
    assert refused.value.errno == errno.ENOSPC
    await file.append(b"x" * 40)
    await file.tidy(list)
    await file.append(b"x" * 100)
    file.close(empty=True)


async def test_a_disk_that_hangs_is_not_waited_for(tmp_path: Path, disk: Disk) -> None:
    file = file_on(disk, tmp_path, wait_s=0.01)
    disk.open.clear()
    with pytest.raises(OSError, match="longer than"):
        await file.append(b"slow\n")
    disk.open.set()
    while disk.syncs == 0:  # noqa: ASYNC110 - it is in its thread
        await asyncio.sleep(0.001)
    file.close(empty=True)


def test_a_folder_that_cannot_be_written_to_is_told_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "kept", Path("/proc/self/fdinfo")):
        with pytest.raises(OSError, match=f"journal_dir {folder} cannot be written to"):
            SettlementJournal(folder, name="p", report=lambda message: None).prepare()


async def test_a_long_journal_is_written_anew_without_what_is_told(tmp_path: Path, disk: Disk) -> None:
    file = file_on(disk, tmp_path)
    await file.append(b"x" * COMPACT_BYTES + b"\n")
    await file.append(b"needed\n")
    await file.tidy(lambda: [b"needed\n"])
    assert content(tmp_path) == b"needed\n"
    await file.append(b"more\n")
    assert content(tmp_path) == b"needed\nmore\n"
    file.close(empty=True)
    assert files(tmp_path) == []


# The journal.


async def test_of_several_lines_for_one_request_the_last_counts(tmp_path: Path, disk: Disk) -> None:
    dead, told = journal_on(disk, tmp_path), Told()
    intents = [debit("a", 1), debit("b", 2), debit("c", 3)]
    for intent in intents:
        await dead.intend(intent)
    await dead.keep(debit("a", 10, command_id=intents[0].id))
    await dead.keep(release("c"))
    await dead.intend(debit("b", 20, command_id=intents[1].id))
    dead.close()
    assert await heir(tmp_path).adopt(told) == 3  # type: ignore[arg-type]
    assert told.names == ["a", "c", "b"]
    assert [type(command).__name__ for command in told.commands] == ["Debit", "Release", "Debit"]
    assert [told.commands[index].settlement.charges[0].base for index in (0, 2)] == [10, 20]
    assert files(tmp_path) == []


async def test_an_intent_is_not_told_while_its_request_lives(tmp_path: Path, disk: Disk) -> None:
    living, told = journal_on(disk, tmp_path), Told()
    await living.intend(debit("a", 1))
    await living.keep(release("b"))
    assert await living.replay(told) == 1  # type: ignore[arg-type]
    assert told.names == ["b"]
    assert b'"a"' in content(tmp_path)
    living.close()
    assert await heir(tmp_path).adopt(told) == 2  # type: ignore[arg-type]
    assert told.names == ["b", "a", "b"]  # What stands in the file is told again: that has no second effect.


async def test_an_intent_that_could_not_be_written_is_taken_back(tmp_path: Path, disk: Disk) -> None:
    """Its line may be on disk in spite of what the disk said."""
    living, told = journal_on(disk, tmp_path), Told()
    disk.sync_fails = True
    with pytest.raises(OSError, match="Input/output"):
        await living.intend(debit("a", 1))
    disk.sync_fails = False
    assert await living.replay(told) == 1  # type: ignore[arg-type]
    assert [type(command).__name__ for command in told.commands] == ["Release"]
    living.close()
    assert content(tmp_path) == b""


async def test_an_intent_that_could_not_be_replaced_is_gone_after_the_end(tmp_path: Path, disk: Disk) -> None:
    """A heartbeat's line fails while the request is settled: nothing is charged of one that was released."""
    living, told = journal_on(disk, tmp_path), Told()
    first = debit("a", 1)
    await living.intend(first)
    disk.writes_fail = lambda data: 0
    renewing = asyncio.create_task(living.intend(debit("a", 2, command_id=first.id)))
    await asyncio.sleep(0)
    with pytest.raises(OSError, match="No space left"):
        await living.keep(release("a"))
    with pytest.raises(OSError, match="No space left"):
        await renewing
    disk.writes_fail = lambda data: None
    assert await living.replay(told) == 1  # type: ignore[arg-type]
    assert content(tmp_path) == b"", "nothing is needed of it any more"
    living.close()
    assert files(tmp_path) == []


async def test_reservations_in_doubt_take_no_room_of_charges_that_no_disk_takes(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.proxy.journal.UNWRITTEN_MAX", 3)
    living, told = journal_on(disk, tmp_path), Told()
    for number in range(5):
        living.withdraw(reserve(f"doubt-{number}"))
    disk.writes_fail = lambda data: 0
    for number in range(4):
        with pytest.raises(OSError, match="No space left"):
            await living.keep(debit(f"charge-{number}", 1))
    assert living.waiting == 3
    assert await living.replay(told) == 3  # type: ignore[arg-type]
    assert told.names == [f"doubt-{number}" for number in range(5)] + [f"charge-{number}" for number in range(3)]
    living.close()


async def test_a_reservation_in_doubt_is_asked_for_until_it_would_have_run_out(tmp_path: Path) -> None:
    """What is not there yet may still come: its commit waits for a standby."""
    now_s = 0.0
    told, there = Told(), False
    living = SettlementJournal(
        tmp_path, name="p", report=lambda message: None, doubts=Doubts(monotonic_s=lambda: now_s)
    )

    def unknown(command: AnyCommand) -> bool:
        told.commands.append(command)
        if not there:
            raise NotFound("there is none")
        return False

    told.away = unknown
    living.withdraw(reserve("a"))
    asked_s = []
    for second in range(600):
        now_s = float(second)
        told.commands.clear()
        await living.replay(told)  # type: ignore[arg-type]
        asked_s += [second] * len(told.commands)
    assert asked_s == [0, 1, 3, 7, 15, 31, 63, 127, 255]
    assert len(living._doubts) == 0
    living.withdraw(reserve("b"))
    await living.replay(told)  # type: ignore[arg-type]
    there, now_s = True, now_s + 1
    await living.replay(told)  # type: ignore[arg-type]
    assert len(living._doubts) == 0, "it was there, and is given back"


async def test_a_file_is_adopted_once_by_rounds_that_overlap(tmp_path: Path, disk: Disk) -> None:
    dead, told = journal_on(disk, tmp_path), Told()
    for number in range(3):
        await dead.keep(debit(f"{number}", 10))
    dead.close()
    first = heir(tmp_path)
    rounds = (first.adopt(told), first.adopt(told))  # type: ignore[arg-type]
    assert sorted(await asyncio.gather(*rounds)) == [0, 3]
    assert (told.names, first.adopted_charges(SCOPE), files(tmp_path)) == (["0", "1", "2"], 0, [])


async def test_a_file_that_cannot_be_read_keeps_no_other_waiting(tmp_path: Path) -> None:
    said: list[str] = []
    told = Told()
    dead = SettlementJournal(tmp_path, name="dead", report=said.append)
    await dead.keep(release("a"))
    dead.close()
    (tmp_path / f"broken{SUFFIX}").mkdir()
    assert await heir(tmp_path, said.append).adopt(told) == 1  # type: ignore[arg-type]
    assert (told.names, said) == (["a"], [f"broken{SUFFIX} cannot be adopted: Is a directory"])


async def test_an_unfinished_line_is_left_out_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    told = Told()
    dead = SettlementJournal(tmp_path, name="dead", report=said.append)
    await dead.keep(release("a"))
    dead.close()
    path = tmp_path / files(tmp_path)[0]
    whole = path.read_bytes()
    path.write_bytes(whole + whole.replace(b'"a"', b'"b"')[:-1])  # All but the end of the line.
    assert await heir(tmp_path, said.append).adopt(told) == 1  # type: ignore[arg-type]
    assert (told.names, said) == (["a"], [f"an unfinished line in {path.name} was left out"])


async def test_many_are_told_in_order_and_in_bounded_crowds(tmp_path: Path, disk: Disk) -> None:
    living, told = journal_on(disk, tmp_path), Told()
    names = [f"{number:04d}" for number in range(3 * TOLD_AT_ONCE)]
    await asyncio.gather(*(living.keep(release(name)) for name in names))
    assert await living.replay(told) == len(names)  # type: ignore[arg-type]
    assert told.names == names
    assert told.most_at_once <= TOLD_AT_ONCE
    living.close()


async def test_while_the_ledger_is_away_one_crowd_finds_out(tmp_path: Path, disk: Disk) -> None:
    living, told = journal_on(disk, tmp_path), Told()
    tried: list[AnyCommand] = []
    told.away = lambda command: tried.append(command) is None
    await asyncio.gather(*(living.keep(release(f"{number}")) for number in range(2 * TOLD_AT_ONCE)))
    assert await living.replay(told) == 0  # type: ignore[arg-type]
    assert (len(tried), living.waiting) == (TOLD_AT_ONCE, 2 * TOLD_AT_ONCE)
    living.close()


async def test_one_that_always_fails_keeps_no_other_waiting(tmp_path: Path) -> None:
    said: list[str] = []
    living, told = SettlementJournal(tmp_path, name="p", report=said.append), Told()

    def broken(command: AnyCommand) -> bool:
        if told_name(command) == "1":
            raise ValueError("a bug of ours, with somebody's values in it")
        return False

    told.away = broken
    for number in range(3):
        await living.keep(release(f"{number}"))
    assert await living.replay(told) == 2  # type: ignore[arg-type]
    assert (told.names, living.waiting) == (["0", "2"], 1)
    assert said == ["the settlement of 1 fails: ValueError"]
    living.close()


async def test_however_many_always_fail_the_others_are_told(tmp_path: Path, disk: Disk) -> None:
    living, told = journal_on(disk, tmp_path), Told()

    def broken(command: AnyCommand) -> bool:
        if told_name(command).startswith("broken"):
            raise ValueError("a bug of ours")
        return False

    told.away = broken
    names = [f"{'well' if number % 2 else 'broken'}-{number}" for number in range(3 * TOLD_AT_ONCE)]
    await asyncio.gather(*(living.keep(release(name)) for name in names))
    assert await living.replay(told) == len(names) // 2  # type: ignore[arg-type]
    assert set(told.names) == {name for name in names if name.startswith("well")}
    living.close()


def told_name(command: AnyCommand) -> str:
    assert isinstance(command, Commit | Debit) or hasattr(command, "reservation")
    return str(command.reservation.reservation)  # type: ignore[union-attr]


async def test_an_adopted_journal_that_is_told_in_part_stays_adopted(tmp_path: Path, disk: Disk) -> None:
    dead, told = journal_on(disk, tmp_path), Told()
    for number in range(3):
        await dead.keep(debit(f"{number}", 10))
    dead.close()
    first, second = heir(tmp_path), heir(tmp_path)
    told.away = lambda command: told_name(command) != "0"
    assert await first.adopt(told) == 1  # type: ignore[arg-type]
    assert first.adopted_charges(SCOPE) == 20
    assert await second.adopt(told) == 0  # type: ignore[arg-type]
    first.close()  # It dies too: another takes over, and tells the first once more, which charges nothing twice.
    told.away = lambda command: False
    assert await second.adopt(told) == 3  # type: ignore[arg-type]
    assert files(tmp_path) == []
