"""The gateway's schema: what every table promises, whatever writes to it."""

import subprocess
import sys
from typing import Any

import pytest
from sqlalchemy import Table, UniqueConstraint, insert
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.schema import CreateTable
from sqlmodel import SQLModel

from gateway.database import Database, of
from gateway.tables import ApiKey, App, AssetVersion, Customer, Tenant

OURS = ["tenants", "assets", "apps", "api_keys", "customers", "billable_metrics", "metering_rules"]
WITH_MODE = ["api_keys", "customers", "billable_metrics", "metering_rules"]


def table(name: str) -> Table:
    return SQLModel.metadata.tables[name]


@pytest.mark.parametrize("name", [name for name in OURS if name != "tenants"])
def test_tenant_and_mode_come_first_in_every_key(name: str):
    first = ["tenant", "mode"] if name in WITH_MODE else ["tenant"]
    keys = [table(name).primary_key, *(c for c in table(name).constraints if isinstance(c, UniqueConstraint))]
    for key in keys:
        assert [column.name for column in key.columns][: len(first)] == first


@pytest.mark.parametrize("name", OURS)
def test_the_schema_can_be_written_for_every_database(name: str):
    for dialect in (sqlite.dialect(), postgresql.dialect()):
        assert name in str(CreateTable(table(name)).compile(dialect=dialect))


def test_importing_the_tables_opens_nothing():
    program = "import gateway.tables, sys; sys.exit('aiosqlite' in sys.modules or 'gateway.database' in sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


TENANT: dict[str, Any] = {"id": "ten_1", "name": "One", "asset_code": "credit", "settings": {}, "created_at_us": 1}
APP: dict[str, Any] = {"tenant": "ten_1", "id": "app_1", "name": "One", "settings": {}, "created_at_us": 1}
ASSET: dict[str, Any] = {
    "tenant": "ten_1",
    "code": "credit",
    "effective_from_us": 0,
    "scale": 9,
    "usd_value_picos": 10**10,
}
KEY: dict[str, Any] = {
    "tenant": "ten_1",
    "mode": "live",
    "id": "key_1",
    "app_id": "app_1",
    "secret_hash": b"x" * 32,
    "last4": "abcd",
    "scopes": [],
    "created_at_us": 1,
}
CUSTOMER: dict[str, Any] = {
    "tenant": "ten_1",
    "mode": "live",
    "id": "cus_1",
    "external_id": "alice",
    "metadata_": {},
    "created_at_us": 1,
}


@pytest.mark.parametrize(
    ("model", "row"),
    [
        (App, APP | {"id": "app_2", "markup_bps": -1}),
        (App, APP | {"id": "app_2", "markup_bps": 1_000_001}),
        (App, APP | {"id": "app_2", "billing_mode": "nobody_pays"}),
        (App, APP | {"id": "app_2", "on_disconnect": "refund"}),
        (App, APP | {"tenant": "ten_9"}),
        (Tenant, TENANT | {"id": "ten_2", "unfunded_limit": -1}),
        (Tenant, TENANT | {"id": "ten_2", "is_first": True}),
        (AssetVersion, ASSET | {"effective_from_us": 1, "scale": 10}),
        (AssetVersion, ASSET | {"effective_from_us": 1, "usd_value_picos": 0}),
        (ApiKey, KEY),
        (ApiKey, KEY | {"mode": "test"}),
        (ApiKey, KEY | {"id": "key_2", "mode": "root"}),
        (ApiKey, KEY | {"id": "key_2", "mode": "admin"}),
        (ApiKey, KEY | {"id": "key_2", "app_id": None}),
        (ApiKey, KEY | {"id": "key_2", "app_id": "app_9"}),
        (ApiKey, KEY | {"id": "key_2", "secret_hash": b"short"}),
        (Customer, CUSTOMER | {"id": "cus_2"}),
        (Customer, CUSTOMER | {"id": "cus_2", "external_id": ""}),
        (Customer, CUSTOMER | {"id": "cus_2", "external_id": "a" * 257}),
        (Customer, CUSTOMER | {"id": "cus_2", "external_id": "bob", "mode": "admin"}),
    ],
)
async def test_the_database_refuses_what_must_not_be(database: Database, model: type[SQLModel], row: dict[str, Any]):
    rows = of("ten_1", "live", "test", "admin")
    async with database.write(rows) as connection:
        await connection.execute(insert(Tenant).values(**TENANT | {"is_first": True}))
        for planted, values in ((AssetVersion, ASSET), (App, APP), (ApiKey, KEY), (Customer, CUSTOMER)):
            await connection.execute(insert(planted).values(**values))
    touched = of(row["tenant"] if "tenant" in row else row["id"], *rows.modes)
    with pytest.raises(IntegrityError):
        async with database.write(touched) as connection:
            await connection.execute(insert(model).values(**row))


async def test_one_name_may_be_a_customer_of_each_tenant_and_mode(database: Database):
    for tenant in ("ten_1", "ten_2"):
        async with database.write(of(tenant, "live", "test")) as connection:
            await connection.execute(insert(Tenant).values(**TENANT | {"id": tenant}))
            for mode in ("live", "test"):
                await connection.execute(insert(Customer).values(**CUSTOMER | {"tenant": tenant, "mode": mode}))
