"""What the server does with bytes before they are a request."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from gateway.server import HEAD_BYTES_MAX, Connection, State

LEAST = b"GET / HTTP/1.1\r\nHost: farebox\r\n"
ONE_READ = 2**18
WAIT_S = 20


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "http"
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    config = uvicorn.Config(hello, http=Connection, ws="none", lifespan="off", log_config=None)
    config.load()
    state = State()
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(config=config, server_state=state, app_state={}), "127.0.0.1", 0
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


async def answered(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    async with asyncio.timeout(WAIT_S):
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.splitlines() if line.lower().startswith(b"content-length"))
        return int(head.split()[1]), await reader.readexactly(int(length.split()[1]))


@pytest.mark.parametrize("part", [b"GET /" + b"a" * 1000, b"X-Long: " + b"a" * 1000, b"X-Many: a\r\n" * 100])
async def test_a_request_whose_head_never_ends_is_refused(part: bytes):
    sent = 0
    async with connected() as (reader, writer):
        writer.write(b"" if part.startswith(b"GET") else LEAST)
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof() and sent < 2 * (HEAD_BYTES_MAX + ONE_READ):
                writer.write(part)
                await writer.drain()
                sent += len(part)
                part = part if part.endswith(b"\n") else b"a" * 1000
        status, body = await answered(reader)
    assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_request")


async def test_what_is_not_http_is_refused_in_our_envelope():
    async with connected() as (reader, writer):
        writer.write(b"HELO farebox\r\n\r\n")
        status, body = await answered(reader)
    assert (status, json.loads(body)["error"]["type"]) == (400, "invalid_request_error")


async def test_a_body_and_later_requests_have_nothing_to_do_with_the_heads_limit():
    length = 4 * HEAD_BYTES_MAX
    async with connected() as (reader, writer):
        for _ in range(3):
            writer.write(LEAST.replace(b"GET", b"POST") + b"Content-Length: %d\r\n" % length)
            await writer.drain()
            writer.write(b"\r\n" + b"a" * length)
            assert await answered(reader) == (200, b"hello")
