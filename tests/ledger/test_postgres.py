"""What is PostgreSQL's own: round trips, locks, what is kept while others write, the clock, and servers that fail."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import asyncpg
import msgspec
import psycopg
import pytest

from gateway.migrations import migrate
from ledger.commands import ReserveLeg
from ledger.ledger import Ledger
from ledger.model import Funding, ReservationState, Scope, WalletRef
from ledger.outcomes import Applied, Outcome, Reason, Rejected
from ledger.store import postgres, postgres_batch, postgres_connection
from ledger.store.postgres import PostgresStore
from ledger.store.protocol import SchemaMissing, StoreUnavailable, WalletBlocks, WalletVersion
from ledger.store.row_security import GATEWAY_ROLE
from ledger.store.tables import TABLES
from ledger.verify import verify
from ledger.writer import BatchRun
from tests.conftest import Campaign
from tests.ledger.conftest import NewDatabase
from tests.ledger.rig import (
    SECOND_US,
    Clock,
    PostgresDatabase,
    RandomCommands,
    Say,
    key,
    partition,
    reservation,
    wallet,
)
from tests.servers.ports import free_port
from tests.servers.postgres import PostgresServer, database_of

Open = Callable[..., Awaitable[PostgresStore]]

DEADLINE_S = 10.0


@pytest.fixture
async def open_store(postgres_database: PostgresDatabase, clock: Clock) -> AsyncIterator[Open]:
    """Opens as many stores on one database as a test has processes; at the end everything must be right."""
    opened: list[PostgresStore] = []

    async def open_one(**options: Any) -> PostgresStore:
        opened.append(await PostgresStore.open(postgres_database.url, **{"clock": clock, **options}))
        return opened[-1]

    yield open_one
    assert (await verify(opened[0], operator="ten_op")).violations == ()
    for store in opened:
        await store.close()


@pytest.fixture
def outside(postgres_database: PostgresDatabase) -> Iterator["psycopg.Connection[Any]"]:
    with psycopg.connect(postgres_database.url, autocommit=True) as connection:
        yield connection


async def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


def until_shown(connection: "psycopg.Connection[Any]", standbys: str) -> None:
    """A session reads a reloaded setting between two statements."""
    deadline = time.monotonic() + DEADLINE_S
    while connection.execute("SHOW synchronous_standby_names").fetchone() != (standbys,):
        assert time.monotonic() < deadline, "the setting was not reloaded in time"


def waits(outside: "psycopg.Connection[Any]") -> bool:
    """Whether somebody waits for a lock."""
    (count,) = outside.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    ).fetchone() or (0,)
    return bool(count)


def result_of(outcome: Outcome) -> Any:
    assert isinstance(outcome, Applied), outcome
    return outcome.result


class Recorder:
    """A watcher that can hold a batch up between its decision and its commit."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, int]]] = []
        self.blocks: dict[str, tuple[str, ...]] = {}
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def changing(self, versions: Sequence[WalletVersion]) -> None:
        self.told.append(("changing", {each.wallet.wallet: each.version for each in versions}))
        self.reached.set()
        await self.go_on.wait()

    def changed(self, wallets: Sequence[WalletBlocks]) -> None:
        self.told.append(("changed", {each.wallet.ref.wallet: each.wallet.version for each in wallets}))
        self.blocks |= {each.wallet.ref.wallet: tuple(block.id for block in each.blocks) for each in wallets}


class Counted:
    """A connection that writes down what it is asked."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.asked: list[str] = []
        self.after: Callable[[str], None] = lambda query: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def execute(self, query: str, *values: Any) -> Any:
        self.asked.append(query.partition("(")[0].partition(";")[0])
        answer = await self._connection.execute(query, *values)
        self.after(query)
        return answer

    async def fetchval(self, query: str, *values: Any) -> Any:
        self.asked.append(query.partition("(")[0])
        answer = await self._connection.fetchval(query, *values)
        self.after(query)
        return answer


def counted(store: PostgresStore) -> Counted:
    """The store's idle connection for batches, watched. Another one is made only for batches that run together."""
    (idle,) = store._writers._idle
    connection = Counted(idle)
    store._writers._idle[:] = [connection]  # type: ignore[list-item]
    return connection


SHORT = ["SELECT farebox_apply_v2"]
LONG = ["BEGIN", "SELECT farebox_load_v1", "SELECT farebox_write_v2", "COMMIT"]


# Round trips.


async def test_a_batch_on_what_is_kept_is_one_round_trip(open_store: Open, say: Say) -> None:
    store = await open_store()
    connection = counted(store)
    await store.run_batch([say.grant("a", "1", 100)])
    assert connection.asked == LONG
    for commands in (
        [say.reserve("a", "1", 10), say.reserve("a", "2", 20, key=key("k"))],
        [say.commit("1", 5), say.extend("2", 5), say.reserve("a", "3", 1)],
        [say.grant("a", "2", 50), say.release("2"), say.debit("a", "4", 7)],
    ):
        connection.asked.clear()
        outcomes = await store.run_batch(commands)
        assert all(isinstance(outcome, Applied) for outcome in outcomes)
        assert connection.asked == SHORT


async def test_refusals_and_repetitions_are_checked_too(open_store: Open, say: Say) -> None:
    """What another process did shows also to a command that comes to nothing."""
    one, other = await open_store(), await open_store()
    await one.run_batch([say.grant("a", "1", 10)])
    await other.run_batch([say.grant("a", "2", 90, key=key("k"))])
    (held,) = await one.run_batch([say.reserve("a", "1", 100)])
    assert isinstance(held, Applied), "the second grant counts"
    (again,) = await one.run_batch([say.grant("a", "3", 90, key=key("k"))])
    assert again.replayed  # type: ignore[union-attr]
    reserve = say.reserve("a", "2", 1)
    (refused,) = await one.run_batch([reserve])
    await other.run_batch([say.release("1")])
    (held,) = await one.run_batch([reserve])
    assert (refused.reason, type(held)) == (Reason.INSUFFICIENT_CREDITS, Applied)  # type: ignore[union-attr]


async def test_a_wallet_that_others_move_is_locked_first_for_a_while(
    open_store: Open, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = await open_store(), await open_store()
    connection = counted(one)
    await one.run_batch([say.grant("a", "1", 100), say.grant("b", "2", 100)])
    await other.run_batch([say.reserve("a", "1", 1)])
    connection.asked.clear()
    await one.run_batch([say.reserve("a", "2", 1)])
    assert connection.asked == SHORT + LONG, "once only, and then behind the locks"
    connection.asked.clear()
    await one.run_batch([say.reserve("a", "3", 1)])
    await one.run_batch([say.reserve("b", "4", 1)])
    assert connection.asked == LONG + SHORT
    monkeypatch.setattr(one._batches, "_contended", {wallet("a"): time.monotonic()})
    connection.asked.clear()
    await one.run_batch([say.reserve("a", "5", 1)])
    assert connection.asked == SHORT


# Batches under way together.


async def test_a_batch_is_decided_on_one_that_is_not_committed_yet_and_comes_after_it(
    open_store: Open, say: Say
) -> None:
    watching = Recorder()
    store = await open_store(watcher=watching)
    await store.run_batch([say.grant("a", "1", 100), say.grant("b", "2", 100)])
    connection = counted(store)
    watching.reached.clear()
    watching.go_on.clear()
    first = asyncio.create_task(store.run_batch([say.reserve("a", "1", 60)]))
    await watching.reached.wait()
    second = asyncio.create_task(
        store.run_batch([say.reserve("a", "2", 60), say.commit("1", 20), say.debit("a", "3", 1)])
    )
    beside = asyncio.create_task(store.run_batch([say.reserve("b", "4", 1)]))
    await until(lambda: len(watching.told) == 4)
    assert [told for told in watching.told[2:] if told[0] == "changing"] == [
        ("changing", {"customer:a": 2}),
        ("changing", {"customer:b": 2}),
    ], "the second waits"
    watching.go_on.set()
    refused, settled, debited = await second
    assert set(connection.asked) == set(SHORT)
    assert refused == Rejected(Reason.INSUFFICIENT_CREDITS, needed=60, available=40)
    assert (result_of(settled).balance, result_of(debited).balance) == (80, 79)
    assert len(await first) == len(await beside) == 1


async def test_what_was_decided_on_a_batch_that_came_to_nothing_is_decided_anew(open_store: Open, say: Say) -> None:
    """Another process takes the credits that the first batch counted on, and brings the wallet to the very version that
    the second one expects."""
    watching = Recorder()
    one, other = await open_store(watcher=watching), await open_store()
    await one.run_batch([say.grant("a", "1", 100), say.grant("b", "2", 100)])
    watching.reached.clear()
    watching.go_on.clear()
    first = asyncio.create_task(one.run_batch([say.debit("a", "1", 30)]))
    await watching.reached.wait()
    second = asyncio.create_task(one.run_batch([say.debit("a", "2", 50), say.debit("b", "2b", 1)]))
    await asyncio.sleep(0)
    await other.run_batch([say.debit("a", "3", 80)])
    watching.go_on.set()
    outcomes, (second_refused, beside) = await first, await second
    assert outcomes == [Rejected(Reason.INSUFFICIENT_CREDITS, needed=30, available=20)]
    assert second_refused == Rejected(Reason.INSUFFICIENT_CREDITS, needed=50, available=20)
    assert result_of(beside).balance == 99


async def test_what_was_decided_on_a_batch_that_failed_is_decided_anew(open_store: Open, say: Say) -> None:
    store = await open_store()
    await store.run_batch([say.grant("a", "1", 100)])
    failed, applied = await asyncio.gather(
        store.run_batch([say.debit("a", "1\x00", 60)]),
        store.run_batch([say.debit("a", "2", 60)]),
        return_exceptions=True,
    )
    assert isinstance(failed, asyncpg.DataError)
    assert result_of(applied[0]).balance == 40  # type: ignore[index]


# What is kept while others write.


async def test_a_heartbeat_of_another_process_is_seen(open_store: Open, say: Say, clock: Clock) -> None:
    """It changes the reservation and no wallet: its version alone would not tell."""
    one, other = await open_store(), await open_store()
    await one.run_batch([say.grant("a", "1", 100), say.reserve("a", "1", 10, ttl_us=10 * SECOND_US)])
    await one.run_batch([say.extend("1", 0, ttl_us=11 * SECOND_US)])
    await other.run_batch([say.extend("1", 0, ttl_us=3600 * SECOND_US)])
    clock.us += 60 * SECOND_US
    await one.run_batch([say.lapse("1")])
    found = await one.reservation(reservation("1"))
    assert found is not None
    assert found.state is ReservationState.OPEN


async def test_what_another_process_settled_stays_settled(open_store: Open, say: Say) -> None:
    one, other = await open_store(), await open_store()
    await one.run_batch([say.grant("a", "1", 100), say.reserve("a", "1", 10)])
    await other.run_batch([say.commit("1", 10)])
    (late,) = await one.run_batch([say.commit("1", 9)])
    assert isinstance(late, Rejected)
    assert late.reason is Reason.RESERVATION_SETTLED


async def test_a_wallet_that_was_not_there_is_seen_when_another_process_makes_it(open_store: Open, say: Say) -> None:
    one, other = await open_store(), await open_store()
    reserve = say.reserve("a,b", "1", 10)
    await one.run_batch([say.grant("a", "1", 5), reserve])
    (refused,) = await one.run_batch([reserve])
    await other.run_batch([say.grant("b", "2", 5)])
    (held,) = await one.run_batch([reserve])
    assert (type(refused), type(held)) == (Rejected, Applied)


async def test_two_processes_that_make_the_same_thing_at_once_make_one(open_store: Open, say: Say) -> None:
    watching = Recorder()
    one, other = await open_store(watcher=watching), await open_store()
    watching.go_on.clear()
    grant = say.grant("a", "1", 100, key=key("k"))
    first = asyncio.create_task(one.run_batch([grant, say.reserve("a", "1", 60)]))
    await watching.reached.wait()
    second = await other.run_batch([grant, say.reserve("a", "1", 60), say.reserve("a", "2", 60)])
    watching.go_on.set()
    granted, held = await first
    assert [type(outcome) for outcome in second] == [Applied, Applied, Rejected]
    assert (granted.replayed, held.replayed) == (True, True)  # type: ignore[union-attr]


async def test_a_key_that_one_process_frees_may_be_taken_by_another(open_store: Open, say: Say) -> None:
    """On wallets that have nothing in common: the journal's numbers still tell which was first."""
    one, other = await open_store(), await open_store()
    await one.run_batch([say.grant("a", "1", 100)])
    await other.run_batch([say.grant("b", "2", 100)])
    for number in range(10):
        first, second = (one, other) if number % 2 else (other, one)
        mine, theirs = ("a", "b") if number % 2 else ("b", "a")
        await first.run_batch([say.reserve(mine, f"m{number}", 1, key=key("k"))])
        released, taken = await asyncio.gather(
            first.run_batch([say.release(f"m{number}")]),
            second.run_batch([say.reserve(theirs, f"t{number}", 1, key=key("k"))]),
        )
        assert result_of(released[0]).state is ReservationState.RELEASED
        name = result_of(taken[0]).reservation
        await (first if name == f"rsv_m{number}" else second).run_batch([say.release(name.removeprefix("rsv_"))])


@pytest.mark.campaign
async def test_processes_that_do_the_same_at_once_leave_one_true_ledger(
    new_postgres: NewDatabase, clock: Clock, campaign: Campaign
) -> None:
    """Random commands on the same few wallets, keys and reservations, by three processes with two batches at once."""
    for _ in range(campaign.rounds(short=2, long=40)):
        seed = campaign.random()
        database = new_postgres()
        stores = [await database.open(clock) for _ in range(3)]
        source = RandomCommands(seed)
        for _ in range(15):
            clock.us += seed.randint(0, 5) * SECOND_US
            batches = partition(source.take(90, clock.us), seed, 40)
            queues = [batches[number::6] for number in range(6)]

            async def work(store: Any, queue: list[list[Any]], hear: Callable[[list[Outcome]], None]) -> None:
                for batch in queue:
                    hear(await store.run_batch(batch))

            await asyncio.gather(
                *(work(store, queue, source.hear) for store, queue in zip(stores * 2, queues, strict=True))
            )
        verified = await verify(stores[0])
        assert verified.violations == ()
        assert verified.entries > 300
        for store in stores:
            await store.close()


# Locks.


@pytest.mark.parametrize("way", ["short", "long"])
async def test_wallets_are_locked_in_the_order_of_their_names(
    open_store: Open, say: Say, outside: "psycopg.Connection[Any]", way: str
) -> None:
    """While a batch waits for one, it holds all that come before it, and none that come after: nobody can wait in a
    circle."""
    store = await open_store()
    names = ("a", "b", "c", "d")
    await store.run_batch([say.grant(name, name, 100) for name in names])
    if way == "long":
        store._batches._contended = {wallet(name): time.monotonic() + 60 for name in names}
    outside.execute("BEGIN")
    outside.execute("SELECT FROM ledger_wallet WHERE wallet = 'customer:c' FOR UPDATE")
    batch = asyncio.create_task(
        store.run_batch([say.reserve(name, f"{name}1", 1) for name in ("d", "c", "a")] + [say.reserve("b,a", "b1", 1)])
    )
    await until(lambda: waits(outside))
    free = outside.execute("SELECT wallet FROM ledger_wallet ORDER BY wallet FOR UPDATE SKIP LOCKED").fetchall()
    outside.execute("ROLLBACK")
    assert free == [("customer:c",), ("customer:d",)], "c is ours"
    assert all(isinstance(outcome, Applied) for outcome in await batch)


async def test_processes_that_lock_the_same_wallets_do_not_wait_in_a_circle(
    open_store: Open, say: Say, outside: "psycopg.Connection[Any]"
) -> None:
    stores = [await open_store() for _ in range(3)]
    names = [f"{number:02d}" for number in range(20)]
    await stores[0].run_batch([say.grant(name, name, 1000) for name in names])
    for number in range(15):
        await asyncio.gather(
            *(
                store.run_batch([say.debit(name, f"{turn}_{number}_{name}", 1) for name in ordered])
                for turn, (store, ordered) in enumerate(
                    zip(stores, (names, names[::-1], names[7:] + names[:7]), strict=True)
                )
            )
        )
    (deadlocks,) = outside.execute(
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    ).fetchone() or (1,)
    assert deadlocks == 0
    found = await stores[0].wallet(wallet("07"))
    assert found is not None
    assert found.blocks[0].remaining == 1000 - 3 * 15


async def test_a_pool_that_comes_to_light_behind_the_lock_is_locked_with_the_others(
    open_store: Open, say: Say, outside: "psycopg.Connection[Any]"
) -> None:
    """Another process gives the wallet a block out of a pool while the batch waits for the wallet."""
    watching = Recorder()
    one, other = await open_store(), await open_store(watcher=watching)
    await one.run_batch([say.grant("pool", "p", 100), say.grant("a", "1", 10)])
    watching.go_on.clear()
    giving = asyncio.create_task(
        other.run_batch([say.grant("a", "2", 50, source_wallet="pool", funding=Funding.DEVELOPER_GRANT, priority=9)])
    )
    await watching.reached.wait()
    one._batches._contended = {wallet("a"): time.monotonic() + 60}
    connection = counted(one)
    spending = asyncio.create_task(one.run_batch([say.reserve("a", "1", 40), say.commit("1", 30, 10)]))
    await until(lambda: waits(outside))
    watching.go_on.set()
    await giving
    assert [type(outcome) for outcome in await spending] == [Applied, Applied]
    assert connection.asked == ["BEGIN", "SELECT farebox_load_v1", "ROLLBACK", *LONG]
    pool = await one.wallet(wallet("pool"))
    assert pool is not None
    assert [(block.id, block.remaining) for block in pool.blocks] == [("blk_p", 50), ("blk_returns_paid", 10)]


async def test_a_wallet_of_another_tenant_pays_whoever_settles(open_store: Open, say: Say) -> None:
    """The operator's wallets do. A process that has not made the reservation learns of them only from it."""
    one, other = await open_store(), await open_store()
    operators = Say(Scope("ten_op", "live"), say._ids)
    universal = WalletRef("ten_op", "live", "customer:u")
    await one.run_batch([operators.grant("u", "1", 100), say.grant("a", "1", 10)])
    payers = ReserveLeg((wallet("a"), universal), amount=30, minimum=30)
    await one.run_batch([msgspec.structs.replace(say.reserve("a", "1", 30), legs=(payers,))])
    (settled,) = await other.run_batch([say.commit("1", 30)])
    assert [payment.wallet for payment in result_of(settled).payments] == [wallet("a"), universal]
    found = await one.wallet(universal)
    assert found is not None
    assert found.blocks[0].remaining == 80


async def test_a_lock_that_is_not_let_go_makes_the_store_unavailable(
    open_store: Open, say: Say, outside: "psycopg.Connection[Any]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_batch, "LOCK_WAIT_MS", 50)
    store = await open_store()
    await store.run_batch([say.grant("a", "1", 100), say.grant("b", "1", 100)])
    outside.execute("BEGIN")
    outside.execute("SELECT FROM ledger_wallet WHERE wallet = 'customer:a' FOR UPDATE")
    with pytest.raises(StoreUnavailable, match="LockNotAvailable"):
        await store.run_batch([say.reserve("a", "1", 1)])
    await store.run_batch([say.reserve("b", "2", 1)])
    outside.execute("ROLLBACK")
    await store.run_batch([say.reserve("a", "3", 1)])


# Whom it tells.


async def test_a_watcher_hears_of_wallets_before_the_commit_and_after_it(open_store: Open, say: Say) -> None:
    watching = Recorder()
    store = await open_store(watcher=watching)
    await store.run_batch([say.grant("a", "1", 100), say.grant("b", "2", 100)])
    await store.run_batch([say.debit("a", "1", 100)])
    await store.run_batch([say.reserve("a", "2", 1)])
    a, b = "customer:a", "customer:b"
    assert watching.told == [
        ("changing", {a: 1, b: 1}),
        ("changed", {a: 1, b: 1}),
        ("changing", {a: 2}),
        ("changed", {a: 2}),
    ]
    assert watching.blocks == {a: (), b: ("blk_2",)}


# Time.


async def test_the_time_of_a_batch_is_the_databases(
    open_store: Open, say: Say, outside: "psycopg.Connection[Any]", monkeypatch: pytest.MonkeyPatch
) -> None:
    def database_us() -> int:
        (now_us,) = outside.execute("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint").fetchone() or (
            0,
        )
        return int(now_us)

    store = await open_store(clock=None)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    connection = counted(store)
    for number in range(5):
        before_us = database_us()
        await store.run_batch([say.grant("a", f"{number}", 1)])
        found = await store.wallet(wallet("a"))
        assert found is not None
        # The short way reckons from the last answer, and is behind by less than that took.
        assert before_us - SECOND_US / 2 < found.wallet.last_fact_us <= database_us()
    assert connection.asked == LONG + SHORT * 4


async def test_a_clock_that_was_reckoned_wrong_is_read_again(open_store: Open, say: Say) -> None:
    store = await open_store(clock=None)
    await store.run_batch([say.grant("a", "1", 1)])
    store._batches._kept.clock_us += 3600 * SECOND_US
    connection = counted(store)
    await store.run_batch([say.grant("a", "2", 1)])
    assert connection.asked == SHORT + LONG
    found = await store.wallet(wallet("a"))
    assert found is not None
    assert found.wallet.last_fact_us < time.time_ns() // 1000 + 60 * SECOND_US


# What goes wrong.


async def test_a_poisoned_command_fails_alone(open_store: Open, clock: Clock, say: Say) -> None:
    """A text with a zero character cannot be stored: the server says so of the whole batch."""
    ledger = await Ledger.open(await open_store(), clock=clock, new_command_id=say.id)
    await ledger.execute(say.grant("a", "1", 100))
    commands = [say.reserve("a", f"{number}", 1) for number in range(9)]
    commands.insert(4, say.reserve("a", "poisoned", 1, developer="zero \x00 character"))
    commands.insert(7, say.reserve("a", "poisoned\x00", 1))
    outcomes = await asyncio.gather(*(ledger.execute(command) for command in commands), return_exceptions=True)
    failed = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)]
    assert failed == [7], "in a text that holds JSON it is written as an escape"
    assert isinstance(outcomes[7], asyncpg.DataError)


async def test_a_name_that_is_too_long_for_an_index_is_the_commands_fault(
    open_store: Open, clock: Clock, say: Say, campaign: Campaign
) -> None:
    """The store is not away for it: nobody else is made to wait."""
    attempts: list[BatchRun] = []
    ledger = await Ledger.open(await open_store(), clock=clock, new_command_id=say.id, observed=attempts.append)
    await ledger.execute(say.grant("a", "1", 100))
    attempts.clear()
    name = campaign.random().randbytes(4000).hex()
    with pytest.raises(asyncpg.ProgramLimitExceededError):
        await ledger.execute(say.grant(name, "1", 100))
    assert len(attempts) == 1


async def test_a_value_at_fault_leaves_the_connection_whole(open_store: Open, say: Say) -> None:
    store = await open_store()
    connection = counted(store)
    for _ in range(2):
        with pytest.raises(asyncpg.DataError):
            await store.run_batch([say.grant("a", "1\x00", 100)])
    await store.run_batch([say.grant("a", "1", 100)])
    with pytest.raises(asyncpg.DataError):
        await store.run_batch([say.grant("a", "2\x00", 100)])
    connection.asked.clear()
    await store.run_batch([say.reserve("a", "1", 1)])
    assert connection.asked == LONG, "nothing is left of what the batch would have changed"
    with pytest.raises(ValueError, match="no name"):
        await store.run_batch([Say(Scope("ten_a,ten_b", "live")).grant("a", "1", 1)])


async def test_connections_that_are_cut_come_back_by_themselves(
    open_store: Open, clock: Clock, say: Say, outside: "psycopg.Connection[Any]"
) -> None:
    store = await open_store()
    ledger = await Ledger.open(store, clock=clock, new_command_id=say.id)
    await ledger.execute(say.grant("a", "1", 100))
    assert await store.wallet(wallet("a")) is not None
    cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'farebox'"
    for number in range(3):
        outside.execute(cut)
        await ledger.execute(say.reserve("a", f"{number}", 1))
    outside.execute(cut)
    reading = store._readers._idle[0]
    await until(reading.is_closed)
    assert await store.wallet_version(wallet("a")) == 4


@pytest.mark.parametrize("lost", ["SELECT farebox_apply_v2", "SELECT farebox_write_v2", "COMMIT"])
async def test_an_answer_that_is_lost_is_no_second_effect(open_store: Open, clock: Clock, say: Say, lost: str) -> None:
    """The connection is cut when the server has done its part: the same commands come again."""
    store = await open_store()
    ledger = await Ledger.open(store, clock=clock, new_command_id=say.id)
    await ledger.execute(say.grant("a", "1", 100))
    if lost != "SELECT farebox_apply_v2":
        store._batches._contended = {wallet("a"): time.monotonic() + 60}
    connection = counted(store)

    def cut(query: str) -> None:
        if query.startswith(lost):
            connection._connection.terminate()
            raise asyncpg.ConnectionDoesNotExistError("cut after the server was done")

    connection.after = cut
    outcomes = await asyncio.gather(*(ledger.execute(say.debit("a", f"{number}", 10)) for number in range(3)))
    assert connection.is_closed()
    assert [result_of(outcome).balance for outcome in outcomes] == [90, 80, 70]


async def test_a_repetition_is_committed_before_it_is_told(open_store: Open, say: Say) -> None:
    store = await open_store()
    debit, keyed = say.debit("a", "1", 10), say.grant("a", "2", 10, key=key("k"))
    await store.run_batch([say.grant("a", "1", 100), debit, keyed])
    connection = counted(store)
    for again, short in ((debit, SHORT), (msgspec.structs.replace(keyed, id=say.id()), SHORT)):
        connection.asked.clear()
        (outcome,) = await store.run_batch([again])
        assert outcome.replayed  # type: ignore[union-attr]
        assert connection.asked == [*short, "BEGIN", "SELECT farebox_load_v1", "COMMIT"]


async def test_a_batch_whose_caller_has_gone_is_committed_all_the_same(open_store: Open, say: Say) -> None:
    watching = Recorder()
    store = await open_store(watcher=watching)
    watching.go_on.clear()
    task = asyncio.create_task(store.run_batch([say.grant("a", "1", 100)]))
    await watching.reached.wait()
    task.cancel()
    await asyncio.wait((task,))
    watching.go_on.set()
    await store.run_batch([say.expire("a")])
    assert await store.wallet(wallet("a")) is not None


async def test_what_is_kept_has_a_bound(open_store: Open, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_batch, "WALLETS_KEPT_MAX", 5)
    store = await open_store()
    for number in range(12):
        await store.run_batch([say.grant(f"w{number}", "1", 10), say.reserve(f"w{number}", f"{number}", 1)])
        assert len(store._batches._kept.state.wallets) <= 5
    outcomes = await store.run_batch([say.commit(f"{number}", 1) for number in range(12)])
    assert all(isinstance(outcome, Applied) for outcome in outcomes)


@pytest.fixture
def own_server(clock: Clock) -> Iterator[PostgresServer]:
    server = PostgresServer(settings={"fsync": "off"}).create().start()
    yield server
    server.close()


async def test_a_server_that_hangs_or_dies_is_unavailable_in_time_and_missed_no_longer_than_it_is_away(
    own_server: PostgresServer, clock: Clock, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.to_thread(migrate, own_server.url)
    for module, name in (
        (postgres_batch, "BATCH_S"),
        (postgres, "READ_S"),
        (postgres_connection, "CONNECT_S"),
        (postgres_connection, "CONNECT_ALL_S"),
    ):
        monkeypatch.setattr(module, name, 0.3)
    store = await PostgresStore.open(own_server.url, clock=clock)
    await store.run_batch([say.grant("a", "1", 100)])
    await store.wallet(wallet("a"))
    own_server.pause()
    try:
        for _ in range(2):
            for away in (lambda: store.run_batch([say.reserve("a", "1", 1)]), lambda: store.wallet(wallet("a"))):
                begun = time.monotonic()
                with pytest.raises(StoreUnavailable):
                    await away()  # type: ignore[no-untyped-call]
                assert time.monotonic() - begun < 2
    finally:
        own_server.resume()
    monkeypatch.undo()
    await store.run_batch([say.reserve("a", "2", 1)])
    own_server.kill()
    with pytest.raises(StoreUnavailable):
        await store.run_batch([say.reserve("a", "3", 1)])
    with pytest.raises(StoreUnavailable):
        await store.wallet(wallet("a"))
    await asyncio.to_thread(own_server.start)
    await store.run_batch([say.reserve("a", "4", 1)])
    assert await store.wallet(wallet("a")) is not None
    assert (await verify(store)).violations == ()
    await store.close()


async def test_what_no_standby_has_is_not_told_to_have_happened_either(
    own_server: PostgresServer, clock: Clock, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is started anew forgets that a commit was to wait for its standby; whoever asks again waits."""
    await asyncio.to_thread(migrate, own_server.url)
    store = await PostgresStore.open(own_server.url, clock=clock)
    await store.run_batch([say.grant("a", "1", 100)])
    debit = say.debit("a", "1", 10)

    def wait_for_standby(name: str) -> None:
        with psycopg.connect(own_server.url, autocommit=True) as connection:
            connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
            connection.execute("SELECT pg_reload_conf()")
            until_shown(connection, name)

    await asyncio.to_thread(wait_for_standby, "nobody")
    monkeypatch.setattr(postgres_batch, "BATCH_S", 0.5)
    with pytest.raises(StoreUnavailable):
        await store.run_batch([debit])
    own_server.kill()
    await asyncio.to_thread(own_server.start)
    found = await store.wallet(wallet("a"))
    assert found is not None
    assert found.blocks[0].remaining == 90, "it is there, and only there"
    with pytest.raises(StoreUnavailable):
        await store.run_batch([debit])
    await asyncio.to_thread(wait_for_standby, "")
    monkeypatch.undo()
    (outcome,) = await store.run_batch([debit])
    assert outcome.replayed  # type: ignore[union-attr]
    await store.close()


async def test_what_was_kept_of_a_ledger_that_a_backup_has_replaced_is_not_believed(
    open_store: Open, say: Say, outside: "psycopg.Connection[Any]"
) -> None:
    """Its server is the same, and its wallet has reached the very version that it had before."""
    one, other = await open_store(), await open_store()
    await one.run_batch([say.grant("a", "1", 100)])
    names = [table.name for table in TABLES]
    for name in names:
        outside.execute(f"CREATE TABLE backup_{name} AS TABLE {name}")
    await one.run_batch([say.debit("a", "1", 10)])
    outside.execute("BEGIN; SET LOCAL session_replication_role = replica")
    for name in names:
        outside.execute(f"TRUNCATE {name}; INSERT INTO {name} TABLE backup_{name}")
    outside.execute("COMMIT")
    await other.run_batch([say.debit("a", "2", 60)])
    (refused,) = await one.run_batch([say.debit("a", "3", 50)])
    assert refused == Rejected(Reason.INSUFFICIENT_CREDITS, needed=50, available=40)


async def test_a_closed_store_says_so_and_may_be_closed_again(open_store: Open, say: Say) -> None:
    await open_store()
    watching = Recorder()
    store = await open_store(watcher=watching)
    watching.go_on.clear()
    batch = asyncio.create_task(store.run_batch([say.grant("a", "1", 100)]))
    await watching.reached.wait()
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0)
    watching.go_on.set()
    await closing
    assert len(await batch) == 1, "closing waits for the batch under way"
    await store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.run_batch([say.grant("a", "2", 100)])
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.wallet(wallet("a"))


# Whom it works as, and where.


async def test_it_works_as_a_role_that_cannot_get_around_the_policies(open_store: Open) -> None:
    store = await open_store()
    (connection,) = store._writers._idle
    role, able, rows = await connection.fetchrow(
        "SELECT current_user, (SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user), "
        "(SELECT count(*) FROM ledger_wallet)"
    ) or (None, None, None)
    assert (role, able, rows) == (GATEWAY_ROLE, False, 0)


async def test_an_empty_database_says_what_to_do(postgres_url: str) -> None:
    with pytest.raises(SchemaMissing, match="farebox migrate"):
        await PostgresStore.open(postgres_url)


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(StoreUnavailable):
        await PostgresStore.open(f"postgresql://postgres@127.0.0.1:{free_port()}/none")


async def test_of_several_hosts_the_one_that_can_be_written_to_is_taken(
    postgres_server: PostgresServer, postgres_database: PostgresDatabase, clock: Clock, say: Say
) -> None:
    hosts = f"127.0.0.1:{free_port()},127.0.0.1:{postgres_server.port}"
    url = f"postgresql+asyncpg://postgres@{hosts}/{database_of(postgres_database.url)}?target_session_attrs=read-write"
    store = await PostgresStore.open(url, clock=clock)
    await store.run_batch([say.grant("a", "1", 100)])
    await store.close()


# Plans. A scan of a table that grows for ever would be seen only in a year.


async def test_nothing_scans_a_table(
    postgres_database: PostgresDatabase, clock: Clock, campaign: Campaign, outside: "psycopg.Connection[Any]"
) -> None:
    store = await postgres_database.open(clock)
    seed = campaign.random()
    for batch in partition(RandomCommands(seed).take(300, clock.us), seed, 20):
        await store.run_batch(batch)
    await store.transactions(wallet("a"), before=None, limit=10)
    await store.wallet(wallet("a"))
    await store.close()
    await until(lambda: outside.execute("SELECT sum(idx_scan) > 0 FROM pg_stat_user_tables").fetchone() == (True,))
    scanned = outside.execute("SELECT relname, seq_scan FROM pg_stat_user_tables WHERE seq_scan > 0").fetchall()
    assert [name for name, _ in scanned if name.startswith("ledger_")] == []


def test_a_batch_works_as_whoever_calls_it(postgres_database: PostgresDatabase) -> None:
    """So that the policies hold in the functions too."""
    with psycopg.connect(postgres_database.url) as connection:
        found = connection.execute(
            "SELECT prosecdef FROM pg_proc WHERE proname SIMILAR TO 'farebox%_v[0-9]'"
        ).fetchall()
    assert found == [(False,)] * 8
