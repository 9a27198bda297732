"""The seam to upstreams: one small protocol, and its implementation over HTTP.

How it works. `send` returns when the upstream has answered with a status and headers; the body is then read whole with
`read`, or as it comes with `chunks`. A body that ends without an exception has ended cleanly; any other end is an
exception that says what had been sent or received by then, which is what the settlement needs to know.

Whether a request may be sent again follows from the type of the error alone:

- `UpstreamUnreachable`, and `UpstreamTimeout` in the phase `connect`: nothing was sent. Safe to repeat.
- `UpstreamBroken` with `bytes_received == 0`: the connection ended after the request was written and before any byte
  of a body. This includes a kept-alive connection that the server closed at that same moment. The upstream may have
  done the work, so nothing here repeats a POST: the journey treats it as refused before the first byte.
- `UpstreamTimeout` in the phases `first_byte` and `idle`, `UpstreamBroken` later on: the work was under way.
"""

import asyncio
import io
import re
from collections.abc import AsyncIterator, Mapping
from enum import StrEnum
from typing import Final, Protocol, Self
from urllib.parse import urlsplit

import aiohttp
import msgspec
from aiohttp.http_exceptions import HttpProcessingError

CONNECT_TIMEOUT_S: Final = 5.0
FIRST_BYTE_TIMEOUT_S: Final = 120.0
IDLE_TIMEOUT_S: Final = 60.0
CONNECTIONS_MAX: Final = 16_384
"""Open connections to one upstream. One more request waits for a free one, within the connect timeout."""
KEEPALIVE_S: Final = 30.0
DNS_TTL_S: Final = 60

Headers = list[tuple[bytes, bytes]]


class Phase(StrEnum):
    """What was awaited when a time limit passed."""

    CONNECT = "connect"
    FIRST_BYTE = "first_byte"
    IDLE = "idle"


class UpstreamError(Exception):
    """The upstream's fault, of which the subclass says how far the request had come."""


class UpstreamUnreachable(UpstreamError):
    """No connection: refused, no such host, or TLS failed. Nothing was sent, so the request may be repeated."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the upstream cannot be reached: {reason}")
        self.reason = reason


class UpstreamTimeout(UpstreamError):
    """A time limit passed. In the phase `connect` nothing was sent."""

    def __init__(self, *, phase: Phase, bytes_received: int = 0) -> None:
        super().__init__(f"the upstream took too long ({phase}, after {bytes_received} bytes of the body)")
        self.phase = phase
        self.bytes_received = bytes_received


class UpstreamBroken(UpstreamError):
    """The request was sent, and the answer ended before its end or was not HTTP."""

    def __init__(self, *, bytes_received: int, reason: str) -> None:
        super().__init__(f"the upstream broke off after {bytes_received} bytes of the body: {reason}")
        self.bytes_received = bytes_received
        self.reason = reason


class UpstreamBodyTooLarge(UpstreamError):
    """The body is longer than the reader's limit; the rest was not read."""

    def __init__(self, bytes_max: int) -> None:
        super().__init__(f"the upstream's answer is longer than {bytes_max} bytes")
        self.bytes_max = bytes_max


class UpstreamRequest(msgspec.Struct, frozen=True):
    """One call.

    Attributes:
        path: below the upstream's base URL, beginning with a slash.
        stream: whether server-sent events are asked for; the body says so too.
        request_id: ours, for the upstream's logs.
        headers: with which the upstream can go on with the caller's trace.
    """

    path: str
    body: bytes
    stream: bool
    request_id: str
    method: str = "POST"
    headers: Mapping[str, str] = {}


class UpstreamResponse(Protocol):
    """An answer whose body has yet to be read. Who gets one calls `close`, unless it read to the end or to an error."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Headers:
        """Lower-case names; only those that may go on to a client (see `passable_headers`)."""
        ...

    async def read(self, bytes_max: int) -> bytes:
        """The whole body.

        Raises:
            UpstreamBodyTooLarge: and the connection is closed.
            UpstreamBroken, UpstreamTimeout: as for `chunks`.
        """
        ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The body, decompressed, in pieces as they come, never empty; it may be left and taken up again.

        Raises:
            UpstreamBroken: it ended before its end. All that had arrived was handed out before.
            UpstreamTimeout: nothing came within the limit.
        """
        ...

    async def close(self) -> None:
        """Let the connection go: back to the pool if the body was read to its end, else cut. May be repeated."""
        ...


class Upstream(Protocol):
    """Something that answers like OpenAI's API."""

    @property
    def name(self) -> str: ...

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """Send a request and wait for status and headers; an error status is an answer like any other.

        Raises:
            UpstreamUnreachable, UpstreamTimeout, UpstreamBroken: no answer.
        """
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


# What speaks of one connection, of this very body as it was encoded, or of the upstream's own host and cookies.
_NOT_PASSED: Final = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
        *(b"te", b"trailer", b"transfer-encoding", b"upgrade"),
        *(b"content-encoding", b"content-length", b"set-cookie", b"set-cookie2"),
        *(b"alt-svc", b"strict-transport-security"),
    }
)
_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE: Final = re.compile(rb"[\t\x20-\x7e]*")


def passable_headers(raw: tuple[tuple[bytes, bytes], ...]) -> Headers:
    """The headers of an answer that may go on to a client.

    Dropped are those of the connection (RFC 9110, 7.6.1), those that `Connection` names, and any that is not plain
    ASCII or has a control character in it, by which another header could be injected.
    """
    named = b",".join(value for name, value in raw if name.lower() == b"connection").lower()
    dropped = _NOT_PASSED.union(token.strip() for token in named.split(b",")) if named else _NOT_PASSED
    return [
        (lower, value)
        for name, value in raw
        if (lower := name.lower()) not in dropped and _NAME.fullmatch(lower) and _VALUE.fullmatch(value)
    ]


# aiohttp wants a file for a longer body: it then writes it in pieces, instead of joining it to the head in one copy.
_WHOLE_BODY_BYTES_MAX: Final = 256 * 1024
_ENCODINGS_DECODED: Final = frozenset({"", "identity", "gzip", "deflate", "br", "zstd"})
_READ_ERRORS: Final = (aiohttp.ClientError, HttpProcessingError, OSError)


class HTTPUpstream:
    """An upstream at a base URL, over pooled kept-alive connections.

    Cookies, redirects, proxies and credentials from the environment are not followed. It asks for an uncompressed body
    and decompresses one that comes compressed all the same, piece by piece, so that a small body which unpacks to a
    huge one stops at the reader's limit.
    """

    def __init__(
        self,
        *,
        name: str,
        base_url: str,
        api_key: str | None,
        headers: Mapping[str, str] | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        first_byte_timeout_s: float = FIRST_BYTE_TIMEOUT_S,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        connections_max: int = CONNECTIONS_MAX,
        keepalive_s: float = KEEPALIVE_S,
    ) -> None:
        """Nothing is opened before the first request.

        Args:
            headers: sent with each request, as an organisation or a version that the upstream wants.
            connect_timeout_s: from the wish for a connection to its being open, TLS and a full pool included.
            first_byte_timeout_s: from the request being written to the headers; from these to the body's first byte.
            idle_timeout_s: between two pieces of the body.

        Raises:
            ValueError: *base_url* is not an http or https URL without query and fragment.
        """
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"upstream {name!r}: the base URL must look like https://host/v1, not {base_url!r}")
        self._name = name
        self._base_url = base_url.rstrip("/")
        self._idle_timeout_s = idle_timeout_s
        self._send_timeout_s = connect_timeout_s + first_byte_timeout_s
        self._timeout = aiohttp.ClientTimeout(
            total=None, connect=connect_timeout_s, sock_connect=connect_timeout_s, sock_read=first_byte_timeout_s
        )
        self._connections_max = connections_max
        self._keepalive_s = keepalive_s
        self._headers = {"User-Agent": "farebox", "Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._headers.update(headers or {})
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"HTTPUpstream(name={self._name!r})"

    @property
    def name(self) -> str:
        return self._name

    async def send(self, request: UpstreamRequest) -> "HTTPResponse":
        """See `Upstream.send`."""
        session = self._session or self._open()
        body = request.body
        try:
            # aiohttp's own limit begins when the request is written; this one also covers a server that reads slowly.
            async with asyncio.timeout(self._send_timeout_s):
                response = await session.request(
                    request.method,
                    self._base_url + request.path,
                    data=(body if len(body) <= _WHOLE_BODY_BYTES_MAX else io.BytesIO(body)) if body else None,
                    headers={
                        **self._headers,
                        "Accept": "text/event-stream" if request.stream else "application/json",
                        "X-Client-Request-Id": request.request_id,
                        **request.headers,
                    },
                    allow_redirects=False,
                )
        except aiohttp.ConnectionTimeoutError as error:
            raise UpstreamTimeout(phase=Phase.CONNECT) from error
        except TimeoutError as error:
            raise UpstreamTimeout(phase=Phase.FIRST_BYTE) from error
        except aiohttp.ClientConnectorError as error:
            raise UpstreamUnreachable(str(error)) from error
        except _READ_ERRORS as error:
            raise UpstreamBroken(bytes_received=0, reason=str(error) or type(error).__name__) from error
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        if encoding not in _ENCODINGS_DECODED:
            response.close()
            raise UpstreamBroken(bytes_received=0, reason=f"cannot decode the content encoding {encoding!r}")
        return HTTPResponse(response, idle_timeout_s=self._idle_timeout_s)

    async def close(self) -> None:
        """See `Upstream.close`."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        # Here and not in the constructor: aiohttp wants to be made inside the running loop.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._connections_max, keepalive_timeout=self._keepalive_s, ttl_dns_cache=DNS_TTL_S
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=self._timeout,
            trust_env=False,
            auto_decompress=True,
        )
        return self._session


class HTTPResponse:
    """An `UpstreamResponse` over HTTP."""

    __slots__ = ("_bytes_received", "_content", "_idle_timeout_s", "_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse, *, idle_timeout_s: float) -> None:
        self._response = response
        self._content = response.content
        self._idle_timeout_s = idle_timeout_s
        self._bytes_received = 0
        self.status = response.status
        self.headers = passable_headers(response.raw_headers)

    async def read(self, bytes_max: int) -> bytes:
        """See `UpstreamResponse.read`."""
        parts: list[bytes] = []
        size = 0
        async for chunk in self:
            size += len(chunk)
            if size > bytes_max:
                await self.close()
                raise UpstreamBodyTooLarge(bytes_max)
            parts.append(chunk)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def chunks(self) -> AsyncIterator[bytes]:
        """See `UpstreamResponse.chunks`."""
        return self

    async def close(self) -> None:
        """See `UpstreamResponse.close`."""
        self._response.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        # Not a generator: it can be left in the middle and taken up again, and nothing has to be finalised.
        try:
            chunk = await self._content.readany()
        except _READ_ERRORS as error:
            # aiohttp raises before it hands out what came with the cut; these bytes were received all the same.
            chunk = self._content._read_nowait(-1)
            if not chunk:
                self._response.close()
                raise self._translated(error) from error
        if not chunk:
            raise StopAsyncIteration
        if not self._bytes_received:
            self._begin_idle_limit()
        self._bytes_received += len(chunk)
        return chunk

    def _translated(self, error: BaseException) -> UpstreamError:
        if isinstance(error, TimeoutError):
            phase = Phase.IDLE if self._bytes_received else Phase.FIRST_BYTE
            return UpstreamTimeout(phase=phase, bytes_received=self._bytes_received)
        return UpstreamBroken(bytes_received=self._bytes_received, reason=str(error) or type(error).__name__)

    def _begin_idle_limit(self) -> None:
        """Up to here the limit for the first byte held; it rests while we do not want to read."""
        connection = self._response.connection
        if connection is not None and connection.protocol is not None:  # Else the body is all here already.
            connection.protocol.read_timeout = self._idle_timeout_s
            connection.protocol.start_timeout()
