"""Connections that are cut at any statement, before it or after it, under random commands from several processes."""

import asyncio
import random
from collections import defaultdict
from typing import Any

import asyncpg
import pytest

from ledger import writer
from ledger.commands import AnyCommand
from ledger.errors import LedgerError, LedgerUnavailable
from ledger.ledger import Ledger
from ledger.outcomes import Result, Settled
from ledger.store import postgres_connection
from ledger.store.rows import result_from
from ledger.verify import verify
from tests.conftest import Campaign
from tests.ledger.conftest import NewDatabase
from tests.ledger.rig import SECOND_US, Clock, RandomCommands, Say

CUTS = 0.05
"""The share of statements whose connection is cut."""


class Cut:
    """A connection that is lost now and then, before a statement is sent or when its answer is on the way."""

    def __init__(self, connection: Any, seed: random.Random) -> None:
        self._connection = connection
        self._random = seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def execute(self, query: str, *values: Any) -> Any:
        return await self._lossy(self._connection.execute, query, *values)

    async def fetchval(self, query: str, *values: Any) -> Any:
        return await self._lossy(self._connection.fetchval, query, *values)

    async def _lossy(self, ask: Any, query: str, *values: Any) -> Any:
        share = self._random.random()
        if share < CUTS / 2:
            self._lose()
        answer = await ask(query, *values)
        if share > 1 - CUTS / 2:
            self._lose()
        return answer

    def _lose(self) -> None:
        self._connection.terminate()
        raise asyncpg.ConnectionDoesNotExistError("cut")


class Callers:
    """What those who asked were told: results, or None for a refusal, by the command's id."""

    def __init__(self) -> None:
        self.told: dict[str, set[Result | None]] = defaultdict(set)
        self.in_doubt: set[str] = set()
        self.charges: list[Settled] = []

    async def ask(self, ledger: Ledger, command: AnyCommand) -> None:
        try:
            applied = await ledger.execute(command)
        except LedgerUnavailable:
            self.in_doubt.add(command.id)
            return
        except LedgerError:
            self.told[command.id].add(None)
            return
        if applied.replayed:
            self.in_doubt.add(command.id)  # It may be another command's result, under the same key.
        elif applied.facts:
            self.told[command.id].add(applied.result)
        if isinstance(applied.result, Settled):
            self.charges.append(applied.result)


@pytest.mark.campaign
async def test_what_is_answered_has_happened_once_and_what_is_refused_has_not(
    new_postgres: NewDatabase, clock: Clock, campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = campaign.random()
    connect = postgres_connection.connect

    async def connect_badly(url: str) -> Cut:
        return Cut(await connect(url), seed)

    monkeypatch.setattr(postgres_connection, "connect", connect_badly)
    monkeypatch.setattr(writer, "RETRY_WAITS_S", (0.001, 0.002, 0.004))
    monkeypatch.setattr(writer, "PROBE_S", 0.005)
    for processes in [1, 2, 3] * campaign.rounds(short=1, long=10):
        database = new_postgres()
        ids, source, callers = Say(), RandomCommands(seed), Callers()
        stores = [await database.open(clock) for _ in range(processes)]
        ledgers = [await Ledger.open(store, clock=clock, new_command_id=ids.id) for store in stores]
        for _ in range(8):
            clock.us += seed.randint(0, 8) * SECOND_US
            charges = seed.sample(callers.charges, k=min(5, len(callers.charges)))
            refunds = [ids.refund(charge, id=f"ref_{ids.id()}") for charge in charges]
            commands = [*source.take(50, clock.us), *refunds]
            await asyncio.gather(*(callers.ask(seed.choice(ledgers), command) for command in commands))
        assert (await verify(stores[0])).violations == ()
        journal = {row[2]: result_from(row[8]) for row in database.dump()["ledger_command"]}
        for command_id, told in callers.told.items():
            assert told <= {journal.get(command_id), None}
            assert command_id not in journal or told != {None} or command_id in callers.in_doubt
        assert len(journal) > 150
        for ledger in ledgers:
            await ledger.close()
