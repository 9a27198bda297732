"""The link to Redis: quick answers or none.

How it works. What one tick of the loop asks is sent together. Whoever asks while Redis is away is told so at once; who
asked before it went away, within `TIMEOUT_S`. A slow Redis is one that is away: the link is cut, and a task of its own
makes a new one after `LEASE_S`, so no request ever waits for a connection.
"""

import asyncio
import math
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Literal

import structlog
from redis.exceptions import RedisError

from gateway.shared.wire import (
    CONNECT_TIMEOUT_S,
    LIFE_KEY,
    SIGN_OF_LIFE,
    Command,
    Part,
    RedisAway,
    Script,
    Wire,
    reason,
)
from gateway.telemetry import Metrics

TIMEOUT_S: Final = 0.05
"""How long Redis may take. Requests wait for it."""

LEASE_S: Final = 1.0
"""How long Redis is left alone after a failure, and how often it is asked for a sign of life."""

GRACE_S: Final = 0.005
"""After a time limit the loop may read on for so long: what came while we were busy did come in time."""

GRACE_TURNS: Final = 40
"""... and so many turns of the loop, however long they take: a command takes two round trips of
eight turns each where one is under way."""

STEADY_S: Final = 10.0
"""A link that was up for less is one that comes and goes."""

WAITING_MAX: Final = 10_000
"""Most commands without a reply. More are turned away."""

Use = Literal["rate_limit", "balance", "changes", "connect"]

log = structlog.get_logger(__name__)


class Link:
    """Asks Redis. Every failure is counted by what it was asked for.

    Args:
        timeout_s, lease_s, steady_s: see `TIMEOUT_S`, `LEASE_S` and `STEADY_S`.
    """

    def __init__(
        self,
        url: str,
        metrics: Metrics,
        *,
        timeout_s: float = TIMEOUT_S,
        lease_s: float = LEASE_S,
        steady_s: float = STEADY_S,
    ) -> None:
        self.url = url
        self._metrics = metrics
        self.timeout_s = timeout_s
        self._lease_s = lease_s
        self._wire: Wire | None = None
        self._waiting: deque[Command] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._cut = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._connected: list[Callable[[], None]] = []
        self._reason = "not asked yet"
        self._steady_s = steady_s
        self._made_at_s = self._lost_at_s = -math.inf
        metrics.redis_up.set(0)

    @property
    def up(self) -> bool:
        return self._wire is not None

    @property
    def lost_s(self) -> float:
        """How long ago a steady link was lost; of one that comes and goes, the first time counts."""
        return asyncio.get_running_loop().time() - self._lost_at_s

    def describe(self) -> str:
        """`ok`, or what is wrong, in words for the operator."""
        return "ok" if self.up else f"away: {self._reason}"

    def when_connected(self, tell: Callable[[], None]) -> None:
        """Call *tell* whenever a link was made: what Redis knew may be gone."""
        self._connected.append(tell)

    async def start(self) -> None:
        """Look for Redis once; from then on it is looked for in the background."""
        await self._connect()
        self._keeper = asyncio.create_task(self._keep(), name="redis-link")

    async def stop(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait((self._keeper,))
        self._break(ConnectionResetError("the link was closed"), quietly=True)
        await self._closed()

    def ask(self, use: Use, script: Script | None, keys: tuple[str, ...], *arguments: Part) -> "asyncio.Future[Any]":
        """The reply to *script* for *keys*, which share a hash tag; without a script *arguments* are a whole command.

        The reply may also be RedisAway. Nobody has to wait for it.

        Raises:
            RedisAway: at once, while Redis is away.
        """
        self._let_go()
        if self._wire is None or len(self._waiting) >= WAITING_MAX:
            self._metrics.redis_failures.labels(use).inc()
            raise RedisAway(self._reason)
        loop = asyncio.get_running_loop()
        parts = arguments if script is None else (len(keys), *keys, *arguments)
        command = Command(use, script, parts, reply=loop.create_future(), asked_s=loop.time())
        self._waiting.append(command)
        self._wire.send(command)
        if self._timer is None:
            self._timer = loop.call_later(self.timeout_s, self._look_late)
        return command.reply

    def _let_go(self) -> None:
        """Of the oldest commands that have their reply."""
        while self._waiting and self._waiting[0].reply.done():
            self._waiting.popleft()

    # What takes too long.

    def _look_late(self) -> None:
        """The oldest command may be late: let the loop read what is there already, then judge.

        Only that command: where the loop is busy for long, each one after it seems late when its time has passed, too.
        """
        self._timer = None
        self._let_go()
        if not self._waiting:
            return
        loop = asyncio.get_running_loop()
        oldest = self._waiting[0]
        left_s = oldest.asked_s + self.timeout_s - loop.time()
        if left_s > 0:
            self._timer = loop.call_later(left_s, self._look_late)
        else:
            self._timer = loop.call_later(GRACE_S, self._read_on, oldest, GRACE_TURNS)

    def _read_on(self, late: Command, turns: int) -> None:
        if late.reply.done():
            self._look_late()
        elif turns:
            self._timer = asyncio.get_running_loop().call_later(0, self._read_on, late, turns - 1)
        else:
            self._break(TimeoutError(f"no answer within {self.timeout_s * 1000:g} ms"))

    # Making and losing the link.

    async def _keep(self) -> None:
        while True:
            if self._wire is None:
                # Not all processes at once, and none later than the lease.
                await asyncio.sleep(self._lease_s * random.uniform(0.5, 1.0))  # noqa: S311  (spreads the load)
                await self._connect()
                continue
            try:
                async with asyncio.timeout(self._lease_s):
                    await self._cut.wait()
            except TimeoutError:
                await self._sign_of_life()

    async def _sign_of_life(self) -> None:
        try:
            await self.ask("connect", SIGN_OF_LIFE, (LIFE_KEY,))
        except RedisAway:
            return

    async def _connect(self) -> None:
        await self._closed()
        self._cut.clear()
        wire = Wire(self.url, self._break)
        try:
            async with asyncio.timeout(max(CONNECT_TIMEOUT_S, self.timeout_s)):
                await wire.open()
        except BaseException as error:
            await wire.close()
            if not isinstance(error, (OSError, RedisError)):
                raise
            self._metrics.redis_failures.labels("connect").inc()
            if self._reason != reason(error):
                self._note(error)
            return
        self._wire = wire
        self._made_at_s = asyncio.get_running_loop().time()
        self._metrics.redis_up.set(1)
        log.info("redis is there")
        for tell in self._connected:
            tell()

    def _break(self, error: Exception, *, quietly: bool = False) -> None:
        """Cut the link, and tell everybody who waits."""
        wire, self._wire = self._wire, None
        if wire is None:
            return
        now_s = asyncio.get_running_loop().time()
        if now_s - self._made_at_s >= self._steady_s:
            self._lost_at_s = now_s
        self._metrics.redis_up.set(0)
        if not quietly:
            self._note(error)
        self._closing = asyncio.create_task(wire.close(), name="redis-close")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, deque()
        for command in waiting:
            if not command.reply.done():
                self._metrics.redis_failures.labels(command.use).inc()
            command.fail(error)
        self._cut.set()

    async def _closed(self) -> None:
        if self._closing is not None:
            await asyncio.wait((self._closing,))

    def _note(self, error: Exception) -> None:
        self._reason = reason(error)
        log.warning("redis is away: limits and caches are this process's own", reason=self._reason)
