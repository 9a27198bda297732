"""Copies that are served without asking, and what makes their holders let go of them in time."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import pytest

from gateway.clock import now_us
from gateway.shared.balances import Balances
from gateway.shared.leases import CHANNEL, Leases
from gateway.shared.link import Link
from gateway.shared.wallets import STRIKE, SharedWallets, holders_key
from gateway.telemetry import Metrics
from ledger.model import Wallet, WalletRef
from ledger.store.protocol import WalletBlocks, WalletVersion
from tests.servers.valkey import ValkeyServer

REF = WalletRef("ten_a", "live", "customer:cus_a")
PATIENT_S = 10.0
LEASE_S = 5.0
"""Longer than a test looks on, unless it is about its end."""


def version(number: int) -> WalletBlocks:
    return WalletBlocks(Wallet(ref=REF, asset="credit", version=number), ())


async def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENT_S
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.001)


class Books:
    """A store with one wallet."""

    def __init__(self) -> None:
        self.value = version(1)
        self.reads = 0

    async def wallet(self, ref: WalletRef) -> WalletBlocks | None:
        self.reads += 1
        return self.value

    async def wallet_version(self, ref: WalletRef) -> int | None:
        return self.value.wallet.version


class Process:
    def __init__(self, books: Books, link: Link, *, lease_s: float) -> None:
        self.link = link
        self.leases = Leases(link, holders_key=holders_key, lease_s=lease_s)
        self.shared = SharedWallets(link, now_us=now_us, leases=self.leases)
        self.balances = Balances(books, Metrics(), shared=self.shared)

    @property
    def kept(self) -> int | None:
        """The version that it serves without asking."""
        found = self.balances.kept(REF)
        return None if found is None else found.wallet.version

    async def hold(self) -> None:
        """Look until there is a copy: who finds nothing in Redis puts it there first."""
        deadline_s = time.monotonic() + PATIENT_S
        while self.kept is None:
            assert time.monotonic() < deadline_s
            await self.balances.wallet(REF)

    async def change(self, books: Books, number: int) -> float:
        """Commit a version; how long it took to be allowed to."""
        began_s = time.monotonic()
        await self.shared.changing([WalletVersion(REF, number)])
        took_s = time.monotonic() - began_s
        books.value = version(number)
        self.shared.changed([books.value])
        return took_s


@contextlib.asynccontextmanager
async def started(
    books: Books, url: str, *, lease_s: float = LEASE_S, steady_s: float = 0.0, retry_s: float = 1.0
) -> AsyncIterator[Process]:
    link = Link(url, Metrics(), timeout_s=PATIENT_S, steady_s=steady_s, lease_s=retry_s)
    await link.start()
    process = Process(books, link, lease_s=lease_s)
    process.leases.start()
    await until(process.leases.heard.is_set)
    yield process
    await process.leases.stop()
    await link.stop()


@pytest.fixture
def books() -> Books:
    return Books()


@pytest.fixture
async def one(books: Books, redis_url: str) -> AsyncIterator[Process]:
    async with started(books, redis_url) as process:
        yield process


@pytest.fixture
async def other(books: Books, redis_url: str) -> AsyncIterator[Process]:
    async with started(books, redis_url) as process:
        yield process


async def test_a_copy_is_served_without_asking_anybody(one: Process, books: Books):
    assert one.kept is None
    await one.hold()
    reads = books.reads
    assert [one.kept for _ in range(100)] == [1] * 100
    assert books.reads == reads


async def test_a_holder_that_is_told_lets_go_before_the_change_goes_on(one: Process, other: Process, books: Books):
    for number in range(2, 12):
        await one.hold()
        await other.hold()
        assert await other.change(books, number) < LEASE_S / 2
        assert one.kept is None
        assert other.kept == number, "what it made itself it may serve at once"


async def test_a_copy_in_use_is_renewed_before_it_wears_off(books: Books, redis_url: str):
    async with started(books, redis_url, lease_s=0.2) as process:
        await process.hold()
        ends_s = time.monotonic() + 0.6
        missed = 0
        while time.monotonic() < ends_s:
            missed += process.kept is None
            await asyncio.sleep(0.001)
        assert missed < 300, "it is served for most of the time"
        await until(lambda: process.leases.copy(REF) is None)


async def test_a_holder_that_hears_nothing_is_waited_for(
    one: Process, books: Books, redis_url: str, monkeypatch: pytest.MonkeyPatch
):
    async with started(books, redis_url, lease_s=0.3) as hung:
        await hung.hold()
        monkeypatch.setattr(hung.leases, "_take", lambda word: None)
        monkeypatch.setattr(one.leases, "_lease_s", 0.3)
        assert await one.change(books, 2) >= 0.3
        assert hung.kept is None
        await one.link.ask("balance", STRIKE, (holders_key(REF),), "nobody", 0)  # Which Redis has not known before.
        assert await one.change(books, 3) < 0.2, "it is waited for once, until it signs anew"
        await hung.hold()
        assert await one.change(books, 4) >= 0.3


async def test_what_was_asked_for_before_the_word_and_comes_after_it_is_void(one: Process):
    ask = one.leases.ask(REF)
    one.leases.let_go(REF)
    one.leases.answer(ask, version(1), life_s=1)
    assert one.kept is None
    ask = one.leases.ask(REF)
    one.leases.answer(ask, version(2), life_s=1)
    assert one.kept == 2


async def test_what_is_asked_for_before_redis_has_answered_is_void(one: Process):
    one.leases.unsure(REF)
    ask = one.leases.ask(REF)
    one.leases.sure(REF)
    one.leases.answer(ask, version(1), life_s=1)
    assert one.kept is None


async def test_an_older_value_replaces_no_newer_copy(one: Process):
    for number, kept in ((2, 2), (1, 2), (3, 3)):
        one.leases.answer(one.leases.ask(REF), version(number), life_s=1)
        assert one.kept == kept


async def test_a_change_of_ours_that_another_has_overtaken_is_not_kept(one: Process):
    await one.hold()
    await one.shared.changing([WalletVersion(REF, 2)])
    one.leases.let_go(REF)
    one.shared.changed([version(2)])
    assert one.kept is None


async def test_a_process_that_is_deaf_signs_nowhere(one: Process, other: Process, books: Books):
    one.leases.heard.clear()
    for _ in range(3):
        await one.balances.wallet(REF)
    assert one.kept is None
    assert await other.change(books, 2) < LEASE_S / 2


async def test_who_cannot_be_told_that_all_have_let_go_waits_for_the_lease(one: Process, books: Books):
    await one.hold()
    shared = SharedWallets(one.link, now_us=now_us)
    began_s = time.monotonic()
    await shared.changing([WalletVersion(REF, 2)])
    assert time.monotonic() - began_s >= 1.0
    assert one.kept is None


async def test_when_redis_is_lost_a_change_waits_until_the_leases_are_over(books: Books):
    server = ValkeyServer().start()
    try:
        async with started(books, server.url) as steady, started(books, server.url, steady_s=60) as flapping:
            killed_s = time.monotonic()
            server.kill()
            await until(lambda: not steady.link.up and not flapping.link.up)
            assert flapping.link.lost_s > 60
            await steady.change(books, 2)
            assert time.monotonic() - killed_s >= 1.0
    finally:
        server.close()


async def test_a_redis_that_comes_back_has_forgotten_who_holds_what(books: Books):
    server = ValkeyServer().start()
    try:
        async with (
            started(books, server.url, retry_s=0.05) as steady,
            started(books, server.url, retry_s=0.05, steady_s=60) as flapping,
        ):
            await steady.hold()
            await flapping.hold()
            killed_s = time.monotonic()
            server.kill()
            await until(lambda: not steady.link.up and not flapping.link.up)
            assert (steady.kept, flapping.kept) == (None, None)
            server.start()
            await until(lambda: steady.link.up and flapping.link.up)
            assert (steady.kept, flapping.kept) == (None, None), "nobody would be told to let go of it"
            await steady.change(books, 2)
            assert time.monotonic() - killed_s >= 1.0
    finally:
        server.close()


async def test_what_it_could_not_tell_of_it_does_not_hold(
    one: Process, other: Process, books: Books, monkeypatch: pytest.MonkeyPatch
):
    await one.hold()
    with monkeypatch.context() as full:
        full.setattr("gateway.shared.link.WAITING_MAX", 0)
        await one.change(books, 2)
    assert one.kept is None
    await other.change(books, 3)
    assert one.kept is None


async def test_what_is_no_word_of_ours_deafens_nobody(one: Process, other: Process, books: Books):
    one.link.ask("changes", None, (), "PUBLISH", f"{CHANNEL}{one.leases.process}", "what is that")
    await until(lambda: not one.leases.heard.is_set())
    await until(one.leases.heard.is_set)
    await one.hold()
    assert await other.change(books, 2) < LEASE_S / 2
    assert one.kept is None


async def test_who_has_signed_anew_is_not_struck(one: Process, other: Process, books: Books):
    await other.hold()
    assert await one.link.ask("balance", STRIKE, (holders_key(REF),), other.leases.process, 1)
    await one.change(books, 2)
    await until(lambda: other.kept is None)
