"""A receiver of webhooks behind a real socket, which behaves as a test says."""

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from standardwebhooks import Webhook

COMES_S = 20.0


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> Any:
        return json.loads(self.body)

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def customer(self) -> str | None:
        """The tenant's own id of the customer."""
        customer = self.event["customer"]
        return None if customer is None else customer["external_id"]

    def verified(self, secret: str) -> Any:
        return Webhook(secret).verify(self.body, self.headers)


@dataclass(frozen=True)
class Reply:
    """*hang*: no answer comes. *cut*: the connection ends in the middle of it. *stuck*: its body never ends."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b"ok"
    hang: bool = False
    cut: bool = False
    endless: bool = False
    stuck: bool = False


Behave = Callable[[Received], Reply]


def accept(received: Received) -> Reply:
    return Reply()


@dataclass
class Receiver:
    """Takes requests on a port of its own, which it keeps over a restart."""

    behave: Behave = accept
    received: list[Received] = field(default_factory=list)
    port: int = 0
    sent_bytes: int = 0
    at_once: int = 0
    at_once_max: int = 0
    tls: ssl.SSLContext | None = None
    _server: asyncio.Server | None = None
    _open: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hooks?of=test"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Nobody listens any more, and what is open is cut."""
        assert self._server is not None
        self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    @property
    def ids(self) -> list[str]:
        return [each.id for each in self.received]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        self.at_once += 1
        self.at_once_max = max(self.at_once_max, self.at_once)
        try:
            await self._serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.at_once -= 1
            self._open.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        headers = {name.lower(): value for name, value in headers.items()}
        body = await reader.readexactly(int(headers["content-length"]))
        received = Received(head[0].split(" ")[1], headers, body)
        self.received.append(received)
        reply = self.behave(received)
        if reply.hang:
            await reader.read()
            return
        if reply.cut:
            writer.write(b"HTTP/1.1 2")
            await writer.drain()
            return
        length = "" if reply.endless or reply.stuck else f"Content-Length: {len(reply.body)}\r\n"
        extra = "".join(f"{name}: {value}\r\n" for name, value in reply.headers)
        writer.write(f"HTTP/1.1 {reply.status} X\r\n{length}{extra}\r\n".encode() + reply.body)
        await writer.drain()
        if reply.stuck:
            await reader.read()
        while reply.endless:
            writer.write(b"x" * 65_536)
            self.sent_bytes += 65_536
            await writer.drain()


@contextlib.asynccontextmanager
async def receiving(behave: Behave = accept, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    receiver = Receiver(behave, tls=tls)
    await receiver.start()
    try:
        yield receiver
    finally:
        await receiver.stop()


async def comes(condition: Callable[[], object], what: str = "webhook", *, within_s: float = COMES_S) -> None:
    """Poll *condition* until it holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"within {within_s} s there was no {what}"
        await asyncio.sleep(0.005)
