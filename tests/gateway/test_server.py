"""What the server does with bytes before they are a request."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from gateway.api.entitlements import Answer
from gateway.app import Gateway
from gateway.server import HEAD_BYTES_MAX, LINGER_S, Connection, Server, State
from gateway.settings import Settings
from gateway.supervisor import listen

LEAST = b"GET / HTTP/1.1\r\nHost: farebox\r\n"
ONE_READ = 2**18
WAIT_S = 20


class Served:
    """An application behind `Connection`, which a test tells to end."""

    def __init__(self) -> None:
        self.state = State()
        self.go_on = asyncio.Event()
        self.asked: list[str] = []
        self._config = uvicorn.Config(
            self._app, http=Connection, ws="none", lifespan="off", log_config=None, interface="asgi3"
        )
        self._config.load()

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        self.asked.append(scope["method"])
        while (await receive()).get("more_body"):
            pass
        body = b"there" if scope["path"] == "/at-hand" else b"hello"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        if scope["path"] == "/stream":
            await self.go_on.wait()
        await send({"type": "http.response.body", "body": body})

    @property
    def connections(self) -> list[Connection]:
        return [connection for connection in self.state.connections if isinstance(connection, Connection)]

    def end(self) -> None:
        """As the server does it, after it has stopped listening."""
        self.state.draining = True
        for connection in self.connections:
            connection.shutdown()

    async def heard(self, head: bytes) -> None:
        """Wait until so much of a head has come."""
        while not any(each._in_head and each._head_bytes >= len(head) for each in self.connections):  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def stuffed(self) -> None:
        """Wait until a client has left so much unread that it waits in this process."""
        async with asyncio.timeout(WAIT_S):
            while not any(each.transport.get_write_buffer_size() for each in self.connections):  # noqa: ASYNC110
                await asyncio.sleep(0)

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        server = await asyncio.get_running_loop().create_server(
            lambda: Connection(config=self._config, server_state=self.state, app_state={}), "127.0.0.1", 0
        )
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            server.close()
            await server.wait_closed()


@pytest.fixture
def served() -> Served:
    return Served()


async def answered(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    async with asyncio.timeout(WAIT_S):
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.splitlines() if line.lower().startswith(b"content-length"))
        return int(head.split()[1]), await reader.readexactly(int(length.split()[1]))


@pytest.mark.parametrize("part", [b"GET /" + b"a" * 1000, b"X-Long: " + b"a" * 1000, b"X-Many: a\r\n" * 100])
async def test_a_request_whose_head_never_ends_is_refused(served: Served, part: bytes):
    sent = 0
    async with served.connected() as (reader, writer):
        writer.write(b"" if part.startswith(b"GET") else LEAST)
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof() and sent < 2 * (HEAD_BYTES_MAX + ONE_READ):
                writer.write(part)
                await writer.drain()
                sent += len(part)
                part = part if part.endswith(b"\n") else b"a" * 1000
        status, body = await answered(reader)
    assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_request")


def at_hand(scope: Scope) -> Answer | None:
    """What the application would answer, too."""
    if scope["path"] != "/at-hand":
        return None
    return Answer(b"there", [(b"content-length", b"5"), (b"x-request-id", b"req_1")])


async def test_what_is_at_hand_is_answered_in_order_with_all_else(served: Served):
    served.state.answer_at_once = at_hand
    asked = [*(b"/at-hand", b"/else") * 200, *(b"/at-hand",) * 200, b"/else"]
    async with served.connected() as (reader, writer):
        writer.writelines(LEAST.replace(b"/ ", path + b" ") + b"\r\n" for path in asked)
        for path in asked:
            assert await answered(reader) == (200, b"there" if path == b"/at-hand" else b"hello")
        writer.write(LEAST.replace(b"GET / ", b"GET /at-hand ") + b"Content-Length: 4\r\n\r\nbody" + LEAST + b"\r\n")
        assert [await answered(reader), await answered(reader)] == [(200, b"there"), (200, b"hello")]


async def test_who_reads_no_answers_is_waited_for(served: Served):
    """The head of an answer fills what the one before it has left of the buffer, and its body would have to wait."""
    answer = Answer(b"there", [(b"content-length", b"5"), (b"x-long", b"a" * 40_000)])
    served.state.answer_at_once = lambda scope: answer
    async with served.connected() as (reader, writer):
        asked = 400
        writer.writelines([LEAST.replace(b"/ ", b"/at-hand ") + b"\r\n"] * asked)
        await served.stuffed()
        for _ in range(asked):
            assert (await answered(reader))[0] == 200


async def test_nothing_is_done_for_who_has_asked_to_close(served: Served):
    served.state.answer_at_once = at_hand
    async with served.connected() as (reader, writer):
        first = LEAST.replace(b"GET / ", b"GET /at-hand ") + b"Connection: close\r\n\r\n"
        writer.write(first + LEAST.replace(b"GET", b"POST") + b"Content-Length: 0\r\n\r\n")
        assert await answered(reader) == (200, b"there")
        assert await reader.read() == b""
    assert served.asked == []


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1"])
async def test_what_is_at_hand_keeps_the_connection_as_all_else_does(served: Served, version: bytes):
    served.state.answer_at_once = at_hand
    async with served.connected() as (reader, writer):
        writer.write(LEAST.replace(b"/ HTTP/1.1", b"/at-hand " + version) + b"\r\n")
        assert await answered(reader) == (200, b"there")
        if version == b"HTTP/1.0":
            assert await reader.read() == b""
        else:
            assert served.connections[0].timeout_keep_alive_task is not None


async def test_what_is_at_hand_leaves_no_task_behind(served: Served):
    served.state.answer_at_once = at_hand
    async with served.connected() as (reader, writer):
        writer.write(LEAST.replace(b"/ ", b"/at-hand ") + b"\r\n")
        assert await answered(reader) == (200, b"there")
        assert not served.state.tasks


async def test_a_server_that_ends_closes_the_connection_of_what_is_at_hand_too(served: Served):
    served.state.answer_at_once = at_hand
    served.state.draining = True
    async with served.connected() as (reader, writer):
        writer.write(LEAST.replace(b"/ ", b"/at-hand ") + b"\r\n")
        assert await answered(reader) == (200, b"there")
        assert await reader.read() == b""


async def test_what_is_not_http_is_refused_in_our_envelope(served: Served):
    async with served.connected() as (reader, writer):
        writer.write(b"HELO farebox\r\n\r\n")
        status, body = await answered(reader)
    assert (status, json.loads(body)["error"]["type"]) == (400, "invalid_request_error")


async def test_a_body_and_later_requests_have_nothing_to_do_with_the_heads_limit(served: Served):
    length = 4 * HEAD_BYTES_MAX
    async with served.connected() as (reader, writer):
        for _ in range(3):
            writer.write(LEAST.replace(b"GET", b"POST") + b"Content-Length: %d\r\n" % length)
            await writer.drain()
            writer.write(b"\r\n" + b"a" * length)
            assert await answered(reader) == (200, b"hello")


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """The head of the answer to one request."""
    writer.write(LEAST + b"\r\n")
    async with asyncio.timeout(WAIT_S):
        head = await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(5) == b"hello"
    return head.lower()


async def ended(reader: asyncio.StreamReader) -> bool:
    async with asyncio.timeout(WAIT_S):
        return await reader.read() == b""


async def test_while_it_drains_each_response_asks_to_close(served: Served):
    async with served.connected() as (reader, writer):
        assert b"connection: close" not in await ask(reader, writer)
        served.state.draining = True
        assert b"connection: close" in await ask(reader, writer)
        assert await ended(reader)


async def test_a_request_that_comes_just_after_the_end_was_ordered_is_served(served: Served):
    async with served.connected() as (reader, writer):
        await ask(reader, writer)
        served.end()
        assert b"connection: close" in await ask(reader, writer)
        assert await ended(reader)


async def test_a_request_whose_head_is_on_its_way_is_served(served: Served):
    async with served.connected() as (reader, writer):
        await ask(reader, writer)
        writer.write(LEAST)
        await asyncio.wait_for(served.heard(LEAST), WAIT_S)
        served.end()
        writer.write(b"\r\n")
        assert b"connection: close" in (await reader.readuntil(b"\r\n\r\n")).lower()


async def test_an_idle_connection_is_closed_soon(served: Served):
    async with served.connected() as (reader, writer):
        await ask(reader, writer)
        began_s = time.monotonic()
        served.end()
        assert await ended(reader)
        assert LINGER_S * 0.5 < time.monotonic() - began_s < LINGER_S + WAIT_S


async def test_one_that_was_idle_for_long_is_closed_at_once(served: Served):
    async with served.connected() as (reader, writer):
        await ask(reader, writer)
        (connection,) = served.connections
        connection._idle_since_s -= 2 * LINGER_S
        served.end()
        closing = connection.timeout_keep_alive_task
        assert closing is not None
        assert closing.when() < asyncio.get_running_loop().time()
        assert await ended(reader)


async def test_a_stream_that_has_begun_keeps_the_connection_that_it_promised(served: Served):
    async with served.connected() as (reader, writer):
        writer.write(LEAST.replace(b"/ ", b"/stream ") + b"\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"connection: close" not in head.lower()
        served.end()
        served.go_on.set()
        assert await reader.readexactly(5) == b"hello"
        assert b"connection: close" in await ask(reader, writer), "the next one is served, and is the last"


async def test_connections_that_the_kernel_had_taken_are_served(tmp_path: Path):
    gateway = Gateway(
        Settings(database_url=f"sqlite:///{tmp_path}/farebox.db")
    )  # Not started: it refuses all politely.
    server = Server(gateway, Settings())
    server.config.lifespan = "off"
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    listener = listen("127.0.0.1", 0)
    address = listener.getsockname()
    await server.startup([listener])
    clients = [socket.create_connection(address) for _ in range(5)]  # The loop has had no turn to accept them.
    ending = asyncio.create_task(server.shutdown([listener]))
    for client in clients:
        reader, writer = await asyncio.open_connection(sock=client)
        writer.write(LEAST + b"\r\n")
        async with asyncio.timeout(WAIT_S):
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"shutting_down" in answer
        writer.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    await ending
