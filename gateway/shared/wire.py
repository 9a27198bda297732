"""Commands to Redis and their replies, through redis-py's client for a server or for a cluster.

How it works. One pipeline is under way at a time. What is asked meanwhile leaves with the next one, so the commands of
one tick of the loop, and of several where Redis is busy, are one packet. In a cluster all keys of a command share a
hash tag, and the client sends each to the node that has its slot.

The client is not let to mend anything while the wire is in use: it would do so while requests wait, and nobody would be
told that Redis may have forgotten what it knew. A wire that failed once is of no use any more.
"""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import Connection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as ConnectionFailed
from redis.exceptions import NoScriptError, RedisError

PIPELINE_MAX: Final = 500
"""Most commands in one pipeline, whose replies come together: about five milliseconds' work for the loop."""

CONNECT_TIMEOUT_S: Final = 0.5
"""How long making a wire may take, and closing it. Only tasks of their own wait, and the start of a process."""

Part = str | bytes | int


class RedisAway(Exception):
    """Redis did not answer, or not in time: whoever asked does without."""


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class Script:
    """Lua that Redis runs as one step; it is known there by its digest."""

    __slots__ = ("digest", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


SIGN_OF_LIFE: Final = Script("return redis.call('SET', KEYS[1], '1', 'PX', 60000)")
"""Of a server that runs scripts and may write: a replica, or one that is full, is of no use."""

LIFE_KEY: Final = "farebox:{life}"


class Command:
    """One command and the reply that it waits for: *arguments* of a script, else the whole command."""

    __slots__ = ("arguments", "asked_s", "reply", "script", "use")

    def __init__(
        self,
        use: str,
        script: Script | None,
        arguments: tuple[Part, ...],
        *,
        reply: asyncio.Future[Any],
        asked_s: float,
    ) -> None:
        self.use = use
        self.script = script
        self.arguments = arguments
        self.reply = reply
        self.asked_s = asked_s

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.arguments if self.script is None else ("EVALSHA", self.script.digest, *self.arguments)

    def fail(self, error: Exception) -> None:
        if not self.reply.done():
            self.reply.set_exception(RedisAway(reason(error)))
            self.reply.exception()  # Seen: nobody has to wait for a reply.


class Wire:
    """To the server at *url*, or to the cluster that it belongs to.

    Args:
        when_broken: is told once why the wire is of no use any more. Replies that have not come will not come.
    """

    def __init__(self, url: str, when_broken: Callable[[Exception], None]) -> None:
        self._url = url
        self._when_broken = when_broken
        self._in_use = False
        self._unsent: list[Command] = []
        self._asked = asyncio.Event()
        self._sending: asyncio.Task[None] | None = None
        self._options: dict[str, Any] = {
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "max_connections": 1,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            # Who uses the wire knows how long it may take, and cuts it.
            "socket_timeout": None,
        }
        self.client: Redis | RedisCluster = Redis.from_url(url, redis_connect_func=self._enter, **self._options)

    async def open(self) -> None:
        """Connect, and see that it does what we need. The caller bounds the time, and closes the wire in any case.

        Raises:
            OSError, RedisError: it cannot be reached, does not let us in, or not write.
        """
        if (await self.client.info("cluster"))["cluster_enabled"]:
            await self.client.aclose()
            # Slots that move are followed one by one; to learn all of them anew would take a request's time.
            self.client = RedisCluster.from_url(self._url, reinitialize_steps=0, **self._options)
            await self.client.initialize()
            await self.client.ping(target_nodes=RedisCluster.PRIMARIES)
        loop = asyncio.get_running_loop()
        await self._execute([Command("connect", SIGN_OF_LIFE, (1, LIFE_KEY), reply=loop.create_future(), asked_s=0)])
        self._in_use = True
        self._sending = asyncio.create_task(self._keep_sending(), name="redis-wire")

    async def _enter(self, connection: Connection) -> None:
        """Log in and choose the database, once; a cluster's client tells of a lost connection by itself."""
        if self._in_use:
            raise ConnectionFailed("the connection to Redis was lost")
        await connection.on_connect()

    def send(self, command: Command) -> None:
        self._unsent.append(command)
        self._asked.set()

    async def close(self) -> None:
        """Cut it, whatever it is doing. Repeatable."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait((self._sending,))
        with suppress(RedisError, OSError):
            await self.client.aclose()
        if isinstance(self.client, RedisCluster):
            # A client that means to look for its cluster again takes itself for closed, and leaves its nodes open.
            nodes = (*self.client.get_nodes(), *self.client.startup_nodes)
            await asyncio.gather(*(node.disconnect() for node in nodes), return_exceptions=True)

    async def _keep_sending(self) -> None:
        try:
            while True:
                await self._asked.wait()
                commands, self._unsent = self._unsent[:PIPELINE_MAX], self._unsent[PIPELINE_MAX:]
                if not self._unsent:
                    self._asked.clear()
                await self._execute(commands)
        except (RedisError, OSError) as error:
            self._when_broken(error)

    async def _execute(self, commands: Sequence[Command], *, loaded: bool = False) -> None:
        """Raises the first error among the replies, after the others were given out."""
        pipeline = self.client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command.parts)
        unknown: list[Command] = []
        errors: list[Exception] = []
        for command, reply in zip(commands, await pipeline.execute(raise_on_error=False), strict=True):
            if isinstance(reply, NoScriptError) and not loaded:
                unknown.append(command)
            elif isinstance(reply, Exception):
                errors.append(reply)
            elif not command.reply.done():
                command.reply.set_result(reply)
        if errors:
            raise errors[0]
        if unknown:
            for text in {command.script.text for command in unknown if command.script is not None}:
                await self.client.script_load(text)
            await self._execute(unknown, loaded=True)
