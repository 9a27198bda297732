"""Webhook endpoints: where a tenant wants to be told of what.

A tenant's modes have endpoints of their own. The secrets are stored as they are, because they sign.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import Select, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.database import Database, Transactions, of
from gateway.errors import invalid_request, not_found, version_mismatch
from gateway.events.event import ALL_TYPES, is_told
from gateway.events.signing import Secret, new_secret, rotated
from gateway.tables import WebhookEndpoint, WebhookLane
from ledger.model import Scope

ENDPOINTS_MAX: Final = 20
"""For each mode of a tenant: every event is looked at for each of them."""

ENABLED: Final = "enabled"
DISABLED: Final = "disabled"


class Endpoint(msgspec.Struct, frozen=True):
    id: str
    url: str
    types: tuple[str, ...]
    secrets: tuple[Secret, ...]
    status: str
    disabled_reason: str | None
    description: str
    version: int
    created_at_us: int

    def wants(self, wallet: str, kind: str) -> bool:
        """Whether it is told of an event of this type on this wallet."""
        return self.status == ENABLED and is_told(wallet, kind) and (ALL_TYPES in self.types or kind in self.types)


class Endpoints:
    """The endpoints of all tenants; each call is about one tenant and mode."""

    def __init__(self, database: Database, *, now_us: Callable[[], int], new_id: Callable[[str], str]) -> None:
        self._database = database
        self._now_us = now_us
        self._new_id = new_id

    async def create(
        self,
        scope: Scope,
        *,
        url: str,
        types: Sequence[str],
        description: str,
        transactions: Transactions | None = None,
    ) -> Endpoint:
        """A new endpoint with a new secret, which is told of what happens from now on.

        Raises:
            ApiError: 400 where there are `ENDPOINTS_MAX` already.
        """
        made = Endpoint(
            id=self._new_id("whk"),
            url=url,
            types=tuple(types),
            secrets=(Secret(new_secret()),),
            status=ENABLED,
            disabled_reason=None,
            description=description,
            version=1,
            created_at_us=self._now_us(),
        )
        async with (transactions or self._database).write(of(*scope)) as connection:
            there = await connection.scalar(select(func.count()).select_from(_of(scope).subquery()))
            if there is not None and there >= ENDPOINTS_MAX:
                raise invalid_request(f"There are {ENDPOINTS_MAX} webhook endpoints already: remove one first.")
            row = msgspec.to_builtins(made)
            await connection.execute(insert(WebhookEndpoint).values(tenant=scope.tenant, mode=scope.mode, **row))
        return made

    async def get(self, scope: Scope, endpoint_id: str) -> Endpoint:
        """Raises ApiError 404."""
        async with self._database.read(of(*scope)) as connection:
            found = await read_endpoint(connection, scope, endpoint_id)
        if found is None:
            raise not_found(f"webhook endpoint {endpoint_id}")
        return found

    async def page(self, scope: Scope, *, before: str | None, limit: int) -> list[Endpoint]:
        """Newest first."""
        query = _of(scope).order_by(col(WebhookEndpoint.id).desc()).limit(limit)
        if before is not None:
            query = query.where(col(WebhookEndpoint.id) < before)
        async with self._database.read(of(*scope)) as connection:
            return [_endpoint(row) for row in (await connection.execute(query)).mappings()]

    async def change(
        self,
        scope: Scope,
        endpoint_id: str,
        changes: Mapping[str, Any],
        *,
        expected_version: int | None,
        transactions: Transactions | None = None,
    ) -> Endpoint:
        """Set these columns, and raise the version.

        Raises:
            ApiError: 404; 412 where it is not at *expected_version*.
        """
        async with (transactions or self._database).write(of(*scope)) as connection:
            found = await read_endpoint(connection, scope, endpoint_id, lock=True)
            if found is None:
                raise not_found(f"webhook endpoint {endpoint_id}")
            if expected_version is not None and expected_version != found.version:
                raise version_mismatch(found.version)
            changed = msgspec.structs.replace(found, **changes, version=found.version + 1)
            values = {name: msgspec.to_builtins(getattr(changed, name)) for name in (*changes, "version")}
            await connection.execute(update(WebhookEndpoint).where(*_is(scope, endpoint_id)).values(**values))
        return changed

    async def rotate(
        self,
        scope: Scope,
        endpoint_id: str,
        *,
        expire_current_us: int,
        transactions: Transactions | None = None,
    ) -> Endpoint:
        """Give it a new secret; the one before signs too for *expire_current_us*.

        Raises:
            ApiError: 404.
        """
        async with (transactions or self._database).write(of(*scope)) as connection:
            found = await read_endpoint(connection, scope, endpoint_id, lock=True)
            if found is None:
                raise not_found(f"webhook endpoint {endpoint_id}")
            secrets = rotated(found.secrets, new_secret(), now_us=self._now_us(), expire_current_us=expire_current_us)
            changed = msgspec.structs.replace(found, secrets=secrets, version=found.version + 1)
            values = {"secrets": msgspec.to_builtins(secrets), "version": changed.version}
            await connection.execute(update(WebhookEndpoint).where(*_is(scope, endpoint_id)).values(**values))
        return changed

    async def delete(self, scope: Scope, endpoint_id: str) -> None:
        """Take it away, with what it was yet to be told. What was delivered goes in pages, later.

        Raises:
            ApiError: 404.
        """
        async with self._database.write(of(*scope)) as connection:
            lanes = (col(WebhookLane.tenant) == scope.tenant, col(WebhookLane.mode) == scope.mode)
            await connection.execute(delete(WebhookLane).where(*lanes, col(WebhookLane.endpoint) == endpoint_id))
            gone = await connection.execute(delete(WebhookEndpoint).where(*_is(scope, endpoint_id)))
            if not gone.rowcount:
                raise not_found(f"webhook endpoint {endpoint_id}")


async def read_endpoint(
    connection: AsyncConnection, scope: Scope, endpoint_id: str, *, lock: bool = False
) -> Endpoint | None:
    """The endpoint, within a transaction that is open; with *lock* nobody else changes it until the end of that."""
    query = _of(scope).where(col(WebhookEndpoint.id) == endpoint_id)
    row = (await connection.execute(query.with_for_update() if lock else query)).mappings().one_or_none()
    return None if row is None else _endpoint(row)


async def enabled_endpoints(connection: AsyncConnection, scope: Scope) -> list[Endpoint]:
    """Those that are told, within a transaction that is open."""
    query = _of(scope).where(col(WebhookEndpoint.status) == ENABLED).order_by(col(WebhookEndpoint.id))
    return [_endpoint(row) for row in (await connection.execute(query)).mappings()]


async def disable(connection: AsyncConnection, scope: Scope, endpoint_id: str, *, reason: str) -> None:
    """Tell it no more, for a reason that its owner can read."""
    values = {"status": DISABLED, "disabled_reason": reason, "version": col(WebhookEndpoint.version) + 1}
    enabled = col(WebhookEndpoint.status) == ENABLED
    await connection.execute(update(WebhookEndpoint).where(*_is(scope, endpoint_id), enabled).values(**values))


def _of(scope: Scope) -> Select[Any]:
    columns = [getattr(WebhookEndpoint, name) for name in Endpoint.__struct_fields__]
    return select(*columns).where(col(WebhookEndpoint.tenant) == scope.tenant, col(WebhookEndpoint.mode) == scope.mode)


def _is(scope: Scope, endpoint_id: str) -> tuple[Any, ...]:
    return (
        col(WebhookEndpoint.tenant) == scope.tenant,
        col(WebhookEndpoint.mode) == scope.mode,
        col(WebhookEndpoint.id) == endpoint_id,
    )


def _endpoint(row: Mapping[str, Any]) -> Endpoint:
    return msgspec.convert(dict(row), Endpoint)
