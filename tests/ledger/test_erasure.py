"""What a person may ask to be gone is gone from every row of every store, and no number has changed."""

import asyncio
import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
import psycopg
import pytest

from ledger.erasable import bare, facts_to_keep, without_metadata
from ledger.errors import WalletFrozen
from ledger.ledger import Ledger
from ledger.model import Charge, Settlement
from ledger.outcomes import BlockOpened, Fact, ReservationChanged, UsageRecorded
from ledger.store import erasure
from ledger.store.protocol import Store
from ledger.store.sqlite import SqliteStore
from ledger.verify import verify
from tests.ledger.rig import (
    RESPONSE,
    SECOND_US,
    Clock,
    Database,
    Dump,
    PostgresDatabase,
    Say,
    key,
    reservation,
    usage,
    wallet,
)

SAID: Final = "what-she-said"
ABOUT: Final[dict[str, Any]] = {"note": SAID, "deep": [{"metadata": SAID}]}


def holders(dump: Dump, said: str = SAID) -> set[str]:
    """The tables that have the text in any row."""
    return {table for table, rows in dump.items() if any(said in repr(row) for row in rows)}


def tell(say: Say, who: str, *, said: str = SAID) -> list[Any]:
    """Commands after which everything that can hold metadata holds some, and an answer is kept."""
    about = {"note": said, "deep": [{"metadata": said}]}
    answer = msgspec.structs.replace(RESPONSE, body=said.encode())
    spoken = usage(f"{who}_done", customer_id=who, metadata=about)
    marked = Settlement((Charge(3),), usage(f"{who}_open", customer_id=who, metadata=about))
    return [
        say.grant(who, f"{who}_1", 100, metadata=about, expires_at_us=None),
        say.reserve(who, f"{who}_done", 20, metadata=about, key=key(f"{who}_k")),
        say.commit(f"{who}_done", 10, usage=spoken, response=answer),
        say.reserve(who, f"{who}_left", 5, metadata=about),
        say.release(f"{who}_left"),
        say.reserve(who, f"{who}_open", 7, metadata=about, mark=marked),
    ]


async def test_the_journal_has_no_metadata(store: Store, database: Database, say: Say) -> None:
    await store.run_batch(tell(say, "a"))
    dump = database.dump()
    assert holders(dump) == {"ledger_block", "ledger_event", "ledger_reservation", "ledger_response", "ledger_usage"}
    assert "metadata" not in repr(dump["ledger_command"])
    assert (await verify(store)).violations == ()


async def test_nothing_of_a_person_is_left_and_no_number_has_changed(
    ledger: Ledger, store: Store, database: Database, say: Say
) -> None:
    for command in (*tell(say, "a"), *tell(say, "b", said="what-he-said")):
        await ledger.execute(command)
    before = database.dump()
    journal = (before["ledger_command"], before["ledger_transfer"])
    await ledger.erase(wallet("a"), customer_id="a")
    after = database.dump()
    assert holders(after) == set()
    assert holders(after, "what-he-said") == holders(before, "what-he-said")
    assert (await verify(store)).violations == ()
    assert [row for row in after["ledger_command"] if row in journal[0]] == journal[0]
    assert after["ledger_transfer"] == journal[1]
    assert len(after["ledger_event"]) == len(before["ledger_event"])
    view = await ledger.wallet_view(wallet("a"))
    assert view is not None
    assert (view.balance, view.reserved, view.wallet.frozen) == (90, 7, True)
    assert await store.response(wallet("a").scope, "chat", "a_k", now_us=0) is None
    assert await store.response(wallet("b").scope, "chat", "b_k", now_us=0) is not None


async def test_what_was_under_way_is_settled_as_ever_but_nothing_new_is_held(ledger: Ledger, say: Say) -> None:
    for command in tell(say, "a"):
        await ledger.execute(command)
    await ledger.erase(wallet("a"), customer_id="a")
    await ledger.execute(say.commit("a_open", 7))
    with pytest.raises(WalletFrozen):
        await ledger.execute(say.reserve("a", "new", 1))
    view = await ledger.wallet_view(wallet("a"))
    assert view is not None
    assert (view.balance, view.reserved) == (83, 0)


async def test_what_an_older_release_still_wrote_into_the_journal_troubles_nobody(
    store: Store, database: Database, say: Say
) -> None:
    """It runs beside this one for as long as an upgrade takes."""
    await store.run_batch([say.grant("a", "1", 100, metadata=ABOUT)])
    database.damage(
        """UPDATE ledger_command SET facts = replace(facts, '"granted":100', '"granted":100,"metadata":{"old":1}')"""
    )
    assert '"old":1' in repr(database.dump()["ledger_command"])
    assert (await verify(store)).violations == ()


async def test_an_erasure_is_repeatable_and_one_of_nobody_does_nothing(
    ledger: Ledger, store: Store, database: Database, say: Say
) -> None:
    await ledger.execute(say.grant("a", "1", 100, metadata=ABOUT))
    empty = database.dump()
    await ledger.erase(wallet("nobody"), customer_id="nobody")
    assert database.dump() == empty
    for _ in range(2):
        await ledger.erase(wallet("a"), customer_id="a")
        assert holders(database.dump()) == set()
    assert (await verify(store)).violations == ()


async def test_another_process_that_had_kept_it_writes_it_nowhere_again(
    database: Database, clock: Clock, say: Say
) -> None:
    """An event tells of a whole block: one that a process has kept must be read anew."""
    one, other = await database.open(clock), await database.open(clock)
    ledger = await Ledger.open(one, clock=clock, new_command_id=say.id)
    await other.run_batch([say.grant("a", "1", 100, metadata=ABOUT, expires_at_us=clock.us + SECOND_US)])
    await other.run_batch([say.reserve("a", "1", 10, metadata=ABOUT)])
    await ledger.erase(wallet("a"), customer_id="a")
    clock.us += 2 * SECOND_US
    await other.run_batch([say.extend("1", 0, ttl_us=90 * SECOND_US)])
    await other.run_batch([say.expire("a")])
    await other.run_batch([say.release("1")])
    dump = database.dump()
    assert "credit.expired" in repr(dump["ledger_event"])
    assert holders(dump) == set()
    assert (await verify(one)).violations == ()
    await other.close()
    await ledger.close()


async def test_the_process_that_erased_it_writes_it_nowhere_again(
    ledger: Ledger, store: Store, database: Database, clock: Clock, say: Say
) -> None:
    """It had kept the wallet itself, and its own commands do not make it read anew."""
    await ledger.execute(say.grant("a", "1", 100, metadata=ABOUT, expires_at_us=clock.us + SECOND_US))
    await ledger.execute(say.debit("a", "1", 10))
    await ledger.erase(wallet("a"), customer_id="a")
    clock.us += 2 * SECOND_US
    await ledger.execute(say.expire("a"))
    dump = database.dump()
    assert "credit.expired" in repr(dump["ledger_event"])
    assert holders(dump) == set()
    assert (await verify(store)).violations == ()


async def test_more_than_a_page_of_everything_is_erased(
    ledger: Ledger, database: Database, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "PAGE_ROWS", 3)
    await ledger.execute(say.grant("a", "1", 1_000, metadata=ABOUT))
    commands = []
    for number in range(10):
        name = f"{number:02d}"
        answer = msgspec.structs.replace(RESPONSE, body=SAID.encode())
        spoken = usage(name, customer_id="a", metadata=ABOUT)
        commands.append(say.reserve("a", name, 2, metadata=ABOUT, key=key(name)))
        commands.append(say.commit(name, 1, usage=spoken, response=answer))
        commands.append(say.grant("a", f"more_{name}", 1, metadata=ABOUT))
    for command in commands:
        await ledger.execute(command)
    await ledger.erase(wallet("a"), customer_id="a")
    assert holders(database.dump()) == set()


async def test_others_are_served_while_a_person_is_erased(
    ledger: Ledger, store: Store, database: Database, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "PAGE_ROWS", 2)
    for command in (*tell(say, "a"), *tell(say, "b", said="what-he-said")):
        await ledger.execute(command)
    busy = [ledger.execute(say.debit("b", f"busy_{number}", 1)) for number in range(30)]
    random.Random(1).shuffle(busy)
    await asyncio.gather(ledger.erase(wallet("a"), customer_id="a"), *busy)
    assert holders(database.dump()) == set()
    assert (await verify(store)).violations == ()


def test_a_fact_without_metadata_is_kept_as_it_is() -> None:
    say = Say()
    assert facts_to_keep([]) == []
    record = usage("1")
    assert bare(record) is record
    recorded = UsageRecorded(reservation("1"), 1, record, (Charge(1),), 0, 5)
    assert bare(recorded) is recorded
    assert bare(say) is say


def test_every_kind_of_fact_that_can_have_metadata_loses_it() -> None:
    """A new fact, or a new field of one, that brings metadata into the journal fails here."""
    able = {kind for kind in get_args(Fact) if "metadata" in repr(msgspec.inspect.type_info(kind))}
    assert able == {BlockOpened, ReservationChanged, UsageRecorded}


def test_an_events_body_loses_metadata_however_deep() -> None:
    assert without_metadata({"a": [{"metadata": 1, "b": {"metadata": {}, "c": "metadata"}}]}) == {
        "a": [{"b": {"c": "metadata"}}]
    }


def test_the_statements_find_reservations_by_an_index(
    sqlite_store: SqliteStore, database_path: Path, postgres_database: PostgresDatabase
) -> None:
    with closing(sqlite3.connect(database_path)) as file:
        named = {"1": "ten_a", "2": "live", "3": "customer:a", "4": "", "5": 10}
        plan = file.execute(f"EXPLAIN QUERY PLAN {erasure.RESERVATIONS['sqlite']}", named).fetchall()
    assert "ix_ledger_reservation_metadata" in repr(plan)
    with psycopg.connect(postgres_database.url) as connection:
        connection.execute("SET enable_seqscan = off")
        connection.execute("SET plan_cache_mode = force_generic_plan")
        connection.execute(f"PREPARE found AS {erasure.RESERVATIONS['postgresql']}")
        plan = connection.execute("EXPLAIN EXECUTE found ('ten_a', 'live', 'customer:a', '', 10)").fetchall()
    assert "ix_ledger_reservation_payer_metadata" in repr(plan)
    assert "split_part" in next(line for (line,) in plan if "Index Cond" in line)
