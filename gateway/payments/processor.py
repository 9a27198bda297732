"""What asking the payment processor can come to, for those who ask. It imports nothing of the processor's library."""

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

StripeMode = Literal["live", "test"]
"""Whether real money moves."""

MODES: Final = ("live", "test")
"""Of customers."""


def pays_for(processor: StripeMode, mode: str) -> bool:
    """Whether customers of *mode* can pay there: real money pays for nothing in the sandbox."""
    return processor == "test" or mode == "live"


class ProcessorUnavailable(Exception):
    """Stripe does not answer, or not now. What was asked may or may not have happened: ask again."""


class ProcessorRefused(Exception):
    """Stripe will not do it, however often it is asked. *param* names what it did not like."""

    def __init__(self, status: int | None, code: str | None, param: str | None = None) -> None:
        super().__init__(f"the payment processor refused it ({status}, {code}, {param})")
        self.status = status
        self.code = code
        self.param = param


class ProcessorNotFound(ProcessorRefused):
    """There is no such object, or none that this key may see."""


class PaymentDeclined(Exception):
    """The customer's bank, or Stripe for it, has said no; with `authentication_required`, not without the customer.

    Attributes:
        payment_intent: the payment as it stands, which can be tried again or cancelled.
    """

    def __init__(self, code: str | None, decline_code: str | None, payment_intent: Mapping[str, Any] | None) -> None:
        super().__init__(f"the payment was declined ({code}, {decline_code})")
        self.code = code
        self.decline_code = decline_code
        self.payment_intent = payment_intent


class SignatureInvalid(Exception):
    """Not from Stripe, too old, or not an event: says which, without quoting it."""


class Session(msgspec.Struct, frozen=True):
    """A Checkout Session. It has no *url* once it has ended."""

    id: str
    url: str | None
