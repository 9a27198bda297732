"""Whether this process can serve, and in words what is wrong where it cannot.

How it works. The database is asked as a request would ask it: the gateway's tables, the ledger, and the right to write.
One probe runs at a time and its answer holds for a second, so that however many ask, the database is asked once; one
that does not answer in time is unready, and is not asked again before it has. What is merely degraded (work is served,
only slower or later) is told beside it and does not make a gateway unready: taking all of them out would help nobody.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from sqlalchemy import text

from gateway.database import NOBODY, Database, DatabaseUnavailable
from gateway.logs import masked
from gateway.migrations import HEAD
from ledger.errors import LedgerUnavailable
from ledger.ledger import Ledger
from ledger.model import WalletRef

TIMEOUT_S: Final = 1.5
"""How long the database may take to answer."""

LEASE_S: Final = 1.0
"""How long an answer holds."""

FREE_BYTES_MIN: Final = 16 * 2**20
"""What must be free on the journal's disk: room for the settlements of a long outage."""

OK: Final = "ok"
NO_WALLET: Final = WalletRef("nobody", "live", "nobody")
"""Asking for it reads the ledger's database, and finds nothing."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """What was checked, and what is wrong with it; what is degraded, and how."""

    checks: Mapping[str, str]
    degraded: Mapping[str, str]

    @property
    def ready(self) -> bool:
        return all(found == OK for found in self.checks.values())


class Readiness:
    """Checks this process.

    Args:
        degraded: names what does not work as it should, and says how; empty where all does.
    """

    def __init__(
        self,
        *,
        database: Database,
        ledger: Ledger,
        journal_dir: Path,
        draining: Callable[[], bool],
        degraded: Callable[[], Mapping[str, str]],
        timeout_s: float = TIMEOUT_S,
        lease_s: float = LEASE_S,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._journal_dir = journal_dir
        self._draining = draining
        self._degraded = degraded
        self._timeout_s = timeout_s
        self._lease_s = lease_s
        self._monotonic_s = monotonic_s
        self._probing: asyncio.Task[str] | None = None
        self._found = OK
        self._until_s = 0.0
        self._told: Mapping[str, str] = {}

    async def report(self) -> Report:
        """What is so now, give or take a lease."""
        checks = {
            "database": await self._database_now(),
            "journal": _folder(self._journal_dir),
            "process": "shutting down" if self._draining() else OK,
        }
        self._tell(checks)
        return Report(checks, self._degraded())

    async def close(self) -> None:
        """End a probe that is under way."""
        if self._probing is not None:
            self._probing.cancel()
            with suppress(asyncio.CancelledError):
                await self._probing

    def _tell(self, checks: Mapping[str, str]) -> None:
        """Log what has changed: an operator reads there since when."""
        if checks != self._told:
            wrong = {name: found for name, found in checks.items() if found != OK}
            if wrong:
                log.warning("not ready", **wrong)
            elif self._told:
                log.info("ready again")
            self._told = checks

    async def _database_now(self) -> str:
        if self._monotonic_s() < self._until_s:
            return self._found
        if self._probing is None:
            self._probing = asyncio.create_task(self._probe(), name="readiness")
            self._probing.add_done_callback(self._landed)
        done, _ = await asyncio.wait((self._probing,), timeout=self._timeout_s)
        if not done:
            self._hold(f"no answer within {self._timeout_s:g} s")
        return self._found

    def _landed(self, task: asyncio.Task[str]) -> None:
        self._probing = None
        if not task.cancelled():
            self._hold(task.result())

    def _hold(self, found: str) -> None:
        self._found, self._until_s = found, self._monotonic_s() + self._lease_s

    async def _probe(self) -> str:
        try:
            await self._database.check()
            behind = await self._schema()
            await self._ledger.wallet_view(NO_WALLET)
        except DatabaseUnavailable as error:
            return f"not usable: {_first_line(error)}"
        except LedgerUnavailable as error:
            return f"the ledger is not usable: {_first_line(error)}"
        except Exception as error:
            log.exception("the database could not be checked")
            return f"not usable: {type(error).__name__}"
        return behind

    async def _schema(self) -> str:
        """Whether we may write, and the schema is one that this code knows. A newer one is: upgrades only add."""
        async with self._database.write(NOBODY) as connection:
            if connection.dialect.name == "postgresql":
                read_only = await connection.scalar(text("SELECT current_setting('transaction_read_only')"))
                if read_only == "on":
                    return "it is read-only: a standby, or one that was told so"
            revision = await connection.scalar(text("SELECT version_num FROM alembic_version"))
        if revision is None or str(revision) < HEAD:
            return f"the schema is behind: it is at {revision}, this version needs {HEAD}; run `farebox migrate`"
        return OK


def _folder(path: Path) -> str:
    """Whether settlements can be kept in the journal's folder."""
    try:
        disk = os.statvfs(path)
    except OSError as error:
        return f"the folder is not usable: {error.strerror}"
    if not os.access(path, os.W_OK | os.X_OK):
        return "the folder cannot be written to"
    free_bytes = disk.f_bavail * disk.f_frsize
    if free_bytes < FREE_BYTES_MIN:
        return f"its disk is full: {free_bytes // 2**20} MiB are free, {FREE_BYTES_MIN // 2**20} are needed"
    return OK


def _first_line(error: Exception) -> str:
    """What the error says, without what a database adds to it; anybody may read it."""
    return masked(str(error).split("\n", 1)[0])
