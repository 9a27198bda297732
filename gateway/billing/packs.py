"""Plan packs: what a tenant offers for credits, and the purchase of one out of a customer's own wallet."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import msgspec
from sqlalchemy import Row, Select, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway import errors
from gateway.clock import now_us
from gateway.database import Database, Transactions, of
from gateway.identity.wallets import customer_wallet
from gateway.ids import new_id, reserved_prefix
from gateway.tables import Pack
from ledger.burndown import payable
from ledger.commands import Key, Purchase
from ledger.errors import InvalidAmount
from ledger.ledger import Ledger
from ledger.model import UNRESTRICTED, Block, Restriction, Scope, Tags, WalletRef
from ledger.outcomes import Applied
from ledger.purchasing import payers_of

PACK_PREFIX: Final = "pck_"
PACK_KEY_LENGTH_MAX: Final = 100

_METADATA: Final = Pack.__table__.c.metadata  # type: ignore[attr-defined]
_COLUMNS: Final = (
    col(Pack.id),
    col(Pack.key),
    col(Pack.name),
    col(Pack.price),
    col(Pack.credits),
    col(Pack.duration_s),
    col(Pack.priority),
    col(Pack.restrictions),
    _METADATA,
    col(Pack.archived),
    col(Pack.version),
    col(Pack.created_at_us),
)


class PackTerms(msgspec.Struct, frozen=True, kw_only=True):
    """What a pack is sold for. *price* and *credits* are in the asset's smallest unit; no *duration_s* is for ever."""

    name: str
    price: int
    credits: int
    duration_s: int | None = None
    priority: int = 10
    restriction: Restriction = UNRESTRICTED
    metadata: dict[str, Any] = {}


class PackInfo(PackTerms, frozen=True, kw_only=True):
    """A pack as it is offered now. *version* rises with each change."""

    id: str
    key: str
    archived: bool
    version: int
    created_at_us: int

    def at(self, *, price: int | None, credits: int | None) -> "PackInfo":
        """The pack on somebody's own terms, where they are not None."""
        return msgspec.structs.replace(
            self,
            price=self.price if price is None else price,
            credits=self.credits if credits is None else credits,
        )


class PackArchived(Exception):
    """The pack is offered no more."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the pack {key} is archived")
        self.key = key


class Buyer(msgspec.Struct, frozen=True):
    """Whose wallet pays, in which app; the installation and an expiry have no app. *asset* is the tenant's credit."""

    scope: Scope
    customer_id: str
    asset: str
    app_id: str | None = None

    @property
    def wallet(self) -> WalletRef:
        return customer_wallet(*self.scope, self.customer_id)


class Packs:
    """Every method is one transaction, or a part of the one that was given; a purchase is one command."""

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        *,
        transactions: Transactions | None = None,
        now_us: Callable[[], int] = now_us,
        new_id: Callable[[str], str] = new_id,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._transactions = transactions or database
        self._now_us = now_us
        self._new_id = new_id

    def within(self, transactions: Transactions) -> "Packs":
        """The same, as a part of other work that commits as one."""
        return Packs(self._database, self._ledger, transactions=transactions, now_us=self._now_us, new_id=self._new_id)

    async def create(self, tenant: str, mode: str, key: str, terms: PackTerms) -> PackInfo:
        """Offer a new pack.

        Raises:
            ApiError: 400 for a key that no pack can have, 409 where there is one of this key, maybe archived.
        """
        pack = PackInfo(
            **_fields(terms),
            id=self._new_id("pck"),
            key=_checked_key(key),
            archived=False,
            version=1,
            created_at_us=self._now_us(),
        )
        try:
            async with self._transactions.write(of(tenant, mode)) as connection:
                await connection.execute(insert(Pack.__table__).values(tenant=tenant, mode=mode, **_row(_fields(pack))))  # type: ignore[attr-defined]
        except IntegrityError:
            raise errors.already_exists(f"pack with the key {key}", param="key") from None
        return pack

    async def find(self, tenant: str, mode: str, reference: str) -> PackInfo:
        """The pack that *reference* names, by our id or the tenant's key, archived or not.

        Raises:
            ApiError: 404.
        """
        async with self._transactions.read(of(tenant, mode)) as connection:
            return await _pack(connection, tenant, mode, reference)

    async def page(self, tenant: str, mode: str, *, before: str | None, limit: int) -> list[PackInfo]:
        """Packs, newest first, from the one that came just before the id *before*."""
        query = _packs(tenant, mode).order_by(col(Pack.id).desc()).limit(limit)
        if before is not None:
            query = query.where(col(Pack.id) < before)
        async with self._transactions.read(of(tenant, mode)) as connection:
            return [_info(row) for row in await connection.execute(query)]

    async def change(
        self,
        tenant: str,
        mode: str,
        reference: str,
        changes: Mapping[str, Any],
        *,
        restricted: Mapping[str, tuple[str, ...]] | None = None,
        expected: int | None = None,
    ) -> PackInfo:
        """Change fields of `PackTerms`, or *archived*; and of its restriction what *restricted* names.

        What was bought stays what it is. What is as it should be already changes no version.

        Raises:
            ApiError: 404; 412 when the pack's version is not *expected*.
        """
        async with self._transactions.write(of(tenant, mode)) as connection:
            pack = await _pack(connection, tenant, mode, reference, lock=True)
            if expected not in (None, pack.version):
                raise errors.version_mismatch(pack.version)
            if restricted:
                changes = {**changes, "restriction": msgspec.structs.replace(pack.restriction, **restricted)}
            changed = msgspec.structs.replace(pack, **changes)
            if changed == pack:
                return pack
            changed = msgspec.structs.replace(changed, version=pack.version + 1)
            this = (col(Pack.tenant) == tenant, col(Pack.mode) == mode, col(Pack.id) == pack.id)
            values = _row({**changes, "version": changed.version})
            await connection.execute(update(Pack.__table__).where(*this).values(values))  # type: ignore[attr-defined]
        return changed

    async def buy(
        self,
        buyer: Buyer,
        pack: PackInfo,
        *,
        key: Key | None,
        cause: str,
        unless_active: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> Applied:
        """Buy *pack* as it stands there, out of the buyer's own credits.

        Blocks that are restricted to the pack's key as a metric pay for it, too. A repeated *key* answers as it did,
        whatever became of the pack since.

        Raises:
            PackArchived
            LedgerError: as `Ledger.execute` does for a purchase.
        """
        purchase = self._purchase(buyer, pack, key=key, cause=cause, unless_active=unless_active, metadata=metadata)
        try:
            return await self._ledger.execute(purchase)
        except InvalidAmount:
            if pack.archived:
                raise PackArchived(pack.key) from None
            raise

    def price_out_of(self, blocks: Collection[Block], buyer: Buyer, pack: PackInfo, tags: Tags) -> int:
        """How much of the price would come out of *blocks*, as they are now, that could pay for *tags*, too."""
        now_us = self._now_us()
        able = {block.id for block in payable(blocks, tags, now_us)}
        left, shared = pack.price, 0
        for block in payers_of(blocks, self._purchase(buyer, pack, key=None, cause=""), now_us):
            part = min(left, block.free)
            left -= part
            shared += part if block.id in able else 0
        return shared

    def _purchase(
        self,
        buyer: Buyer,
        pack: PackInfo,
        *,
        key: Key | None,
        cause: str,
        unless_active: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> Purchase:
        return Purchase(
            id=self._new_id("cmd"),
            scope=buyer.scope,
            key=key,
            wallet=buyer.wallet,
            asset=buyer.asset,
            block_id=self._new_id("blk"),
            price=pack.price,
            # Only the ledger knows whether the key had its effect before; of nothing it makes no other.
            amount=0 if pack.archived else pack.credits,
            pack=pack.id,
            duration_us=None if pack.duration_s is None else pack.duration_s * 1_000_000,
            priority=pack.priority,
            tags=Tags(app=buyer.app_id, metric=pack.key),
            unless_active=unless_active,
            cause=cause,
            source=pack.key,
            restriction=pack.restriction,
            metadata={**pack.metadata, **(metadata or {})},
        )


def _fields(terms: PackTerms) -> dict[str, Any]:
    return {name: getattr(terms, name) for name in terms.__struct_fields__}


def _row(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a pack as columns."""
    row = dict(fields)
    if "restriction" in row:
        row["restrictions"] = msgspec.to_builtins(row.pop("restriction"))
    return row


def _info(row: Row[Any]) -> PackInfo:
    fields = dict(row._mapping)
    fields["restriction"] = msgspec.convert(fields.pop("restrictions"), Restriction)
    return PackInfo(**fields)


def _packs(tenant: str, mode: str) -> Select[Any]:
    return select(*_COLUMNS).where(col(Pack.tenant) == tenant, col(Pack.mode) == mode)


async def _pack(connection: AsyncConnection, tenant: str, mode: str, reference: str, *, lock: bool = False) -> PackInfo:
    column = col(Pack.id) if reference.startswith(PACK_PREFIX) else col(Pack.key)
    query = _packs(tenant, mode).where(column == reference)
    found = None
    if "\x00" not in reference:  # PostgreSQL keeps no such text, nor looks for it.
        found = (await connection.execute(query.with_for_update() if lock else query)).one_or_none()
    if found is None:
        raise errors.not_found(f"pack {reference[:PACK_KEY_LENGTH_MAX]}")
    return _info(found)


def _checked_key(key: str) -> str:
    if not 1 <= len(key) <= PACK_KEY_LENGTH_MAX or not key.isprintable():
        message = f"A pack's key has 1 to {PACK_KEY_LENGTH_MAX} printable characters."
    elif key != key.strip():
        message = "A pack's key neither begins nor ends with a space."
    elif reserved_prefix(key):
        message = f"A pack's key may not begin with {key.partition('_')[0]}_, which our own ids begin with."
    else:
        return key
    raise errors.invalid_request(message, param="key")
