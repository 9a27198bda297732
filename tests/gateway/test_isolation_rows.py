"""Every table of PostgreSQL, as the gateway's database role: what a transaction names is all that it sees and writes.

Each table has one row of each tenant and mode, made by hand: a table for which no row can be made fails the walk.
"""

from collections.abc import Iterator
from typing import Any, Final

import psycopg
import pytest
from sqlalchemy import JSON, BigInteger, Boolean, Integer, LargeBinary, Table
from sqlmodel import SQLModel

import gateway.tables
import ledger.store.tables  # noqa: F401  (fills the metadata)
from ledger.model import Scope
from ledger.store.row_security import naming

A, B = "ten_a", "ten_b"
MODES: Final = ("live", "test")
TABLES: Final = sorted(SQLModel.metadata.tables)
JOURNAL: Final = ("ledger_command", "ledger_transfer")
IDS: Final = {"tenant", "mode", "reservation", "wallet", "operation", "key", "customer_id", "endpoint", "id"}

VALUES: Final[dict[str, dict[str, Any]]] = {
    "api_keys": {"secret_hash": b"x" * 32},
    "apps": {"billing_mode": "user_pays", "on_disconnect": "drain"},
    "budgets": {"subject_type": "tenant"},
    "billable_metrics": {"overage_policy": "block"},
    "ledger_block": {"consumed": 0, "reserved": 0, "expired": 0, "revoked": 0, "live": True},
    "ledger_event": {"delivered_at_us": None},
    "ledger_reservation": {"state": "open"},
    "ledger_transfer": {"credit": "clearing"},
    "ledger_usage": {"markup": 0},
    "packs": {"credits": 1},
    "tenants": {"is_first": False},
    "payment_orders": {"kind": "checkout", "status": "open"},
    "webhook_deliveries": {"state": "pending"},
    "webhook_endpoints": {"status": "enabled"},
}
"""What the constraints of a table ask for, beyond a value of the column's type."""

NAMED: Final = [
    pytest.param(None, id="nothing"),
    pytest.param("SELECT set_config('farebox.scopes', '*', true), set_config('farebox.tenants', '*', true)", id="star"),
    pytest.param(naming([Scope("ten_c", "live")]), id="another"),
]


def has_mode(table: str) -> bool:
    """Whether its rows are live or test data. An API key's mode is its kind: it belongs to the tenant as a whole."""
    return "mode" in SQLModel.metadata.tables[table].columns and table != "api_keys"


def row(table: Table, tenant: str, mode: str) -> dict[str, Any]:
    """A row that the table accepts. Every text in it names the tenant and the mode."""
    made: dict[str, Any] = {}
    for column in table.columns:
        kind = column.type
        if isinstance(kind, JSON):
            made[column.name] = "{}"
        elif isinstance(kind, Boolean):
            made[column.name] = False
        elif isinstance(kind, BigInteger | Integer):
            made[column.name] = 1
        elif isinstance(kind, LargeBinary):
            made[column.name] = f"{tenant} {mode}".encode()
        else:
            made[column.name] = f"{column.name} of {tenant} {mode}"
    made.update(VALUES.get(table.name, {}))
    made.update({"id": tenant} if table.name == "tenants" else {"tenant": tenant})
    if "mode" in table.columns:
        made["mode"] = mode
    return made


def insert(connection: psycopg.Connection, table: str, values: dict[str, Any]) -> None:
    names = ", ".join(f'"{name}"' for name in values)
    marks = ", ".join(["%s"] * len(values))
    connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(values.values()))


def rows_of(table: str, tenant: str) -> Iterator[dict[str, Any]]:
    of_each = MODES if "mode" in SQLModel.metadata.tables[table].columns else MODES[:1]
    for mode in of_each:
        yield row(SQLModel.metadata.tables[table], tenant, mode)


def owner_of(table: str) -> str:
    return "id" if table == "tenants" else "tenant"


@pytest.fixture
def planted(migrated_database: psycopg.Connection, gateway_url: str) -> str:
    """The URL of a database in which both tenants have a row of each mode in each table. No trigger and no foreign key
    holds the superuser who plants them."""
    for table in TABLES:
        for tenant in (A, B):
            for values in rows_of(table, tenant):
                insert(migrated_database, table, values)
    return gateway_url


@pytest.fixture
def gateway(planted: str) -> Iterator[psycopg.Connection]:
    """A gateway's connection. What it does is not committed."""
    with psycopg.connect(planted) as connection:
        yield connection
        connection.rollback()


def refused(connection: psycopg.Connection, statement: str, *values: Any) -> str:
    """Why the statement is refused; what was done before stands."""
    with pytest.raises(psycopg.Error) as caught, connection.transaction():
        connection.execute(statement, values)
    return str(caught.value)


def test_the_gateways_login_cannot_get_around_the_policies(gateway: psycopg.Connection):
    roles = gateway.execute(
        "SELECT rolsuper OR rolbypassrls OR rolcreaterole FROM pg_roles WHERE pg_has_role(session_user, oid, 'MEMBER')"
    ).fetchall()
    assert roles == [(False,), (False,)]
    owned = gateway.execute("SELECT count(*) FROM pg_class WHERE pg_has_role(session_user, relowner, 'MEMBER')")
    assert owned.fetchone() == (0,)


@pytest.mark.parametrize("named", NAMED)
def test_who_names_no_tenant_of_ours_sees_no_row(gateway: psycopg.Connection, named: str | None):
    if named is not None:
        gateway.execute(named)
    found = {table: gateway.execute(f"SELECT count(*) FROM {table}").fetchone() for table in TABLES}
    assert found == dict.fromkeys(TABLES, (0,))


@pytest.mark.parametrize("mode", MODES)
def test_a_transaction_sees_the_rows_that_it_names_and_no_others(gateway: psycopg.Connection, mode: str):
    gateway.execute(naming([Scope(A, mode)]))
    for table in TABLES:
        found = gateway.execute(f"SELECT row_to_json(t)::text FROM {table} AS t").fetchall()
        expected = 1 if has_mode(table) else len(list(rows_of(table, A)))
        assert len(found) == expected, table
        for (text,) in found:
            assert A in text, table
            assert B not in text, table
            if has_mode(table):
                assert f'"mode":"{mode}"' in text, table


@pytest.mark.parametrize("table", TABLES)
def test_nothing_of_anothers_can_be_written(gateway: psycopg.Connection, table: str):
    model = SQLModel.metadata.tables[table]
    gateway.execute(naming([Scope(A, "live")]))
    beyond = [row(model, B, "live"), *([row(model, A, "test")] if has_mode(table) else [])]
    for values in beyond:
        values |= {name: f"new {value}" for name, value in values.items() if name in ("id", "external_id")}
        if table == "tenants":
            values["id"] = "ten_c"
        names = ", ".join(f'"{name}"' for name in values)
        marks = ", ".join(["%s"] * len(values))
        said = refused(gateway, f"INSERT INTO {table} ({names}) VALUES ({marks})", *values.values())
        assert "row-level security" in said
    owner = owner_of(table)
    if table in JOURNAL:
        assert "permission denied" in refused(gateway, f"UPDATE {table} SET {owner} = {owner}")
        assert "permission denied" in refused(gateway, f"DELETE FROM {table}")
        return
    seen = gateway.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert gateway.execute(f"UPDATE {table} SET {owner} = {owner}").rowcount == seen[0]  # type: ignore[index]
    assert "row-level security" in refused(gateway, f"UPDATE {table} SET {owner} = %s", B)
    if has_mode(table):
        assert "row-level security" in refused(gateway, f"UPDATE {table} SET mode = 'test'")
    assert gateway.execute(f"UPDATE {table} SET {owner} = {owner} WHERE {owner} = %s", (B,)).rowcount == 0
    assert gateway.execute(f"DELETE FROM {table} WHERE {owner} = %s", (B,)).rowcount == 0
    for verb in ("TRUNCATE {}", "ALTER TABLE {} DISABLE ROW LEVEL SECURITY", "DROP TABLE {}"):
        said = refused(gateway, verb.format(table))
        assert "permission denied" in said or "must be owner" in said


def test_look_ups_return_ids_and_nobody_else_may_call_them(
    gateway: psycopg.Connection, migrated_database: psycopg.Connection
):
    functions = migrated_database.execute(
        """
        SELECT p.oid::regprocedure::text, pg_get_function_result(p.oid), p.proconfig::text,
               has_function_privilege('public', p.oid, 'EXECUTE')
        FROM pg_proc AS p WHERE p.prosecdef AND p.pronamespace = 'public'::regnamespace
        """
    ).fetchall()
    calls = {
        "farebox_due_reservations(bigint,bigint)": "farebox_due_reservations(9, 100)",
        "farebox_due_wallets(bigint,bigint)": "farebox_due_wallets(9, 100)",
        "farebox_due_responses(bigint,bigint)": "farebox_due_responses(9, 100)",
        "farebox_due_lanes(bigint,bigint,bigint)": "farebox_due_lanes(9, 10, 100)",
        "farebox_due_top_ups(bigint,bigint)": "farebox_due_top_ups(9, 100)",
        "farebox_open_orders(bigint,text,bigint,bigint)": "farebox_open_orders(0, '', 9, 100)",
        "farebox_ledger_scopes()": "farebox_ledger_scopes()",
        "farebox_pending_events()": "farebox_pending_events()",
        "farebox_tenant_of_key(text)": f"farebox_tenant_of_key('id of {B} live')",
        "farebox_tenants()": "farebox_tenants()",
        "farebox_unfolded_scope(text,text)": f"farebox_unfolded_scope('{A}', 'test')",
    }
    assert {signature for signature, *_ in functions} == calls.keys(), "a look-up that this walk does not know"
    for signature, result, settings, public in functions:
        assert "search_path=pg_catalog," in settings, signature
        assert not public, signature
        columns = result.removeprefix("TABLE(").removesuffix(")").split(", ")
        assert {column.split()[0] for column in columns} <= IDS | {"text"}, signature
    # Called without a name, they answer for every tenant; afterwards the caller still sees nothing.
    for call in calls.values():
        assert B in str(gateway.execute(f"SELECT * FROM {call}").fetchall()), call
    assert gateway.execute("SELECT count(*) FROM tenants").fetchone() == (0,)
    gateway.execute(naming([Scope(A, "live")]))
    for call in calls.values():
        gateway.execute(f"SELECT * FROM {call}").fetchall()
    assert gateway.execute("SELECT id FROM tenants").fetchall() == [(A,)]
