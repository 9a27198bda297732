"""Word among processes that keys, apps, tenants or prices have changed, so that nobody trusts what it cached of them.

A message says nothing but that: what is cached is small, and read again when it is next needed. One that is lost costs
no more than the lease that every cached answer has anyway.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from gateway.shared.link import LEASE_S, Link
from gateway.shared.wire import CONNECT_TIMEOUT_S, RedisAway

CHANNEL: Final = "farebox:changes"
CHECK_S: Final = 5.0
"""How often a silent connection is asked for a sign of life."""


class Changes:
    """Without a *link* it tells this process alone.

    Args:
        forget: each drops what this process has cached; called for every change, anywhere.
    """

    def __init__(
        self, *forget: Callable[[], None], url: str | None = None, link: Link | None = None, retry_s: float = LEASE_S
    ) -> None:
        self._forget = forget
        self._url = url
        self._link = link
        self._retry_s = retry_s
        self._listening: asyncio.Task[None] | None = None
        self.heard = asyncio.Event()
        """Set while it hears what the others say."""

    def start(self) -> None:
        if self._url is not None:
            self._listening = asyncio.create_task(self._listen(self._url), name="changes")

    async def stop(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait((self._listening,))

    def announce(self) -> None:
        """Something has changed, and is committed. It returns at once."""
        self._forget_all()
        with suppress(RedisAway):
            _publish(self._link)

    def _forget_all(self) -> None:
        for forget in self._forget:
            forget()

    async def _listen(self, url: str) -> None:
        while True:
            # What is not heard meanwhile is covered by the lease.
            with suppress(RedisError, OSError):
                await self._hear(url)
            self.heard.clear()
            await asyncio.sleep(self._retry_s)

    async def _hear(self, url: str) -> None:
        client = Redis.from_url(
            url,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=CONNECT_TIMEOUT_S,
            health_check_interval=CHECK_S,
        )
        async with client, client.pubsub() as messages:
            await messages.subscribe(CHANNEL)
            while True:
                message = await messages.get_message(timeout=CHECK_S)
                if message is None:
                    continue
                # Subscribed: what was said before went unheard. Or a message.
                self._forget_all()
                self.heard.set()


async def announce(link: Link | None) -> None:
    """Tell all processes that something has changed, from one that is about to end. It never raises."""
    with suppress(RedisAway):
        if (reply := _publish(link)) is not None:
            await reply


def _publish(link: Link | None) -> "asyncio.Future[Any] | None":
    return None if link is None else link.ask("changes", None, (), "PUBLISH", CHANNEL, b"")
