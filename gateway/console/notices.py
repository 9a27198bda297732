"""What a customer reads where their page cannot be shown: what is in the way, and what to do now."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NamedTuple

import structlog
from fastapi import Request, Response

from gateway.api.frame import REFUSAL, REQUEST_ID
from gateway.console.page import page
from gateway.database import DatabaseUnavailable
from gateway.payments.checkout import PackageNotFound, PackageWorthless
from gateway.payments.links import LinkExpired, LinkInvalid
from gateway.payments.processor import ProcessorRefused, ProcessorUnavailable
from gateway.payments.processor_customers import CustomerErased
from ledger.errors import LedgerUnavailable

log = structlog.get_logger(__name__)


class NoPayments(Exception):
    """Nobody can pay here, or not for this customer."""


class TooOften(Exception):
    """*retry_after_s*: when it may be tried again."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"wait {retry_after_s} s")
        self.retry_after_s = retry_after_s


class OrderNotFound(Exception):
    pass


class CreditsFrozen(Exception):
    pass


class AccountGone(Exception):
    pass


class FormInvalid(Exception):
    """What was sent is not the page's form."""


class Notice(NamedTuple):
    """What a customer reads instead of the page. *again* is what the way back to it is called, if there is one."""

    status: int
    code: str
    title: str
    text: str
    again: str | None = None


AWAY: Final = Notice(
    503,
    "payments_unavailable",
    "Please try again",
    "The payment service does not answer at the moment. Nothing that you have paid is lost.",
    "Try again",
)
BOOKS_AWAY: Final = Notice(
    503, "ledger_unavailable", "Please try again", "We cannot read your balance at the moment.", "Try again"
)
NOT_SOLD: Final = Notice(
    400, "invalid_request", "This is not sold any more", "Please choose from what there is now.", "Choose again"
)
GONE: Final = Notice(404, "not_found", "This account is gone", "Nothing can be added to it any more.")
NOTICES: Final[Mapping[type[Exception], Notice]] = {
    LinkInvalid: Notice(
        404,
        "not_found",
        "This link does not work",
        "It may have been cut off when it was copied. Open it again from where you got it, or ask there for a new one.",
    ),
    LinkExpired: Notice(
        410, "not_found", "This link has expired", "Links work for a week. Go back to the app to get a new one."
    ),
    NoPayments: Notice(404, "not_found", "Nothing can be paid here", "Payments are not set up for this account."),
    AccountGone: GONE,
    CustomerErased: GONE,
    FormInvalid: Notice(
        400, "invalid_request", "That did not work", "What was sent is not what this page asks for.", "Choose again"
    ),
    OrderNotFound: Notice(
        404, "not_found", "We do not know this order", "It is not an order of this account.", "Back to your credits"
    ),
    PackageNotFound: NOT_SOLD,
    PackageWorthless: NOT_SOLD,
    CreditsFrozen: Notice(
        403,
        "permission_denied",
        "These credits are frozen",
        "Nothing can be added until whoever runs the app lifts that. Please ask them.",
    ),
    TooOften: Notice(
        429, "rate_limit_exceeded", "A little slower, please", "Wait a minute, then try again.", "Try again"
    ),
    ProcessorUnavailable: AWAY,
    ProcessorRefused: AWAY,
    DatabaseUnavailable: BOOKS_AWAY,
    LedgerUnavailable: BOOKS_AWAY,
}
BROKEN: Final = Notice(
    500,
    "internal_error",
    "Something broke on our side",
    "Please try again. Nothing that you have paid is lost.",
    "Try again",
)
RETRY_AFTER_S: Final = 5


async def answered(request: Request, token: str, show: Callable[[], Awaitable[Response]]) -> Response:
    """What *show* shows, or in a page what is in its way."""
    try:
        return await show()
    except Exception as error:
        notice = next((NOTICES[kind] for kind in type(error).__mro__ if kind in NOTICES), BROKEN)
        if notice is BROKEN:
            log.exception("a page failed", request_id=request.scope[REQUEST_ID])
        request.scope[REFUSAL] = notice.code
        retry_after_s = error.retry_after_s if isinstance(error, TooOften) else RETRY_AFTER_S
        return page(
            "notice.html",
            status=notice.status,
            retry_after_s=retry_after_s if notice.status in (429, 503) else None,
            tone="bad" if notice.status >= 500 else "note",
            title=notice.title,
            text=notice.text,
            again=None if notice.again is None else {"url": home_of(request, token), "label": notice.again},
        )


def home_of(request: Request, token: str) -> str:
    """The way to the page itself, whatever stands before it in the address that the customer sees."""
    return f"../{token}" if request.url.path.endswith("/return") else "?"
