"""Stripe's test payment methods, and how each behaves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tests.servers.stripe_objects import LAST4, Object


@dataclass(frozen=True)
class TestCard:
    """How one of Stripe's test payment methods behaves: on attaching, and when it is charged."""

    __test__ = False

    last4: str = LAST4
    type: str = "card"
    attaches: bool = True
    code: str | None = None
    decline_code: str | None = None


_DECLINED: Final = "card_declined"

_GENERIC: Final = TestCard("0002", attaches=False, code=_DECLINED, decline_code="generic_decline")
_NO_FUNDS: Final = TestCard("9995", attaches=False, code=_DECLINED, decline_code="insufficient_funds")

TEST_CARDS: Final[Mapping[str, TestCard]] = {
    "pm_card_visa": TestCard(),
    "pm_card_chargeDeclined": _GENERIC,
    "pm_card_visa_chargeDeclined": _GENERIC,
    "pm_card_chargeDeclinedInsufficientFunds": _NO_FUNDS,
    "pm_card_visa_chargeDeclinedInsufficientFunds": _NO_FUNDS,
    "pm_card_chargeDeclinedExpiredCard": TestCard("0069", attaches=False, code="expired_card"),
    "pm_card_chargeCustomerFail": TestCard("0341", code=_DECLINED, decline_code="generic_decline"),
    "pm_card_authenticationRequired": TestCard(
        "3184", code="authentication_required", decline_code="authentication_required"
    ),
    "pm_usBankAccount_success": TestCard("6789", type="us_bank_account"),
}
"""Source: docs.stripe.com/testing. Authentication is asked for only of who is not there."""

MESSAGES: Final = {
    "card_declined": "Your card was declined.",
    "expired_card": "Your card has expired.",
    "authentication_required": "Your card was declined. This transaction requires authentication.",
}


def decline(card: TestCard) -> Object:
    assert card.code is not None
    reason = {} if card.decline_code is None else {"decline_code": card.decline_code}
    return {
        "type": "card_error",
        "code": card.code,
        **reason,
        "doc_url": f"https://docs.stripe.com/error-codes/{card.code.replace('_', '-')}",
        "message": MESSAGES.get(card.code, "The payment failed."),
    }
