"""What a payment has come to becomes true in the ledger: once, whoever brings the news, and however often.

How it works. News of a payment is kept as an observation first. Then everything that is kept of it is joined, which
says what has to be true (`gateway.payments.facts`), and commands make it true: a top-up that is keyed by the order, and
a reversal that says how much is to be gone in all. Only then the order and the observation are marked. So a crash
anywhere is repaired by the next delivery, and who looks first or twice does no harm.

Of several at once, whoever kept its observation last has seen all of them. Their number is the revision of what it
asks for, so that what one with an older look asks for later changes nothing.
"""

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
import structlog
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.clock import now_us
from gateway.database import Database, Joined, of
from gateway.identity.wallets import customer_wallet
from gateway.ids import new_id
from gateway.payments.facts import EXPIRED, NOTHING, Facts, Money, Target, target
from gateway.payments.observations import Kept, Observations
from gateway.payments.observed import Observed, OrderRef, facts_of
from gateway.payments.operator import OperatorScope
from gateway.payments.orders import Order, Orders, OrderStatus
from gateway.payments.packages import price_text
from gateway.payments.processor import ProcessorNotFound, pays_for
from gateway.tables import Customer, PaymentCustomer
from ledger.commands import Key, Reverse, Tell, TopUp
from ledger.errors import LedgerError, LedgerUnavailable
from ledger.ledger import Ledger
from ledger.model import Scope, WalletRef

if TYPE_CHECKING:
    from gateway.payments.stripe_api import StripeAPI

SOURCE: Final = "payment"
"""The source of blocks that were paid for."""

Result = Literal["done", "duplicate", "kept", "refused", "ignored"]

Changed = Callable[[AsyncConnection, Order, Target], Awaitable[None]]
"""Is told, in the transaction that does it, that an order has ended, or that its payment method is kept for later; and
what the order has come to.
"""

Reversing = Callable[[Order, Target], Awaitable[None]]
"""Is told that money of an order goes back, is disputed or is there again, before the wallet has that. Repeatable."""

ToldOfFailure = Callable[[Order, str], Awaitable[Mapping[str, Any]]]
"""What `topup.failed` says of an order besides."""

log = structlog.get_logger(__name__)


class Outcome(msgspec.Struct, frozen=True):
    """What news of a payment have come to.

    Attributes:
        result: `done`; `duplicate`, when they were done before; `kept`, until more is known; `refused`, for *reason*,
            which no repetition changes; `ignored`, when they are of no order of ours.
        order: as it is now.
    """

    result: Result
    reason: str | None = None
    order: Order | None = None


async def _nothing_more(order: Order, reason: str) -> Mapping[str, Any]:
    return {}


async def _nothing_first(order: Order, goal: Target) -> None:
    pass


class NotBooked(Exception):
    """The ledger refuses what a payment asks for: a fault of ours, which the payer must not suffer from."""


class Settler:
    """Settles the payments of all tenants.

    Args:
        changed: are told of every order that changes.
        reversing: is told before a payment is reversed, or given back again.
        told_of_failure: says what follows from a failure.
    """

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        *,
        orders: Orders,
        stripe: "StripeAPI",
        operator: OperatorScope,
        changed: Sequence[Changed] = (),
        reversing: Reversing = _nothing_first,
        told_of_failure: ToldOfFailure = _nothing_more,
        now_us: Callable[[], int] = now_us,
        new_id: Callable[[str], str] = new_id,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._orders = orders
        self._observations = Observations(database, now_us=now_us, new_id=new_id)
        self._stripe = stripe
        self._operator = operator
        self._changed = tuple(changed)
        self._reversing = reversing
        self._told_of_failure = told_of_failure
        self._new_id = new_id

    async def observe(self, observed: Observed) -> Outcome:
        """Keep what was learnt of a payment, and make true what follows from it. Repeatable, in any order.

        Raises:
            ProcessorUnavailable, LedgerUnavailable, DatabaseUnavailable: it is not done; bring the news again.
            NotBooked: it cannot be done as things are.
        """
        scope = await self._operator()
        if (foreign := _foreign(scope, observed)) is not None:
            # Nothing of it is joined with anything: not even its ids are ours.
            observed = Observed(observed.id, observed.kind, payment_intent=None, order=None, facts=NOTHING)
        if not await self._observations.keep(scope, observed):
            return Outcome("duplicate")
        outcome = await self._settled(scope, observed) if foreign is None else Outcome("refused", foreign)
        return await self._ended(scope, observed, outcome)

    async def settle(self, order: Order) -> Order:
        """Make true what follows from all that is known of *order*; it, as it is then. Repeatable.

        Raises:
            LedgerUnavailable, DatabaseUnavailable, NotBooked: some of it may not be true yet.
        """
        scope = await self._operator()
        order, known = await self._known(scope, order)
        facts = _joined(known)
        goal = target(order, facts)
        if goal.credited:
            await self._credit(order, goal, revision=len(known))
        elif goal.failed is not None and order.status == "open":
            await self._fail(order, goal)
        if goal.credited or goal.failed is not None:
            await self._observations.done(scope, [each.id for each in known if not each.done], "done")
        return await self._again(order)

    async def standing(self, order: Order) -> Target:
        """What *order* has come to by all that is known of it. It makes nothing of that true."""
        _, known = await self._known(await self._operator(), order)
        return target(order, _joined(known))

    # From news to their order

    async def _settled(self, scope: Scope, observed: Observed) -> Outcome:
        linked = observed.order
        if linked is None:
            assert observed.payment_intent is not None, "news of no order and of no payment"
            found = await self._linked(scope, observed.payment_intent)
            if isinstance(found, str):
                return Outcome("kept" if found == _NOT_FOUND else "ignored", found)
            linked = found
        order = await self._find(linked)
        if order is None:
            return Outcome("refused", "unknown_order")
        other_mode = not pays_for(self._stripe.mode, order.mode)
        if other_mode or not await self._is_for(scope, observed.payment_intent, linked):
            return Outcome("refused", "other_mode" if other_mode else "other_payment", order)
        await self._ask_for_refunds(scope, observed)
        order = await self.settle(order)
        if observed.payment_intent not in (None, order.payment_intent) and order.payment_intent is not None:
            return Outcome("refused", "other_payment", order)
        if order.status == "paid":
            await self._keep_method(order, observed)
            return Outcome("done", order=order)
        return _without_credit(order, observed)

    async def _linked(self, scope: Scope, payment_intent: str) -> OrderRef | str:
        """The order of a payment by what else is known of it, or by asking; or why there is none."""
        # After the news are kept: who brings the link now sees them, or we see the link.
        kept = await self._observations.of_payment(scope, payment_intent)
        if (order := next((each.order for each in kept if each.order is not None), None)) is not None:
            return order
        try:
            found = facts_of(await self._stripe.payment_intent(payment_intent))
        except ProcessorNotFound:
            return _NOT_FOUND
        if found is None or found.order is None:
            return "not_ours"
        await self._observations.keep(scope, found)
        return found.order

    async def _find(self, ref: OrderRef) -> Order | None:
        try:
            return await self._orders.find(ref.scope, ref.order_id)
        except ValueError:  # No tenant can have this name.
            return None

    async def _ask_for_refunds(self, scope: Scope, observed: Observed) -> None:
        """A refund that failed after all lowers what was refunded, so the highest amount seen says too little then."""
        news, payment = observed.facts, observed.payment_intent
        if payment is None or not (news.refunds or news.amount_refunded):
            return
        if not _joined(await self._observations.of_payment(scope, payment)).refund_undone:
            return
        for refund in await self._stripe.refunds_of(payment):
            if (seen := facts_of(refund)) is not None:
                await self._observations.keep(scope, seen)

    async def _ended(self, scope: Scope, observed: Observed, outcome: Outcome) -> Outcome:
        """Mark it, unless it waits for more, and log what was not done. Ids only: the rest is the customer's."""
        if outcome.result != "kept":
            told = outcome.result if outcome.reason is None else f"{outcome.result}:{outcome.reason}"
            await self._observations.done(scope, [observed.id], told)
        if outcome.result in ("kept", "refused"):
            log.warning(
                f"news of a payment {outcome.result}",
                reason=outcome.reason,
                observation=observed.id,
                kind=observed.kind,
                payment_intent=observed.payment_intent,
                order=None if observed.order is None else observed.order.order_id,
            )
        return outcome

    # From an order to what has to be true

    async def _known(self, scope: Scope, order: Order) -> tuple[Order, list[Kept]]:
        """All that is known of the order and its one payment: the first that was for its price."""
        ref = OrderRef(order.scope, order.id)
        if order.payment_intent is None:
            known = await self._observations.of_order(scope, ref, ())
            known = [each for each in known if await self._is_for(scope, each.payment_intent, ref)]
            price = Money(order.price_minor, order.currency)
            paying = (each.payment_intent for each in known if price in each.facts.received)
            if (first := next(paying, None)) is None:
                return order, known
            await self._orders.note_payment(order, first)
            order = await self._again(order)
        assert order.payment_intent is not None, "a payment that was noted is gone"
        known = await self._observations.of_order(scope, ref, (order.payment_intent,))
        return order, [each for each in known if each.payment_intent in (None, order.payment_intent)]

    async def _is_for(self, scope: Scope, payment_intent: str | None, order: OrderRef) -> bool:
        """Whether the payment is for *order*: it pays for one order only, the one that it was first said to be for."""
        if payment_intent is None:
            return True
        kept = await self._observations.of_payment(scope, payment_intent)
        return next((each.order for each in kept if each.order is not None), order) == order

    async def _again(self, order: Order) -> Order:
        found = await self._orders.find(order.scope, order.id)
        assert found is not None, "an order is gone"
        return found

    async def _credit(self, order: Order, goal: Target, *, revision: int) -> None:
        if order.status != "paid":
            await self._book(self._top_up(order))
        if goal.touched:
            await self._reversing(order, goal)
            await self._book(
                Reverse(
                    id=self._new_id("cmd"),
                    scope=order.scope,
                    wallet=_wallet(order),
                    block_id=order.block_id,
                    taken=goal.taken_minor,
                    paid=order.price_minor,
                    frozen=goal.frozen,
                    revision=revision,
                    reference=order.id,
                )
            )
        await self._end(order, "paid", goal)

    async def _book(self, command: TopUp | Reverse | Tell) -> None:
        try:
            await self._ledger.execute(command)
        except LedgerUnavailable:
            raise
        except LedgerError as error:
            raise NotBooked(f"{type(command).__name__} of {command.wallet.wallet}") from error

    def _top_up(self, order: Order) -> TopUp:
        terms = (order.customer_id, order.asset, order.credited, order.bonus, order.spread)
        digest = hashlib.sha256(msgspec.json.encode(terms)).hexdigest()
        return TopUp(
            id=self._new_id("cmd"),
            scope=order.scope,
            key=Key("payment", order.id, digest),
            wallet=_wallet(order),
            asset=order.asset,
            block_id=order.block_id,
            amount=order.credited,
            payment=order.id,
            bonus=order.bonus,
            spread=order.spread,
            source=SOURCE,
            metadata={"order": order.id, "package": order.package},
            body=_told(order),
        )

    async def _fail(self, order: Order, goal: Target) -> None:
        reason = goal.failed
        assert reason is not None
        if reason == EXPIRED:
            await self._end(order, "expired", goal)
            return
        await self._book(
            Tell(
                id=self._new_id("cmd"),
                scope=order.scope,
                key=Key("payment_failed", order.id, ""),
                wallet=_wallet(order),
                asset=order.asset,
                event="topup.failed",
                body={**_told(order), "reason": reason, **await self._told_of_failure(order, reason)},
            )
        )
        await self._end(order, "failed", goal, failure=reason)

    async def _end(self, order: Order, status: OrderStatus, goal: Target, *, failure: str | None = None) -> None:
        """Mark the order, once, and tell of it."""
        if order.status == "paid":
            return
        rows = of(*order.scope)
        async with self._database.write(rows) as connection:
            orders = self._orders.within(Joined(connection, rows))
            if status == "paid":
                ended = await orders.paid(order)
            else:
                assert status != "open", "an order does not open again"
                ended = await orders.ended(order, status, failure=failure)
            if ended:
                await self._tell(connection, msgspec.structs.replace(order, status=status, failure=failure), goal)
            if ended and status == "paid" and await _erased(connection, order):
                log.warning(
                    "who was erased has paid: the credits are of use to nobody, refund the payment",
                    order=order.id,
                    payment_intent=order.payment_intent,
                )

    async def _keep_method(self, order: Order, observed: Observed) -> None:
        """The customer agreed that what they paid with is charged again. Only news of it count: later orders may have
        brought another one since. Who is not known to Stripe any more, as after an erasure, keeps none."""
        method = min(observed.facts.methods, default=None)
        if method is None or not order.save_payment_method:
            return
        goal = await self.standing(order)
        async with self._database.write(of(*order.scope)) as connection:
            await connection.execute(
                update(PaymentCustomer)
                .where(
                    col(PaymentCustomer.tenant) == order.tenant,
                    col(PaymentCustomer.mode) == order.mode,
                    col(PaymentCustomer.customer_id) == order.customer_id,
                    col(PaymentCustomer.processor_id).is_not(None),
                )
                .values(payment_method=method)
            )
            await self._tell(connection, order, goal)

    async def _tell(self, connection: AsyncConnection, order: Order, goal: Target) -> None:
        for changed in self._changed:
            await changed(connection, order, goal)


_NOT_FOUND: Final = "no_payment_yet"


def _foreign(scope: Scope, observed: Observed) -> str | None:
    """Why it is none of our account's, as we run it."""
    if observed.account is not None:
        return "other_account"
    if observed.livemode is not None and observed.livemode != (scope.mode == "live"):
        return "other_livemode"
    return None


def _without_credit(order: Order, observed: Observed) -> Outcome:
    """What news have come to of an order that is not paid."""
    facts = observed.facts
    if facts.received:
        return Outcome("refused", "other_amount", order)
    if facts.amount_refunded or facts.refunds or facts.disputes:
        return Outcome("kept", "no_payment_yet", order)
    return Outcome("done", order=order) if order.status != "open" else Outcome("refused", "unpaid", order)


def _joined(known: Sequence[Kept]) -> Facts:
    return reduce(Facts.join, (each.facts for each in known), NOTHING)


async def _erased(connection: AsyncConnection, order: Order) -> bool:
    """Whether the customer was erased, or is being, and so can spend nothing any more."""
    query = select(col(Customer.id)).where(
        col(Customer.tenant) == order.tenant,
        col(Customer.mode) == order.mode,
        col(Customer.id) == order.customer_id,
        col(Customer.erased_at_us).is_not(None),
    )
    return (await connection.execute(query)).one_or_none() is not None


def _wallet(order: Order) -> WalletRef:
    return customer_wallet(order.tenant, order.mode, order.customer_id)


def _told(order: Order) -> dict[str, str]:
    """What events tell of an order."""
    return {
        "order": order.id,
        "package": order.package,
        "price": price_text(order.price_minor, order.currency),
        "currency": order.currency,
    }
