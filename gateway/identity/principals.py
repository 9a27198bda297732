"""Who is calling: from the bytes of a key to a principal, through a cache with a short lease.

A principal is trusted for `lease_s` from the moment its row was read, so that a key that another process revokes stops
working within a second. The same lease holds for a key that is unknown, in a cache of its own, where guesses can push
out only other guesses. However many requests arrive when a lease has run out, the database is asked once.
"""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Final, Literal, NamedTuple, cast

import msgspec
from sqlalchemy import and_, select
from sqlmodel import col

from gateway import errors
from gateway.clock import now_us
from gateway.database import Database, DatabaseUnavailable, within
from gateway.identity import keys
from gateway.identity.assets import in_force
from gateway.identity.availability import open_allowance
from gateway.identity.keys import KeyScope
from gateway.identity.wallets import unfunded_wallet
from gateway.lru import LRU
from gateway.tables import ApiKey, App, AssetVersion, Tenant
from ledger.model import WalletRef
from pricing.money import Asset

LEASE_S: Final = 1.0
OUTAGE_LEASE_S: Final = 600.0
"""How long beyond its lease a principal is used while the database cannot be asked, where the tenant chose to be served
then. A key that was revoked since its row was read works until the database is back, and no longer than this."""

OUTAGE_LOOK_S: Final = 1.0
"""How long the database is taken for away after a look-up has failed, for those who may go on without it."""

LOOK_UP_S: Final = 5.0
"""How long a look-up may take before the database is taken for away."""

OUTAGE_WAIT_S: Final = 0.25
"""How long those who may go on without it wait for a database that was away a moment ago: it may hang."""

LOOK_UPS_MAX: Final = 1_000
"""Look-ups under way at once. More are refused: an outage must not fill the memory."""

PRINCIPALS_MAX: Final = 10_000
UNKNOWN_MAX: Final = 1_000

Mode = Literal["live", "test"]
BillingMode = Literal["user_pays", "developer_pays"]
OnDisconnect = Literal["cancel", "drain"]


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """The caller, and what of its tenant and app the journey of a request needs.

    `app_id` is None for the installation's key, which acts on live data unless an endpoint says otherwise.
    `unfunded_limit` is in the asset's smallest unit; None is no limit. `on_disconnect` None follows the settings.
    `open_allowance`, in the same unit, is what each process may serve while the ledger cannot be reached; 0 is nothing.
    """

    tenant_id: str
    mode: Mode
    app_id: str | None
    key_id: str
    scopes: frozenset[KeyScope]
    billing_mode: BillingMode
    markup_bps: int
    on_disconnect: OnDisconnect | None
    asset: Asset
    unfunded_limit: int | None
    open_allowance: int = 0

    def require(self, scope: KeyScope) -> None:
        """Raises ApiError 403 when the key lacks *scope*."""
        if scope not in self.scopes:
            raise errors.permission_denied(f"This key lacks the scope {scope.value}.")

    @property
    def unfunded(self) -> WalletRef | None:
        """The tenant's line for credits that the operator was not paid for; None leaves it unbounded."""
        return None if self.unfunded_limit is None else unfunded_wallet(self.tenant_id, self.mode)

    def sees_app(self, app_id: str | None) -> bool:
        """Whether a request of *app_id* is there for this key: its own app's; with `admin` all of the tenant's."""
        return app_id is None or app_id == self.app_id or KeyScope.ADMIN in self.scopes


class Lease(NamedTuple):
    principal: Principal
    until_s: float


class Principals:
    """Authenticates keys against the database, from a cache where it can.

    Args:
        lease_s: how long an answer is used before it is asked for again.
        looked_up: is told of each look-up whether the cache had the answer.
        monotonic_s: the clock of the leases.
    """

    def __init__(
        self,
        database: Database,
        *,
        lease_s: float = LEASE_S,
        now_us: Callable[[], int] = now_us,
        monotonic_s: Callable[[], float] = time.monotonic,
        looked_up: Callable[[bool], None] = lambda hit: None,
    ) -> None:
        self._database = database
        self._lease_s = lease_s
        self._now_us = now_us
        self._monotonic_s = monotonic_s
        self._looked_up = looked_up
        self._known: LRU[bytes, Lease] = LRU(PRINCIPALS_MAX)
        self._unknown: LRU[bytes, float] = LRU(UNKNOWN_MAX)
        self._under_way: dict[bytes, asyncio.Task[Principal | None]] = {}
        self._away_until_s = -math.inf

    async def authenticate(self, token: bytes) -> Principal:
        """The principal of a key.

        Raises:
            ApiError: 401 `invalid_api_key` for anything but a key in force, 503 when the database cannot be asked.
        """
        if len(token) > keys.TOKEN_LENGTH_MAX:
            raise errors.invalid_api_key()
        digest = keys.digest(token)
        lease = self._known.get(digest)
        now_s = self._monotonic_s()
        if lease is not None and now_s < lease.until_s:
            self._looked_up(True)
            return lease.principal
        stale = self._stale(lease, now_s)
        if stale is not None and now_s < self._away_until_s:
            return stale
        parsed = keys.parse(token)
        if parsed is None or now_s < (self._unknown.get(digest) or 0):
            raise errors.invalid_api_key()
        self._looked_up(False)
        lately = now_s < self._away_until_s + LOOK_UP_S
        try:
            async with within(OUTAGE_WAIT_S if stale is not None and lately else LOOK_UP_S):
                principal = await self._look_up_once(digest, parsed.key_id)
        except DatabaseUnavailable:
            self._away_until_s = self._monotonic_s() + OUTAGE_LOOK_S
            if stale is not None:
                return stale
            raise errors.ledger_unavailable() from None
        if principal is None:
            raise errors.invalid_api_key()
        return principal

    def known(self, token: bytes) -> Principal | None:
        """The principal of a key whose lease runs: what `authenticate` would answer without asking anybody.

        A lease that is half over is renewed meanwhile, so that a key in steady use is never waited for.
        """
        if len(token) > keys.TOKEN_LENGTH_MAX:
            return None
        digest = keys.digest(token)
        lease = self._known.get(digest)
        left_s = 0.0 if lease is None else lease.until_s - self._monotonic_s()
        if lease is None or left_s <= 0:
            return None
        if left_s < self._lease_s / 2 and len(self._under_way) < LOOK_UPS_MAX:
            self._begin_look_up(digest, lease.principal.key_id)
        self._looked_up(True)
        return lease.principal

    def _stale(self, lease: Lease | None, now_s: float) -> Principal | None:
        """Who may go on for a while without the database: a principal whose tenant chose to be served in an outage."""
        if lease is None or lease.principal.open_allowance == 0 or now_s >= lease.until_s + OUTAGE_LEASE_S:
            return None
        return lease.principal

    def invalidate(self) -> None:
        """Forget everything: the next request of each key asks the database, whatever is being looked up now."""
        self._known.clear()
        self._unknown.clear()
        self._under_way.clear()

    async def _look_up_once(self, digest: bytes, key_id: str) -> Principal | None:
        """All who ask for a key while it is looked up get one answer; one who goes away does not stop the others.

        Raises:
            DatabaseUnavailable
        """
        if digest not in self._under_way and len(self._under_way) >= LOOK_UPS_MAX:
            raise DatabaseUnavailable(f"{LOOK_UPS_MAX} look-ups are under way already")
        return await asyncio.shield(self._begin_look_up(digest, key_id))

    def _begin_look_up(self, digest: bytes, key_id: str) -> "asyncio.Task[Principal | None]":
        """The look-up of a key that is under way, begun now if there is none."""
        task = self._under_way.get(digest)
        if task is None:
            task = asyncio.create_task(self._look_up(digest, key_id))
            self._under_way[digest] = task
            task.add_done_callback(lambda done: self._landed(digest, done))
        return task

    def _landed(self, digest: bytes, task: asyncio.Task[Principal | None]) -> None:
        if self._under_way.get(digest) is task:
            del self._under_way[digest]
        if not task.cancelled():
            task.exception()  # Seen here, in case all who waited have gone.

    async def _look_up(self, digest: bytes, key_id: str) -> Principal | None:
        # The lease begins before the row is read: what changes while we read is noticed a lease later at most.
        until_s = self._monotonic_s() + self._lease_s
        async with within(LOOK_UP_S):
            principal = await self._read(digest, key_id)
        if self._under_way.get(digest) is asyncio.current_task():  # Otherwise it was invalidated while we read.
            if principal is None:
                self._known.discard(digest)
                self._unknown.put(digest, until_s)
            else:
                self._known.put(digest, Lease(principal, until_s))
        return principal

    async def _read(self, digest: bytes, key_id: str) -> Principal | None:
        """One query: the key, its app, its tenant, and what the tenant's credit is worth now."""
        query = (
            select(
                col(ApiKey.tenant),
                col(ApiKey.mode),
                col(ApiKey.app_id),
                col(ApiKey.secret_hash),
                col(ApiKey.scopes),
                col(ApiKey.revoked_at_us),
                col(App.billing_mode),
                col(App.markup_bps),
                col(App.on_disconnect),
                col(App.archived),
                col(Tenant.unfunded_limit),
                col(Tenant.settings),
                col(AssetVersion.code),
                col(AssetVersion.scale),
                col(AssetVersion.usd_value_picos),
            )
            .join(Tenant, col(Tenant.id) == col(ApiKey.tenant))
            .join(AssetVersion, in_force(self._now_us()))
            .outerjoin(App, and_(col(App.tenant) == col(ApiKey.tenant), col(App.id) == col(ApiKey.app_id)))
            .where(col(ApiKey.id) == key_id)
            .order_by(col(AssetVersion.effective_from_us).desc())
            .limit(1)
        )
        async with self._database.read_of_key(key_id) as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None or not keys.same(row.secret_hash, digest):
            return None
        if row.revoked_at_us is not None or row.archived:
            return None
        return Principal(
            tenant_id=row.tenant,
            mode="test" if row.mode == "test" else "live",
            app_id=row.app_id,
            key_id=key_id,
            scopes=frozenset(map(KeyScope, row.scopes)),
            billing_mode=cast(BillingMode, row.billing_mode or "user_pays"),
            markup_bps=row.markup_bps or 0,
            on_disconnect=cast(OnDisconnect | None, row.on_disconnect),
            asset=Asset(code=row.code, scale=row.scale, usd_value_picos=row.usd_value_picos),
            unfunded_limit=row.unfunded_limit,
            open_allowance=open_allowance(row.settings),
        )
