"""What a customer reads who is back from the processor's page."""

from typing import Any, Final
from urllib.parse import urlencode

from gateway.console.amounts import credits_text, money_text
from gateway.console.visit import Visit
from gateway.payments.returns import Returned

REFRESH_S: Final = 3
REFRESHES_MAX: Final = 20
"""How often the page looks by itself whether a payment has come; then the customer may ask."""


def told(visit: Visit, returned: Returned, looks: int) -> dict[str, Any]:
    """What the page says of an order."""
    order, asset = returned.order, visit.asset
    home = f"../{visit.token}"
    facts: dict[str, Any] = {"order": order.id, "refresh": None, "again": None, "bought": None, "bonus": None}
    match order.status:
        case "paid":
            return facts | {
                "title": "Thank you",
                "tone": "good",
                "lead": "Your payment has arrived",
                "text": "The credits are in your balance. You can close this page and go back to the app.",
                "bought": credits_text(order.credited, asset),
                "bonus": credits_text(order.bonus, asset) if order.bonus else None,
                "price": money_text(order.price_minor, order.currency),
            }
        case "failed":
            return facts | {
                "title": "The payment did not work",
                "tone": "bad",
                "lead": "Nothing was credited",
                "text": "Your bank or card issuer did not let the payment through. Another card may work.",
                "again": {"url": home, "label": "Try again"},
            }
        case "expired":
            return facts | {
                "title": "Nothing was paid",
                "tone": "note",
                "lead": "The payment page has expired",
                "text": "Choose again whenever you like.",
                "again": {"url": home, "label": "Choose again"},
            }
    if returned.progress == "to_be_paid":
        return facts | {
            "title": "Not paid yet",
            "tone": "note",
            "lead": "The payment page is still open",
            "text": "You can go on there whenever you like.",
            "again": {"url": order.checkout_url or home, "label": "Go on to payment"},
        }
    next_look = "?" + urlencode({"order": order.id, "look": looks + 1})
    going_on = looks < REFRESHES_MAX
    text = (
        "This page looks again by itself."
        if going_on
        else "Some banks take a few days. The credits come by themselves."
    )
    return facts | {
        "title": "Being confirmed",
        "tone": "note",
        "lead": "Your payment is on its way",
        "text": text,
        "refresh": {"after_s": REFRESH_S, "url": next_look} if going_on else None,
        "again": None if going_on else {"url": "?" + urlencode({"order": order.id}), "label": "Look again"},
    }
