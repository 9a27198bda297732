"""The tenant's users: found by the tenant's own name for them, created on first sight.

An external id is taken as it comes, character for character: two spellings are two customers. It may not look like one
of our ids, because management paths take both.
"""

import asyncio
import unicodedata
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec
from sqlalchemy import Select, select, update
from sqlmodel import col

from gateway import errors
from gateway.clock import now_us
from gateway.database import Database, DatabaseUnavailable, Transactions, insert_new, of, within
from gateway.ids import new_id, reserved_prefix
from gateway.lru import LRU
from gateway.tables import EXTERNAL_ID_LENGTH_MAX, Customer

CUSTOMERS_MAX: Final = 100_000
"""How many customers' ids a process remembers; at some 300 bytes each."""

LOOK_UP_S: Final = 10.0
"""How long a customer may take to be found or created before the database is taken for away."""

LOOK_UPS_MAX: Final = 1_000
"""Look-ups under way at once. More are refused: an outage must not fill the memory."""

CUSTOMER_PREFIX: Final = "cus_"
UNSEEN_CATEGORIES: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})


class CustomerName(NamedTuple):
    """Which customer, in the tenant's own words."""

    tenant_id: str
    mode: str
    external_id: str


class CustomerInfo(msgspec.Struct, frozen=True):
    id: str
    external_id: str
    metadata: dict[str, Any]
    created_at_us: int


def check_external_id(external_id: str, *, param: str) -> None:
    """Raises ApiError 400 naming *param* for an id of a customer that we do not accept."""
    if not 1 <= len(external_id) <= EXTERNAL_ID_LENGTH_MAX:
        raise errors.invalid_request(f"A user's id has 1 to {EXTERNAL_ID_LENGTH_MAX} characters.", param=param)
    plain = external_id.isascii() and external_id.isprintable()
    if not plain and any(unicodedata.category(character) in UNSEEN_CATEGORIES for character in external_id):
        raise errors.invalid_request("A user's id has no control characters.", param=param)
    if external_id != external_id.strip():
        raise errors.invalid_request("A user's id neither begins nor ends with a space.", param=param)
    if reserved_prefix(external_id):
        prefix = external_id.partition("_")[0]
        raise errors.invalid_request(
            f"A user's id may not begin with {prefix}_, which our own ids begin with.", param=param
        )


class Customers:
    """Customers by name and by id. What is remembered is only ever an id, which never changes once it is there."""

    def __init__(
        self,
        database: Database,
        *,
        now_us: Callable[[], int] = now_us,
        new_id: Callable[[str], str] = new_id,
        customers_max: int = CUSTOMERS_MAX,
    ) -> None:
        self._database = database
        self._now_us = now_us
        self._new_id = new_id
        self._ids: LRU[CustomerName, str] = LRU(customers_max)
        self._there: LRU[CustomerName, bool] = LRU(customers_max)
        """Ids of ours that are known to be this tenant's, in place of the external id."""
        self._under_way: dict[CustomerName, asyncio.Task[str]] = {}

    async def resolve(self, tenant_id: str, mode: str, external_id: str, *, param: str = "user") -> str:
        """Our id (`cus_…`) of the customer, who is created if nobody has seen them before.

        Repeatable, also from several processes at once: one name, one customer.

        Raises:
            ApiError: 400 naming *param* when *external_id* is not acceptable.
            DatabaseUnavailable
        """
        name = CustomerName(tenant_id, mode, external_id)
        known = self._ids.get(name)
        if known is not None:
            return known
        check_external_id(external_id, param=param)
        task = self._under_way.get(name)
        if task is None:
            if len(self._under_way) >= LOOK_UPS_MAX:
                raise DatabaseUnavailable(f"{LOOK_UPS_MAX} look-ups are under way already")
            task = asyncio.create_task(self._find_or_create(name))
            self._under_way[name] = task
            task.add_done_callback(lambda done: self._landed(name, done))
        return await asyncio.shield(task)

    async def named(self, tenant_id: str, mode: str, reference: str, *, param: str = "customer_id") -> str:
        """Our id of the customer that *reference* names, which is our id or the tenant's name for them.

        Raises:
            ApiError: 404 for an id of ours that is not there; otherwise as `resolve`.
        """
        if reference.startswith(CUSTOMER_PREFIX):
            if not self._there.get(CustomerName(tenant_id, mode, reference)):
                await self.get(tenant_id, mode, reference)
                self._there.put(CustomerName(tenant_id, mode, reference), True)
            return reference
        return await self.resolve(tenant_id, mode, reference, param=param)

    def known(self, tenant_id: str, mode: str, reference: str, *, external: bool = False) -> str | None:
        """What `named` would answer without asking anybody, or `resolve` if the name is *external*."""
        name = CustomerName(tenant_id, mode, reference)
        if external or not reference.startswith(CUSTOMER_PREFIX):
            return self._ids.get(name)
        return reference if self._there.get(name) else None

    async def find(self, tenant_id: str, mode: str, reference: str) -> CustomerInfo:
        """The customer that *reference* names, by our id or the tenant's; looking creates nobody.

        Raises:
            ApiError: 404.
        """
        if "\x00" in reference:  # PostgreSQL keeps no such text, nor looks for it.
            raise errors.not_found("this customer")
        by_id = reference.startswith(CUSTOMER_PREFIX)
        column = col(Customer.id) if by_id else col(Customer.external_id)
        async with self._database.read(of(tenant_id, mode)) as connection:
            row = (await connection.execute(_customers(tenant_id, mode).where(column == reference))).one_or_none()
        if row is None:
            raise errors.not_found(f"customer {reference}")
        return CustomerInfo(*row)

    async def put(
        self,
        tenant_id: str,
        mode: str,
        external_id: str,
        metadata: dict[str, Any] | None,
        *,
        transactions: Transactions | None = None,
    ) -> tuple[CustomerInfo, bool]:
        """The customer of this name, and whether they are new. *metadata* replaces theirs, unless it is None.

        Raises:
            ApiError: 400 when *external_id* is not acceptable.
            DatabaseUnavailable
        """
        check_external_id(external_id, param="external_id")
        row = {
            "tenant": tenant_id,
            "mode": mode,
            "id": self._new_id("cus"),
            "external_id": external_id,
            "metadata": metadata or {},
            "created_at_us": self._now_us(),
        }
        named = _customers(tenant_id, mode).where(col(Customer.external_id) == external_id)
        async with (transactions or self._database).write(of(tenant_id, mode)) as connection:
            inserted = await connection.execute(insert_new(Customer, connection.dialect.name), row)
            if not inserted.rowcount and metadata is not None:
                known = update(Customer).where(
                    col(Customer.tenant) == tenant_id,
                    col(Customer.mode) == mode,
                    col(Customer.external_id) == external_id,
                )
                await connection.execute(known.values({Customer.__table__.c.metadata: metadata}))  # type: ignore[attr-defined]
            return CustomerInfo(*(await connection.execute(named)).one()), bool(inserted.rowcount)

    async def page(
        self, tenant_id: str, mode: str, *, before: str | None, limit: int, external_id: str | None = None
    ) -> list[CustomerInfo]:
        """Customers, newest first, from the one that came just before the id *before*."""
        query = _customers(tenant_id, mode).order_by(col(Customer.id).desc()).limit(limit)
        if before is not None:
            query = query.where(col(Customer.id) < before)
        if external_id is not None:
            query = query.where(col(Customer.external_id) == external_id)
        async with self._database.read(of(tenant_id, mode)) as connection:
            return [CustomerInfo(*row) for row in await connection.execute(query)]

    async def get(self, tenant_id: str, mode: str, customer_id: str) -> CustomerInfo:
        """Raises ApiError 404 when this tenant has no such customer in this mode."""
        return await self.find(tenant_id, mode, customer_id)

    async def _find_or_create(self, name: CustomerName) -> str:
        async with within(LOOK_UP_S):
            customer_id = await self._found_or_created(name)
        self._ids.put(name, customer_id)
        return customer_id

    async def _found_or_created(self, name: CustomerName) -> str:
        query = select(col(Customer.id)).where(
            col(Customer.tenant) == name.tenant_id,
            col(Customer.mode) == name.mode,
            col(Customer.external_id) == name.external_id,
        )
        rows = of(name.tenant_id, name.mode)
        async with self._database.read(rows) as connection:
            customer_id = (await connection.execute(query)).scalar_one_or_none()
        if customer_id is None:
            async with self._database.write(rows) as connection:
                await connection.execute(
                    insert_new(Customer, connection.dialect.name),
                    {
                        "tenant": name.tenant_id,
                        "mode": name.mode,
                        "id": self._new_id("cus"),
                        "external_id": name.external_id,
                        "metadata": {},
                        "created_at_us": self._now_us(),
                    },
                )
                # Whoever was first, the row that is there now is the customer.
                customer_id = (await connection.execute(query)).scalar_one()
        assert isinstance(customer_id, str)
        return customer_id

    def _landed(self, name: CustomerName, task: asyncio.Task[str]) -> None:
        del self._under_way[name]
        if not task.cancelled():
            task.exception()  # Seen here, in case all who waited have gone.


def _customers(tenant_id: str, mode: str) -> Select[Any]:
    """The columns of `CustomerInfo`."""
    metadata = Customer.__table__.c.metadata  # type: ignore[attr-defined]
    columns = (col(Customer.id), col(Customer.external_id), metadata, col(Customer.created_at_us))
    return select(*columns).where(col(Customer.tenant) == tenant_id, col(Customer.mode) == mode)
