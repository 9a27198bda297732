"""One HTTP exchange on the hot path, over raw ASGI: what the request says, and how it is answered."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from time import monotonic
from typing import Any, Final

from gateway.errors import ApiError, invalid_api_key, invalid_request, request_too_large
from gateway.proxy.journey import JOURNEY, Journey

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Iterable[tuple[str, str]]

VALUE_LENGTH_MAX: Final = 512
"""Characters in a header that we read ourselves."""

LENGTH_DIGITS_MAX: Final = 20

STALLED_S: Final = 60.0
"""A client that takes nothing of what we write for so long is gone."""

LOOK_EVERY_S: Final = 15.0
"""How often we look whether a client has stalled."""

JSON: Final = (b"content-type", b"application/json")


class ClientGone(Exception):
    """The client closed the connection before its request had come in whole."""


def only_value(name: str, values: Sequence[bytes]) -> str | None:
    """The value of the header *name*, which stood in a request with *values*; None where it did not stand.

    Raises:
        ApiError: 400 when it stands twice, is too long, or has other than printable characters in UTF-8.
    """
    if not values:
        return None
    try:
        value = values[0].decode()
    except UnicodeDecodeError:
        value = "\0"
    if len(values) > 1 or len(value) > VALUE_LENGTH_MAX or not value.isprintable():
        raise invalid_request(
            f"{name} must stand once, with up to {VALUE_LENGTH_MAX} printable characters.", param=name
        )
    return value


class Exchange:
    """A request and its response.

    Attributes:
        request_id: names the receipt, in the response's headers too.
        extra: headers to send with whatever the response will be.
        started: the response's status has been sent, so it can only be ended.
        gone: the client has closed the connection, as far as is known.
        journey: where is noted what is done, for whoever counts.
    """

    __slots__ = (
        "_headers",
        "_receive",
        "_scope",
        "_send",
        "_watcher",
        "_writing_since_s",
        "extra",
        "gone",
        "journey",
        "request_id",
        "started",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, request_id: str) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            self._headers.setdefault(name, []).append(value)
        self._watcher: asyncio.Task[None] | None = None
        self._writing_since_s: float | None = None
        self.request_id = request_id
        self.extra: list[tuple[bytes, bytes]] = []
        self.started = False
        self.gone = False
        self.journey: Journey = scope.get(JOURNEY) or Journey()
        self.journey.request_id = request_id

    # The request.

    def header(self, name: str) -> str | None:
        """A header that may stand once.

        Raises:
            ApiError: 400 when it stands twice, is too long, or has other than printable characters.
        """
        return only_value(name, self._headers.get(name.lower().encode(), ()))

    def token(self) -> bytes:
        """The API key.

        Raises:
            ApiError: 401 when there is none, or several of which one would have to be chosen.
        """
        for name, prefix in ((b"authorization", b"bearer "), (b"x-api-key", b"")):
            values = self._headers.get(name, [])
            if len(values) == 1 and values[0][: len(prefix)].lower() == prefix:
                return values[0][len(prefix) :].strip()
        raise invalid_api_key()

    async def body(self, bytes_max: int) -> bytes:
        """The whole request body.

        Raises:
            ApiError: 413 when it is longer, 400 when it is compressed.
            ClientGone: it never came in whole.
        """
        declared = self._headers.get(b"content-length", [b"0"])[0]
        if len(declared) <= LENGTH_DIGITS_MAX and declared.isdigit() and int(declared) > bytes_max:
            raise request_too_large(bytes_max)
        if self._headers.get(b"content-encoding", [b"identity"])[0].lower() != b"identity":
            raise invalid_request("Send the body uncompressed.", param="Content-Encoding")
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > bytes_max:
                raise request_too_large(bytes_max)
            parts.append(part)
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def watch(self, on_gone: Callable[[], None]) -> None:
        """From now on notice when the client goes, and say so once; the request's body must have been read."""
        self._watcher = asyncio.create_task(self._watch(on_gone))

    async def _watch(self, on_gone: Callable[[], None]) -> None:
        while not self.gone:
            try:
                async with asyncio.timeout(LOOK_EVERY_S):
                    self.gone = (await self._receive())["type"] == "http.disconnect"
            except TimeoutError:
                since_s = self._writing_since_s
                self.gone = since_s is not None and monotonic() - since_s > STALLED_S
        on_gone()

    # The response.

    def add(self, name: str, value: str) -> None:
        """Send a header with whatever the response will be."""
        self.extra.append((name.lower().encode(), value.encode()))

    async def respond(self, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]] = (JSON,)) -> None:
        """Send a whole response."""
        await self.start(status, (*headers, (b"content-length", str(len(body)).encode())))
        await self.finish(body)

    async def refuse(self, error: ApiError) -> None:
        for name, value in error.headers:
            self.add(name, value)
        await self.respond(error.status, error.to_body(self.request_id))

    async def start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Begin a streamed response. Of what *headers* say, our own say it instead."""
        own = [(b"x-request-id", self.request_id.encode()), *self.extra]
        names = {name for name, _ in own}
        passed = [(name, value) for name, value in headers if name not in names]
        self.started = True
        await self._put({"type": "http.response.start", "status": status, "headers": [*passed, *own]})

    async def write(self, data: bytes) -> None:
        await self._put({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes = b"") -> None:
        await self._put({"type": "http.response.body", "body": data})

    async def _put(self, message: Message) -> None:
        self._writing_since_s = monotonic()
        try:
            await self._send(message)
        except OSError:  # ASGI's word for a client that is not there any more; some servers say nothing.
            self.gone = True
        self._writing_since_s = None

    def unwatch(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
