"""Customers as they are stored: the statements that read and change them. Who is erased is in none of them."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import Select, Update, select, update
from sqlmodel import col

from gateway.identity.thresholds import thresholds_of
from gateway.tables import Customer

CUSTOMER_PREFIX: Final = "cus_"


class CustomerInfo(msgspec.Struct, frozen=True):
    id: str
    external_id: str
    metadata: dict[str, Any]
    created_at_us: int
    settings: dict[str, Any] = {}
    version: int = 1


class CustomerChange(msgspec.Struct, frozen=True, kw_only=True):
    """What is not None changes. *metadata* is replaced as a whole, of *settings* what is named."""

    external_id: str | None = None
    metadata: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None


def of_all(tenant_id: str, mode: str) -> tuple[Any, ...]:
    return (col(Customer.tenant) == tenant_id, col(Customer.mode) == mode, col(Customer.erased_at_us).is_(None))


def select_customers(tenant_id: str, mode: str) -> Select[Any]:
    """The columns of `CustomerInfo`, and what is due. Nobody finds who is erased, or about to be."""
    metadata = Customer.__table__.c.metadata  # type: ignore[attr-defined]
    columns = (col(Customer.id), col(Customer.external_id), metadata, col(Customer.created_at_us))
    more = (col(Customer.settings), col(Customer.version), col(Customer.welcome))
    return select(*columns, *more).where(*of_all(tenant_id, mode))


def info_of(row: Sequence[Any]) -> CustomerInfo:
    """All columns of `select_customers` but the last, which is what is due."""
    return CustomerInfo(*row[:-1])


def named(external_id: str) -> Any:
    return col(Customer.external_id) == external_id


def referred(reference: str) -> Any:
    return col(Customer.id) == reference if reference.startswith(CUSTOMER_PREFIX) else named(reference)


def merged(change: CustomerChange, settings: Mapping[str, Any]) -> CustomerChange:
    if change.settings is None:
        return change
    return msgspec.structs.replace(change, settings={**settings, **change.settings})


def update_customers(tenant_id: str, mode: str, change: CustomerChange) -> Update:
    """Of those who are not erased. Every change is a version; to change nothing is none."""
    table = Customer.__table__  # type: ignore[attr-defined]
    asked = {"external_id": change.external_id, "metadata": change.metadata, "settings": change.settings}
    values: dict[Any, Any] = {table.c[column]: value for column, value in asked.items() if value is not None}
    changed = 1 if values else 0
    if change.settings is not None:
        values[table.c.own_alerts] = thresholds_of(change.settings).own
    return update(table).where(*of_all(tenant_id, mode)).values({**values, table.c.version: table.c.version + changed})
