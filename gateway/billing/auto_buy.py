"""Plans that are bought by themselves, for customers who have agreed to it: once for each cause.

How it works. A plan is bought for two reasons: a customer's wallet was refused what it was asked for, or a plan has
expired. Both may notice the same end, in several processes at once, and an event comes at least once. So the ledger's
idempotency key of such a purchase is its cause: that the customer's latest plan, dead or alive, does no more. Whoever
is second replays the first one's purchase; a plan that was bought is the latest then, and makes another cause.

After a refusal the latest plan is read before the command is tried again. Refused again, it has seen that plan and no
later one: what was bought in between would have answered it.
"""

from typing import Final

import msgspec
from sqlalchemy import and_, select
from sqlmodel import col

from gateway.billing.packs import Buyer, PackInfo, Packs
from gateway.database import Database, of
from gateway.errors import ApiError
from gateway.events.event import StoredEvent
from gateway.identity.wallets import customer_wallet
from gateway.tables import AssetVersion, Customer, Tenant
from ledger.commands import Debit, Key, Reserve
from ledger.errors import InsufficientCredits, LedgerError, LedgerUnavailable
from ledger.ledger import Ledger
from ledger.model import Block, Funding, Scope, Tags, WalletRef
from ledger.outcomes import Applied
from pricing.money import Asset

OPERATION: Final = "pack.auto"
"""The scope of the idempotency keys."""

DIGEST: Final = "auto"
"""A cause has one purchase, whatever is asked for by whoever comes second."""

CUSTOMER_WALLET: Final = "customer:"


class AutoBuySettings(msgspec.Struct, frozen=True):
    """What a customer has agreed to, as it stands in their settings. Amounts are millicredits; None is the pack's."""

    auto_buy_enabled: bool = False
    auto_buy_pack: str | None = None
    auto_buy_price: int | None = None
    auto_buy_credits: int | None = None


class Preferred(msgspec.Struct, frozen=True):
    """The pack at the customer's own price, and the tenant's credit."""

    pack: PackInfo
    asset: str


class AutoBuy:
    """Buys the preferred plan of customers when one is missing."""

    def __init__(self, database: Database, ledger: Ledger, packs: Packs) -> None:
        self._database = database
        self._ledger = ledger
        self._packs = packs

    async def try_again(
        self, command: Reserve | Debit, refused: InsufficientCredits, *, customer_id: str, app_id: str | None
    ) -> Applied:
        """Do the *refused* command after all, if need be on a plan that is bought for it.

        Raises:
            InsufficientCredits: the customer has not agreed, no plan would help, or it cannot be paid.
            LedgerError: as `Ledger.execute`.
        """
        wallet = customer_wallet(*command.scope, customer_id)
        if not await self._falls_to(wallet, command, refused):
            raise refused
        preferred = await self._preferred(command.scope, customer_id)
        if preferred is None or not _allowed(preferred.pack, command.tags):
            raise refused
        latest = await self._ledger.latest_plan(wallet)
        try:
            return await self._ledger.execute(command)
        except InsufficientCredits as again:
            refused = again
        buyer = Buyer(command.scope, customer_id, preferred.asset, app_id)
        if not await self._helps(buyer, preferred.pack, command.tags, refused):
            raise refused
        if not await self._buy(buyer, preferred.pack, after=latest, cause="refused"):
            raise refused
        return await self._ledger.execute(command)

    async def on_event(self, event: StoredEvent) -> None:
        """Buy the next plan when one has expired and none is left. Repeatable; what cannot be paid is let be.

        Raises:
            LedgerUnavailable, DatabaseUnavailable: tell of the event again.
        """
        if event.type != "credit.expired" or not event.wallet.startswith(CUSTOMER_WALLET):
            return
        expired = event.body["block"]
        if expired.get("funding") != Funding.PLAN:
            return
        scope, customer_id = Scope(event.tenant, event.mode), event.wallet.removeprefix(CUSTOMER_WALLET)
        preferred = await self._preferred(scope, customer_id)
        if preferred is None:
            return
        latest = await self._ledger.latest_plan(customer_wallet(*scope, customer_id))
        # What was bought after the end of this plan was bought because of it.
        if latest is not None and latest.created_at_us < expired["expires_at_us"]:
            buyer = Buyer(scope, customer_id, preferred.asset)
            await self._buy(buyer, preferred.pack, after=latest, cause="expired", unless_active=True)

    async def _falls_to(self, wallet: WalletRef, command: Reserve | Debit, refused: InsufficientCredits) -> bool:
        """Whether it is the customer's own wallet that was short, and not that of the developer who bears a part."""
        first, *others = command.legs
        if wallet not in first.wallets or refused.needed != first.minimum:
            return False
        if not others:
            return True
        view = await self._ledger.wallet_view(wallet, command.tags, unfunded=command.unfunded)
        return view is None or view.effective_balance < first.minimum

    async def _helps(self, buyer: Buyer, pack: PackInfo, tags: Tags, refused: InsufficientCredits) -> bool:
        """Whether the pack would pay what was refused: else a customer would buy one with every refusal.

        Its price may come out of credits that could have paid, too.
        """
        view = await self._ledger.wallet_view(buyer.wallet)
        blocks = () if view is None else view.blocks
        given_up = self._packs.price_out_of(blocks, buyer, pack, tags)
        return refused.available - given_up + pack.credits >= refused.needed

    async def _preferred(self, scope: Scope, customer_id: str) -> Preferred | None:
        """What the customer has agreed to have bought; None without an agreement, or when no such pack is offered."""
        query = (
            select(
                col(Customer.settings),
                col(AssetVersion.code),
                col(AssetVersion.scale),
                col(AssetVersion.usd_value_picos),
            )
            .join(Tenant, col(Tenant.id) == col(Customer.tenant))
            .join(
                AssetVersion,
                and_(col(AssetVersion.tenant) == col(Tenant.id), col(AssetVersion.code) == col(Tenant.asset_code)),
            )
            .where(
                col(Customer.tenant) == scope.tenant, col(Customer.mode) == scope.mode, col(Customer.id) == customer_id
            )
            .limit(1)  # Any version: what is asked for here, the scale, never changes.
        )
        async with self._database.read(of(scope.tenant, scope.mode)) as connection:
            row = (await connection.execute(query)).one_or_none()
        settings = msgspec.convert(row.settings, AutoBuySettings) if row is not None else AutoBuySettings()
        if row is None or not settings.auto_buy_enabled or settings.auto_buy_pack is None:
            return None
        asset = Asset(code=row.code, scale=row.scale, usd_value_picos=row.usd_value_picos)
        try:
            pack = await self._packs.find(scope.tenant, scope.mode, settings.auto_buy_pack)
        except ApiError:
            return None
        if pack.archived:
            return None
        price = None if settings.auto_buy_price is None else asset.from_millis(settings.auto_buy_price)
        credits = None if settings.auto_buy_credits is None else asset.from_millis(settings.auto_buy_credits)
        return Preferred(pack.at(price=price, credits=credits), asset.code)

    async def _buy(
        self, buyer: Buyer, pack: PackInfo, *, after: Block | None, cause: str, unless_active: bool = False
    ) -> bool:
        """Whether the plan that follows *after* is bought, now or before. A short wallet is no fault of anybody's."""
        key = Key(OPERATION, f"{buyer.customer_id}:{'none' if after is None else after.id}", DIGEST)
        try:
            await self._packs.buy(buyer, pack, key=key, cause=cause, unless_active=unless_active)
        except LedgerUnavailable:
            raise
        except LedgerError:
            return False
        return True


def _allowed(pack: PackInfo, tags: Tags) -> bool:
    """Whether the credits of the pack may pay for *tags*."""
    return pack.restriction.allows(tags) and (tags.priority_max is None or pack.priority <= tags.priority_max)
