"""Payments with nobody there: what we ask of the processor for an automatic order, and what its answers say.

How it works. The order's payment is asked for under the order's idempotency key, so that asking again is no second
payment. Where it must not be made any more, or the key may have been forgotten, it is looked for instead, among the
customer's payments. Whatever is found becomes an observation, like any other news of a payment.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from gateway.payments.auto_top_up_terms import AUTHENTICATION_REQUIRED, SECOND_US
from gateway.payments.facts import Facts
from gateway.payments.observed import Observed, OrderRef, facts_of
from gateway.payments.orders import Order
from gateway.payments.processor import PaymentDeclined, ProcessorNotFound, ProcessorRefused, ProcessorUnavailable
from gateway.payments.top_up_turns import Turn

if TYPE_CHECKING:
    from gateway.payments.stripe_api import StripeAPI

OPERATORS_FAULT: Final = (401, 403)
"""Statuses that tell of the operator's key, not of the payment."""

OTHER_ARGUMENTS: Final = "idempotency_error"
"""The key was used before, with another payment method than the customer has now."""

LIST_MARGIN_S: Final = 3600
"""The processor's clock is not ours."""

log = structlog.get_logger(__name__)


class OffSession:
    """The payments of automatic orders.

    Raises:
        ProcessorUnavailable: `charge` and `find`. What was asked may have happened: ask again.
    """

    def __init__(self, stripe: "StripeAPI") -> None:
        self._stripe = stripe

    async def charge(self, order: Order, turn: Turn) -> Observed | None:
        """Ask for the payment, or for the one that was made; None where there is none, and will be none."""
        assert turn.processor_id is not None
        assert turn.payment_method is not None
        try:
            payment = await self._stripe.charge_off_session(
                order, processor_id=turn.processor_id, payment_method=turn.payment_method
            )
        except PaymentDeclined as declined:
            return _declined(order, declined.payment_intent, declined.decline_code or declined.code)
        except ProcessorRefused as refused:
            _excuse(refused)
            found = await self._listed(order, turn)
            if found is not None or refused.code == OTHER_ARGUMENTS:
                return found
            return _declined(order, None, refused.code)
        return _seen(order, payment)

    async def find(self, order: Order, turn: Turn) -> Observed | None:
        """The payment if it was made, without asking for it; None where it was not."""
        if order.payment_intent is None:
            return await self._listed(order, turn)
        try:
            return _seen(order, await self._stripe.payment_intent(order.payment_intent))
        except ProcessorNotFound:
            return None

    async def let_go(self, payment_intent: str) -> None:
        """Nobody is to pay what has failed: the next attempt is another payment."""
        try:
            await self._stripe.cancel_payment_intent(payment_intent)
        except (ProcessorUnavailable, ProcessorRefused) as error:
            # It can only be paid by whoever confirms it, which is us.
            log.warning("a payment that failed stays open", payment_intent=payment_intent, reason=str(error))

    async def _listed(self, order: Order, turn: Turn) -> Observed | None:
        if turn.processor_id is None:
            return None
        since_s = order.created_at_us // SECOND_US - LIST_MARGIN_S
        try:
            payments = await self._stripe.payment_intents_of(turn.processor_id, since_s)
        except ProcessorRefused as refused:
            _excuse(refused)
            return None  # The processor knows no such customer (any more).
        made = (each for each in payments if (each.get("metadata") or {}).get("farebox_order") == order.id)
        payment = next(made, None)
        return None if payment is None else _seen(order, payment)


def _excuse(refused: ProcessorRefused) -> None:
    """Raises ProcessorUnavailable for what is no fault of the order's."""
    if refused.status in OPERATORS_FAULT:
        raise ProcessorUnavailable(str(refused)) from refused


def _seen(order: Order, payment: Mapping[str, Any]) -> Observed | None:
    """What *payment* says. One that waits for the customer is declined: nobody is there."""
    if payment.get("status") == "requires_action":
        return _declined(order, payment, AUTHENTICATION_REQUIRED)
    return facts_of(payment)


def _declined(order: Order, payment: Mapping[str, Any] | None, code: str | None) -> Observed:
    """That *order* will not be paid, because of *code*."""
    reason = code or "declined"
    payment_intent = None if payment is None else payment.get("id")
    return Observed(
        id=f"seen:{order.id}:{reason}",
        kind="payment_intent",
        payment_intent=msgspec.convert(payment_intent, str | None),
        order=OrderRef(order.scope, order.id),
        facts=Facts(declined=frozenset({reason})),
    )
