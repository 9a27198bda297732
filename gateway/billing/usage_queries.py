"""Answers what was used: by day, metric, customer, model, action, app, or a key of the metadata; exact at once.

No question reads without bound: so many usage rows at most, so long at most, so many questions at once.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.billing.usage_facts import SUMS, amount, dialect
from gateway.billing.usage_statement import RAW_ROWS_MAX, Key, UsageQuestion, statement
from gateway.database import Database, DatabaseUnavailable, of

ANSWER_S: Final = 4.0
"""How long one statement may take, and how long a question waits for its turn."""

AT_ONCE: Final = 2
"""Questions under way in a process: they share its few connections with everything else."""

ROUNDS_MAX: Final = 10
"""How often further leads are looked for, before a page is answered that is not full."""


class UsageSum(msgspec.Struct, frozen=True, kw_only=True):
    """What the charges of one group come to. *events* counts charges; amounts are in the asset's smallest unit."""

    keys: dict[str, Key]
    events: int
    microunits: int
    charged: int
    markup: int
    provider_cost_nanos: int
    input_tokens: int
    output_tokens: int


class UsagePage(msgspec.Struct, frozen=True):
    """*after* is where the next page begins; None where there is none."""

    sums: list[UsageSum]
    after: tuple[Key, ...] | None


class PeriodTooWide(Exception):
    """The period has more than can be read for this question. Whole days, or a shorter period, may be answered."""


class UsageBehind(Exception):
    """So many charges wait to be added up that they cannot be read for a question. It passes by itself."""


class UsageQueries:
    """Questions about the usage of an installation."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def ask(self, question: UsageQuestion) -> UsagePage:
        """A page of sums. Each is exact as of one moment; a page may have fewer rows than it could, and a next one.

        Raises:
            PeriodTooWide, UsageBehind, DatabaseUnavailable
        """
        sums: list[UsageSum] = []
        after = question.after
        for _ in range(ROUNDS_MAX):
            wanted = question.limit + 1 - len(sums)
            found = await self._answered(msgspec.structs.replace(question, after=after, limit=wanted))
            sums += found.sums
            if len(sums) > question.limit:
                last = sums[question.limit - 1].keys
                return UsagePage(sums[: question.limit], tuple(last[group] for group in question.order))
            if found.after is None:
                return UsagePage(sums, None)
            after = found.after
        return UsagePage(sums, after)

    async def _answered(self, question: UsageQuestion) -> UsagePage:
        """One statement's answer. *after* is None unless there may be leads that it has not looked at."""
        loop = asyncio.get_running_loop()
        async with self._turn():
            began_s = loop.time()
            try:
                async with self._database.read(of(*question.scope)) as connection, _bounded(connection):
                    asked = statement(question, dialect(connection.dialect.name))
                    rows = (await connection.execute(text(asked.sql), asked.values)).all()
            except DatabaseUnavailable:
                if loop.time() - began_s >= ANSWER_S:
                    raise PeriodTooWide from None
                raise
        tail_rows, edge_rows, leads, last_lead = rows[0][:4]
        if tail_rows > RAW_ROWS_MAX:
            raise UsageBehind
        if edge_rows > RAW_ROWS_MAX:
            raise PeriodTooWide
        sums = [_sum(question.order, row[4:]) for row in rows if row[-1] is not None]
        return UsagePage(sums, (last_lead,) if leads == asked.values.get("lead_rows") else None)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._turns.acquire()
        except TimeoutError:
            raise DatabaseUnavailable("too many questions about usage are under way") from None
        try:
            yield
        finally:
            self._turns.release()


def _sum(order: tuple[str, ...], row: Sequence[Any]) -> UsageSum:
    keys, sums = row[: len(order)], tuple(row[len(order) :])
    return UsageSum(
        keys=dict(zip(order, keys, strict=True)),
        events=sums[SUMS.index("events")],
        microunits=amount(sums, "microunits"),
        charged=amount(sums, "charged"),
        markup=amount(sums, "markup"),
        provider_cost_nanos=amount(sums, "provider_cost"),
        input_tokens=sums[SUMS.index("input_tokens")],
        output_tokens=sums[SUMS.index("output_tokens")],
    )


@asynccontextmanager
async def _bounded(connection: AsyncConnection) -> AsyncIterator[None]:
    """End a statement that takes longer than ANSWER_S: on a server by its own limit, in a file by an interrupt."""
    if connection.dialect.name == "postgresql":
        await connection.exec_driver_sql(f"SET LOCAL statement_timeout = {round(ANSWER_S * 1000)}")
        yield
        return
    driver = (await connection.get_raw_connection()).driver_connection
    assert driver is not None
    loop = asyncio.get_running_loop()
    ends: list[asyncio.Task[None]] = []
    timer = loop.call_later(ANSWER_S, lambda: ends.append(loop.create_task(driver.interrupt())))
    try:
        yield
    finally:
        timer.cancel()
        await asyncio.gather(*ends)
