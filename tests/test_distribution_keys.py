"""Every key begins with the tenant, so that a distributed database can keep a tenant's rows together.

Citus and its like ask that each primary key, unique key and foreign key of a distributed table holds the distribution
column; ours begin with it. What does not is listed here with its reason, and `docs/scaling.md` says it too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Inspector, Table, UniqueConstraint, create_engine, inspect
from sqlmodel import SQLModel

import gateway.tables  # noqa: F401  (fills the metadata)
import ledger.store.tables  # noqa: F401  (fills the metadata)
from gateway.migrations import migrate

ROOT = Path(__file__).resolve().parent.parent

DISTRIBUTED_BY = {"tenants": "id"}
"""The tenant's own row has its id for a key; every other table calls it `tenant`."""

EXCEPTIONS = {
    "api_keys_id": "a key is looked up by its id before its tenant is known",
    "tenants_one_is_first": "there is one first tenant in the installation",
}
"""Unique indexes over all tenants: what each is for. A distributed database needs another form of them."""

TABLES = sorted(SQLModel.metadata.tables)


def distribution_column(table: str) -> str:
    return DISTRIBUTED_BY.get(table, "tenant")


def keys_of(table: Table) -> Iterator[tuple[str, list[str]]]:
    """Every primary and unique key, by its name, with its columns."""
    yield f"{table.name}_pkey", [column.name for column in table.primary_key]
    for constraint in table.constraints:
        if isinstance(constraint, UniqueConstraint):
            yield str(constraint.name), [column.name for column in constraint.columns]
    for index in table.indexes:
        if index.unique:
            yield str(index.name), [column.name for column in index.columns]


def keys_in(inspector: Inspector, table: str) -> Iterator[tuple[str, list[Any]]]:
    """The same of a database as it is."""
    yield f"{table}_pkey", inspector.get_pk_constraint(table)["constrained_columns"]
    for constraint in inspector.get_unique_constraints(table):
        yield str(constraint["name"]), constraint["column_names"]
    for index in inspector.get_indexes(table):
        if index["unique"]:
            yield str(index["name"]), index["column_names"]


@pytest.mark.parametrize("name", TABLES)
def test_every_key_of_a_model_begins_with_the_tenant(name: str) -> None:
    column = distribution_column(name)
    others = {key for key, columns in keys_of(SQLModel.metadata.tables[name]) if columns[:1] != [column]}
    assert others <= EXCEPTIONS.keys()


@pytest.mark.parametrize("name", TABLES)
def test_every_reference_stays_with_its_tenant(name: str) -> None:
    for constraint in SQLModel.metadata.tables[name].foreign_key_constraints:
        first = constraint.elements[0]
        assert first.parent.name == distribution_column(name)
        assert first.column.name == distribution_column(first.column.table.name)


@pytest.fixture(params=["sqlite", "postgres"])
def migrated(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Inspector]:
    sqlite = request.param == "sqlite"
    url: str = f"sqlite:///{tmp_path / 'farebox.db'}" if sqlite else request.getfixturevalue("postgres_url")
    migrate(url)
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    yield inspect(engine)
    engine.dispose()


def test_a_migrated_database_has_no_other_keys(migrated: Inspector) -> None:
    others = set()
    tables = set(migrated.get_table_names()) - {"alembic_version"}
    assert tables == set(TABLES)
    for table in tables:
        column = distribution_column(table)
        others |= {key for key, columns in keys_in(migrated, table) if columns[:1] != [column]}
        for key in migrated.get_foreign_keys(table):
            assert key["constrained_columns"][0] == column, table
            assert key["referred_columns"][0] == distribution_column(key["referred_table"]), table
    assert others == EXCEPTIONS.keys()


def test_the_page_lists_the_exceptions() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    for name in EXCEPTIONS:
        assert f"`{name}`" in page
