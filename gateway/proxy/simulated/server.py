"""The simulated upstream behind a real socket: a small HTTP/1.1 server that plays scripts.

How it works. One protocol object for each connection gathers a request and starts a task that plays its script;
requests of one connection are answered one after the other. When the client leaves, the task is cancelled.
"""

import asyncio
import zlib
from collections.abc import Callable
from http import HTTPStatus
from typing import Final, cast

import msgspec

from gateway.proxy.simulated.respond import respond
from gateway.proxy.simulated.script import Cut, Script, Send, Wait

HEAD_BYTES_MAX: Final = 64 * 1024
BODY_BYTES_MAX: Final = 64 * 1024 * 1024
_HEAD_END: Final = b"\r\n\r\n"

Witness = Callable[[str, str], None]
"""Told "received" when a request is there and "sent" when its whole answer has left, and its `X-Client-Request-Id`."""


def _nobody(event: str, request_id: str) -> None:
    """The witness where none is wanted."""


class SimulatedServer:
    """The running server. `url` is what an OpenAI client wants as its base URL."""

    def __init__(self, witness: Witness = _nobody) -> None:
        self.tell = witness
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self.requests_count = 0
        self.connections_count = 0
        self.unfinished_count = 0
        """Answers that the client did not wait for."""

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self, host: str, port: int) -> None:
        """Accept connections from now on."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), host, port)

    async def serve_forever(self) -> None:
        """Until cancelled."""
        assert self._server is not None
        await self._server.serve_forever()

    async def close(self) -> None:
        """Close the port and cut all connections."""
        assert self._server is not None
        self._server.close()
        for connection in list(self._connections):
            connection.cut()
            await connection.gone.wait()
        await self._server.wait_closed()

    def opened(self, connection: "_Connection") -> None:
        """A client has come."""
        self.connections_count += 1
        self._connections.add(connection)

    def closed(self, connection: "_Connection") -> None:
        """It has gone."""
        self._connections.discard(connection)


async def serve_simulated(host: str = "127.0.0.1", port: int = 0, *, witness: Witness = _nobody) -> SimulatedServer:
    """Start the server; port 0 takes a free one. The caller closes it."""
    server = SimulatedServer(witness)
    await server.start(host, port)
    return server


class _Head(msgspec.Struct, frozen=True):
    method: str
    path: str
    body_length: int
    request_id: str
    keep_alive: bool
    expects_continue: bool


class _Connection(asyncio.Protocol):
    def __init__(self, server: SimulatedServer) -> None:
        self._server = server
        self._buffer = bytearray()
        self._head: _Head | None = None
        self._playing: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self.gone = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by inheritance.
        self._transport.set_write_buffer_limits(high=0)  # So that all was given to the kernel before a cut.
        self._server.opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self._playing is not None:
            self._server.unfinished_count += 1
            self._playing.cancel()
        self._server.closed(self)
        self.gone.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) > HEAD_BYTES_MAX + BODY_BYTES_MAX:
            self.cut()
        elif self._playing is None:
            self._advance()

    def cut(self) -> None:
        """Close the connection at once."""
        self._transport.abort()

    def _advance(self) -> None:
        if self._head is None:
            end = self._buffer.find(_HEAD_END)
            if end < 0:
                if len(self._buffer) > HEAD_BYTES_MAX:
                    self._refuse(431)
                return
            head = _parse_head(bytes(self._buffer[:end]))
            del self._buffer[: end + len(_HEAD_END)]
            if isinstance(head, int):
                self._refuse(head)
                return
            self._head = head
            if head.expects_continue:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = self._head
        if len(self._buffer) >= head.body_length:
            body = bytes(self._buffer[: head.body_length])
            del self._buffer[: head.body_length]
            self._head = None
            self._server.requests_count += 1
            self._server.tell("received", head.request_id)
            script = respond(head.method, head.path, body)
            self._playing = asyncio.get_running_loop().create_task(self._play(script, head))

    def _refuse(self, status: int) -> None:
        self._transport.write(_status_line(status) + b"content-length: 0\r\nconnection: close\r\n\r\n")
        self._transport.close()

    async def _play(self, script: Script, head: _Head) -> None:
        framing = _Framing(script, keep_alive=head.keep_alive)
        for step in script.steps:
            if isinstance(step, Send):
                self._transport.write(framing.piece(step.data))
                await self._writable.wait()
                await asyncio.sleep(0)  # Each piece on its own, and the other connections in between.
            elif isinstance(step, Wait):
                await asyncio.sleep(step.seconds)
            elif isinstance(step, Cut):
                self._playing = None
                self.cut()
                return
            else:
                await self.gone.wait()
        self._transport.write(framing.end())
        await self._writable.wait()
        self._server.tell("sent", head.request_id)
        self._playing = None
        if head.keep_alive:
            self._advance()
        else:
            self._transport.close()


class _Framing:
    """The bytes on the wire: the head before the first piece, chunks where the length is not known, compression."""

    def __init__(self, script: Script, *, keep_alive: bool) -> None:
        headers = dict(script.headers)
        self._gzip = zlib.compressobj(wbits=31) if headers.get(b"content-encoding") == b"gzip" else None
        if self._gzip is not None:
            headers.pop(b"content-length", None)
        self._chunked = b"content-length" not in headers
        if self._chunked:
            headers[b"transfer-encoding"] = b"chunked"
        headers[b"connection"] = b"keep-alive" if keep_alive else b"close"
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers.items())
        self._head = _status_line(script.status) + lines + b"\r\n"

    def piece(self, data: bytes) -> bytes:
        """A piece of the body."""
        if self._gzip is not None:
            data = self._gzip.compress(data) + self._gzip.flush(zlib.Z_SYNC_FLUSH)
        return self._take_head() + self._framed(data)

    def end(self) -> bytes:
        """What ends the body."""
        rest = self._framed(self._gzip.flush()) if self._gzip is not None else b""
        return self._take_head() + rest + (b"0\r\n\r\n" if self._chunked else b"")

    def _take_head(self) -> bytes:
        head, self._head = self._head, b""
        return head

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked and data else data


def _status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Error"
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


def _parse_head(head: bytes) -> _Head | int:
    """The request's head, or the status with which it is refused."""
    request_line, *lines = head.split(b"\r\n")
    words = request_line.decode("latin-1").split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return 400
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    if b"transfer-encoding" in headers:
        return 411
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or len(length) > len(str(BODY_BYTES_MAX)):
        return 400
    if int(length) > BODY_BYTES_MAX:
        return 413
    connection = headers.get(b"connection", b"").lower()
    return _Head(
        method=words[0],
        path=words[1],
        body_length=int(length),
        request_id=headers.get(b"x-client-request-id", b"-").decode("latin-1"),
        keep_alive=connection == b"keep-alive" if words[2] == "HTTP/1.0" else connection != b"close",
        expects_continue=headers.get(b"expect", b"").lower() == b"100-continue",
    )
