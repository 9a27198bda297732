"""The seam to upstreams: one conformance suite over both implementations, then what only a socket can do wrong."""

import asyncio
import contextlib
import gzip
import json
import sys
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import aiohttp
import openai
import pytest
from openai.types.chat import ChatCompletion

from gateway.proxy.simulated import SimulatedServer, SimulatedUpstream, serve_simulated
from gateway.proxy.simulated.server import BODY_BYTES_MAX
from gateway.proxy.sse import SSEDecoder
from gateway.proxy.upstream import (
    HTTPUpstream,
    Phase,
    Upstream,
    UpstreamBodyTooLarge,
    UpstreamBroken,
    UpstreamRequest,
    UpstreamResponse,
    UpstreamTimeout,
    UpstreamUnreachable,
    passable_headers,
)

BODY_MAX = 32 * 1024 * 1024
SHORT_S = 0.05
"""A limit that a test wants to see passed."""


def chat(*, stream: bool = False, **fields: Any) -> UpstreamRequest:
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Say hello."}], "stream": stream, **fields}
    return UpstreamRequest("/chat/completions", json.dumps(body).encode(), stream, "req_1")


def simulated(stream: bool = False, /, **directive: Any) -> UpstreamRequest:
    return chat(stream=stream, simulate=directive)


async def collect(response: UpstreamResponse, into: list[bytes]) -> None:
    async for chunk in response.chunks():
        into.append(chunk)


def data_of(chunks: list[bytes]) -> list[bytes]:
    decoder = SSEDecoder()
    return [event.data for chunk in chunks for event in decoder.feed(chunk) if event.data is not None]


@pytest.fixture
async def server() -> AsyncIterator[SimulatedServer]:
    server = await serve_simulated()
    yield server
    await server.close()


class Open(Protocol):
    def __call__(self, *, first_byte_timeout_s: float = ..., idle_timeout_s: float = ...) -> Upstream: ...


@pytest.fixture(params=["in process", "over http"])
async def open_upstream(request: pytest.FixtureRequest, server: SimulatedServer) -> AsyncIterator[Open]:
    async with contextlib.AsyncExitStack() as stack:

        def opened(*, first_byte_timeout_s: float = 10, idle_timeout_s: float = 10) -> Upstream:
            if request.param == "in process":
                return SimulatedUpstream(
                    name="sim", first_byte_timeout_s=first_byte_timeout_s, idle_timeout_s=idle_timeout_s
                )
            upstream = HTTPUpstream(
                name="sim",
                base_url=server.url,
                api_key="sk-upstream",
                first_byte_timeout_s=first_byte_timeout_s,
                idle_timeout_s=idle_timeout_s,
            )
            stack.push_async_callback(upstream.close)
            return upstream

        yield opened


@pytest.fixture
async def upstream(open_upstream: Open) -> Upstream:
    return open_upstream()


async def test_a_body(upstream: Upstream) -> None:
    response = await upstream.send(chat())
    headers = dict(response.headers)
    assert (upstream.name, response.status, headers[b"content-type"]) == ("sim", 200, b"application/json")
    assert not {b"content-length", b"connection", b"transfer-encoding"} & set(headers)
    assert headers[b"x-request-id"].startswith(b"req_")
    answer = ChatCompletion.model_validate_json(await response.read(BODY_MAX))
    assert answer.choices[0].finish_reason == "stop"
    await response.close()
    await response.close()


async def test_a_stream(upstream: Upstream) -> None:
    response = await upstream.send(chat(stream=True, stream_options={"include_usage": True}))
    chunks: list[bytes] = []
    await collect(response, chunks)
    await response.close()
    assert all(chunks)
    data = data_of(chunks)
    assert json.loads(data[-2])["usage"]["completion_tokens"] == len(data) - 4
    assert data[-1] == b"[DONE]"


async def test_a_body_over_the_readers_limit(upstream: Upstream) -> None:
    response = await upstream.send(simulated(chunk_bytes=100_000))
    with pytest.raises(UpstreamBodyTooLarge) as raised:
        await response.read(50_000)
    assert raised.value.bytes_max == 50_000


async def test_a_body_of_exactly_the_readers_limit(upstream: Upstream) -> None:
    size = len(await (await upstream.send(chat())).read(BODY_MAX))
    assert len(await (await upstream.send(chat())).read(size)) == size
    with pytest.raises(UpstreamBodyTooLarge):
        await (await upstream.send(chat())).read(size - 1)


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_status_is_an_answer(upstream: Upstream, status: int, stream: bool) -> None:
    response = await upstream.send(simulated(stream, status=status, retry_after=3))
    assert response.status == status
    assert dict(response.headers)[b"retry-after"] == b"3"
    assert "message" in json.loads(await response.read(BODY_MAX))["error"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [{"refuse": True}, {"cut_after_chunks": 0}])
async def test_refused_before_any_byte(upstream: Upstream, stream: bool, fault: dict[str, Any]) -> None:
    with pytest.raises(UpstreamBroken) as raised:
        await upstream.send(simulated(stream, **fault))
    assert raised.value.bytes_received == 0


async def test_a_stream_cut_after_each_event(upstream: Upstream) -> None:
    whole: list[bytes] = []
    await collect(await upstream.send(chat(stream=True)), whole)
    for count in range(1, len(data_of(whole)) + 1):
        response = await upstream.send(simulated(True, cut_after_chunks=count))
        chunks: list[bytes] = []
        with pytest.raises(UpstreamBroken) as raised:
            await collect(response, chunks)
        assert len(data_of(chunks)) == count
        assert raised.value.bytes_received == len(b"".join(chunks))
        with pytest.raises(UpstreamBroken):
            await collect(response, chunks)
        await response.close()


async def test_a_body_cut_in_its_middle(upstream: Upstream) -> None:
    response = await upstream.send(simulated(cut_after_chunks=1))
    with pytest.raises(UpstreamBroken) as raised:
        await response.read(BODY_MAX)
    assert raised.value.bytes_received > 100


async def test_silence_before_the_first_byte(open_upstream: Open) -> None:
    upstream = open_upstream(first_byte_timeout_s=SHORT_S)
    for request in (simulated(hang_after_chunks=0), simulated(True, first_byte_delay_ms=60_000)):
        with pytest.raises(UpstreamTimeout) as raised:
            await upstream.send(request)
        assert (raised.value.phase, raised.value.bytes_received) == (Phase.FIRST_BYTE, 0)


@pytest.mark.parametrize("fault", [{"hang_after_chunks": 2}, {"chunk_delay_ms": 60_000}])
async def test_silence_in_a_stream(open_upstream: Open, fault: dict[str, Any]) -> None:
    upstream = open_upstream(idle_timeout_s=SHORT_S)
    response = await upstream.send(simulated(True, **fault))
    chunks: list[bytes] = []
    with pytest.raises(UpstreamTimeout) as raised:
        await collect(response, chunks)
    assert (raised.value.phase, raised.value.bytes_received) == (Phase.IDLE, len(b"".join(chunks)))
    assert len(data_of(chunks)) == fault.get("hang_after_chunks", 1)
    await response.close()


async def test_silence_in_a_body(open_upstream: Open) -> None:
    response = await open_upstream(idle_timeout_s=SHORT_S).send(simulated(hang_after_chunks=1))
    with pytest.raises(UpstreamTimeout) as raised:
        await response.read(BODY_MAX)
    assert raised.value.phase is Phase.IDLE
    await response.close()


async def test_a_slow_stream_is_not_an_idle_one(open_upstream: Open) -> None:
    response = await open_upstream(idle_timeout_s=0.5).send(simulated(True, chunk_delay_ms=1, first_byte_delay_ms=1))
    chunks: list[bytes] = []
    await collect(response, chunks)
    assert data_of(chunks)[-1] == b"[DONE]"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [{"split_bytes": True}, {"gzip": True}, {"gzip": True, "split_bytes": True}])
async def test_the_same_bytes_however_they_come(upstream: Upstream, stream: bool, fault: dict[str, Any]) -> None:
    received: list[bytes] = []
    for directive in ({"text": "always the same"}, {"text": "always the same", **fault}):
        response = await upstream.send(simulated(stream, **directive))
        assert b"content-encoding" not in dict(response.headers)
        chunks: list[bytes] = []
        await collect(response, chunks)
        received.append(b"".join(chunks))
    plain, faulty = received
    identity = plain[: plain.index(b"service_tier")]  # The id and the time come from the request's bytes.
    assert len(faulty) == len(plain)
    assert faulty[len(identity) :].replace(faulty[: len(identity)], identity) == plain[len(identity) :]


async def test_malformed_events_pass_through(upstream: Upstream) -> None:
    chunks: list[bytes] = []
    await collect(await upstream.send(simulated(True, malformed_sse=True)), chunks)
    assert b"garbage\n" in b"".join(chunks)
    assert data_of(chunks)[-1] == b"[DONE]"


async def test_a_clean_end_without_done(upstream: Upstream) -> None:
    chunks: list[bytes] = []
    await collect(await upstream.send(simulated(True, no_done=True)), chunks)
    assert json.loads(data_of(chunks)[-1])["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_one_huge_chunk(upstream: Upstream, stream: bool) -> None:
    chunks: list[bytes] = []
    await collect(await upstream.send(simulated(stream, chunk_bytes=5_000_000)), chunks)
    assert len(b"".join(chunks)) > 5_000_000


async def test_a_long_request(upstream: Upstream) -> None:
    long = "x" * 5_000_000
    response = await upstream.send(chat(long=long, simulate={"echo": True}))
    assert json.loads(await response.read(BODY_MAX))["echo"]["long"] == long


async def test_the_body_is_forwarded_byte_for_byte(upstream: Upstream) -> None:
    request = simulated(echo=True)
    body = request.body.replace(b'"stream": false', b'"stream" :false, "unknown":[1.50,1e2,"\\u00e9\xc3\xa9"]')
    response = await upstream.send(UpstreamRequest(request.path, body, False, "req_2"))
    assert b'"echo":' + body in await response.read(BODY_MAX)


async def test_reading_may_be_cancelled_and_taken_up_again(upstream: Upstream) -> None:
    response = await upstream.send(simulated(True, chunk_delay_ms=5))
    chunks: list[bytes] = []
    while b"data: [DONE]\n\n" not in b"".join(chunks):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.003):
                await collect(response, chunks)
    assert len(data_of(chunks)) == 11
    await response.close()


async def test_a_hang_that_was_cancelled_is_still_no_end(open_upstream: Open) -> None:
    response = await open_upstream(idle_timeout_s=0.2).send(simulated(True, hang_after_chunks=2))
    chunks: list[bytes] = []
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(SHORT_S):
            await collect(response, chunks)
    with pytest.raises(UpstreamTimeout):
        await collect(response, chunks)
    assert len(data_of(chunks)) == 2
    await response.close()


async def test_after_close_nothing_is_read(upstream: Upstream) -> None:
    response = await upstream.send(simulated(True, hang_after_chunks=2))
    await anext(response.chunks())
    await response.close()
    with pytest.raises(UpstreamBroken):
        await collect(response, [])


async def test_the_list_of_models(upstream: Upstream) -> None:
    response = await upstream.send(UpstreamRequest("/models", b"", False, "req_3", method="GET"))
    assert json.loads(await response.read(BODY_MAX))["object"] == "list"


# Over a socket only.


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(handler: Handler) -> AsyncIterator[str]:
    """A server that is all one handler; it leaves when each of its connections has ended."""
    connections: set[asyncio.Task[Any] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await handler(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    await asyncio.gather(*(task for task in connections if task is not None))
    await server.wait_closed()


@pytest.fixture
async def http(server: SimulatedServer) -> AsyncIterator[HTTPUpstream]:
    upstream = HTTPUpstream(name="sim", base_url=server.url, api_key="sk-upstream")
    yield upstream
    await upstream.close()


async def test_connections_are_kept(server: SimulatedServer, http: HTTPUpstream) -> None:
    for stream in (False, True, False):
        response = await http.send(chat(stream=stream))
        await collect(response, [])
        await response.close()
    response = await http.send(simulated(status=429))
    await response.read(BODY_MAX)
    await response.close()
    assert (server.requests_count, server.connections_count, server.unfinished_count) == (4, 1, 0)


async def test_an_answer_that_is_not_read_to_its_end_is_cut(server: SimulatedServer, http: HTTPUpstream) -> None:
    response = await http.send(simulated(True, hang_after_chunks=2))
    await anext(response.chunks())
    [connection] = server._connections
    await response.close()
    await connection.gone.wait()
    assert server.unfinished_count == 1


async def test_nobody_listens() -> None:
    server = await serve_simulated()
    url = server.url
    await server.close()
    upstream = HTTPUpstream(name="gone", base_url=url, api_key=None)
    with pytest.raises(UpstreamUnreachable):
        await upstream.send(chat())
    await upstream.close()


async def test_no_such_host() -> None:
    upstream = HTTPUpstream(name="nowhere", base_url="http://nowhere.invalid/v1", api_key=None)
    with pytest.raises(UpstreamUnreachable):
        await upstream.send(chat())
    await upstream.close()


async def test_tls_that_is_none() -> None:
    async def answer_in_clear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer(b"", status=b"400 The plain HTTP request was sent to HTTPS port"))

    async with listening(answer_in_clear) as url:
        upstream = HTTPUpstream(name="plain", base_url=url.replace("http:", "https:"), api_key=None)
        with pytest.raises(UpstreamUnreachable):
            await upstream.send(chat())
        await upstream.close()


async def test_no_free_connection(server: SimulatedServer) -> None:
    upstream = HTTPUpstream(
        name="full", base_url=server.url, api_key=None, connections_max=1, connect_timeout_s=SHORT_S
    )
    held = await upstream.send(simulated(True, hang_after_chunks=1))
    with pytest.raises(UpstreamTimeout) as raised:
        await upstream.send(chat())
    assert raised.value.phase is Phase.CONNECT
    assert server.requests_count == 1
    await held.close()
    await (await upstream.send(chat())).read(BODY_MAX)
    await upstream.close()


@pytest.mark.parametrize(
    "base_url", ["", "api.example.com/v1", "ftp://example.com", "https://", "https://example.com/?a=1", "http://a/#b"]
)
def test_a_base_url_that_is_none(base_url: str) -> None:
    with pytest.raises(ValueError, match="must look like"):
        HTTPUpstream(name="x", base_url=base_url, api_key=None)


def test_the_key_is_not_shown() -> None:
    assert "sk-secret" not in repr(HTTPUpstream(name="x", base_url="https://example.com/v1", api_key="sk-secret"))


class Answering:
    """A server that answers each request with the same bytes, and notes what it was sent."""

    def __init__(self, answer: bytes, *, keep_open: bool = False) -> None:
        self._answer = answer
        self._keep_open = keep_open
        self.heads: list[bytes] = []

    async def __aenter__(self) -> "Answering":
        self._stack = contextlib.AsyncExitStack()
        url = await self._stack.enter_async_context(listening(self._serve))
        self.upstream = HTTPUpstream(
            name="raw",
            base_url=f"{url}/v1/",
            api_key="sk-upstream",
            headers={"OpenAI-Organization": "org-1"},
            first_byte_timeout_s=SHORT_S * 4,
        )
        self._stack.push_async_callback(self.upstream.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            writer.write(self._answer)
            await writer.drain()
            if not self._keep_open:
                break


def answer(body: bytes, *headers: bytes, status: bytes = b"200 OK") -> bytes:
    lines = b"".join(line + b"\r\n" for line in (*headers, b"Content-Length: %d" % len(body)))
    return b"HTTP/1.1 " + status + b"\r\n" + lines + b"\r\n" + body


async def test_what_is_sent() -> None:
    async with Answering(answer(b"{}", b"Set-Cookie: a=b; Path=/"), keep_open=True) as server:
        for stream in (False, True):
            response = await server.upstream.send(chat(stream=stream))
            assert b"set-cookie" not in dict(response.headers)
            assert await response.read(BODY_MAX) == b"{}"
        for head, accept in zip(server.heads, (b"application/json", b"text/event-stream"), strict=True):
            request_line, *lines = head.strip().split(b"\r\n")
            assert request_line == b"POST /v1/chat/completions HTTP/1.1"
            headers = {name.lower(): value for name, value in (line.split(b": ", 1) for line in lines)}
            assert int(headers.pop(b"content-length")) > 0
            assert headers.pop(b"host").startswith(b"127.0.0.1:")
            assert headers == {
                b"authorization": b"Bearer sk-upstream",
                b"openai-organization": b"org-1",
                b"content-type": b"application/json",
                b"accept": accept,
                b"accept-encoding": b"identity",
                b"user-agent": b"farebox",
                b"x-client-request-id": b"req_1",
            }


async def test_a_redirect_is_not_followed() -> None:
    async with Answering(answer(b"", b"Location: http://127.0.0.1:1/", status=b"307 Moved")) as server:
        response = await server.upstream.send(chat())
        assert response.status == 307
        assert await response.read(BODY_MAX) == b""


@pytest.mark.parametrize(
    "bytes_sent",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\nContent-",
        b"220 smtp.example.com ready\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\n",
        answer(b"\xff\x06\x00\x00sNaPpY", b"Content-Encoding: snappy"),
        answer(gzip.compress(b"{}"), b"Content-Encoding: gzip, gzip"),
    ],
)
async def test_an_answer_that_is_none(bytes_sent: bytes) -> None:
    async with Answering(bytes_sent) as server:
        with pytest.raises(UpstreamBroken) as raised:
            await server.upstream.send(chat())
        assert raised.value.bytes_received == 0


async def test_a_kept_connection_that_is_closed_as_we_send_is_not_used_for_a_second_post() -> None:
    async def close_at_the_second_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for reply in (answer(b"{}"), b""):  # The second one has been sent: it may have been acted upon.
            requests.append(await reader.readuntil(b"\r\n\r\n"))
            await reader.readexactly(len(chat().body))
            writer.write(reply)

    requests: list[bytes] = []
    async with listening(close_at_the_second_request) as url:
        upstream = HTTPUpstream(name="closing", base_url=url, api_key=None)
        assert await (await upstream.send(chat())).read(BODY_MAX) == b"{}"
        with pytest.raises(UpstreamBroken) as raised:
            await upstream.send(chat())
        assert raised.value.bytes_received == 0
        assert len(requests) == 2
        await upstream.close()


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        (b"gzip", gzip.compress(b'{"a":1}')),
        (b"GZIP", gzip.compress(b'{"a":1}')),
        (b"deflate", zlib.compress(b'{"a":1}')),
        (b"deflate", zlib.compress(b'{"a":1}', wbits=-15)),
        (b"identity", b'{"a":1}'),
    ],
)
async def test_compressed_although_we_asked_for_identity(encoding: bytes, body: bytes) -> None:
    async with Answering(answer(body, b"Content-Encoding: " + encoding)) as server:
        response = await server.upstream.send(chat())
        assert b"content-encoding" not in dict(response.headers)
        assert await response.read(BODY_MAX) == b'{"a":1}'


async def test_what_is_no_gzip_is_broken() -> None:
    async with Answering(answer(b"not compressed at all", b"Content-Encoding: gzip")) as server:
        with pytest.raises(UpstreamBroken):
            await (await server.upstream.send(chat())).read(BODY_MAX)


async def test_a_small_body_that_unpacks_to_a_huge_one_stops_at_the_limit() -> None:
    bomb = gzip.compress(bytes(300_000_000))
    async with Answering(answer(bomb, b"Content-Encoding: gzip")) as server:
        tracemalloc.start()
        try:
            response = await server.upstream.send(chat())
            with pytest.raises(UpstreamBodyTooLarge):
                await response.read(1_000_000)
            assert tracemalloc.get_traced_memory()[1] < 10_000_000
        finally:
            tracemalloc.stop()


async def test_headers_without_a_byte_of_the_body() -> None:
    async with Answering(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n", keep_open=True) as server:
        response = await server.upstream.send(chat())
        with pytest.raises(UpstreamTimeout) as raised:
            await response.read(BODY_MAX)
        assert raised.value.phase is Phase.FIRST_BYTE
        await response.close()


async def test_a_server_that_does_not_read_the_request() -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await released.wait()

    released = asyncio.Event()
    async with listening(deaf) as url:
        upstream = HTTPUpstream(
            name="deaf", base_url=url, api_key=None, connect_timeout_s=0.5, first_byte_timeout_s=SHORT_S
        )
        with pytest.raises(UpstreamTimeout) as raised:
            await upstream.send(chat(long="x" * 20_000_000))
        assert raised.value.phase is Phase.FIRST_BYTE
        released.set()
        await upstream.close()


async def test_what_came_with_the_cut_is_handed_out_before_the_error() -> None:
    async def cut_in_the_second_chunk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ndata: a\n\n\r\n9\r\ndata: b")
        await writer.drain()
        writer.transport.abort()

    async with listening(cut_in_the_second_chunk) as url:
        upstream = HTTPUpstream(name="cut", base_url=url, api_key=None)
        response = await upstream.send(chat(stream=True))
        with pytest.raises(aiohttp.ClientPayloadError):
            await response._response.content.wait_eof()  # The cut is there before we have read anything.
        chunks: list[bytes] = []
        with pytest.raises(UpstreamBroken) as raised:
            await collect(response, chunks)
        assert b"".join(chunks) == b"data: a\n\ndata: b"
        assert raised.value.bytes_received == 16
        await upstream.close()


def test_headers_that_may_pass() -> None:
    raw = (
        (b"Content-Type", b"application/json"),
        (b"X-Request-Id", b"req_1"),
        (b"x-ratelimit-remaining-tokens", b"42"),
        (b"Retry-After", b"7"),
        (b"Content-Length", b"7"),
        (b"Content-Encoding", b"gzip"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Connection", b"keep-alive, X-Hop"),
        (b"X-Hop", b"of this connection"),
        (b"Keep-Alive", b"timeout=5"),
        (b"Set-Cookie", b"a=b"),
        (b"Alt-Svc", b'h3=":443"'),
        (b"X-Injected", b"a\r\nX-Quota-Cost: 0"),
        (b"X-Null", b"a\x00b"),
        (b"X-Latin", b"caf\xe9"),
        (b"X-Utf8", "café".encode()),
        (b"X Space", b"a"),
        (b"", b"a"),
        (b"X-Empty", b""),
    )
    assert passable_headers(raw) == [
        (b"content-type", b"application/json"),
        (b"x-request-id", b"req_1"),
        (b"x-ratelimit-remaining-tokens", b"42"),
        (b"retry-after", b"7"),
        (b"x-empty", b""),
    ]


# The server of the simulated upstream.


async def raw_exchange(server: SimulatedServer, sent: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(sent)
    received = await reader.read()
    writer.close()
    await writer.wait_closed()
    return received


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n\r\n", 200),
        (b"GET /v1/models HTTP/1.0\r\n\r\n", 200),
        (b"GET /v1/models HTTP/1.1\r\n\r\nGET /v1/models/x HTTP/1.1\r\nConnection: close\r\n\r\n", 200),
        (b"garbage\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        (b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (BODY_BYTES_MAX + 1), 413),
        (b"GET /v1/models HTTP/1.1\r\nX: " + b"x" * 70_000, 431),
    ],
)
async def test_the_server_understands_http(server: SimulatedServer, sent: bytes, status: int) -> None:
    received = await raw_exchange(server, sent)
    assert received.startswith(b"HTTP/1.1 %d " % status)
    assert received.count(b"HTTP/1.1") == sent.count(b"GET /v1/models") or status >= 400


async def test_the_openai_sdk_understands_the_server(server: SimulatedServer) -> None:
    async with openai.AsyncOpenAI(base_url=server.url, api_key="sk-x", max_retries=0) as client:
        answer = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi."}])
        assert answer.choices[0].message.content == 'You said: "Hi.". This answer is simulated.'
        stream = await client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "Hi."}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == (
            answer.choices[0].message.content
        )
        assert chunks[-1].usage == answer.usage
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": "Hi."}],
                extra_body={"simulate": {"status": 429, "retry_after": 1}},
            )


async def test_the_server_runs_on_its_own() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway.proxy.simulated", "--port", "0"), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    url = (await process.stdout.readline()).decode().strip()
    upstream = HTTPUpstream(name="process", base_url=url, api_key=None)
    assert (await (await upstream.send(chat())).read(BODY_MAX)).startswith(b'{"id":"chatcmpl-')
    await upstream.close()
    process.terminate()
    await process.communicate()
