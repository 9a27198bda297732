"""Automatic top-ups: what a customer has agreed to is bought when their wallet falls below a threshold, once at a time.

How it works. The ledger tells, in the transaction of the charge that crossed, that a top-up is due. Our reaction writes
that down with the customer and wakes this process; it does not wait for the processor, so the outbox goes on. Whoever
takes the customer's turn (see `Turns`) looks at the wallet, and decides and writes an order in one transaction, in
which the customer's agreement and the month's orders cannot change. An open order is the only one; the database says
so. Only then the processor is asked, under an idempotency key that is the order's.

So a process may die anywhere. Before the order is there, the turn's lease runs out, and another looks again. After
that, the next turn goes on with the order: it asks for the same payment under the same key, which is made once. Keys
end after a day: later, and where the payment may not be made any more, it is looked for among the customer's payments.

What came of a payment is for the `Settler`, as of any other: it credits, or fails the order. A failure sets the time of
the next attempt where the order ends, once.
"""

import asyncio
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

import msgspec
import structlog
from sqlalchemy import and_, select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.database import Database, DatabaseUnavailable, Joined, of
from gateway.events.event import StoredEvent, customer_of
from gateway.identity.wallets import customer_wallet
from gateway.payments.auto_top_up_terms import (
    SECOND_US,
    Agreement,
    Decision,
    Standing,
    agreement_of,
    decide,
    month_of,
    next_attempt_us,
)
from gateway.payments.facts import Facts
from gateway.payments.links import Links
from gateway.payments.observed import Observed, OrderRef, facts_of
from gateway.payments.orders import Order, Orders
from gateway.payments.packages import Packages
from gateway.payments.settling import Settler
from gateway.payments.stripe_api import (
    PaymentDeclined,
    ProcessorNotFound,
    ProcessorRefused,
    ProcessorUnavailable,
    StripeAPI,
)
from gateway.payments.top_up_turns import Turn, Turns
from gateway.tables import AssetVersion, Customer, PaymentCustomer, Tenant
from ledger.commands import Key, Tell
from ledger.errors import LedgerUnavailable
from ledger.ledger import Ledger, WalletView
from ledger.model import Scope
from pricing.money import Asset

POLL_S: Final = 30.0
"""What this process was not told of is found within so long."""

PAUSE_LEAST: Final = 0.75
"""Each pause is drawn from this part of it to all of it: processes do not come in step."""

PAGE: Final = 100
AT_ONCE_MAX: Final = 8
"""Customers whom a process looks at together."""

TURNS_MAX: Final = 8
"""Orders, one after the other, that a customer gets before others have their turn."""

ALONE_US: Final = 60 * SECOND_US
"""So long an order is left to whoever made it. Longer than the processor is waited for."""

KEY_LIFE_US: Final = 23 * 3600 * SECOND_US
"""So long an idempotency key is surely known to the processor, which forgets them after a day."""

ASK_AGAIN_US: Final = (60 * SECOND_US, 6 * 3600 * SECOND_US)
"""How soon, and how late at most, an order that stays open is asked after again: when it is twice as old."""

REFUSED_US: Final = (401, 403)
"""Statuses that tell of the operator's key, not of the payment."""

LIST_MARGIN_S: Final = 3600
"""The processor's clock is not ours."""

DUE: Final = "topup.due"
TRIGGERS: Final = frozenset({DUE, "topup.succeeded"})

FAILED: Final = "topup.failed"
DIGEST: Final = "auto"
"""A cause is told once, whatever would be said of it the second time."""

log = structlog.get_logger(__name__)


class AutoTopUps:
    """Looks at customers' wallets and tops them up, from `start` to `stop`.

    Args:
        serves: whether customers of a mode can pay.
    """

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        *,
        packages: Packages,
        orders: Orders,
        stripe: StripeAPI,
        settler: Settler,
        links: Links,
        serves: Callable[[str], bool],
        now_us: Callable[[], int],
        new_id: Callable[[str], str],
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._packages = packages
        self._orders = orders
        self._stripe = stripe
        self._settler = settler
        self._links = links
        self._serves = serves
        self._now_us = now_us
        self._new_id = new_id
        self._news = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self.turns = Turns(database, now_us=now_us, new_id=new_id)

    # What brings news.

    async def on_event(self, event: StoredEvent) -> None:
        """A wallet has crossed the customer's threshold, or was topped up, perhaps not far enough. Repeatable.

        Raises:
            DatabaseUnavailable, LedgerUnavailable: tell of the event again.
        """
        customer_id = customer_of(event.wallet)
        if customer_id is None:
            return
        scope = Scope(event.tenant, event.mode)
        await self.turns.news(scope, customer_id)
        self.wake()
        if event.type == DUE:
            await self.tell_if_no_method(scope, customer_id, cause=event.id)

    def wake(self) -> None:
        """There are news of somebody."""
        self._news.set()

    async def consider(self, scope: Scope, customer_id: str) -> None:
        """Top the wallet up now if that is due, and nobody else is at it. Repeatable at any time.

        Raises:
            DatabaseUnavailable, LedgerUnavailable: the next turn goes on, when the lease has run out.
        """
        await self.turns.news(scope, customer_id)
        await self._take_turns(scope, customer_id)

    async def tell_if_no_method(self, scope: Scope, customer_id: str, *, cause: str) -> None:
        """Tell, once for each *cause*, that a top-up is due and there is nothing to pay it with."""
        async with self._database.read(of(*scope)) as connection:
            agreement = await self._agreement(connection, scope, customer_id)
            known = select(col(PaymentCustomer.payment_method)).where(
                col(PaymentCustomer.tenant) == scope.tenant,
                col(PaymentCustomer.mode) == scope.mode,
                col(PaymentCustomer.customer_id) == customer_id,
            )
            method = (await connection.execute(known)).scalar_one_or_none()
        if agreement is None or method is not None:
            return
        balance, _ = _standing(await self._ledger.wallet_view(customer_wallet(*scope, customer_id)))
        if balance < agreement.threshold:
            await self._tell(scope, customer_id, agreement, "no_payment_method", cause=cause)

    async def failure_facts(self, order: Order, failure: str | None) -> Mapping[str, Any]:
        """What `topup.failed` says of an automatic *order* beside its terms: when it is tried again, and what to do."""
        query = select(col(PaymentCustomer.failures)).where(
            col(PaymentCustomer.tenant) == order.tenant,
            col(PaymentCustomer.mode) == order.mode,
            col(PaymentCustomer.customer_id) == order.customer_id,
        )
        async with self._database.read(of(*order.scope)) as connection:
            failures = ((await connection.execute(query)).scalar_one_or_none() or 0) + 1
        return {
            "attempt": failures,
            "next_attempt_at_us": next_attempt_us(order.id, failures, failure, self._now_us()),
            "top_up_url": self._links.url_of(order.scope, order.customer_id, package=order.package),
        }

    # The loop.

    def start(self) -> None:
        self._loop = asyncio.create_task(self._keep_up(), name="automatic top-ups")

    async def stop(self) -> None:
        """End; what is under way is given up, and taken up again by somebody when its lease has run out."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
            self._loop = None

    async def round(self) -> int:
        """Look at a page of the customers who are due; how many there were.

        Raises:
            DatabaseUnavailable
        """
        due = await self.turns.due(page=PAGE)
        at_once = asyncio.Semaphore(AT_ONCE_MAX)

        async def look_at(scope: Scope, customer_id: str) -> None:
            async with at_once:
                try:
                    await self._take_turns(scope, customer_id)
                except (DatabaseUnavailable, LedgerUnavailable):
                    log.warning("the database is away", upkeep="top-ups")
                except Exception:
                    # Their turn comes again when the lease has run out; the others have theirs now.
                    log.exception("an automatic top-up is held up", tenant=scope.tenant, customer=customer_id)

        async with asyncio.TaskGroup() as looks:
            for scope, customer_id in due:
                looks.create_task(look_at(scope, customer_id))
        return len(due)

    async def _keep_up(self) -> None:
        while True:
            self._news.clear()
            found = 0
            try:
                found = await self.round()
            except DatabaseUnavailable:
                log.warning("the database is away", upkeep="top-ups")
            except Exception:
                log.exception("upkeep failed", upkeep="top-ups")
            if found == PAGE:
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S * random.uniform(PAUSE_LEAST, 1)):  # noqa: S311
                    await self._news.wait()

    # A turn.

    async def _take_turns(self, scope: Scope, customer_id: str) -> None:
        for _ in range(TURNS_MAX):
            turn = await self.turns.take(scope, customer_id)
            if turn is None:
                return
            look_at_us = await self._look(turn)
            await self.turns.end(turn, look_at_us)

    async def _look(self, turn: Turn) -> int | None:
        """Do what is due for a customer; when to look again, if ever."""
        order = await self._orders.open_automatic(turn.scope, turn.customer_id)
        if order is None:
            view = await self._ledger.wallet_view(customer_wallet(*turn.scope, turn.customer_id))
            begun = await self._begin(turn, view)
            if isinstance(begun, Decision):
                return begun.look_at_us
            order = begun
            asked = self._charged(turn, order)
        else:
            if order.payment_intent is None and self._now_us() < order.created_at_us + ALONE_US:
                return order.created_at_us + ALONE_US
            asked = self._found(turn, order)
        try:
            return await self._heard(order, await asked)
        except ProcessorUnavailable as away:
            log.warning("an automatic top-up waits for the payment processor", order=order.id, reason=str(away))
            return self._later(order)

    async def _begin(self, turn: Turn, view: WalletView | None) -> Order | Decision:
        """Decide, and write the order that follows; in one transaction, so that what is decided by stays true."""
        scope, now_us = turn.scope, self._now_us()
        month = month_of(now_us)
        balance, frozen = _standing(view)
        async with self._database.write(of(*scope)) as connection:
            here = Joined(connection, of(*scope))
            agreement = await self._agreement(connection, scope, turn.customer_id, hold=True)
            if not await self.turns.within(here).holds(turn):
                return Decision("not_needed", now_us)  # There are news: the next turn looks at the wallet again.
            orders = self._orders.within(here)
            spent_minor = 0
            if agreement is not None:
                spent_minor = await orders.automatic_minor(
                    scope, turn.customer_id, currency=agreement.package.currency, month=month
                )
            standing = Standing(
                balance=balance,
                frozen=frozen,
                spent_minor=spent_minor,
                has_method=turn.processor_id is not None and turn.payment_method is not None,
                failures=turn.failures,
                last_failure=turn.last_failure,
            )
            decision = decide(agreement, standing, now_us)
            if agreement is not None and decision.reason == "due":
                order = self._order(turn, agreement, now_us)
                # None is open, or another process made one since we looked.
                return order if await orders.add(order) else Decision("not_needed", now_us)
        if agreement is not None and decision.reason == "monthly_cap":
            cause = f"{turn.customer_id}:{month.start_us}:{agreement.cap_minor}"
            await self._tell(scope, turn.customer_id, agreement, "monthly_cap", cause=cause)
        return decision

    def _order(self, turn: Turn, agreement: Agreement, now_us: int) -> Order:
        package, bought = agreement.package, agreement.bought
        return Order(
            tenant=turn.scope.tenant,
            mode=turn.scope.mode,
            id=self._new_id("ord"),
            kind="auto",
            status="open",
            customer_id=turn.customer_id,
            package=package.id,
            price_minor=package.price_minor,
            currency=package.currency,
            asset=agreement.asset,
            credited=bought.credited,
            bonus=bought.bonus,
            spread=bought.spread,
            created_at_us=now_us,
        )

    # The payment of an order.

    async def _charged(self, turn: Turn, order: Order) -> Observed | None:
        """Ask for the payment; asked again, it is the same one. None where there is none, and never will be."""
        assert turn.processor_id is not None
        assert turn.payment_method is not None
        try:
            return _seen(
                order,
                await self._stripe.charge_off_session(
                    order, processor_id=turn.processor_id, payment_method=turn.payment_method
                ),
            )
        except PaymentDeclined as declined:
            if declined.payment_intent is not None:
                return _seen(order, declined.payment_intent, declined.decline_code or declined.code)
            return _said(order, declined.decline_code or declined.code)
        except ProcessorRefused as refused:
            if refused.status in REFUSED_US:
                raise ProcessorUnavailable(str(refused)) from None
            # It may have been made before with what was kept then: another payment method, perhaps.
            found = await self._listed(turn, order)
            if found is not None or refused.code == "idempotency_error":
                return found
            return _said(order, refused.code)

    async def _found(self, turn: Turn, order: Order) -> Observed | None:
        """Go on with an order that somebody has left; None where there is no payment of it, and never will be."""
        if order.payment_intent is not None:
            try:
                return _seen(order, await self._stripe.payment_intent(order.payment_intent))
            except ProcessorNotFound:
                return None
        async with self._database.read(of(*turn.scope)) as connection:
            agreement = await self._agreement(connection, turn.scope, turn.customer_id)
        known = turn.processor_id is not None and turn.payment_method is not None
        if known and agreement is not None and self._now_us() < order.created_at_us + KEY_LIFE_US:
            return await self._charged(turn, order)
        return await self._listed(turn, order)

    async def _listed(self, turn: Turn, order: Order) -> Observed | None:
        """The order's payment among those that the processor has of the customer."""
        if turn.processor_id is None:
            return None
        since_s = order.created_at_us // SECOND_US - LIST_MARGIN_S
        try:
            payments = await self._stripe.payment_intents_of(turn.processor_id, since_s)
        except ProcessorRefused as refused:
            if refused.status in REFUSED_US:
                raise ProcessorUnavailable(str(refused)) from None
            return None  # The processor knows no such customer (any more).
        for payment in payments:
            if (payment.get("metadata") or {}).get("farebox_order") == order.id:
                return _seen(order, payment)
        return None

    async def _heard(self, order: Order, observed: Observed | None) -> int:
        """Let what is known of the payment have its effect; when to look again."""
        if observed is None:
            await self._orders.ended(order, "expired")
            return self._now_us()
        await self._settler.observe(observed)
        after = await self._orders.find(order.scope, order.id)
        if after is not None and after.status == "open":
            if observed.payment_intent is not None and after.payment_intent is None:
                await self._orders.note_payment(order, observed.payment_intent)
            return self._later(order)
        if after is not None and after.status == "failed" and observed.payment_intent is not None:
            await self._let_go(observed.payment_intent)
        return self._now_us()

    async def _let_go(self, payment_intent: str) -> None:
        """Nobody is to pay what has failed: the next attempt is another payment."""
        try:
            await self._stripe.cancel_payment_intent(payment_intent)
        except (ProcessorUnavailable, ProcessorRefused) as error:
            # It can only be paid by whoever confirms it, which is us.
            log.warning("a payment that failed stays open", payment=payment_intent, reason=str(error))

    def _later(self, order: Order) -> int:
        least_us, most_us = ASK_AGAIN_US
        now_us = self._now_us()
        return now_us + min(most_us, max(least_us, now_us - order.created_at_us))

    # What is read and told.

    async def _agreement(
        self, connection: AsyncConnection, scope: Scope, customer_id: str, *, hold: bool = False
    ) -> Agreement | None:
        """What the customer has agreed to, in the tenant's credits as they are now; with *hold* it stays so."""
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
                and_(
                    col(AssetVersion.tenant) == col(Tenant.id),
                    col(AssetVersion.code) == col(Tenant.asset_code),
                    col(AssetVersion.effective_from_us) <= self._now_us(),
                ),
            )
            .where(
                col(Customer.tenant) == scope.tenant,
                col(Customer.mode) == scope.mode,
                col(Customer.id) == customer_id,
                col(Customer.erased_at_us).is_(None),
            )
            .order_by(col(AssetVersion.effective_from_us).desc())
            .limit(1)
        )
        if hold:
            query = query.with_for_update(read=True, of=Customer)
        row = (await connection.execute(query)).one_or_none()
        if row is None or not self._serves(scope.mode):
            return None
        asset = Asset(code=row.code, scale=row.scale, usd_value_picos=row.usd_value_picos)
        return agreement_of(row.settings, self._packages, asset)

    async def _tell(self, scope: Scope, customer_id: str, agreement: Agreement, reason: str, *, cause: str) -> None:
        """That a top-up is due and cannot be: once for each cause."""
        await self._ledger.execute(
            Tell(
                id=self._new_id("cmd"),
                scope=scope,
                key=Key(FAILED, f"{reason}:{cause}", DIGEST),
                wallet=customer_wallet(*scope, customer_id),
                asset=agreement.asset,
                event=FAILED,
                body={
                    "reason": reason,
                    "package": agreement.package.id,
                    "top_up_url": self._links.url_of(scope, customer_id, package=agreement.package.id),
                },
            )
        )


def _standing(view: WalletView | None) -> tuple[int, bool]:
    """The balance, and whether the wallet is frozen."""
    return (0, False) if view is None else (view.balance, view.wallet.frozen)


def _seen(order: Order, payment: Mapping[str, Any], declined: str | None = None) -> Observed | None:
    """What *payment* says, and why it was *declined*. One that waits for the customer has failed: nobody is there."""
    observed = facts_of(payment)
    if observed is None:
        return None
    if declined is None and payment.get("status") == "requires_action":
        declined = "authentication_required"
    if declined is None:
        return observed
    more = Facts(declined=frozenset({declined}))
    return msgspec.structs.replace(_said(order, declined), payment_intent=observed.payment_intent, facts=more)


def _said(order: Order, failure: str | None) -> Observed:
    """That the processor will not make a payment for *order*."""
    code = failure or "refused"
    return Observed(
        id=f"seen:{order.id}:{code}",
        kind="payment_intent",
        payment_intent=None,
        order=OrderRef(order.scope, order.id),
        facts=Facts(declined=frozenset({code})),
    )
