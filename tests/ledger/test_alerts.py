"""Low balance on real stores: told once a crossing, by however many processes at once, and over restarts."""

import asyncio
import json
from typing import Any

from ledger.commands import Watch
from ledger.ledger import Ledger
from ledger.model import Alert
from ledger.store.protocol import Store
from ledger.verify import verify
from tests.ledger.rig import SECOND_US, Clock, Database, Say, wallet
from tests.ledger.test_processes import fund, opened, rest_of, start
from tests.ledger.worker import AMOUNT, HALF

ALERTS = (Alert("low", 500), Alert("low", 100), Alert("top_up", 300), Alert("exhausted", 1))
WATCH = (Watch(wallet("a"), ALERTS),)


def rings(database: Database, of: str) -> list[tuple[str, dict[str, Any]]]:
    """What a wallet has rung, in its order."""
    rows = sorted(
        (row for row in database.dump()["ledger_event"] if row[2] == wallet(of).wallet), key=lambda row: row[3]
    )
    return [(row[5], json.loads(row[7])) for row in rows if row[5] in ("credit.low", "credit.exhausted", "topup.due")]


async def test_of_200_charges_at_once_each_threshold_is_told_once(
    database: Database, ledger: Ledger, store: Store, say: Say
) -> None:
    await ledger.execute(say.grant("a", "1", 1000))
    await asyncio.gather(*(ledger.execute(say.debit("a", f"{number}", 5, watches=WATCH)) for number in range(200)))
    assert rings(database, "a") == [
        ("credit.low", {"threshold": 500, "balance": 495}),
        ("topup.due", {"threshold": 300, "balance": 295}),
        ("credit.low", {"threshold": 100, "balance": 95}),
        ("credit.exhausted", {"balance": 0}),
    ]
    assert (await verify(store)).violations == ()


async def test_reservations_that_are_committed_at_once_ring_as_often(
    database: Database, ledger: Ledger, store: Store, say: Say
) -> None:
    """What is reserved still counts: nothing rings before the commits, though nothing could be reserved any more."""
    await ledger.execute(say.grant("a", "1", 1000))
    names = [f"{number:03d}" for number in range(200)]
    await asyncio.gather(*(ledger.execute(say.reserve("a", name, 5, watches=WATCH)) for name in names))
    assert rings(database, "a") == []
    await asyncio.gather(*(ledger.execute(say.commit(name, 4)) for name in names))
    assert [(kind, body["balance"]) for kind, body in rings(database, "a")] == [("credit.low", 496), ("topup.due", 296)]
    assert (await verify(store)).violations == ()


async def test_a_top_up_arms_them_anew(database: Database, ledger: Ledger, store: Store, say: Say) -> None:
    await ledger.execute(say.grant("a", "1", 1000))
    for number in range(3):
        await asyncio.gather(
            *(ledger.execute(say.debit("a", f"{number}_{each}", 50, watches=WATCH)) for each in range(20))
        )
        await ledger.execute(say.grant("a", f"again_{number}", 1000))
    told = [kind for kind, _ in rings(database, "a")]
    assert told == ["credit.low", "topup.due", "credit.low", "credit.exhausted"] * 3
    assert (await verify(store)).violations == ()


async def test_a_command_that_is_repeated_rings_nothing(database: Database, ledger: Ledger, say: Say) -> None:
    await ledger.execute(say.grant("a", "1", 1000))
    charge = say.debit("a", "1", 600, watches=WATCH)
    await asyncio.gather(*(ledger.execute(charge) for _ in range(20)))
    assert [kind for kind, _ in rings(database, "a")] == ["credit.low"]


async def test_credits_that_expire_ring_with_the_sweep(
    database: Database, ledger: Ledger, store: Store, say: Say, clock: Clock
) -> None:
    await ledger.execute(say.grant("a", "1", 450))
    await ledger.execute(say.grant("a", "2", 450, expires_at_us=clock.us + SECOND_US))
    await ledger.execute(say.reserve("a", "1", 1, watches=WATCH))
    clock.us += SECOND_US
    await asyncio.gather(*(ledger.sweep(clock.us) for _ in range(5)))
    assert rings(database, "a") == [("credit.low", {"threshold": 500, "balance": 450})]
    assert (await verify(store)).violations == ()


async def test_what_has_rung_is_remembered_over_a_restart(database: Database, clock: Clock) -> None:
    async with opened(database) as (_, ledger, say):
        await fund(ledger, say, {"a": 1000})
        await ledger.execute(say.debit("a", "1", 600, watches=WATCH, id=ledger.new_command_id()))
    async with opened(database) as (store, ledger, say):
        await ledger.execute(say.debit("a", "2", 10, watches=WATCH, id=ledger.new_command_id()))
        await ledger.execute(say.debit("a", "3", 100, id=ledger.new_command_id()))
        assert [kind for kind, _ in rings(database, "a")] == ["credit.low", "topup.due"]
        assert (await verify(store)).violations == ()


async def test_processes_that_charge_one_wallet_ring_once_between_them(database: Database) -> None:
    """The worker watches the shared wallet for what it has at half, and for its last credit."""
    async with opened(database) as (store, ledger, say):
        await fund(ledger, say, {"shared": 2 * HALF + 1, "own_one": 10**6, "own_two": 10**6})
        workers = [start(database.url, name, at_once=16, pairs=2 * HALF // AMOUNT // 8) for name in ("one", "two")]
        lines = await asyncio.gather(*(asyncio.to_thread(rest_of, worker) for worker in workers))
        assert [worker.returncode for worker in workers] == [0, 0]
        assert all(any(line[0] == "charged" for line in printed) for printed in lines), "neither starved"
        assert [(kind, body["balance"]) for kind, body in rings(database, "shared")] == [
            ("credit.low", HALF - 2),
            ("credit.exhausted", 1),
        ]
        assert (await verify(store)).violations == ()
