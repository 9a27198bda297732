"""The tenant's users: found by the tenant's own name for them, created on first sight.

An external id is taken as it comes, character for character: two spellings are two customers. It may not look like one
of our ids, because management paths take both.

How it works. A customer who is new to a tenant with a default grant is due it: their row says so until they have it.
Whoever meets such a row gives it first, so it does not matter who dies in between. A process remembers the ids of
those who are due nothing more, so that a request of theirs costs no look-up. A name may come to mean another customer,
by a rename or an erasure: what is remembered is dropped on word of that, and looked at again, behind a request that
does not wait for it, once its lease has run out.
"""

import asyncio
import time
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import msgspec
from sqlalchemy import Row, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway import errors
from gateway.clock import now_us
from gateway.database import Database, DatabaseUnavailable, Transactions, insert_new, of, within
from gateway.errors import ApiError
from gateway.identity.customer_rows import (
    CUSTOMER_PREFIX,
    CustomerChange,
    CustomerInfo,
    info_of,
    merged,
    named,
    of_all,
    referred,
    select_customers,
    update_customers,
)
from gateway.identity.default_grant import GiveWelcome, Welcome, welcome_due
from gateway.identity.thresholds import thresholds_of
from gateway.ids import new_id, reserved_prefix
from gateway.lru import LRU
from gateway.tables import EXTERNAL_ID_LENGTH_MAX, Customer, Tenant

CUSTOMERS_MAX: Final = 100_000
"""How many customers' ids a process remembers; at some 300 bytes each."""

LOOK_UP_S: Final = 10.0
"""How long a customer may take to be found or created before the database is taken for away."""

LOOK_UPS_MAX: Final = 1_000
"""Look-ups under way at once. More are refused: an outage must not fill the memory."""

LEASE_S: Final = 60.0
"""How long a remembered id is used before its name is looked at again, where nobody tells of a change."""

UNSEEN_CATEGORIES: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})


class CustomerName(NamedTuple):
    """Which customer, in the tenant's own words."""

    tenant_id: str
    mode: str
    external_id: str


CheckSettings = Callable[[Mapping[str, Any], Mapping[str, Any]], None]
"""Raises ApiError for settings that do not go together: as they stand before a change, and as they would after it."""


class Remembered(NamedTuple):
    id: str
    until_s: float


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
    """Customers by name and by id.

    Args:
        welcome: gives new customers the default grant that they are due; without it, that waits for a process that can.
        monotonic_s: the clock of the leases.
    """

    def __init__(
        self,
        database: Database,
        *,
        welcome: GiveWelcome | None = None,
        now_us: Callable[[], int] = now_us,
        monotonic_s: Callable[[], float] = time.monotonic,
        new_id: Callable[[str], str] = new_id,
        customers_max: int = CUSTOMERS_MAX,
    ) -> None:
        self._database = database
        self._welcome = welcome
        self._now_us = now_us
        self._monotonic_s = monotonic_s
        self._new_id = new_id
        self._ids: LRU[CustomerName, Remembered] = LRU(customers_max)
        """By the tenant's name, or by our id in its place: no name looks like one of our ids."""
        self._under_way: dict[CustomerName, asyncio.Task[str]] = {}
        self._forgotten = 0
        """How often all was."""

    async def resolve(self, tenant_id: str, mode: str, external_id: str, *, param: str = "user") -> str:
        """Our id (`cus_…`) of the customer, who is created if nobody has seen them before, and has their default grant.

        Repeatable, also from several processes at once: one name, one customer, one grant.

        Raises:
            ApiError: 400 naming *param* when *external_id* is not acceptable, 404 while its customer is being erased.
            DatabaseUnavailable
            LedgerUnavailable: the default grant is due and could not be given.
        """
        name = CustomerName(tenant_id, mode, external_id)
        known = self._ids.get(name)
        if known is None:
            check_external_id(external_id, param=param)
            return await asyncio.shield(self._look_up(name))
        if self._monotonic_s() >= known.until_s and len(self._under_way) < LOOK_UPS_MAX:
            self._look_up(name)
        return known.id

    async def named(self, tenant_id: str, mode: str, reference: str, *, param: str = "customer_id") -> str:
        """Our id of the customer that *reference* names, which is our id or the tenant's name for them.

        Raises:
            ApiError: 404 for an id of ours that is not there; otherwise as `resolve`.
        """
        if not reference.startswith(CUSTOMER_PREFIX):
            return await self.resolve(tenant_id, mode, reference, param=param)
        if self.known(tenant_id, mode, reference) is None:
            until_s, forgotten = self._monotonic_s() + LEASE_S, self._forgotten
            row = await self._row(tenant_id, mode, reference)
            await self._greet(tenant_id, mode, row.id, row.welcome)
            if self._forgotten == forgotten:  # Otherwise they may have been erased since we read.
                self._ids.put(CustomerName(tenant_id, mode, reference), Remembered(row.id, until_s))
        return reference

    def known(self, tenant_id: str, mode: str, reference: str, *, external: bool = False) -> str | None:
        """What `named` would answer without asking anybody, or `resolve` if the name is *external*."""
        if external and reference.startswith(CUSTOMER_PREFIX):
            return None
        found = self._ids.get(CustomerName(tenant_id, mode, reference))
        return None if found is None or self._monotonic_s() >= found.until_s else found.id

    async def find(self, tenant_id: str, mode: str, reference: str) -> CustomerInfo:
        """The customer that *reference* names, by our id or the tenant's; looking creates nobody.

        Raises:
            ApiError: 404.
        """
        return info_of(await self._row(tenant_id, mode, reference))

    async def put(
        self,
        tenant_id: str,
        mode: str,
        external_id: str,
        change: CustomerChange,
        *,
        check: CheckSettings = lambda before, settings: None,
        transactions: Transactions,
    ) -> tuple[CustomerInfo, bool]:
        """The customer of this name with *change*, and whether they are new. `named` gives them what they are due.

        Raises:
            ApiError: 400 when *external_id* is not acceptable, 404 while they are being erased; what *check* raises.
            DatabaseUnavailable
        """
        check_external_id(external_id, param="external_id")
        name = CustomerName(tenant_id, mode, external_id)
        async with transactions.write(of(tenant_id, mode)) as connection:
            created = await self._create(connection, name, change)
            query = select_customers(tenant_id, mode).where(named(external_id))
            if created:
                check({}, change.settings or {})
            else:
                before = (await connection.execute(query.with_for_update())).one_or_none()
                changed = change if before is None else merged(change, before.settings)
                check({} if before is None else before.settings, changed.settings or {})
                await connection.execute(update_customers(tenant_id, mode, changed).where(named(external_id)))
            found = (await connection.execute(query)).one_or_none()
        if found is None:
            raise _being_erased(external_id)
        return info_of(found), created

    async def change(
        self,
        tenant_id: str,
        mode: str,
        reference: str,
        change: CustomerChange,
        *,
        version: int | None = None,
        check: CheckSettings = lambda before, settings: None,
        transactions: Transactions | None = None,
    ) -> CustomerInfo:
        """Change a customer whom *reference* names, if they are at *version*; None takes any.

        Raises:
            ApiError: 404; 412 at another version; 400 or 409 for a new external id that cannot be or is another's;
                what *check* raises.
            DatabaseUnavailable
        """
        if change.external_id is not None:
            check_external_id(change.external_id, param="external_id")
        query = select_customers(tenant_id, mode).where(referred(reference))
        try:
            async with (transactions or self._database).write(of(tenant_id, mode)) as connection:
                # Locked, so that of two who read one version none takes the other's change back.
                before = (await connection.execute(query.with_for_update())).one_or_none()
                if before is None:
                    raise errors.not_found(f"customer {reference}")
                if version not in (None, before.version):
                    raise errors.version_mismatch(before.version)
                by_id = select_customers(tenant_id, mode).where(col(Customer.id) == before.id)
                changed = merged(change, before.settings)
                check(before.settings, changed.settings or {})
                await connection.execute(
                    update_customers(tenant_id, mode, changed).where(col(Customer.id) == before.id)
                )
                return info_of((await connection.execute(by_id)).one())
        except IntegrityError:
            raise errors.already_exists("customer with this external_id", param="external_id") from None

    async def page(
        self, tenant_id: str, mode: str, *, before: str | None, limit: int, external_id: str | None = None
    ) -> list[CustomerInfo]:
        """Customers, newest first, from the one that came just before the id *before*."""
        query = select_customers(tenant_id, mode).order_by(col(Customer.id).desc()).limit(limit)
        if before is not None:
            query = query.where(col(Customer.id) < before)
        if external_id is not None:
            query = query.where(named(external_id))
        async with self._database.read(of(tenant_id, mode)) as connection:
            return [info_of(row) for row in await connection.execute(query)]

    async def get(self, tenant_id: str, mode: str, customer_id: str) -> CustomerInfo:
        """Raises ApiError 404 when this tenant has no such customer in this mode."""
        return await self.find(tenant_id, mode, customer_id)

    def forget(self) -> None:
        """Look every name up anew: some may mean another customer, or nobody."""
        self._ids.clear()
        self._under_way.clear()
        self._forgotten += 1

    async def _row(self, tenant_id: str, mode: str, reference: str) -> Row[Any]:
        if "\x00" in reference:  # PostgreSQL keeps no such text, nor looks for it.
            raise errors.not_found("this customer")
        query = select_customers(tenant_id, mode).where(referred(reference))
        async with self._database.read(of(tenant_id, mode)) as connection:
            row: Row[Any] | None = (await connection.execute(query)).one_or_none()
        if row is None:
            raise errors.not_found(f"customer {reference}")
        return row

    # By name.

    def _look_up(self, name: CustomerName) -> asyncio.Task[str]:
        """The look-up of *name* that is under way, or a new one."""
        task = self._under_way.get(name)
        if task is None:
            if len(self._under_way) >= LOOK_UPS_MAX:
                raise DatabaseUnavailable(f"{LOOK_UPS_MAX} look-ups are under way already")
            task = asyncio.create_task(self._find_or_create(name))
            self._under_way[name] = task
            task.add_done_callback(lambda done: self._landed(name, done))
        return task

    async def _find_or_create(self, name: CustomerName) -> str:
        # The lease begins before the row is read.
        until_s = self._monotonic_s() + LEASE_S
        async with within(LOOK_UP_S):
            row = await self._found_or_created(name)
        welcomed = await self._greet(name.tenant_id, name.mode, row.id, row.welcome)
        if welcomed and self._under_way.get(name) is asyncio.current_task():  # Otherwise it was forgotten meanwhile.
            self._ids.put(name, Remembered(row.id, until_s))
        customer_id: str = row.id
        return customer_id

    async def _found_or_created(self, name: CustomerName) -> Row[Any]:
        rows = of(name.tenant_id, name.mode)
        query = select_customers(name.tenant_id, name.mode).where(named(name.external_id))
        async with self._database.read(rows) as connection:
            row: Row[Any] | None = (await connection.execute(query)).one_or_none()
        if row is None:
            async with self._database.write(rows) as connection:
                await self._create(connection, name, CustomerChange())
                # Whoever was first, the row that is there now is the customer.
                row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise _being_erased(name.external_id)
        return row

    async def _create(self, connection: AsyncConnection, name: CustomerName, change: CustomerChange) -> bool:
        """Make the customer, due what the tenant gives now; False where the name is taken."""
        terms = select(col(Tenant.settings), col(Tenant.asset_code)).where(col(Tenant.id) == name.tenant_id)
        settings, asset = (await connection.execute(terms)).one()
        inserted = await connection.execute(
            insert_new(Customer, connection.dialect.name),
            {
                "tenant": name.tenant_id,
                "mode": name.mode,
                "id": self._new_id("cus"),
                "external_id": name.external_id,
                "metadata": change.metadata or {},
                "settings": change.settings or {},
                "own_alerts": thresholds_of(change.settings or {}).own,
                "version": 1,
                "welcome": welcome_due(settings, asset),
                "created_at_us": self._now_us(),
            },
        )
        return bool(inserted.rowcount)

    async def _greet(self, tenant_id: str, mode: str, customer_id: str, due: Mapping[str, Any] | None) -> bool:
        """Give a customer what they are *due*; whether they are due nothing more."""
        if due is None:
            return True
        if self._welcome is None:
            return False
        await self._welcome(tenant_id, mode, customer_id, msgspec.convert(due, Welcome))
        async with self._database.write(of(tenant_id, mode)) as connection:
            given = update(Customer).where(*of_all(tenant_id, mode), col(Customer.id) == customer_id)
            await connection.execute(given.values(welcome=None))
        return True

    def _landed(self, name: CustomerName, task: asyncio.Task[str]) -> None:
        if self._under_way.get(name) is task:
            del self._under_way[name]
        if task.cancelled():
            return
        failure = task.exception()  # Seen here, in case all who waited have gone.
        known = self._ids.get(name)
        if known is None or failure is None:
            return
        if isinstance(failure, ApiError):
            self._ids.discard(name)
        else:  # The database is away: what is known serves on.
            self._ids.put(name, Remembered(known.id, self._monotonic_s() + LEASE_S))


def _being_erased(external_id: str) -> ApiError:
    return errors.not_found(
        f"customer {external_id}: they are being erased. The name is free when DELETE /v1/customers has answered"
    )
