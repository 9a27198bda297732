"""A call as a value, and its way through attempts to an answer. Nothing here talks to a network or waits.

How it works. `farebox.calls` makes a `Call`: what to send, and how to read the answer. A call that changes something
has its idempotency key from then on, so all attempts carry the same one and are carried out once. An `Exchange` leads a
call: a client sends it, and tells what came of it; the exchange says what to do next: return a value, wait and send it
again, or raise.
"""

import email.utils
import json
import random
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any, Final, Generic, TypeVar

from farebox.errors import ConnectionFailed, UnexpectedAnswer, refusal
from farebox.reading import reader

T = TypeVar("T")


ATTEMPTS_AFTER: Final = frozenset({429, 502, 503, 504})
"""Statuses after which the same call may do better."""

IN_PROGRESS: Final = "request_in_progress"
"""A 409 that is repeated too: the attempt before, whose answer was lost, is still under way."""

PAGE_SIZE: Final = 100
EXCERPT_LENGTH_MAX: Final = 200


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and how soon a call is sent again when no answer came, or one that says to try again.

    Attributes:
        attempts_max: in all; 1 never repeats.
        first_s: the first pause. Each is twice the one before, and up to half of it shorter by chance.
        pause_max_s: the longest pause. An answer that says `Retry-After` more is not waited for.
    """

    attempts_max: int = 4
    first_s: float = 0.5
    pause_max_s: float = 30.0

    def pause_s(self, attempts: int, *, chance: float) -> float:
        """After so many *attempts*. *chance* is between 0 and 1."""
        return float(min(self.pause_max_s, self.first_s * 2 ** (attempts - 1))) * (1 - chance / 2)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """Attributes:
    path: below the base URL, escaped.
    read: makes the answer's value of its JSON; of None where it has no body.
    """

    method: str
    path: str
    read: Callable[[Any], T]
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    data: tuple[T, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Pages(Generic[T]):
    """A list, which is read page by page."""

    first: Call[Page[T]]

    def after(self, page: Page[T]) -> Call[Page[T]] | None:
        """The call for what follows *page*; None at the end."""
        if page.next_cursor is None:
            return None
        return replace(self.first, query={**self.first.query, "cursor": page.next_cursor})


@dataclass(frozen=True, slots=True)
class Answer:
    """What came."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    value: T


@dataclass(frozen=True, slots=True)
class Again:
    """Send it again after a pause."""

    after_s: float


class Exchange(Generic[T]):
    """One call, until it has come to something."""

    def __init__(self, call: Call[T], retries: Retries, *, chance: Callable[[], float] = random.random) -> None:
        self.call = call
        self._retries = retries
        self._chance = chance
        self._attempts = 0

    def failed(self, error: Exception, *, repeatable: bool) -> Again:
        """No answer came.

        Raises:
            ConnectionFailed: and none will.
        """
        self._attempts += 1
        if repeatable and self._attempts < self._retries.attempts_max:
            return Again(self._pause_s())
        times = "once" if self._attempts == 1 else f"{self._attempts} times"
        raise ConnectionFailed(
            f"{self.call.method} {self.call.path} was tried {times} and not answered: {type(error).__name__}: {error}"
        ) from error

    def heard(self, answer: Answer) -> Done[T] | Again:
        """An answer came.

        Raises:
            FareboxError: it is a refusal, which is final; or none of ours.
        """
        self._attempts += 1
        if 200 <= answer.status < 300:
            return Done(self._value(answer))
        if self.call.method == "DELETE" and answer.status == 404 and self._attempts > 1:
            return Done(self.call.read(None))  # The attempt whose answer was lost has done it.
        error, retry_after = _error(answer), _retry_after(answer)
        again = answer.status in ATTEMPTS_AFTER or error.get("code") == IN_PROGRESS
        if again and self._attempts < self._retries.attempts_max:
            asked_s = float(retry_after or 0)
            if asked_s <= self._retries.pause_max_s:
                # A while later by chance: many may have been told the same.
                return Again(asked_s + self._pause_s())
        request_id = answer.headers.get("x-request-id")
        raise refusal(answer.status, error, request_id=request_id, retry_after=retry_after)

    def _pause_s(self) -> float:
        return self._retries.pause_s(self._attempts, chance=self._chance())

    def _value(self, answer: Answer) -> T:
        try:
            return self.call.read(json.loads(answer.body) if answer.body else None)
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:
            raise UnexpectedAnswer(
                f"{self.call.method} {self.call.path} was answered with something else than the API says "
                f"({type(error).__name__}: {error}). Is the base URL that of a Farebox, ending in /v1?",
                status=answer.status,
                request_id=answer.headers.get("x-request-id"),
            ) from error


def get(path: str, kind: type[T], query: Mapping[str, str | None] | None = None) -> Call[T]:
    """Reads something."""
    return Call("GET", path, reader(kind), _named(query or {}))


def listed(
    path: str, kind: type[T], query: Mapping[str, str | None] | None = None, *, page_size: int = PAGE_SIZE
) -> Pages[T]:
    """Reads a list."""
    read = reader(kind)

    def page(value: Any) -> Page[T]:
        return Page(tuple(map(read, value["data"])), value["next_cursor"])

    return Pages(Call("GET", path, page, {**_named(query or {}), "limit": str(page_size)}))


def change(
    method: str,
    path: str,
    read: Callable[[Any], T],
    body: Mapping[str, Any] | None = None,
    *,
    key: str | None,
    version: int | None = None,
) -> Call[T]:
    """Changes something, once. Of *body*, what is None is left out."""
    headers = {"Idempotency-Key": f"py_{uuid.uuid4().hex}" if key is None else key}
    if version is not None:
        headers["If-Match"] = f'"{version}"'
    content = None
    if body is not None:
        headers["Content-Type"] = "application/json"
        content = json.dumps(
            {name: value for name, value in body.items() if value is not None}, allow_nan=False
        ).encode()
    return Call(method, path, read, body=content, headers=headers)


def _named(query: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in query.items() if value is not None}


def _error(answer: Answer) -> Mapping[str, Any]:
    """The `error` of the envelope. What has none comes from something in between."""
    try:
        error = json.loads(answer.body)["error"]
    except (ValueError, TypeError, KeyError):
        error = None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return error
    excerpt = answer.body[:EXCERPT_LENGTH_MAX].decode(errors="replace")
    return {"message": f"The answer has the status {answer.status} and is none of Farebox's: {excerpt!r}"}


def _retry_after(answer: Answer) -> Decimal | None:
    """Seconds; the header has them, or a date."""
    written = answer.headers.get("retry-after", "")
    try:
        seconds = Decimal(written)
    except InvalidOperation:
        try:
            at = email.utils.parsedate_to_datetime(written)
        except ValueError:
            return None
        if at.tzinfo is None:
            at = at.replace(tzinfo=UTC)
        seconds = Decimal((at - datetime.now(UTC)) // timedelta(seconds=1))
    return max(seconds, Decimal(0)) if seconds.is_finite() else None
