"""What is seen of one proxied request on its way: for the counters, the access log and the spans.

How it works. `gateway/app.py` puts a `Journey` into the request's scope; the proxy notes there what it does and what
it waits for, and whoever wants to know reads it when the request has ended. Nothing here counts, writes or sends. The
spans are behind the `Trace` protocol, so that what they are made with is not even imported where nobody collects them.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from time import perf_counter
from typing import Final, Protocol, Self

import msgspec

from gateway.proxy.routing import Candidate
from gateway.proxy.upstream import (
    Phase,
    UpstreamBodyTooLarge,
    UpstreamError,
    UpstreamRequest,
    UpstreamResponse,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from pricing.usage import Usage

JOURNEY: Final = "farebox.journey"
"""Where in a request's scope its journey is."""

CLIENT_LEFT: Final = 499
"""The status of a request that has no answer: its client left first."""


class Outcome(StrEnum):
    """How an attempt at an upstream ended: one for each kind of alarm."""

    OK = "ok"
    REFUSED = "refused"
    RATE_LIMITED = "rate_limited"
    FAILED = "failed"
    UNREACHABLE = "unreachable"
    CONNECT_TIMEOUT = "connect_timeout"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    TOO_LARGE = "too_large"
    BROKEN = "broken"
    LEFT = "left"


class Kind(StrEnum):
    """Why an upstream was asked."""

    FIRST = "first"
    RETRY = "retry"
    FALLBACK = "fallback"


_TIMEOUTS: Final = {
    Phase.CONNECT: Outcome.CONNECT_TIMEOUT,
    Phase.FIRST_BYTE: Outcome.FIRST_BYTE_TIMEOUT,
    Phase.IDLE: Outcome.IDLE_TIMEOUT,
}


@dataclass(slots=True, eq=False)
class Attempt:
    """One call of an upstream.

    Attributes:
        outcome: `left` while nothing is known: the call was given up.
        first_byte_s: from the call to the first byte of the body; None before it.
    """

    upstream: str
    model: str
    provider: str
    kind: Kind
    began_s: float
    outcome: Outcome = Outcome.LEFT
    first_byte_s: float | None = None


class Trace(Protocol):
    """The spans of one request."""

    def step(self, name: str) -> AbstractContextManager[None]:
        """A span of a step of the journey, for as long as the block runs."""
        ...

    def sending(self, attempt: Attempt) -> Mapping[str, str]:
        """An upstream is asked; the headers with which it can go on with the trace."""
        ...

    def answered(self, head: bytes) -> None:
        """The first piece of an answer's body, which names the model that gave it."""
        ...

    def ended(self, attempt: Attempt) -> None:
        """The call has ended. May be told twice."""
        ...

    def end(self, journey: "Journey") -> None:
        """The request has ended."""
        ...

    @property
    def trace_id(self) -> str | None: ...


class Untraced:
    """The spans of a request that nobody traces."""

    trace_id: str | None = None
    _nothing: Final = nullcontext()
    _no_headers: Final[Mapping[str, str]] = {}

    def step(self, name: str) -> AbstractContextManager[None]:
        return self._nothing

    def sending(self, attempt: Attempt) -> Mapping[str, str]:
        return self._no_headers

    def answered(self, head: bytes) -> None: ...

    def ended(self, attempt: Attempt) -> None: ...

    def end(self, journey: "Journey") -> None: ...


UNTRACED: Final = Untraced()


class Journey:
    """One request, as far as it has come.

    Attributes:
        status: of the response that was begun.
        code: of the refusal that it was answered with.
        model: what was asked for; None before it is known to be one that is served.
        upstream_s, client_s: time spent waiting for an upstream, and for a client that sends or reads slowly.
        first_byte_s: from the request's beginning to the response's.
        took_s: from its beginning to its end; 0 before that.
    """

    __slots__ = (
        "attempts",
        "began_s",
        "client_s",
        "code",
        "ending",
        "first_byte_s",
        "model",
        "request_id",
        "status",
        "stream",
        "took_s",
        "trace",
        "upstream_s",
        "usage",
    )

    def __init__(self, trace: Trace = UNTRACED) -> None:
        self.trace = trace
        self.began_s = perf_counter()
        self.took_s = 0.0
        self.request_id = ""
        self.status = CLIENT_LEFT
        self.code: str | None = None
        self.model: str | None = None
        self.stream = False
        self.attempts: list[Attempt] = []
        self.ending: str | None = None
        self.usage: Usage | None = None
        self.upstream_s = 0.0
        self.client_s = 0.0
        self.first_byte_s: float | None = None

    @property
    def overhead_s(self) -> float:
        """What the gateway itself took, its ledger included: all but the waiting for others."""
        return max(0.0, self.took_s - self.upstream_s - self.client_s)

    def begun(self, status: int) -> None:
        """The response has begun."""
        self.status = status
        self.first_byte_s = perf_counter() - self.began_s

    def settled(self, ending: str, usage: Usage) -> None:
        """The request was charged, or released, for *usage*."""
        self.ending, self.usage = ending, usage

    def end(self) -> None:
        self.took_s = perf_counter() - self.began_s
        self.trace.end(self)

    async def send(self, candidate: Candidate, request: UpstreamRequest) -> "WatchedResponse":
        """`Upstream.send`, noted."""
        attempt = self._attempt(candidate)
        if headers := self.trace.sending(attempt):
            request = msgspec.structs.replace(request, headers=headers)
        try:
            response = await candidate.upstream.send(request)
        except BaseException as error:
            if isinstance(error, UpstreamError):
                attempt.outcome = outcome_of(error)
            self.trace.ended(attempt)
            raise
        finally:
            self.upstream_s += perf_counter() - attempt.began_s
        attempt.outcome = outcome_of_status(response.status)
        return WatchedResponse(response, self, attempt)

    def _attempt(self, candidate: Candidate) -> Attempt:
        kind = Kind.FIRST
        upstream = candidate.upstream.name
        if self.attempts:
            last = self.attempts[-1]
            again = (last.upstream, last.model) == (upstream, candidate.model)
            kind = Kind.RETRY if again else Kind.FALLBACK
        attempt = Attempt(upstream, candidate.model, candidate.card.provider, kind, perf_counter())
        self.attempts.append(attempt)
        return attempt


class WatchedResponse:
    """An `UpstreamResponse` of which is noted how long it was waited for, and how it ended."""

    __slots__ = ("_attempt", "_journey", "_response", "headers", "status")

    def __init__(self, response: UpstreamResponse, journey: Journey, attempt: Attempt) -> None:
        self._response = response
        self._journey = journey
        self._attempt = attempt
        self.status = response.status
        self.headers = response.headers

    async def read(self, bytes_max: int) -> bytes:
        """See `UpstreamResponse.read`."""
        began_s = perf_counter()
        try:
            body = await self._response.read(bytes_max)
        except UpstreamError as error:
            self._attempt.outcome = outcome_of(error)
            raise
        finally:
            now_s = perf_counter()
            self._journey.upstream_s += now_s - began_s
            self._attempt.first_byte_s = now_s - self._attempt.began_s
        self._journey.trace.answered(body)
        self._journey.trace.ended(self._attempt)
        return body

    def chunks(self) -> AsyncIterator[bytes]:
        """See `UpstreamResponse.chunks`."""
        return _WatchedChunks(self._response.chunks(), self._journey, self._attempt)

    async def close(self) -> None:
        """See `UpstreamResponse.close`."""
        self._journey.trace.ended(self._attempt)
        await self._response.close()


class _WatchedChunks:
    __slots__ = ("_attempt", "_journey", "_next")

    def __init__(self, chunks: AsyncIterator[bytes], journey: Journey, attempt: Attempt) -> None:
        self._next = chunks.__anext__
        self._journey = journey
        self._attempt = attempt

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        began_s = perf_counter()
        try:
            chunk = await self._next()
        except UpstreamError as error:
            self._attempt.outcome = outcome_of(error)
            raise
        finally:
            self._journey.upstream_s += perf_counter() - began_s
        if self._attempt.first_byte_s is None:
            self._attempt.first_byte_s = perf_counter() - self._attempt.began_s
            self._journey.trace.answered(chunk)
        return chunk


def outcome_of(error: UpstreamError) -> Outcome:
    if isinstance(error, UpstreamTimeout):
        return _TIMEOUTS[error.phase]
    if isinstance(error, UpstreamUnreachable):
        return Outcome.UNREACHABLE
    return Outcome.TOO_LARGE if isinstance(error, UpstreamBodyTooLarge) else Outcome.BROKEN


def outcome_of_status(status: int) -> Outcome:
    if status == 429:
        return Outcome.RATE_LIMITED
    if 200 <= status < 300:
        return Outcome.OK
    return Outcome.REFUSED if 400 <= status < 500 else Outcome.FAILED
