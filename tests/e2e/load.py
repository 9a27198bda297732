"""Clients of a gateway that remember what they saw of each request, however it ended."""

import asyncio
import itertools
import json
import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from tests.e2e.farebox import CREDIT_UNITS

CHAT: Final = "/chat/completions"
DONE: Final = b"data: [DONE]\n\n"
NARROW_BYTES: Final = 4096
ANSWER_S: Final = 120
PAUSE_S: Final = 0.1
"""Before a client that was refused asks again."""


@dataclass(slots=True)
class Seen:
    """One request as its client saw it.

    Attributes:
        status: 0 while no response has begun.
        complete: the whole body came, or the stream's `[DONE]`.
        asked_s, ended_s: when, by the clock that only rises; ended is 0 while it goes on.
    """

    model: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False
    asked_s: float = 0.0
    ended_s: float = 0.0

    @property
    def served(self) -> bool:
        """Whether it has the whole answer."""
        return self.complete and self.status == 200

    @property
    def request_id(self) -> str | None:
        return self.headers.get("x-request-id")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def usage(self) -> dict[str, Any] | None:
        """What the answer or the stream says of its usage."""
        if not self.complete or self.status != 200:
            return None
        if not self.body.startswith(b"data: "):
            usage: dict[str, Any] = self.json["usage"]
            return usage
        events = [json.loads(event[6:]) for event in self.body.split(b"\n\n") if event.startswith(b"data: {")]
        return next((event["usage"] for event in reversed(events) if event.get("usage")), None)


def units(credits: str) -> int:
    """Decimal credits in the smallest unit."""
    whole, _, part = credits.partition(".")
    return int(whole) * CREDIT_UNITS + int(part.ljust(9, "0"))


def chat(model: str, *, prompt: str = "Hello", simulate: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    messages = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": messages, "simulate": simulate or {}, **fields}


def a_request(rng: random.Random, *, longest_ms: int = 1500) -> dict[str, Any]:
    """One of the kinds that dwell in different phases, for *longest_ms* or, of a stream, a little more."""
    kind = rng.random()
    prompt = "word " * rng.randrange(1, 30)
    if kind < 0.4:
        simulate = {"tokens": rng.randrange(1, 40), "first_byte_delay_ms": rng.randrange(longest_ms // 15)}
        return chat("meter", prompt=prompt, simulate=simulate, max_tokens=64)
    if kind < 0.6:
        delay_ms = rng.randrange(longest_ms // 8, longest_ms)
        simulate = {"tokens": rng.randrange(1, 40), "first_byte_delay_ms": delay_ms}
        return chat("meter", prompt=prompt, simulate=simulate, max_tokens=64)
    simulate = {"tokens": rng.randrange(5, 80), "chunk_delay_ms": rng.randrange(1, longest_ms // 50)}
    options = {"stream_options": {"include_usage": True}} if rng.random() < 0.5 else {}
    return chat("meter", prompt=prompt, simulate=simulate, stream=True, **options)


def a_brief_request(rng: random.Random) -> dict[str, Any]:
    """The same kinds, soon over."""
    return a_request(rng, longest_ms=300)


def session() -> aiohttp.ClientSession:
    """As many connections as are wanted."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=ANSWER_S), read_bufsize=2**20
    )


async def ask(
    client: aiohttp.ClientSession,
    base_url: str,
    headers: dict[str, str],
    body: dict[str, Any],
    *,
    seen: Seen | None = None,
) -> Seen:
    """Send a chat request and read its answer as far as it comes."""
    seen = seen or Seen(model=body["model"])
    seen.asked_s = time.monotonic()
    try:
        async with client.post(f"{base_url}{CHAT}", headers=headers, json=body) as response:
            seen.status = response.status
            seen.headers = {name.lower(): value for name, value in response.headers.items()}
            async for part in response.content.iter_any():
                seen.body += part
        seen.complete = not body.get("stream") or response.status != 200 or seen.body.endswith(DONE)
    except (aiohttp.ClientError, ConnectionError):
        # The stream is complete for its client when [DONE] has come, whatever becomes of the connection then.
        seen.complete = seen.body.endswith(DONE)
    seen.ended_s = time.monotonic()
    return seen


async def ask_without_reading(
    base_url: str, headers: dict[str, str], body: dict[str, Any], read_now: asyncio.Event
) -> Seen:
    """Send a request and read nothing of its answer, which no socket's buffer holds, before *read_now*."""
    seen = Seen(model=body["model"])
    place = urlsplit(base_url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, NARROW_BYTES)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(connection, (place.hostname, place.port))
        content = json.dumps(body).encode()
        lines = [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join(
            [f"POST {place.path}{CHAT} HTTP/1.1", "Host: gateway", *lines, f"Content-Length: {len(content)}"]
        )
        await loop.sock_sendall(connection, head.encode() + b"\r\n\r\n" + content)
        await read_now.wait()
        await _read_all(connection, seen)
    except ConnectionError:
        pass
    finally:
        connection.close()
    return seen


async def _read_all(connection: socket.socket, seen: Seen) -> None:
    loop = asyncio.get_running_loop()
    received = b""
    while b"\r\n\r\n" not in received:
        part = await loop.sock_recv(connection, 2**16)
        if not part:
            return
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    seen.status = int(status.split()[1])
    seen.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    parts = [body]
    missing = int(seen.headers["content-length"]) - len(body)
    while missing > 0:
        part = await loop.sock_recv(connection, 2**20)
        if not part:
            break
        parts.append(part)
        missing -= len(part)
    seen.body = b"".join(parts)
    seen.complete = missing == 0


class Traffic:
    """Clients that ask without a pause, each with what *next_body* gives, until they are stopped or nobody answers.

    Attributes:
        seen: every request, as soon as it is sent.
        in_flight: requests sent and not answered in full.
    """

    def __init__(
        self,
        base_url: str,
        users: list[dict[str, str]],
        next_body: Callable[[random.Random], dict[str, Any]],
        rng: random.Random,
    ) -> None:
        """*users* are the headers that the requests carry, in turn."""
        self._base_url = base_url
        self._users = users
        self._next_body = next_body
        self._rng = rng
        self._stopped = False
        self._read_now = asyncio.Event()
        self.seen: list[Seen] = []
        self.in_flight = 0

    async def run(self, *, clients: int, not_reading: tuple[dict[str, Any], ...] = ()) -> list[Seen]:
        """Run *clients* until all have ended, and one more for each body in *not_reading*."""
        async with session() as client:
            late = [self._late(body) for body in not_reading]
            await asyncio.gather(*(self._ask(client, number) for number in range(clients)), *late)
        return self.seen

    def stop(self) -> None:
        """Let each client finish what it asked, and no more; those who do not read begin to."""
        self._stopped = True
        self._read_now.set()

    async def _ask(self, client: aiohttp.ClientSession, number: int) -> None:
        headers = self._users[number % len(self._users)]
        while not self._stopped:
            body = self._next_body(self._rng)
            seen = Seen(model=body["model"])
            self.seen.append(seen)
            self.in_flight += 1
            await ask(client, self._base_url, headers, body, seen=seen)
            if not seen.complete:
                return
            self.in_flight -= 1

    async def _late(self, body: dict[str, Any]) -> None:
        self.in_flight += 1
        seen = await ask_without_reading(self._base_url, self._users[0], body, self._read_now)
        self.seen.append(seen)
        self.in_flight -= seen.complete


class Load:
    """Clients that ask without a pause, of several gateways in turn, and go on whatever they get, until told to stop.

    Attributes:
        seen: of each client every request, as soon as it is sent.
        served: how many answers came whole.
    """

    def __init__(
        self,
        base_urls: Sequence[str],
        users: Sequence[dict[str, str]],
        next_body: Callable[[random.Random], dict[str, Any]],
        rng: random.Random,
    ) -> None:
        """*users* are the headers that the requests carry, in turn."""
        self.base_urls = list(base_urls)
        self._users = users
        self._next_body = next_body
        self._rng = rng
        self._stopped = False
        self.seen: list[list[Seen]] = []
        self.served = 0

    async def run(self, *, clients: int) -> None:
        """Until they are stopped, and each has ended what it asked."""
        self.seen = [[] for _ in range(clients)]
        async with session() as client:
            await asyncio.gather(*(self._ask(client, number) for number in range(clients)))

    def stop(self) -> None:
        self._stopped = True

    @property
    def all(self) -> list[Seen]:
        return [seen for of_one in self.seen for seen in of_one]

    def served_again_s(self, since_s: float) -> float | None:
        """When the last client got its first whole answer to what it asked after *since_s*; None if not all have."""
        latest = since_s
        for of_one in self.seen:
            later = itertools.takewhile(lambda seen: seen.asked_s >= since_s, reversed(of_one))
            ended = min((seen.ended_s for seen in later if seen.served), default=None)
            if ended is None:
                return None
            latest = max(latest, ended)
        return latest

    async def _ask(self, client: aiohttp.ClientSession, number: int) -> None:
        headers = self._users[number % len(self._users)]
        turn = number
        while not self._stopped:
            body = self._next_body(self._rng)
            seen = Seen(model=body["model"])
            self.seen[number].append(seen)
            await ask(client, self.base_urls[turn % len(self.base_urls)], headers, body, seen=seen)
            turn += 1
            self.served += seen.served
            if not seen.served:
                await asyncio.sleep(PAUSE_S)
