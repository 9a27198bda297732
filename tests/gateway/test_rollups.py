"""Usage is added up beside the ledger, each charge once; and a question counts each charge once, at every moment."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import insert, text

from gateway.billing import rollups as rollups_module
from gateway.billing import usage_statement
from gateway.billing.rollups import Rollups
from gateway.billing.usage_facts import DAY_US, HOUR_US
from gateway.billing.usage_queries import PeriodTooWide, UsageBehind, UsageQueries
from gateway.billing.usage_statement import cover
from gateway.database import Database, DatabaseUnavailable, of
from ledger.model import Scope
from ledger.store.tables import LedgerUsageRow
from tests.conftest import Campaign
from tests.gateway.usage_events import (
    MONDAY_US,
    SCOPE,
    Charge,
    answered,
    commit,
    everything,
    plain,
    random_charge,
    random_question,
    recount,
    waiting,
)

WAIT_S = 20


@pytest.fixture
async def second(database_url: str) -> AsyncIterator[Database]:
    """The same database, as another process has it."""
    database = Database(database_url)
    yield database
    await database.close()


async def folded(rollups: Rollups) -> int:
    done = 0
    while page := await rollups.fold():
        done += page
    return done


async def until_folded(database: Database) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            if not await waiting(database):
                return
            await asyncio.sleep(0.01)


async def counted(database: Database, scope: Scope = SCOPE) -> int:
    sums = await answered(UsageQueries(database), everything(scope))
    return sum(row[1][0] for row in sums)


@pytest.mark.parametrize(
    ("start", "end", "covered"),
    [
        (0, 2 * DAY_US, [(DAY_US, 0, 2 * DAY_US)]),
        (1, DAY_US, [(0, 1, HOUR_US), (HOUR_US, HOUR_US, DAY_US)]),
        (0, DAY_US + 1, [(DAY_US, 0, DAY_US), (0, DAY_US, DAY_US + 1)]),
        (0, DAY_US - 1, [(HOUR_US, 0, DAY_US - HOUR_US), (0, DAY_US - HOUR_US, DAY_US - 1)]),
        (5, 9, [(0, 5, 9)]),
        (5, 5, []),
    ],
)
def test_a_period_is_covered_by_the_widest_that_fits(start: int, end: int, covered: list[Any]):
    assert cover(start, end, (DAY_US, HOUR_US)) == covered


@pytest.mark.campaign
async def test_every_answer_is_a_recount_whatever_is_folded(database: Database, second: Database, campaign: Campaign):
    chance = campaign.random()
    queries = UsageQueries(database)
    folders = [Rollups(database, page_rows=5), Rollups(second, page_rows=3)]
    charges: list[Charge] = []
    for _ in range(campaign.rounds(short=8, long=200)):
        new = [random_charge(chance, len(charges) + number) for number in range(20)]
        charges += new
        await commit(chance.choice((database, second)), *new)
        for _ in range(chance.choice((0, 1, 3))):
            await chance.choice(folders).fold()
        for _ in range(6):
            question = random_question(chance, charges)
            assert await answered(queries, question) == recount(charges, question), question
    for folder in folders:
        await folded(folder)
    assert await waiting(database) == 0
    for _ in range(30):
        question = random_question(chance, charges)
        assert await answered(queries, question) == recount(charges, question), question


async def test_folding_twice_adds_nothing(database: Database):
    await commit(database, *map(plain, range(7)))
    rollups = Rollups(database, page_rows=5)
    assert [await rollups.fold() for _ in range(3)] == [5, 2, 0]
    assert await counted(database) == 7


async def test_folders_at_once_add_each_charge_once(database: Database, second: Database):
    await commit(database, *map(plain, range(40)))
    folders = [Rollups(each, page_rows=3) for each in (database, second, database, second)]
    assert sum(await asyncio.gather(*map(folded, folders))) + await folded(folders[0]) == 40
    assert await waiting(database) == 0
    assert await counted(database) == 40


async def test_a_charge_that_moves_into_the_sums_is_seen_once(database: Database, second: Database):
    await commit(database, *map(plain, range(40)))
    folding = asyncio.create_task(folded(Rollups(second, page_rows=2)))
    looks = 0
    while not folding.done():
        assert await counted(database) == 40
        looks += 1
    assert await folding == 40
    assert looks > 1


async def test_what_is_stopped_in_the_middle_has_not_begun(database: Database, monkeypatch: pytest.MonkeyPatch):
    """The page is added up and not yet marked, on either kind of database."""
    await commit(database, *map(plain, range(4)))
    with monkeypatch.context() as broken:
        broken.setattr(
            rollups_module, "_FOLD", rollups_module._FOLD.replace("SELECT count(*) FROM marked", "SELECT 1/0")
        )
        broken.setattr(rollups_module, "_MARK_IN_FILE", "UPDATE ledger_usage SET no_such_column = 1")
        with pytest.raises(Exception, match=r"division by zero|no such column"):
            await Rollups(database).fold_page(SCOPE)
    assert await waiting(database) == 4
    assert await counted(database) == 4
    assert await Rollups(database).fold() == 4
    assert await counted(database) == 4


async def test_a_charge_that_commits_late_is_found(database: Database, second: Database):
    """Its transaction began before those that are added up already. On SQLite it would have waited for its turn."""
    if database.engine.dialect.name == "sqlite":
        await commit(database, plain(2))
        await folded(Rollups(second))
        await commit(database, plain(1))
    else:
        async with database.write(of(*SCOPE)) as connection:
            await connection.execute(insert(LedgerUsageRow), plain(1).row)
            await commit(second, plain(2))
            assert await folded(Rollups(second)) == 1
            assert await counted(second) == 1
    assert await counted(second) == 2
    assert await folded(Rollups(second)) == 1
    assert await counted(second) == 2


async def test_every_scope_is_added_up_and_apart(database: Database):
    scopes = [Scope(tenant, mode) for tenant in ("ten_a", "ten_b") for mode in ("live", "test")]
    for number, scope in enumerate(scopes):
        await commit(database, *(plain(each, scope=scope) for each in range(number + 1)))
    assert await Rollups(database, page_rows=2).fold() == 1 + 2 + 2 + 2
    assert await folded(Rollups(database)) == 3
    assert [await counted(database, scope) for scope in scopes] == [1, 2, 3, 4]


async def test_a_scope_that_cannot_be_added_up_does_not_hold_up_the_others(
    database: Database, monkeypatch: pytest.MonkeyPatch
):
    other = Scope("ten_b", "live")
    await commit(database, plain(1), plain(1, scope=other))
    fold_page = Rollups.fold_page

    async def broken_for_one(self: Rollups, scope: Scope) -> int:
        if scope == SCOPE:
            raise ZeroDivisionError
        return await fold_page(self, scope)

    monkeypatch.setattr(Rollups, "fold_page", broken_for_one)
    assert await Rollups(database).fold() == 1
    assert await waiting(database, other) == 0


async def test_the_largest_numbers_do_not_overflow_a_sum(database: Database):
    most = 2**62
    fields = {"charged": most, "markup": most, "provider_cost_nanos": most, "units": {"microunits": most}}
    charges = [plain(number, **fields) for number in range(9)]
    await commit(database, *charges)
    for _ in range(2):
        assert await answered(UsageQueries(database), everything()) == recount(charges, everything())
        await folded(Rollups(database, page_rows=2))
    assert recount(charges, everything())[0][1][2] == 9 * most > 2**63


async def test_the_loop_adds_up_what_comes_and_ends_when_told(database: Database):
    rollups = Rollups(database, page_rows=2, pause_s=0.01)
    rollups.start()
    await commit(database, *map(plain, range(9)))
    await until_folded(database)
    await rollups.stop()
    await commit(database, plain(9))
    assert await waiting(database) == 1
    assert await counted(database) == 10


async def test_the_loop_outlives_an_outage(database: Database, monkeypatch: pytest.MonkeyPatch):
    asked = asyncio.Event()
    next_after = Rollups._next_after

    async def away_at_first(self: Rollups, scope: Scope) -> Scope | None:
        if not asked.is_set():
            asked.set()
            raise DatabaseUnavailable("the test took it away")
        return await next_after(self, scope)

    monkeypatch.setattr(Rollups, "_next_after", away_at_first)
    await commit(database, plain(1))
    rollups = Rollups(database, pause_s=0.01)
    rollups.start()
    await until_folded(database)
    await rollups.stop()
    assert asked.is_set()


async def test_a_tail_that_is_too_long_is_said_to_be(database: Database, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(usage_statement, "RAW_ROWS_MAX", 3)
    monkeypatch.setattr("gateway.billing.usage_queries.RAW_ROWS_MAX", 3)
    await commit(database, *map(plain, range(4)))
    with pytest.raises(UsageBehind):
        await counted(database)
    await folded(Rollups(database))
    assert await counted(database) == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"start_us": MONDAY_US + 1},
        {"start_us": MONDAY_US + 1, "groups": ("customer",)},
        {"start_us": MONDAY_US + 1, "customer": "cus_a"},
        {"groups": ("metadata.c", "customer")},
    ],
)
async def test_what_would_read_too_many_rows_is_refused(
    database: Database, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
):
    monkeypatch.setattr(usage_statement, "RAW_ROWS_MAX", 3)
    monkeypatch.setattr("gateway.billing.usage_queries.RAW_ROWS_MAX", 3)
    await commit(database, *(plain(number, customer="cus_a", metadata={"c": "x"}) for number in range(1, 6)))
    await folded(Rollups(database))
    with pytest.raises(PeriodTooWide):
        await UsageQueries(database).ask(everything(**fields))
    assert await counted(database) == 5


async def test_a_statement_that_takes_too_long_is_given_up(database: Database, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gateway.billing.usage_queries.ANSWER_S", 0.2)
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 0 FROM n) SELECT count(*), 0, 0, 0, NULL FROM n"
    monkeypatch.setattr(
        "gateway.billing.usage_queries.statement", lambda question, speaks: usage_statement.Statement(endless, {})
    )
    with pytest.raises(PeriodTooWide):
        await counted(database)
    monkeypatch.undo()
    assert await counted(database) == 0


async def test_an_empty_page_does_not_end_the_search(database: Database):
    """Many customers of that day, of whom only the last has anything in the hour that is asked for."""
    charges = [plain(number, customer=f"cus_{number:03}") for number in range(60)]
    charges.append(plain(99, customer="cus_zzz", at_us=MONDAY_US + HOUR_US + 1))
    await commit(database, *charges)
    await folded(Rollups(database))
    question = everything(groups=("customer",), start_us=MONDAY_US + HOUR_US, end_us=MONDAY_US + HOUR_US + 9, limit=1)
    assert await answered(UsageQueries(database), question) == recount(charges, question)
    assert recount(charges, question)[0][0] == ("cus_zzz",)


async def test_the_tail_is_read_by_its_own_index(database: Database):
    chance = random.Random(1)
    await commit(database, *(random_charge(chance, number) for number in range(5)))
    if database.engine.dialect.name == "sqlite":
        async with database.read(of(*SCOPE)) as connection:
            query = usage_statement.statement(everything(), rollups_module.SQLITE)
            plan = (await connection.execute(text(f"EXPLAIN QUERY PLAN {query.sql}"), query.values)).all()
        assert any("ix_ledger_usage_unfolded" in row[-1] for row in plan)
        assert not any("SCAN ledger_usage" in row[-1] or "SCAN u" in row[-1] for row in plan)
