"""What the command line does to an installation: its first tenant, app and keys, further tenants, and credits.

Everything here works beside a gateway that runs on the same database.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from gateway.clock import now_us
from gateway.database import Database
from gateway.errors import invalid_request
from gateway.identity.customers import Customers
from gateway.identity.principals import Mode
from gateway.identity.tenants import AppInfo, TenantInfo, Tenants
from gateway.identity.wallets import app_wallet, customer_wallet, unfunded_wallet
from gateway.ids import new_id
from gateway.settings import Settings
from gateway.shared.changes import announce
from gateway.shared.link import Link
from gateway.shared.wallets import SharedWallets
from gateway.stores import open_store
from gateway.telemetry import Metrics
from ledger.commands import Grant, Key
from ledger.ledger import Ledger
from ledger.model import PRIORITY_MAX, Funding, Scope, WalletRef
from ledger.outcomes import Granted
from pricing.money import CREDIT, Asset

MODES: Final[tuple[Mode, ...]] = ("live", "test")
FIRST_TENANT: Final = "Farebox"
FIRST_APP: Final = "First app"
FIRST_USER: Final = "demo-user"
FIRST_CREDITS: Final = CREDIT.parse("1000")
"""What the first user and the first developer have, in each mode."""

APP_PREFIX: Final = "app_"


class CannotInstall(Exception):
    """The message says what is in the way, and what to do."""


@dataclass(frozen=True, slots=True)
class Books:
    """A database, opened for management."""

    database: Database
    ledger: Ledger
    tenants: Tenants
    customers: Customers


class Installed(msgspec.Struct, frozen=True):
    """What `farebox init` and `farebox demo` print. The keys are shown this once."""

    base_url: str
    live_key: str
    test_key: str
    admin_key: str
    tenant_id: str
    app_id: str
    user: str


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Books]:
    """The books of the installation, closed at the end of the block.

    Raises:
        SchemaMissing: `farebox migrate` comes first.
    """
    async with AsyncExitStack() as stack:
        link = None if settings.redis_url is None else Link(settings.redis_url, Metrics())
        if link is not None:
            await link.start()
            stack.push_async_callback(link.stop)
        watcher = None if link is None else SharedWallets(link, now_us=now_us)
        store = await open_store(settings.database_url, clock=now_us, watcher=watcher)
        ledger = await Ledger.open(store, clock=now_us, new_command_id=lambda: new_id("cmd"))
        stack.push_async_callback(ledger.close)
        database = Database(settings.database_url)
        stack.push_async_callback(database.close)
        yield Books(database, ledger, Tenants(database), Customers(database))
        await announce(link)  # The gateways that run forget what they cached of keys and apps.


async def install(settings: Settings, *, base_url: str, again: bool = False) -> Installed:
    """The first tenant with an app, its keys, a user and a developer with credits.

    Args:
        again: use the tenant and app that are there, and fill the wallets up; the keys are new.

    Raises:
        CannotInstall: there is a first tenant already, and *again* is not wanted.
    """
    async with opened(settings) as books:
        tenant = await books.tenants.first_tenant()
        if tenant is not None and not again:
            raise CannotInstall(
                "This database has its first tenant already, and keys are shown only once. "
                "`farebox keys create` makes further ones."
            )
        if tenant is None:
            tenant = await books.tenants.create_tenant(FIRST_TENANT, first=True)
        apps = [app for app in await books.tenants.list_apps(tenant.id) if not app.archived]
        app = apps[0] if apps else await books.tenants.create_app(tenant.id, FIRST_APP, markup_bps=settings.markup_bps)
        keys = {mode: (await books.tenants.create_key(tenant.id, mode, app_id=app.id)).token for mode in MODES}
        admin = await books.tenants.create_key(tenant.id, "admin")
        for mode in MODES:
            customer = await books.customers.resolve(tenant.id, mode, FIRST_USER)
            for wallet in (customer_wallet(tenant.id, mode, customer), app_wallet(tenant.id, mode, app.id)):
                await _fill(books.ledger, wallet)
    return Installed(
        base_url=base_url,
        live_key=keys["live"],
        test_key=keys["test"],
        admin_key=admin.token,
        tenant_id=tenant.id,
        app_id=app.id,
        user=FIRST_USER,
    )


async def _fill(ledger: Ledger, wallet: WalletRef) -> None:
    """Grant what is missing of `FIRST_CREDITS`."""
    view = await ledger.wallet_view(wallet)
    missing = FIRST_CREDITS - (0 if view is None else view.balance)
    if missing > 0:
        await _promote(ledger, wallet, missing, asset=CREDIT, source="welcome")


async def _promote(
    ledger: Ledger, wallet: WalletRef, amount: int, *, asset: Asset, source: str, **more: Any
) -> Granted:
    """Credits that the operator gives."""
    applied = await ledger.execute(
        Grant(
            id=new_id("cmd"),
            scope=Scope(wallet.tenant, wallet.mode),
            wallet=wallet,
            asset=asset.code,
            block_id=new_id("blk"),
            amount=amount,
            funding=Funding.PROMOTIONAL,
            operator_paid=True,
            source=source,
            **more,
        )
    )
    assert isinstance(applied.result, Granted)
    return applied.result


async def add_tenant(books: Books, name: str, *, unfunded_limit: int) -> TenantInfo:
    """A further tenant. *unfunded_limit* is what it may burn of credits that the operator was not paid for."""
    tenant = await books.tenants.create_tenant(name, unfunded_limit=unfunded_limit)
    if unfunded_limit:
        for mode in MODES:
            line = unfunded_wallet(tenant.id, mode)
            await _promote(books.ledger, line, unfunded_limit, asset=CREDIT, source="unfunded_limit")
    return tenant


async def tenant_of(books: Books, tenant_id: str | None) -> TenantInfo:
    """The tenant that is named, or the first one.

    Raises:
        ApiError: 404. CannotInstall: there is none yet.
    """
    if tenant_id is not None:
        return await books.tenants.tenant(tenant_id)
    tenant = await books.tenants.first_tenant()
    if tenant is None:
        raise CannotInstall("There is no tenant yet: run `farebox init` first.")
    return tenant


async def app_of(books: Books, tenant: TenantInfo, app_id: str | None) -> AppInfo:
    """The app that is named, or the only one.

    Raises:
        ApiError: 404. CannotInstall: there are several, or none.
    """
    if app_id is not None:
        return await books.tenants.app(tenant.id, app_id)
    apps = [app for app in await books.tenants.list_apps(tenant.id) if not app.archived]
    if not apps:
        return await books.tenants.create_app(tenant.id, FIRST_APP)
    if len(apps) > 1:
        raise CannotInstall(f"The tenant has {len(apps)} apps: name one with --app.")
    return apps[0]


async def wallet_named(books: Books, tenant: TenantInfo, mode: Mode, owner: str, *, create: bool) -> WalletRef:
    """The wallet of a customer, by our id or the tenant's, or of an app's developer, by `app_…`.

    Args:
        create: a customer who is not known becomes known.

    Raises:
        ApiError: 404, 400.
    """
    if owner.startswith(APP_PREFIX):
        return app_wallet(tenant.id, mode, (await books.tenants.app(tenant.id, owner)).id)
    if create:
        return customer_wallet(tenant.id, mode, await books.customers.named(tenant.id, mode, owner))
    return customer_wallet(tenant.id, mode, (await books.customers.find(tenant.id, mode, owner)).id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gift:
    """A grant from the operator; *amount* in the asset's smallest unit, *key* makes it happen once."""

    amount: int
    source: str
    priority: int = 0
    expires_at_us: int | None = None
    key: str | None = None


async def give(books: Books, wallet: WalletRef, gift: Gift) -> Granted:
    """Credits from the operator.

    Raises:
        InvalidAmount: nothing, too much, or expired already. KeyReused: the key did something else before.
        ApiError: 400 for a priority out of range.
    """
    if not -PRIORITY_MAX <= gift.priority <= PRIORITY_MAX:
        raise invalid_request(f"A priority lies between -{PRIORITY_MAX} and {PRIORITY_MAX}.", param="priority")
    digest = f"{wallet.wallet} {gift.amount} {gift.source} {gift.priority} {gift.expires_at_us}"
    key = None if gift.key is None else Key(operation="cli.grant", key=gift.key, digest=digest)
    return await _promote(
        books.ledger,
        wallet,
        gift.amount,
        asset=CREDIT,
        source=gift.source,
        priority=gift.priority,
        expires_at_us=gift.expires_at_us,
        key=key,
    )
