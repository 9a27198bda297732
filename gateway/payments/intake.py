"""Where the payment processor's events come in: proven to be its own, few at a time, and handed on."""

from typing import TYPE_CHECKING, Final

from gateway.payments.observed import facts_of
from gateway.payments.settling import Outcome, Settler

if TYPE_CHECKING:
    from gateway.payments.stripe_api import StripeAPI

UNDER_WAY_MAX: Final = 64
"""Events that one process handles at once. Each waits for the database, and some for Stripe."""


class TooManyEvents(Exception):
    """UNDER_WAY_MAX are being handled: send it again later."""


class Intake:
    """Takes in events that are delivered, in whatever order."""

    def __init__(self, stripe: "StripeAPI", settler: Settler) -> None:
        self._stripe = stripe
        self._settler = settler
        self._under_way = 0

    async def receive(self, body: bytes, signature: str) -> Outcome:
        """Do what the event asks for. Until this returns, it has to be delivered again.

        Raises:
            SignatureInvalid: it is not the processor's, or too old; nothing of it was looked at.
            Unreadable: a kind of event that we know has a shape that we do not.
            TooManyEvents; and as `Settler.observe`.
        """
        message = self._stripe.verified(body, signature)
        observed = facts_of(message)
        if observed is None:
            return Outcome("ignored")
        if self._under_way >= UNDER_WAY_MAX:
            raise TooManyEvents
        self._under_way += 1
        try:
            return await self._settler.observe(observed)
        finally:
            self._under_way -= 1
