"""What `/health/ready` says: 503 and the reason in words, in time, and without asking the database too often."""

import asyncio
import os
import sqlite3
import time
from collections import namedtuple
from contextlib import closing
from pathlib import Path

import pytest

import gateway.readiness
from gateway.database import DatabaseUnavailable
from gateway.readiness import FREE_BYTES_MIN, TIMEOUT_S, Readiness
from ledger.store.lock import ProcessLock
from tests.gateway.office import Office, open_office

MARGIN_S = 5.0
"""Two busy cores."""


def fresh(office: Office, **options) -> Readiness:
    """One that asks each time."""
    services = office.gateway.services
    given = {"degraded": dict, "draining": lambda: False, "lease_s": 0.0, **options}
    return Readiness(
        database=services.database, ledger=services.ledger, journal_dir=services.settings.journal_dir, **given
    )


async def test_all_is_well(office: Office):
    ready = await office.ask_plain("/health/ready")
    checks = {"database": "ok", "journal": "ok", "process": "ok"}
    assert (ready.status_code, ready.json()) == (200, {"status": "ok", "checks": checks, "degraded": {}})


async def test_a_gateway_that_is_about_to_go_is_not_ready_and_still_serves(office: Office):
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 100_000})
    office.gateway.draining = True
    ready = await office.ask_plain("/health/ready")
    assert (ready.status_code, ready.json()["checks"]["process"]) == (503, "shutting down")
    assert (await office.ask_plain("/health/live")).status_code == 200
    assert (await office.chat()).status_code == 200


async def test_what_is_degraded_is_told_and_does_not_make_it_unready(office: Office):
    report = await fresh(office, degraded=lambda: {"redis": "away since 3 s"}).report()
    assert report.ready
    assert report.degraded == {"redis": "away since 3 s"}


async def test_a_database_that_fails_is_told_without_its_details(office: Office, monkeypatch: pytest.MonkeyPatch):
    async def unavailable() -> None:
        raise DatabaseUnavailable("cannot reach postgresql://farebox:hunter2@db/farebox\nDETAIL:  Failing row is (…)")

    monkeypatch.setattr(office.gateway.services.database, "check", unavailable)
    report = await fresh(office).report()
    assert not report.ready
    assert report.checks["database"] == "not usable: cannot reach postgresql://farebox:…@db/farebox"


@pytest.mark.sqlite
async def test_a_database_that_is_locked_for_writing_makes_it_unready_in_time(office: Office, tmp_path: Path):
    lock = ProcessLock(str(tmp_path / "farebox.db"))
    readiness = fresh(office)
    with lock:
        began_s = time.monotonic()
        report = await readiness.report()
        assert time.monotonic() - began_s < TIMEOUT_S + MARGIN_S
        assert report.checks["database"] == f"no answer within {TIMEOUT_S:g} s"
    deadline = time.monotonic() + 30
    while not (await readiness.report()).ready:
        assert time.monotonic() < deadline, "it did not become ready again by itself"
    lock.close()
    await readiness.close()


async def test_a_database_that_hangs_is_asked_once_however_many_ask(office: Office, monkeypatch: pytest.MonkeyPatch):
    asked, answer = 0, asyncio.Event()

    async def hang() -> None:
        nonlocal asked
        asked += 1
        await answer.wait()

    monkeypatch.setattr(office.gateway.services.database, "check", hang)
    readiness = fresh(office, timeout_s=0.01)
    for _ in range(3):
        reports = await asyncio.gather(*(readiness.report() for _ in range(20)))
        assert {report.checks["database"] for report in reports} == {"no answer within 0.01 s"}
    assert asked == 1
    answer.set()
    deadline = time.monotonic() + 30
    while not (await readiness.report()).ready:
        assert time.monotonic() < deadline, "it did not become ready again by itself"


async def test_an_answer_holds_for_a_while(office: Office, monkeypatch: pytest.MonkeyPatch):
    now_s = 100.0
    readiness = fresh(office, lease_s=1.0, monotonic_s=lambda: now_s)
    assert (await readiness.report()).ready

    async def unavailable() -> None:
        raise DatabaseUnavailable("gone")

    monkeypatch.setattr(office.gateway.services.database, "check", unavailable)
    now_s = 100.9
    assert (await readiness.report()).ready
    now_s = 101.1
    assert not (await readiness.report()).ready


@pytest.mark.sqlite
async def test_a_gateway_whose_file_was_removed_or_replaced_is_not_ready(office: Office, tmp_path: Path):
    readiness = fresh(office)
    path, kept = tmp_path / "farebox.db", tmp_path / "kept.db"
    assert (await readiness.report()).ready
    path.rename(kept)
    assert "no longer the file" in (await readiness.report()).checks["database"]
    path.write_bytes(kept.read_bytes())
    assert not (await readiness.report()).ready
    path.unlink()
    kept.rename(path)
    assert (await readiness.report()).ready


@pytest.mark.sqlite
async def test_a_schema_that_is_behind_is_told(office: Office, tmp_path: Path):
    with closing(sqlite3.connect(tmp_path / "farebox.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    found = (await fresh(office).report()).checks["database"]
    assert "it is at 0001" in found
    assert "farebox migrate" in found


@pytest.mark.sqlite
async def test_a_newer_schema_is_served(office: Office, tmp_path: Path):
    with closing(sqlite3.connect(tmp_path / "farebox.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    assert (await fresh(office).report()).ready


async def test_a_journal_that_cannot_be_kept_makes_it_unready(office: Office, monkeypatch: pytest.MonkeyPatch):
    folder = office.gateway.services.settings.journal_dir
    readiness = fresh(office)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert (await readiness.report()).checks["journal"] == "the folder cannot be written to"
    monkeypatch.undo()
    disk = namedtuple("disk", "f_bavail f_frsize")
    monkeypatch.setattr(gateway.readiness.os, "statvfs", lambda path: disk(FREE_BYTES_MIN // 4096 - 1, 4096))
    assert "its disk is full" in (await readiness.report()).checks["journal"]
    monkeypatch.undo()
    folder.rename(folder.with_name("moved"))
    assert "not usable: No such file" in (await readiness.report()).checks["journal"]


async def test_the_log_tells_when_it_changes_and_only_then(office: Office, monkeypatch: pytest.MonkeyPatch, log):
    readiness = fresh(office)
    await readiness.report()
    assert log.getvalue() == ""
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        for _ in range(3):
            await readiness.report()
    for _ in range(3):
        await readiness.report()
    assert [("not ready" in line, "ready again" in line) for line in log.getvalue().splitlines()] == [
        (True, False),
        (False, True),
    ]


async def test_the_gauge_says_what_the_check_says(tmp_path: Path):
    async with open_office(tmp_path) as office:
        deadline = time.monotonic() + 30
        while "farebox_database_up 1.0" not in (await office.ask_plain("/metrics")).text:
            assert time.monotonic() < deadline
            await asyncio.sleep(0)
