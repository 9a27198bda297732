"""What is cached of a wallet is never older than an answer, whoever is slow, aborts or dies, and at whichever step."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import redis
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.clock import now_us
from gateway.shared.balances import BLOCKS_MAX, Balances
from gateway.shared.link import Link
from gateway.shared.wallets import FLOOR_LIFE_S, VALUE_LIFE_S, SharedWallets, _keys
from gateway.telemetry import Metrics
from ledger.model import Block, Restriction, Wallet, WalletRef
from ledger.store.protocol import StoreUnavailable, WalletBlocks, WalletVersion
from tests.gateway.test_shared_link import until
from tests.servers.valkey import ValkeyServer

PATIENT_S = 5.0
REF = WalletRef("ten_a", "live", "customer:cus_a")


def block(number: int = 0, *, expires_at_us: int | None = None) -> Block:
    return Block(
        wallet=REF,
        id=f"blk_{number}",
        sequence=number,
        granted=100,
        created_at_us=1,
        effective_at_us=1,
        expires_at_us=expires_at_us,
        restriction=Restriction(apps=("app_a",)),
        pool=WalletRef("ten_a", "live", "pool:app_a"),
        metadata={"order": 7},
    )


def version(number: int, ref: WalletRef = REF, *, blocks: tuple[Block, ...] = ()) -> WalletBlocks:
    return WalletBlocks(Wallet(ref=ref, asset="CREDIT", version=number), blocks)


@dataclass
class Books:
    """A store of wallets, counting what is read of it."""

    value: WalletBlocks | None = field(default_factory=lambda: version(1))
    reads: int = 0
    version_reads: int = 0
    pause_s: float = 0.0

    async def wallet(self, ref: WalletRef) -> WalletBlocks | None:
        self.reads += 1
        found = self.value
        await asyncio.sleep(self.pause_s)
        return found

    async def wallet_version(self, ref: WalletRef) -> int | None:
        self.version_reads += 1
        return None if self.value is None else self.value.wallet.version


@pytest.fixture
async def link(redis_url: str) -> AsyncIterator[Link]:
    link = Link(redis_url, Metrics(), timeout_s=PATIENT_S, lease_s=0.05)
    await link.start()
    yield link
    await link.stop()


@pytest.fixture
def shared(link: Link) -> SharedWallets:
    return SharedWallets(link, now_us=now_us)


async def offer(shared: SharedWallets, value: WalletBlocks, at_ms: int) -> None:
    """Put, and wait until Redis has decided: the script may have to be sent again first, whole."""
    shared.put(value, at_ms)
    for _ in range(2):
        await shared.look(value.wallet.ref)


async def put(shared: SharedWallets, value: WalletBlocks) -> None:
    await offer(shared, value, (await shared.look(value.wallet.ref)).at_ms)


async def cached(shared: SharedWallets, ref: WalletRef = REF) -> int | None:
    """The version that would be served."""
    found = (await shared.look(ref)).found
    return None if found is None else found.wallet.version


# One wallet, step by step.


async def test_a_value_comes_back_as_it_was(shared: SharedWallets):
    value = version(3, blocks=(block(1), block(2, expires_at_us=now_us() + 3_600_000_000)))
    await put(shared, value)
    assert (await shared.look(REF)).found == value


async def test_a_raised_floor_hides_what_is_older(shared: SharedWallets, valkey_server: ValkeyServer):
    await put(shared, version(1))
    await shared.changing([WalletVersion(REF, 2)])
    assert await cached(shared) is None
    with valkey_server.client() as client:
        client.delete(_keys(REF)[1])
        await put(shared, version(1))
        assert not client.exists(_keys(REF)[1])
    await put(shared, version(2))
    await shared.changing([WalletVersion(REF, 2)])
    shared.changed([version(2)])
    assert await cached(shared) == 2


async def test_a_floor_is_never_lowered(shared: SharedWallets):
    await shared.changing([WalletVersion(REF, 5)])
    await shared.changing([WalletVersion(REF, 3)])
    await put(shared, version(4))
    assert await cached(shared) is None


async def test_a_newer_value_is_not_overwritten(shared: SharedWallets):
    early = await shared.look(REF)
    await put(shared, version(2))
    await offer(shared, version(1), early.at_ms)
    assert await cached(shared) == 2


async def test_what_nobody_looked_at_is_not_put(shared: SharedWallets):
    await shared.changing([WalletVersion(REF, 1)])
    shared.changed([version(1)])
    assert await cached(shared) is None


async def test_wallets_of_tenants_and_modes_are_kept_apart(shared: SharedWallets):
    await put(shared, version(1))
    for other in (REF._replace(tenant="ten_b"), REF._replace(mode="test"), REF._replace(wallet="customer:cus_b")):
        assert await cached(shared, other) is None


async def test_a_put_that_comes_too_late_is_refused(shared: SharedWallets):
    look = await shared.look(REF)
    await offer(shared, version(1), look.at_ms - round(VALUE_LIFE_S * 1000))
    assert await cached(shared) is None


async def test_a_clock_of_redis_that_is_set_back_makes_nothing_live_longer(shared: SharedWallets):
    look = await shared.look(REF)
    await offer(shared, version(1), look.at_ms + 60_000)
    assert await cached(shared) is None


async def test_a_value_goes_with_its_lease_or_its_next_block(
    shared: SharedWallets, redis_url: str, valkey_server: ValkeyServer
):
    for blocks, life_ms in (((), 1_000), ((block(1, expires_at_us=now_us() + 300_000), block(2)), 300)):
        with valkey_server.client() as client:
            client.flushall()
            await put(shared, version(1, blocks=blocks))
            assert await cached(shared) == 1
            assert 0 < client.pttl(_keys(REF)[1]) <= life_ms
    await until_gone(shared)


async def until_gone(shared: SharedWallets) -> None:
    deadline_s = time.monotonic() + 10
    while await cached(shared) is not None:
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.01)


async def test_a_wallet_with_an_expired_block_or_too_many_is_not_put(shared: SharedWallets):
    await put(shared, version(1, blocks=(block(1, expires_at_us=now_us() - 1),)))
    assert await cached(shared) is None
    await put(shared, version(1, blocks=tuple(block(number) for number in range(2_000))))
    assert await cached(shared) is None


async def test_a_value_that_cannot_be_read_is_none(shared: SharedWallets, valkey_server: ValkeyServer):
    await put(shared, version(1))
    with valkey_server.client() as client:
        client.hset(_keys(REF)[1], "value", b"\xc1 from another version")
    assert await cached(shared) is None


async def test_floors_outlive_batches_and_are_forgotten(shared: SharedWallets, valkey_server: ValkeyServer):
    await shared.changing([WalletVersion(REF, 1)])
    with valkey_server.client() as client:
        assert 50_000 < client.pttl(_keys(REF)[0]) <= FLOOR_LIFE_S * 1000


async def test_many_floors_are_one_packet(shared: SharedWallets, valkey_server: ValkeyServer):
    await shared.changing([WalletVersion(REF, 1)])
    refs = [REF._replace(wallet=f"customer:cus_{number}") for number in range(256)]
    with valkey_server.client() as client:
        before = client.info("stats")["total_reads_processed"]
        await shared.changing([WalletVersion(ref, 1) for ref in refs])
        assert client.info("stats")["total_reads_processed"] - before <= 4
        assert len(client.keys("farebox:{*}:floor")) == 257


async def test_without_redis_a_change_goes_on(server_gone: SharedWallets):
    await server_gone.changing([WalletVersion(REF, 2)])
    server_gone.changed([version(2)])


@pytest.fixture
async def server_gone() -> AsyncIterator[SharedWallets]:
    """Of a process that has lost Redis."""
    server = ValkeyServer().start()
    link = Link(server.url, Metrics(), timeout_s=PATIENT_S, lease_s=0.05)
    await link.start()
    server.kill()
    await until(lambda: not link.up)
    yield SharedWallets(link, now_us=now_us)
    await link.stop()
    server.close()


# All orders of all steps.

STEPS = st.sampled_from(
    [
        *(f"{who} {what}" for who in "AB" for what in ("changing", "commit", "abort", "changed", "dies")),
        *(f"{who} {what}" for who in "RS" for what in ("look", "put")),
        "value expires",
        "a minute passes",
    ]
)


class World:
    """A store with one wallet, two writers and two readers that may stop between any two steps, and their Redis."""

    def __init__(self, link: Link, client: redis.Redis) -> None:
        self._link = link
        self._client = client
        self.stored = 1
        self.answered = 1
        self.writers = {who: SharedWallets(link, now_us=now_us) for who in "AB"}
        self.wants: dict[str, int] = {}
        self.committed: dict[str, int] = {}
        self.readers = {who: SharedWallets(link, now_us=now_us) for who in "RS"}
        self.read: dict[str, tuple[int, int]] = {}

    async def step(self, who: str, what: str) -> None:
        if what in ("look", "put"):
            await self._reader(who, what)
        elif who in self.writers:
            await self._writer(who, what)
        else:
            floor, value = _keys(REF)
            self._client.delete(value)
            if what == "minute passes":
                # No batch takes so long; what was read or committed before it is that much older.
                self._client.delete(floor)
                self.wants.clear()
                self.read = {reader: (number, at_ms - 61_000) for reader, (number, at_ms) in self.read.items()}
                for writer in self.writers.values():
                    writer._raised_at_ms = {ref: at_ms - 61_000 for ref, at_ms in writer._raised_at_ms.items()}

    async def _writer(self, who: str, what: str) -> None:
        shared = self.writers[who]
        if what == "changing":
            self.wants[who] = self.stored + 1
            await shared.changing([WalletVersion(REF, self.wants[who])])
        elif what == "commit" and self.wants.pop(who, None) == self.stored + 1:
            self.stored += 1
            self.committed[who] = self.answered = self.stored
        elif what == "abort":
            self.wants.pop(who, None)
        elif what == "changed" and who in self.committed:
            shared.changed([version(self.committed.pop(who))])
        elif what == "dies":
            self.wants.pop(who, None)
            self.committed.pop(who, None)
            self.writers[who] = SharedWallets(self._link, now_us=now_us)

    async def _reader(self, who: str, what: str) -> None:
        shared = self.readers[who]
        if what == "look":
            look = await shared.look(REF)
            if look.found is None:
                self.read[who] = (self.stored, look.at_ms)
        elif who in self.read:
            number, at_ms = self.read.pop(who)
            await offer(shared, version(number), at_ms)

    async def check(self) -> None:
        """Whoever looks now must see what was answered before; and nothing that was not committed."""
        found = await cached(self.readers["R"])
        assert found is None or self.answered <= found <= self.stored


@pytest.mark.asyncio
@settings(max_examples=300)
@given(st.lists(STEPS, max_size=40))
@example(["R look", "A changing", "A commit", "R put"])  # A slow reader.
@example(["A changing", "R look", "A commit", "A dies", "R put"])  # A writer that dies before it tells.
@example(["A changing", "A abort", "R look", "R put", "B changing", "B commit"])
@example(["R look", "R put", "A changing", "A commit", "B changing", "B commit", "B changed", "A changed"])
@example(["R look", "A changing", "A commit", "a minute passes", "R put"])  # A reader that was stopped for a minute.
@example(["R look", "R put", "A changing", "A commit", "a minute passes", "B changing", "B commit", "A changed"])
async def test_in_no_order_of_steps_is_an_old_value_served(valkey_server: ValkeyServer, steps: list[str]):
    link = Link(valkey_server.url, Metrics(), timeout_s=PATIENT_S)
    await link.start()
    with valkey_server.client() as client:
        client.flushall()
        world = World(link, client)
        for step in steps:
            await world.step(*step.split(" ", 1))
            await world.check()
    await link.stop()


async def test_many_processes_at_once_never_see_an_old_value(redis_url: str, campaign):
    """Each writer holds the wallet's lock, as in PostgreSQL; readers come whenever they like."""
    rng = campaign.random()
    books = Books()
    answered = 0
    lock = asyncio.Lock()
    links = [Link(redis_url, Metrics(), timeout_s=PATIENT_S) for _ in range(3)]
    for link in links:
        await link.start()
    processes = [SharedWallets(link, now_us=now_us) for link in links]
    readers = [Balances(books, Metrics(), shared=shared) for shared in processes]
    ends_s = time.monotonic() + campaign.rounds(short=1, long=20)
    looks = 0

    async def write(shared: SharedWallets, rng: random.Random) -> None:
        nonlocal answered
        while time.monotonic() < ends_s:
            async with lock:
                assert books.value is not None
                coming = books.value.wallet.version + 1
                await shared.changing([WalletVersion(REF, coming)])
                await asyncio.sleep(rng.choice([0, 0, 0.001, 0.005]))
                if rng.random() < 0.2:
                    continue
                books.value = version(coming)
                if rng.random() < 0.8:
                    shared.changed([books.value])
                answered = coming
            await asyncio.sleep(rng.choice([0, 0.001, 0.01]))

    async def read(balances: Balances, rng: random.Random) -> None:
        nonlocal looks
        while time.monotonic() < ends_s:
            known = answered
            found = await balances.wallet(REF)
            assert found is not None
            assert found.wallet.version >= known
            looks += 1
            books.pause_s = rng.choice([0, 0.001, 0.003])
            await asyncio.sleep(rng.choice([0, 0, 0.001]))

    work = [write(shared, random.Random(rng.random())) for shared in processes]
    work += [read(balances, random.Random(rng.random())) for balances in readers * 4]
    await asyncio.gather(*work)
    assert answered > 20
    assert looks > books.reads
    for link in links:
        await link.stop()


# The reader.


async def test_without_redis_what_is_kept_is_checked_by_its_version():
    books, metrics = Books(), Metrics()
    balances = Balances(books, metrics)
    for _ in range(3):
        assert await balances.wallet(REF) == version(1)
    assert (books.reads, books.version_reads) == (1, 3)
    books.value = version(2)
    assert await balances.wallet(REF) == version(2)
    assert b'farebox_cache_looks_total{cache="balance",result="hit"} 2.0' in metrics.exposition()
    assert b'farebox_cache_looks_total{cache="balance",result="miss"} 2.0' in metrics.exposition()


async def test_a_wallet_that_is_not_there_may_come():
    books = Books(value=None)
    balances = Balances(books, Metrics())
    assert await balances.wallet(REF) is None
    books.value = version(1)
    assert await balances.wallet(REF) == version(1)


async def test_a_wallet_of_many_blocks_is_not_kept():
    books = Books(version(1, blocks=tuple(block(number) for number in range(BLOCKS_MAX + 1))))
    balances = Balances(books, Metrics())
    for _ in range(2):
        await balances.wallet(REF)
    assert books.reads == 2


async def test_looks_at_once_are_one_read():
    books = Books()
    balances = Balances(books, Metrics())
    found = await asyncio.gather(*(balances.wallet(REF) for _ in range(100)))
    assert found == [version(1)] * 100
    assert (books.reads, books.version_reads) == (1, 1)


async def test_who_comes_during_a_read_shares_the_next_one():
    """The one under way may have begun before what the newcomers have seen."""
    books = Books(pause_s=0.02)
    balances = Balances(books, Metrics())
    first = asyncio.create_task(balances.wallet(REF))
    await until(lambda: books.reads == 1)
    books.value = version(2)
    found = await asyncio.gather(*(balances.wallet(REF) for _ in range(100)))
    assert await first == version(1)
    assert found == [version(2)] * 100
    assert books.reads == 2


async def test_a_look_that_is_given_up_stops_no_other():
    books = Books(pause_s=0.01)
    balances = Balances(books, Metrics())
    impatient = asyncio.create_task(balances.wallet(REF))
    patient = asyncio.create_task(balances.wallet(REF))
    await asyncio.sleep(0)
    impatient.cancel()
    assert await patient == version(1)


async def test_a_failure_is_everybodys_and_is_not_kept():
    books = Books()
    balances = Balances(books, Metrics())

    async def fail(ref: WalletRef) -> WalletBlocks | None:
        raise StoreUnavailable("away")

    whole, books.wallet = books.wallet, fail  # type: ignore[method-assign]
    for found in await asyncio.gather(*(balances.wallet(REF) for _ in range(3)), return_exceptions=True):
        assert isinstance(found, StoreUnavailable)
    books.wallet = whole  # type: ignore[method-assign]
    assert await balances.wallet(REF) == version(1)


async def test_with_redis_one_process_reads_for_all(link: Link):
    books = Books()
    one, other = (Balances(books, Metrics(), shared=SharedWallets(link, now_us=now_us)) for _ in range(2))
    assert await one.wallet(REF) == version(1)
    assert await other.wallet(REF) == version(1)
    assert (books.reads, books.version_reads) == (1, 0)


async def test_a_process_that_lost_redis_asks_the_store(server_gone: SharedWallets):
    books = Books()
    balances = Balances(books, Metrics(), shared=server_gone)
    for number in (1, 1, 2):
        books.value = version(number)
        assert await balances.wallet(REF) == version(number)
    assert (books.reads, books.version_reads) == (2, 3)
