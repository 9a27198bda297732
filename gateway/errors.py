"""The one envelope in which every refusal leaves the gateway, and the table of them.

`{"error": {"message", "type", "code", "param", "request_id", …facts}}`. SDKs of OpenAI choose their exception by the
status and show the message; the types are those that OpenAI documents, where it has one:

    400 404 405 409 412 413 422   invalid_request_error     the request must change
    401                           authentication_error
    402                           insufficient_quota        OpenAI's for «out of credit»; not its 429, which SDKs retry
    403                           permission_error
    429                           rate_limit_error
    5xx                           api_error                 the request was right

502 and 504 have charged nothing, unless their message says so. A 503 that comes after the work was done has: the
settlement waits on local disk until the ledger is back.

Domain code never mentions HTTP: its exceptions become `ApiError` in one `ErrorTable`, which `gateway/app.py` fills.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from gateway.database import DatabaseUnavailable


class Kind(NamedTuple):
    status: int
    type: str


KINDS: Final[Mapping[str, Kind]] = {
    "invalid_request": Kind(400, "invalid_request_error"),
    "invalid_api_key": Kind(401, "authentication_error"),
    "insufficient_credits": Kind(402, "insufficient_quota"),
    "budget_exceeded": Kind(402, "insufficient_quota"),
    "permission_denied": Kind(403, "permission_error"),
    "not_found": Kind(404, "invalid_request_error"),
    "model_not_found": Kind(404, "invalid_request_error"),
    "model_not_priced": Kind(404, "invalid_request_error"),
    "method_not_allowed": Kind(405, "invalid_request_error"),
    "already_exists": Kind(409, "invalid_request_error"),
    "request_in_progress": Kind(409, "invalid_request_error"),
    "request_already_completed": Kind(409, "invalid_request_error"),
    "reservation_settled": Kind(409, "invalid_request_error"),
    "version_mismatch": Kind(412, "invalid_request_error"),
    "request_too_large": Kind(413, "invalid_request_error"),
    "idempotency_key_reused": Kind(422, "invalid_request_error"),
    "rate_limit_exceeded": Kind(429, "rate_limit_error"),
    "internal_error": Kind(500, "api_error"),
    "upstream_error": Kind(502, "api_error"),
    "payments_unavailable": Kind(503, "api_error"),
    "ledger_unavailable": Kind(503, "api_error"),
    "shutting_down": Kind(503, "api_error"),
    "upstream_timeout": Kind(504, "api_error"),
}
"""Every code that we answer with, and what it means on the wire."""

RESERVED_FACTS: Final = frozenset({"message", "type", "code", "param", "request_id"})

Headers = tuple[tuple[str, str], ...]


class ApiError(Exception):
    """A refusal as the client will see it. Choose *code* from `KINDS`; status and type follow from it.

    Args:
        message: one or two sentences for a person: what is wrong and what to do next. Nothing secret.
        param: where in the request the fault is, `messages[0].content` for example.
        facts: further members of the envelope, such as `needed` and `available`.
        headers: sent with the response, such as `Retry-After`.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        facts: Mapping[str, Any] | None = None,
        headers: Headers = (),
    ) -> None:
        super().__init__(message)
        self.status, self.type = KINDS[code]
        self.code = code
        self.message = message
        self.param = param
        self.facts: Mapping[str, Any] = facts or {}
        self.headers = headers
        assert not RESERVED_FACTS & self.facts.keys(), "a fact hides a member of the envelope"

    def __repr__(self) -> str:
        return f"ApiError({self.code!r}, {self.message!r})"

    def to_body(self, request_id: str, *, beside: bool = False) -> bytes:
        """The envelope as JSON; with code and message *beside* it, too, for clients that look there."""
        named = {**self.inner, "request_id": request_id}
        outer = {"code": self.code, "message": self.message} if beside else {}
        return msgspec.json.encode({"error": {**named, **self.facts}, **outer})

    @property
    def inner(self) -> dict[str, Any]:
        """What the envelope says of the refusal itself, before its facts."""
        return {"message": self.message, "type": self.type, "code": self.code, "param": self.param}


class Denomination(Protocol):
    """What an asset can say of an amount; `pricing.money.Asset` is one."""

    def format(self, units: int) -> str: ...

    def to_millis(self, units: int) -> int: ...


def invalid_request(message: str, *, param: str | None = None) -> ApiError:
    return ApiError("invalid_request", message, param=param)


def invalid_api_key(message: str = "The API key is missing, unknown or revoked.") -> ApiError:
    return ApiError("invalid_api_key", message, headers=(("WWW-Authenticate", "Bearer"),))


def insufficient_credits(
    *, needed: int, available: int, asset: Denomination, top_up_url: str | None = None
) -> ApiError:
    """402. *needed* and *available* are in the asset's smallest unit; the client reads millicredits and decimals."""
    needed_decimal, available_decimal = asset.format(needed), asset.format(available)
    facts = _lack(needed, available, asset)
    if top_up_url is not None:
        facts["top_up_url"] = top_up_url
    return ApiError(
        "insufficient_credits",
        f"This request needs {needed_decimal} credits and {available_decimal} are available. "
        "Top up, or ask for less (a lower max_tokens, a cheaper model).",
        facts=facts,
    )


def _lack(needed: int, available: int, asset: Denomination) -> dict[str, Any]:
    return {
        "needed": asset.to_millis(needed),
        "needed_decimal": asset.format(needed),
        "available": asset.to_millis(available),
        "available_decimal": asset.format(available),
    }


def budget_exceeded(
    budget_id: str, *, needed: int, available: int, asset: Denomination, resets_at: str | None
) -> ApiError:
    """402, not 429: SDKs would ask again at once. *resets_at* is a time in RFC 3339; None is never."""
    when = "raise it, or ask for less" if resets_at is None else f"wait until {resets_at}, raise it, or ask for less"
    return ApiError(
        "budget_exceeded",
        f"This request needs {asset.format(needed)} credits and the budget {budget_id} leaves "
        f"{asset.format(available)}: {when}.",
        facts={"budget": budget_id, **_lack(needed, available, asset), "resets_at": resets_at},
    )


def subsidy_unaffordable() -> ApiError:
    """402 for the developer's part of an action: without amounts, which are not the user's to know."""
    return ApiError(
        "insufficient_credits",
        "This action costs more than its price, and the developer's wallet does not cover the difference.",
    )


def permission_denied(message: str) -> ApiError:
    return ApiError("permission_denied", message)


def not_found(what: str) -> ApiError:
    """404. *what* names it with its id: `customer cus_…`. Another tenant's rows are not found, never forbidden."""
    return ApiError("not_found", f"There is no {what}.")


def model_not_found(model: str) -> ApiError:
    return ApiError(
        "model_not_found",
        f"The model {model!r} does not exist here. GET /v1/models lists those that do.",
        param="model",
    )


def model_not_priced(model: str) -> ApiError:
    return ApiError(
        "model_not_priced",
        f"The model {model!r} has no price, so it is not served. The operator can set one under [models.price].",
        param="model",
    )


def method_not_allowed(allowed: str) -> ApiError:
    return ApiError("method_not_allowed", f"Use {allowed} here.", headers=(("Allow", allowed),))


def already_exists(what: str, *, param: str) -> ApiError:
    """409. *what* names it: `metric with the key …`; *param* is where its name was sent."""
    return ApiError("already_exists", f"There is a {what} already.", param=param)


def request_in_progress() -> ApiError:
    return ApiError(
        "request_in_progress",
        "A request with this idempotency key is still under way. Wait for it, then repeat to get its answer.",
        headers=retry_after(1),
    )


def request_already_completed(receipt: str) -> ApiError:
    """409. *receipt* is the id of the request that was charged; a finished stream is not replayed."""
    return ApiError(
        "request_already_completed",
        f"The request with this idempotency key has finished and was charged once: see GET /v1/requests/{receipt}.",
        facts={"receipt": receipt},
    )


def reservation_settled(state: str) -> ApiError:
    return ApiError("reservation_settled", f"The reservation is {state} already.", facts={"state": state})


def version_mismatch(version: int) -> ApiError:
    """412. *version* is what it is now."""
    return ApiError(
        "version_mismatch",
        f"It has changed meanwhile and is at version {version}. Read it again, then repeat the change.",
        param="If-Match",
        facts={"version": version},
    )


def request_too_large(bytes_max: int) -> ApiError:
    return ApiError(
        "request_too_large", f"The request body is larger than {bytes_max} bytes.", facts={"bytes_max": bytes_max}
    )


def idempotency_key_reused() -> ApiError:
    return ApiError(
        "idempotency_key_reused",
        "This idempotency key was used for another request. Send the same request, or take a new key.",
    )


def rate_limit_exceeded(*, limit: int, retry_after_s: int) -> ApiError:
    return ApiError(
        "rate_limit_exceeded",
        f"More than {limit} requests a minute with this key. Try again in {retry_after_s} s.",
        facts={"limit": limit},
        headers=retry_after(retry_after_s),
    )


def internal_error() -> ApiError:
    return ApiError(
        "internal_error",
        "Something broke on our side. The request id names the log, and the receipt if anything was charged.",
    )


def upstream_error(message: str = "The upstream could not be reached or broke off. Nothing was charged.") -> ApiError:
    return ApiError("upstream_error", message)


def upstream_timeout(message: str = "The upstream did not answer in time. Nothing was charged.") -> ApiError:
    return ApiError("upstream_timeout", message)


def ledger_unavailable(*, retry_after_s: int = 1) -> ApiError:
    return ApiError(
        "ledger_unavailable",
        "The ledger cannot be reached, so nothing is served: a charge could not be kept. Try again shortly.",
        headers=retry_after(retry_after_s),
    )


def usage_behind() -> ApiError:
    """503 for a question about more charges than could be added up yet."""
    return ApiError(
        "ledger_unavailable",
        "The usage of this period is still being added up. Try again shortly.",
        headers=retry_after(5),
    )


def charge_waits() -> ApiError:
    """503, for work that is done: its charge is kept, and booked as soon as the ledger is back."""
    return ApiError(
        "ledger_unavailable",
        "The ledger cannot be reached. The work is done and will be charged, once, when it is back; "
        "a request with an idempotency key can then be repeated to get its answer.",
        headers=retry_after(1),
    )


def payments_not_set_up() -> ApiError:
    return ApiError("not_found", "This installation takes no payments: its operator has set up no payment processor.")


def payments_unavailable(*, retry_after_s: int = 5) -> ApiError:
    return ApiError(
        "payments_unavailable",
        "The payment processor does not answer. Nothing was paid; try again shortly.",
        headers=retry_after(retry_after_s),
    )


def shutting_down() -> ApiError:
    return ApiError(
        "shutting_down", "This gateway is shutting down. Try again; another will answer.", headers=retry_after(1)
    )


def retry_after(seconds: int) -> Headers:
    return (("Retry-After", str(seconds)),)


Translation = Callable[[Any], ApiError]


class ErrorTable:
    """Which `ApiError` each domain exception becomes: one row a type; a subclass uses its nearest ancestor's row."""

    def __init__(self, rows: Mapping[type[Exception], Translation]) -> None:
        self._rows = dict(rows)

    def __or__(self, rows: Mapping[type[Exception], Translation]) -> "ErrorTable":
        """This table with further rows; a later row for the same type wins."""
        return ErrorTable({**self._rows, **rows})

    @property
    def kinds(self) -> Iterable[type[Exception]]:
        """The exceptions that have a row of their own."""
        return self._rows.keys()

    def translate(self, error: Exception) -> ApiError | None:
        """None when no row fits: then it is a fault of ours, to be logged and answered as `internal_error`."""
        if isinstance(error, ApiError):
            return error
        for ancestor in type(error).__mro__:
            if row := self._rows.get(ancestor):
                return row(error)
        return None


BASE_TABLE: Final = ErrorTable({DatabaseUnavailable: lambda _error: ledger_unavailable()})
"""The rows for the gateway's own exceptions; the composition adds those of the ledger and of prices."""
