"""SIGTERM: what has begun is finished or settled within the limit, what is new is turned away, and it exits with 0."""

import asyncio
import time
from typing import Final

import aiohttp

from tests.e2e.conftest import Install
from tests.e2e.farebox import Upstream, until_async
from tests.e2e.load import Seen, ask, chat, session, units

GRACE_S: Final = 3
MARGIN_S: Final = 15.0
"""Over the limit: settling, closing, and two busy cores."""

STREAMS: Final = 50
"""Of each kind: a hundred together."""


async def test_open_streams_finish_or_are_settled_within_the_limit(install: Install, upstream: Upstream) -> None:
    farebox = install(shutdown_grace_s=GRACE_S)
    gateway = farebox.serve()
    headers = farebox.headers(farebox.user)
    options = {"include_usage": True}
    short = chat("meter", simulate={"tokens": 40, "chunk_delay_ms": 30}, stream=True, stream_options=options)
    endless = chat("meter", simulate={"tokens": 40, "hang_after_chunks": 11}, stream=True, stream_options=options)
    finishing = [Seen(model="meter") for _ in range(STREAMS)]
    hanging = [Seen(model="meter") for _ in range(STREAMS)]
    async with session() as client:
        asks = [
            asyncio.create_task(ask(client, gateway.base_url, headers, body, seen=seen))
            for body, many in ((short, finishing), (endless, hanging))
            for seen in many
        ]
        await until_async(
            lambda: all(seen.body for seen in (*finishing, *hanging)), within_s=60, what="first byte of each stream"
        )
        assert not any(seen.complete for seen in finishing)
        began = time.monotonic()
        gateway.terminate()
        code = await asyncio.to_thread(gateway.ended)
        took_s = time.monotonic() - began
        await asyncio.gather(*asks)

    assert code == 0, gateway.err
    assert took_s < GRACE_S + MARGIN_S
    booked = farebox.books.requests()
    for seen in finishing:
        entry = booked[seen.request_id or ""]
        assert seen.complete
        assert seen.usage is not None
        assert (entry.state, entry.endings) == ("committed", ("finished",))
        assert entry.charged == units(seen.usage["cost"]) > 0
    for seen in hanging:
        entry = booked[seen.request_id or ""]
        assert not seen.complete
        assert (entry.state, len(entry.endings)) == ("committed", 1)
        assert 0 < entry.charged == entry.recorded
    assert farebox.books.reserved() == 0
    farebox.verify()


async def test_new_requests_are_turned_away_while_streams_finish(install: Install) -> None:
    farebox = install(shutdown_grace_s=30)
    gateway = farebox.serve()
    headers = farebox.headers(farebox.user)
    open_one = Seen(model="meter")
    body = chat("meter", simulate={"tokens": 100, "chunk_delay_ms": 30}, stream=True)
    async with session() as client:
        asking = asyncio.create_task(ask(client, gateway.base_url, headers, body, seen=open_one))
        await until_async(lambda: open_one.body, within_s=60, what="first byte")
        health = gateway.base_url.removesuffix("/v1") + "/health/live"
        gateway.terminate()
        await nobody_listens(client, health)
        assert not open_one.complete
        await asking
    assert open_one.complete
    assert await asyncio.to_thread(gateway.ended) == 0, gateway.err
    entry = farebox.books.requests()[open_one.request_id or ""]
    assert (entry.state, entry.endings) == ("committed", ("finished",))


async def nobody_listens(client: aiohttp.ClientSession, url: str) -> None:
    """Ask on new connections until nobody listens."""
    deadline = time.monotonic() + MARGIN_S
    while time.monotonic() < deadline:
        try:
            async with client.get(url, headers={"Connection": "close"}):
                pass
        except (aiohttp.ClientConnectorError, ConnectionError):
            return
    raise AssertionError(f"within {MARGIN_S} s new connections were still accepted")
