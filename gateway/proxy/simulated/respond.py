"""A request's bytes to a script: a pure function."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from gateway.proxy.simulated import wire
from gateway.proxy.simulated.answer import answer
from gateway.proxy.simulated.request import Directive, RequestRefused, parse
from gateway.proxy.simulated.script import Cut, Hang, Script, Send, Step, Wait

_FAULTLESS: Final = Directive()
_MODELS: Final = ("gpt-4o", "gpt-4o-mini", "gpt-5-mini", "o4-mini")
_MALFORMED: Final = (
    b'data: {"choices":[{"delta":{"content":\n\n',
    b"garbage\ndata\n\n",
    b"event: nonsense\ndata: 7\n\n",
)

Headers = tuple[tuple[bytes, bytes], ...]


def respond(method: str, path: str, body: bytes) -> Script:
    """What the simulated upstream answers to any request; *path* may begin with `/v1` or below it."""
    path = path.partition("?")[0].removeprefix("/v1")
    match method, path.split("/")[1:]:
        case "POST", ["chat", "completions"]:
            return simulate(body)
        case "GET", ["models"]:
            return _whole(200, wire.models_body(_MODELS))
        case "GET", ["models", name] if name:
            return _whole(200, wire.model_body(name))
        case _, ["chat", "completions"] | ["models", *_]:
            return _whole(405, wire.error_body(f"Not allowed to {method} on {path}.", code="method_not_supported"))
        case _:
            return _whole(404, wire.error_body(f"Unknown request URL: {method} {path}.", code="unknown_url"))


def simulate(body: bytes) -> Script:
    """What it answers to a chat request: the same for the same bytes."""
    try:
        request = parse(body)
    except RequestRefused as refused:
        return _whole(400, wire.error_body(refused.message, param=refused.param, code=refused.code))
    directive = request.simulate
    digest = hashlib.sha256(body).digest()
    headers: Headers = ((b"x-request-id", b"req_" + digest.hex().encode()[:32]), (b"openai-version", b"2020-10-01"))
    if directive.gzip:
        headers += ((b"content-encoding", b"gzip"),)
    if directive.status is not None:
        if directive.retry_after is not None:
            headers += ((b"retry-after", b"%d" % directive.retry_after),)
        return _whole(directive.status, wire.failure_body(directive.status), headers, directive)
    completion = wire.Completion(request, answer(request, seed=int.from_bytes(digest)), body, digest)
    if not request.stream:
        return _whole(200, completion.body(), headers, directive)
    headers = ((b"content-type", b"text/event-stream; charset=utf-8"), *headers)
    return Script(200, headers, _Stream(completion, directive))


def _whole(status: int, body: bytes, headers: Headers = (), directive: Directive = _FAULTLESS) -> Script:
    headers = ((b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers)
    return Script(status, headers, _Body(body, directive))


class _Body(msgspec.Struct, frozen=True):
    """The steps of a body that is no stream. If it breaks off, then in its middle."""

    body: bytes
    directive: Directive

    def __iter__(self) -> Iterator[Step]:
        cut_after, hang_after = self.directive.cut_after_chunks, self.directive.hang_after_chunks
        if cut_after is None and hang_after is None:
            return _play((self.body,), self.directive)
        middle = len(self.body) // 2
        return _play(
            (self.body[:middle], self.body[middle:]),
            self.directive,
            cut_after=cut_after and 1,
            hang_after=hang_after and 1,
        )


class _Stream(msgspec.Struct, frozen=True):
    """The steps of a stream."""

    completion: wire.Completion
    directive: Directive

    def __iter__(self) -> Iterator[Step]:
        directive = self.directive
        return _play(
            self._events(), directive, cut_after=directive.cut_after_chunks, hang_after=directive.hang_after_chunks
        )

    def _events(self) -> Iterator[bytes]:
        for position, event in enumerate(self.completion.events()):
            yield event
            if self.directive.malformed_sse and position == 1:
                yield from _MALFORMED


def _play(
    pieces: Iterable[bytes], directive: Directive, *, cut_after: int | None = None, hang_after: int | None = None
) -> Iterator[Step]:
    if directive.first_byte_delay_ms:
        yield Wait(directive.first_byte_delay_ms / 1000)
    if directive.refuse:
        yield Cut()
        return
    count = 0
    for piece in pieces:
        if count in (cut_after, hang_after):
            break
        if count and directive.chunk_delay_ms:
            yield Wait(directive.chunk_delay_ms / 1000)
        if directive.split_bytes:
            yield from (Send(piece[position : position + 1]) for position in range(len(piece)))
        else:
            yield Send(piece)
        count += 1
    if count == cut_after:
        yield Cut()
    elif count == hang_after:
        yield Hang()
