"""What `docs/operations.md` and `docs/scaling.md` say of numbers and settings is what the code has."""

import re
from pathlib import Path

from gateway import postgres as own_tables
from gateway.settings import Settings
from ledger.store import postgres as ledger_store
from ledger.store import postgres_batch as batches
from ledger.store import postgres_connection as connections

ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
SCALING = (ROOT / "docs" / "scaling.md").read_text()

PROCESSES = {"4 hosts of 2 processes": 8, "16 hosts of 4": 64}
REQUESTS = (200, 5_000)
DAY_S = 86_400
SUPERUSERS = 3
"""What PostgreSQL keeps back of its connections, by default."""


def row(page: str, first: str) -> list[str]:
    """The other cells of the last table's line that begins with *first*."""
    line = [line for line in page.splitlines() if line.startswith(f"| {first} |")][-1]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_the_connections_are_those_of_the_code() -> None:
    writers, reads, own = batches.BATCHES_AT_ONCE, ledger_store.READERS, own_tables.CONNECTIONS_MAX
    total = writers + reads + own
    assert f"at most {total} connections to PostgreSQL: {writers} for the ledger's batches, {reads}" in (
        OPERATIONS.replace("\n", " ")
    )
    assert f"{own} for tenants" in OPERATIONS
    assert f"that is {(100 - SUPERUSERS) // total} processes" in OPERATIONS
    assert f"give the pool {total} for each" in OPERATIONS
    assert [int(cell) for cell in row(SCALING, "connections, at most")] == [
        processes * total for processes in PROCESSES.values()
    ]


def test_the_limits_are_those_of_the_code() -> None:
    limits = [
        [connections.CONNECT_S, connections.CONNECT_ALL_S],
        [batches.LOCK_WAIT_MS / 1000],
        [batches.BATCH_S],
        [ledger_store.READ_S],
        [own_tables.ACQUIRE_TIMEOUT_S, own_tables.TRANSACTION_TIMEOUT_S],
        [connections.STATEMENT_MS / 1000, connections.ABANDONED_MS / 1000],
    ]
    table = OPERATIONS.partition("| what | limit |")[2].partition("\n\n")[0].splitlines()[2:]
    assert [[float(number) for number in re.findall(r"(\d+) s", line)] for line in table] == limits


def test_the_settings_that_are_explained_are_settings() -> None:
    table = OPERATIONS.partition("## Settings")[2].partition("## ")[0]
    names = [
        name for line in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)
    ]
    assert {"database_url", "redis_url", "journal_dir"} <= set(names) <= Settings.model_fields.keys()


def test_the_forms_of_the_database_url_are_understood() -> None:
    forms = re.findall(r"`((?:sqlite|postgresql)://[^`…]*)`", OPERATIONS)
    assert len(forms) >= 3
    for form in forms:
        assert Settings(database_url=form).database_url == form


def test_the_model_of_a_fleet_is_its_own_arithmetic() -> None:
    def bytes_of(first: str) -> int:
        return int(row(OPERATIONS, first)[0].replace(",", ""))

    log = bytes_of("its write-ahead log, which is also what a standby receives and an archive keeps")
    disk = bytes_of("all tables on PostgreSQL")
    wait_ms = [int(cell.removesuffix(" ms")) for cell in row(SCALING, "`t`, assumed")]
    commands = [int(cell.replace(",", "")) for cell in row(SCALING, "commands a second")]
    batches = [int(cell.replace(",", "")) for cell in row(SCALING, "batches a second, at most")]
    for at, (processes, requests) in enumerate(zip(PROCESSES.values(), REQUESTS, strict=True)):
        assert commands[at] == 2 * requests
        assert batches[at] == processes * 1000 // wait_ms[at]
        assert float(row(SCALING, "commands a batch")[at]) == round(max(1, commands[at] / batches[at]), 1)
        assert float(row(SCALING, "log a second")[at].removesuffix(" MB")) == float(f"{requests * log / 1e6:.2g}")
        amount, unit = row(SCALING, "disk a day")[at].split()
        scale = {"GB": 1e9, "TB": 1e12}[unit]
        assert float(amount) == float(f"{requests * disk * DAY_S / scale:.2g}")
