"""The restore drill of `docs/operations.md`: a backup that is taken under load, restored, and verified."""

import asyncio
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.e2e.conftest import Install
from tests.e2e.farebox import Farebox, until_async
from tests.e2e.load import Seen, Traffic, chat

USERS = 3
CLIENTS = 8
BEFORE = 60
"""Answers that have come before a backup begins; as many come after it has ended."""

WITHIN_S = 60


def next_body(rng: random.Random) -> dict[str, Any]:
    """Whole answers and streams, so that reservations are open at any moment."""
    return chat("meter", stream=rng.random() < 0.5, max_tokens=rng.randint(5, 40))


def charged(seen: list[Seen]) -> set[str]:
    """Requests whose clients have a whole answer: they are charged, durably."""
    return {one.request_id for one in seen if one.complete and one.status == 200 and one.request_id}


async def backed_up_under_load(farebox: Farebox, back_up: Callable[[], None]) -> tuple[set[str], set[str]]:
    """Take a backup while clients ask; what was charged before it began, and in the end."""
    gateway = farebox.serve()
    for user in range(USERS):
        farebox.top_up(gateway, f"user-{user}", millicredits=10**9)
    users = [farebox.headers(f"user-{user}") for user in range(USERS)]
    traffic = Traffic(gateway.base_url, users, next_body, random.Random(3))
    running = asyncio.create_task(traffic.run(clients=CLIENTS))

    async def more(wanted: int) -> None:
        await until_async(
            lambda: running.done() or len(charged(traffic.seen)) >= wanted, within_s=WITHIN_S, what="load"
        )

    await more(BEFORE)
    before = charged(traffic.seen)
    await asyncio.to_thread(back_up)
    await more(len(charged(traffic.seen)) + BEFORE)
    traffic.stop()
    seen = await running
    assert {one.status for one in seen} == {200}
    assert gateway.stop() == 0
    return before, charged(seen)


def settled(database: Path) -> set[str]:
    with closing(sqlite3.connect(database)) as connection:
        query = "SELECT request_id FROM ledger_reservation WHERE state = 'committed'"
        return {request_id for (request_id,) in connection.execute(query)}


async def test_a_backup_of_sqlite_under_load_is_whole(install: Install, tmp_path: Path) -> None:
    """SQLite's own backup, which is what `.backup` and `VACUUM INTO` of its shell do, too."""
    farebox = install()
    backup = tmp_path / "backup.db"

    def back_up() -> None:
        with (
            closing(sqlite3.connect(farebox.database, timeout=WITHIN_S)) as there,
            closing(sqlite3.connect(backup)) as here,
        ):
            there.backup(here)

    before, after = await backed_up_under_load(farebox, back_up)
    kept = settled(backup)
    assert before <= kept
    assert after - kept, "the backup was taken while requests went on"
    assert after <= settled(farebox.database)
    url = f"sqlite:///{backup}"
    verified = farebox.run("verify", FAREBOX_DATABASE_URL=url)
    assert verified.code == 0, verified.out + verified.err
    assert "everything holds" in verified.out
    assert farebox.run("grant", "user-0", "5", FAREBOX_DATABASE_URL=url).code == 0
