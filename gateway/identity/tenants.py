"""Tenants, their apps and their keys: made, listed, changed and revoked by the command line and the API."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal, TypeVar

import msgspec
from sqlalchemy import Row, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import SQLModel, col

from gateway import errors
from gateway.database import Rows, of
from gateway.identity import keys
from gateway.identity.availability import Availability, Chosen, chosen, open_allowance, with_availability
from gateway.identity.default_grant import DefaultGrant, default_grant, with_default_grant
from gateway.identity.keys import APP_SCOPES, INSTALLATION_SCOPES, KeyKind, KeyScope
from gateway.identity.principals import BillingMode, OnDisconnect
from gateway.identity.thresholds import thresholds_of, with_thresholds
from gateway.records import Records
from gateway.tables import AMOUNT_MAX, MARKUP_BPS_MAX, NAME_LENGTH_MAX, ApiKey, App, AssetVersion, Tenant
from ledger.model import PRIORITY_MAX
from pricing.money import CREDIT, Asset

GRANT_LIFE_S_MAX: Final = 100 * 366 * 86_400
GRANT_PARAM: Final = "default_grant"

VERSION: Final = "version"
"""Where in a tenant's settings their version stands."""

UNFUNDED_LIMIT_OF_OTHERS: Final = 0
"""What tenants other than the first may burn of credits that the operator was not paid for, until told otherwise."""


class TenantInfo(msgspec.Struct, frozen=True):
    id: str
    name: str
    is_first: bool
    asset_code: str
    unfunded_limit: int | None
    settings: dict[str, Any]
    created_at_us: int

    @property
    def open_allowance(self) -> int:
        """What each process may serve to it while the ledger cannot be reached; 0 where it is refused then."""
        return open_allowance(self.settings)

    @property
    def availability(self) -> Chosen:
        return chosen(self.settings)

    @property
    def default_grant(self) -> DefaultGrant | None:
        """What its new customers get."""
        return default_grant(self.settings)

    @property
    def low_balance_thresholds(self) -> tuple[int, ...]:
        """Below what balances its customers' wallets and its developers' own ring, in millicredits."""
        return thresholds_of(self.settings).low_balance_thresholds or ()

    @property
    def version(self) -> int:
        """Of its settings."""
        return version_of(self.settings)


class AppInfo(msgspec.Struct, frozen=True):
    id: str
    tenant: str
    name: str
    billing_mode: str
    markup_bps: int
    on_disconnect: str | None
    settings: dict[str, Any]
    archived: bool
    created_at_us: int

    @property
    def version(self) -> int:
        """How often it was changed, and one."""
        return version_of(self.settings)


class KeyInfo(msgspec.Struct, frozen=True):
    """What can be said of a key after it was made; the secret is not among it."""

    id: str
    tenant: str
    mode: str
    app_id: str | None
    name: str
    last4: str
    scopes: list[str]
    created_at_us: int
    revoked_at_us: int | None


def version_of(settings: Mapping[str, Any]) -> int:
    """How often what has these *settings* was changed, and one."""
    version: int = settings.get(VERSION, 1)
    return version


Info = TypeVar("Info", TenantInfo, AppInfo, KeyInfo)

INFO_FIELDS: Final[Mapping[type[SQLModel], tuple[str, ...]]] = {
    Tenant: TenantInfo.__struct_fields__,
    App: AppInfo.__struct_fields__,
    ApiKey: KeyInfo.__struct_fields__,
}
"""What is read of a table; the names are those of its columns."""


class NewKey(msgspec.Struct, frozen=True):
    """A key that was just made. Show the token now: it cannot be shown again."""

    token: str
    info: KeyInfo


class Tenants(Records):
    """Every method is one transaction. A revocation or a change of an app is seen by all processes within a lease."""

    async def create_tenant(
        self,
        name: str,
        *,
        first: bool = False,
        unfunded_limit: int = UNFUNDED_LIMIT_OF_OTHERS,
        asset: Asset = CREDIT,
    ) -> TenantInfo:
        """A new tenant, whose credit is *asset*. The *first* one is the operator, who has no unfunded limit.

        Raises:
            ApiError: 400 for a limit out of range, or when there is a first tenant already.
        """
        if not 0 <= unfunded_limit <= AMOUNT_MAX:
            raise errors.invalid_request(f"unfunded_limit is 0 to {AMOUNT_MAX}.", param="unfunded_limit")
        tenant = TenantInfo(
            id=self._new_id("ten"),
            name=_checked_name(name),
            is_first=first,
            asset_code=asset.code,
            unfunded_limit=None if first else unfunded_limit,
            settings={},
            created_at_us=self._now_us(),
        )
        try:
            async with self._transactions.write(of(tenant.id)) as connection:
                await connection.execute(insert(Tenant).values(**msgspec.structs.asdict(tenant)))
                await connection.execute(
                    insert(AssetVersion).values(
                        tenant=tenant.id,
                        code=asset.code,
                        effective_from_us=0,
                        scale=asset.scale,
                        usd_value_picos=asset.usd_value_picos,
                    )
                )
        except IntegrityError:
            raise errors.invalid_request("This installation has its first tenant already.") from None
        return tenant

    async def first_tenant(self) -> TenantInfo | None:
        """The operator's own tenant; None before `farebox init`."""
        return next((tenant for tenant in await self.list_tenants() if tenant.is_first), None)

    async def tenant(self, tenant_id: str) -> TenantInfo:
        """Raises ApiError 404."""
        try:
            found = await self._select(TenantInfo, Tenant, of(tenant_id), id=tenant_id)
        except ValueError:  # No tenant can have this name.
            found = []
        return _only(found, f"tenant {tenant_id}")

    async def list_tenants(self) -> list[TenantInfo]:
        """All of the installation's tenants, the oldest first."""
        async with self._database.read_every_tenant() as connection:
            return await _selected(connection, TenantInfo, Tenant)

    async def change_tenant(
        self,
        tenant_id: str,
        *,
        when_ledger_is_down: Availability | None = None,
        open_allowance: int | None = None,
        default_grant: DefaultGrant | Literal["none"] | None = None,
        low_balance_thresholds: tuple[int, ...] | None = None,
        version: int | None = None,
    ) -> TenantInfo:
        """Change what is not None, if the settings are at *version*. All processes follow within a lease.

        Args:
            open_allowance: in the asset's smallest unit, for each process.
            default_grant: for customers who are new from now on; `none` ends it.
            low_balance_thresholds: in millicredits that the asset can hold.

        Raises:
            ApiError: 400 for an allowance or a grant out of range, 404 for an unknown tenant, 412 at another version.
        """
        if isinstance(default_grant, DefaultGrant):
            _check_grant(default_grant)
        if open_allowance is not None and not 0 <= open_allowance <= AMOUNT_MAX:
            raise errors.invalid_request(f"open_allowance is 0 to {AMOUNT_MAX}.", param="open_allowance")
        await self.tenant(tenant_id)
        async with self._transactions.write(of(tenant_id)) as connection:
            # Locked, so that of two who change different things none takes the other's back.
            query = select(col(Tenant.settings)).where(col(Tenant.id) == tenant_id).with_for_update()
            settings = (await connection.execute(query)).scalar_one()
            if version not in (None, version_of(settings)):
                raise errors.version_mismatch(version_of(settings))
            changed = with_availability(settings, choice=when_ledger_is_down, allowance=open_allowance)
            if default_grant is not None:
                changed = with_default_grant(changed, None if default_grant == "none" else default_grant)
            if low_balance_thresholds is not None:
                changed = with_thresholds(changed, low_balance_thresholds)
            if changed != settings:
                changed[VERSION] = version_of(settings) + 1
                await connection.execute(update(Tenant).where(col(Tenant.id) == tenant_id).values(settings=changed))
        return await self.tenant(tenant_id)

    async def create_app(
        self,
        tenant_id: str,
        name: str,
        *,
        billing_mode: BillingMode = "user_pays",
        markup_bps: int = 0,
        on_disconnect: OnDisconnect | None = None,
    ) -> AppInfo:
        """A new app of a tenant.

        Raises:
            ApiError: 400 for a markup out of range, 404 for an unknown tenant.
        """
        app = AppInfo(
            id=self._new_id("app"),
            tenant=tenant_id,
            name=_checked_name(name),
            billing_mode=billing_mode,
            markup_bps=_checked_markup(markup_bps),
            on_disconnect=on_disconnect,
            settings={},
            archived=False,
            created_at_us=self._now_us(),
        )
        async with self._transactions.write(of(tenant_id)) as connection:
            await _must_exist(connection, Tenant, f"tenant {tenant_id}", id=tenant_id)
            await connection.execute(insert(App).values(**msgspec.structs.asdict(app)))
        return app

    async def app(self, tenant_id: str, app_id: str) -> AppInfo:
        """Raises ApiError 404, also for another tenant's app."""
        if "\x00" in app_id:  # PostgreSQL keeps no such text, nor looks for it.
            raise errors.not_found("this app")
        return _only(await self._select(AppInfo, App, of(tenant_id), tenant=tenant_id, id=app_id), f"app {app_id}")

    async def list_apps(self, tenant_id: str) -> list[AppInfo]:
        return await self._select(AppInfo, App, of(tenant_id), tenant=tenant_id)

    async def change_app(
        self,
        tenant_id: str,
        app_id: str,
        *,
        name: str | None = None,
        billing_mode: BillingMode | None = None,
        markup_bps: int | None = None,
        on_disconnect: OnDisconnect | Literal["default"] | None = None,
        archived: bool | None = None,
        version: int | None = None,
    ) -> AppInfo:
        """Change what is not None, if the app is at *version*; `on_disconnect="default"` follows the installation's
        settings again.

        Charges that were reserved before keep the terms that they were reserved with.

        Raises:
            ApiError: 400 for a markup out of range, 404 for an unknown app, 412 at another version.
        """
        if markup_bps is not None:
            _checked_markup(markup_bps)
        if name is not None:
            _checked_name(name)
        asked = {"name": name, "billing_mode": billing_mode, "markup_bps": markup_bps, "archived": archived}
        changes: dict[str, Any] = {column: value for column, value in asked.items() if value is not None}
        if on_disconnect is not None:
            changes["on_disconnect"] = None if on_disconnect == "default" else on_disconnect
        this = (col(App.tenant) == tenant_id, col(App.id) == app_id)
        async with self._transactions.write(of(tenant_id)) as connection:
            # Locked, so that of two who read one version none takes the other's change back.
            settings = await connection.scalar(select(col(App.settings)).where(*this).with_for_update())
            if settings is None:
                raise errors.not_found(f"app {app_id}")
            if version not in (None, version_of(settings)):
                raise errors.version_mismatch(version_of(settings))
            if changes:
                changes["settings"] = {**settings, VERSION: version_of(settings) + 1}
                await connection.execute(update(App).where(*this).values(**changes))
        return await self.app(tenant_id, app_id)

    async def create_key(
        self,
        tenant_id: str,
        kind: KeyKind,
        *,
        app_id: str | None = None,
        name: str = "",
        scopes: Iterable[KeyScope] | None = None,
    ) -> NewKey:
        """A new key: for an app's live or test data, or, with the kind `admin`, for the installation.

        Raises:
            ApiError: 400 for an admin key with an app, one without for the others, or one that could proxy without
                an app; 404 for an unknown tenant or app.
        """
        if (kind == "admin") != (app_id is None):
            raise errors.invalid_request("An admin key has no app, and every other key has one.", param="app_id")
        granted = sorted(set(scopes if scopes is not None else INSTALLATION_SCOPES if kind == "admin" else APP_SCOPES))
        if kind == "admin" and KeyScope.PROXY in granted:
            raise errors.invalid_request("An admin key never proxies: leave the scope proxy out.", param="scopes")
        key_id = self._new_id("key")
        generated = keys.generate(kind, key_id)
        key = KeyInfo(
            id=key_id,
            tenant=tenant_id,
            mode=kind,
            app_id=app_id,
            name=_checked_name(name) if name else "",
            last4=generated.last4,
            scopes=[scope.value for scope in granted],
            created_at_us=self._now_us(),
            revoked_at_us=None,
        )
        async with self._transactions.write(of(tenant_id)) as connection:
            if app_id is None:
                await _must_exist(connection, Tenant, f"tenant {tenant_id}", id=tenant_id)
            else:
                await _must_exist(connection, App, f"app {app_id}", tenant=tenant_id, id=app_id)
            await connection.execute(
                insert(ApiKey).values(**msgspec.structs.asdict(key), secret_hash=generated.secret_hash)
            )
        return NewKey(generated.token, key)

    async def list_keys(self, tenant_id: str) -> list[KeyInfo]:
        return await self._select(KeyInfo, ApiKey, of(tenant_id), tenant=tenant_id)

    async def revoke_key(self, tenant_id: str, key_id: str) -> KeyInfo:
        """End a key for good. Repeating it changes nothing: the first time stands.

        Raises:
            ApiError: 404, also for another tenant's key.
        """
        async with self._transactions.write(of(tenant_id)) as connection:
            await connection.execute(
                update(ApiKey)
                .where(col(ApiKey.tenant) == tenant_id, col(ApiKey.id) == key_id, col(ApiKey.revoked_at_us).is_(None))
                .values(revoked_at_us=self._now_us())
            )
        return _only(await self._select(KeyInfo, ApiKey, of(tenant_id), tenant=tenant_id, id=key_id), f"key {key_id}")

    async def _select(self, into: Callable[..., Info], table: type[SQLModel], rows: Rows, **where: Any) -> list[Info]:
        async with self._transactions.read(rows) as connection:
            return await _selected(connection, into, table, **where)


async def _selected(
    connection: AsyncConnection, into: Callable[..., Info], table: type[SQLModel], **where: Any
) -> list[Info]:
    """The rows that match, oldest first, as *into*."""
    fields = INFO_FIELDS[table]
    query = select(*(getattr(table, field) for field in fields)).order_by(table.id).filter_by(**where)  # type: ignore[attr-defined]
    rows: Iterable[Row[Any]] = await connection.execute(query)
    return [into(*row) for row in rows]


async def _must_exist(connection: AsyncConnection, table: type[SQLModel], what: str, **where: Any) -> None:
    query = select(table.id).filter_by(**where)  # type: ignore[attr-defined]
    if (await connection.execute(query)).first() is None:
        raise errors.not_found(what)


def _only(found: list[Info], what: str) -> Info:
    if not found:
        raise errors.not_found(what)
    return found[0]


def _checked_name(name: str) -> str:
    if not 1 <= len(name) <= NAME_LENGTH_MAX or not name.isprintable():
        raise errors.invalid_request(f"A name has 1 to {NAME_LENGTH_MAX} printable characters.", param="name")
    return name


def _check_grant(grant: DefaultGrant) -> None:
    if not 1 <= grant.amount <= AMOUNT_MAX:
        raise errors.invalid_request("default_grant is more than nothing, and not too much to keep.", param=GRANT_PARAM)
    if grant.expires_after_s is not None and not 1 <= grant.expires_after_s <= GRANT_LIFE_S_MAX:
        raise errors.invalid_request(
            f"A default grant lives 1 to {GRANT_LIFE_S_MAX} seconds, or for ever.", param=GRANT_PARAM
        )
    if not -PRIORITY_MAX <= grant.priority <= PRIORITY_MAX:
        raise errors.invalid_request(f"A priority lies between -{PRIORITY_MAX} and {PRIORITY_MAX}.", param=GRANT_PARAM)


def _checked_markup(markup_bps: int) -> int:
    if not 0 <= markup_bps <= MARKUP_BPS_MAX:
        raise errors.invalid_request(
            f"markup_bps is 0 to {MARKUP_BPS_MAX}, in hundredths of a percent.", param="markup_bps"
        )
    return markup_bps
