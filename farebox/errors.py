"""What a call may raise: one exception for each code that Farebox refuses with.

FareboxError                 all of them
  ConnectionFailed           no answer came; with a retry's idempotency key nothing is done twice
  UnexpectedAnswer           an answer that is none of Farebox's: look at what stands between
  WebhookInvalid             a webhook that Farebox did not send, or sent long ago
  InvalidRequest …           the call must change
  InsufficientCredits, …     somebody must act first
  RateLimited, PaymentsUnavailable, ServerError   try again later
"""

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from farebox.credits import Credits


class FareboxError(Exception):
    """A call that did not do what it was to do.

    Attributes:
        message: for a person: what is wrong and what to do next.
        status: of the answer; None where there was none.
        code: `insufficient_credits`, for example. Decide by it, or by the exception's class.
        param: where in the call the fault is.
        request_id: names the request in Farebox's log.
        facts: what else the refusal says.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.facts: Mapping[str, Any] = facts or {}

    def __str__(self) -> str:
        return self.message if self.request_id is None else f"{self.message} ({self.request_id})"


class ConnectionFailed(FareboxError):
    """No answer came, in all attempts. Whether the last one was carried out is not known: repeat it with its key."""


class UnexpectedAnswer(FareboxError):
    """What came is not an answer of Farebox's API."""


class WebhookInvalid(FareboxError):
    """Do not act on it: its signature is not that of the secret, or it is too old."""


class InvalidRequest(FareboxError):
    """The call is not valid; `param` says where."""


class InvalidAPIKey(FareboxError):
    """The key is missing, unknown or revoked."""


class PermissionDenied(FareboxError):
    """The key lacks a scope, or the wallet is frozen."""


class NotFound(FareboxError):
    """There is no such thing, or it is another tenant's."""


class AlreadyExists(FareboxError):
    """Something has this name already."""


class RequestInProgress(FareboxError):
    """A call with this idempotency key is still under way."""


class IdempotencyKeyReused(FareboxError):
    """This idempotency key stands for another call."""


class _Lacking(FareboxError):
    @property
    def needed(self) -> Credits | None:
        """The credits that it takes; None where that is not the caller's to know."""
        return self._amount("needed_decimal")

    @property
    def available(self) -> Credits | None:
        """The credits that could be spent on it now."""
        return self._amount("available_decimal")

    def _amount(self, name: str) -> Credits | None:
        written = self.facts.get(name)
        return None if written is None else Credits(written)


class InsufficientCredits(_Lacking):
    """The wallet does not hold enough. It is never retried."""

    @property
    def top_up_url(self) -> str | None:
        """Where the customer can buy credits; None where payments are not set up."""
        url: str | None = self.facts.get("top_up_url")
        return url


class BudgetExceeded(_Lacking):
    """A budget leaves less than is needed, whatever the wallet holds. It is never retried."""

    @property
    def budget(self) -> str | None:
        """The budget's id."""
        budget: str | None = self.facts.get("budget")
        return budget

    @property
    def resets_at(self) -> datetime | None:
        """When there is more; None is never."""
        written = self.facts.get("resets_at")
        return None if written is None else datetime.fromisoformat(written)


class ReservationSettled(FareboxError):
    """The reservation has been committed or released, or its time has run out."""

    @property
    def state(self) -> str | None:
        state: str | None = self.facts.get("state")
        return state


class VersionMismatch(FareboxError):
    """It has changed since you read it. Read it again, then repeat the change."""

    @property
    def version(self) -> int | None:
        """Its version now."""
        version: int | None = self.facts.get("version")
        return version


class RateLimited(FareboxError):
    """Too many requests with this key, in all attempts.

    Attributes:
        retry_after: seconds after which to try again, where the answer says so.
    """

    retry_after: Decimal | None = None


class PaymentsUnavailable(FareboxError):
    """The payment processor does not answer, in all attempts. Repeat the call with its key: nobody pays twice."""


class ServerError(FareboxError):
    """A fault that is not the caller's."""


CLASSES: Final[Mapping[str, type[FareboxError]]] = {
    "invalid_request": InvalidRequest,
    "invalid_api_key": InvalidAPIKey,
    "insufficient_credits": InsufficientCredits,
    "budget_exceeded": BudgetExceeded,
    "permission_denied": PermissionDenied,
    "not_found": NotFound,
    "model_not_found": NotFound,
    "model_not_priced": NotFound,
    "method_not_allowed": InvalidRequest,
    "already_exists": AlreadyExists,
    "request_in_progress": RequestInProgress,
    "request_already_completed": AlreadyExists,
    "reservation_settled": ReservationSettled,
    "version_mismatch": VersionMismatch,
    "request_too_large": InvalidRequest,
    "idempotency_key_reused": IdempotencyKeyReused,
    "rate_limit_exceeded": RateLimited,
    "internal_error": ServerError,
    "upstream_error": ServerError,
    "payments_unavailable": PaymentsUnavailable,
    "ledger_unavailable": ServerError,
    "shutting_down": ServerError,
    "upstream_timeout": ServerError,
}
"""Every code that Farebox refuses with."""


def refusal(
    status: int | None, error: Mapping[str, Any], *, request_id: str | None = None, retry_after: Decimal | None = None
) -> FareboxError:
    """The exception for the `error` of an answer. A code of tomorrow's is told by its status."""
    named = ("message", "type", "code", "param", "request_id")
    code = error.get("code")
    chosen = CLASSES.get(str(code)) or (ServerError if status is not None and status >= 500 else FareboxError)
    made = chosen(
        str(error.get("message")),
        status=status,
        code=code,
        param=error.get("param"),
        request_id=error.get("request_id") or request_id,
        facts={name: value for name, value in error.items() if name not in named},
    )
    if isinstance(made, RateLimited):
        made.retry_after = retry_after
    return made
