"""The rate limit over all processes: one moving window a key, kept in Redis by Redis's own clock.

How it works. Each process also remembers what it admitted itself. Without Redis it goes on with that, by its own
monotonic clock. Redis may forget, so windows are spread over buckets, each with an epoch beside its windows, under one
hash tag: a process names the epoch that it has told its admissions to, and a Redis that forgot has another one, and is
told them again, by age, before it decides. Processes that are idle look for that once a lease, so that a limit is
short of what others admitted for no longer. A new link tells everything again: a Redis that comes back from a snapshot
or a replica may have an old epoch and lack the latest. Telling twice is harmless: an admission has a name.

Redis's memory is bounded by the limits: only what was admitted is kept, and a window goes a minute after its last use.
It must not evict keys that expire by themselves (`maxmemory-policy noeviction`, the default).
"""

import asyncio
import math
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import Any, Final, NamedTuple
from zlib import crc32

from gateway.lru import LRU
from gateway.proxy.rate_limit import KEYS_MAX, UNLIMITED, WINDOW_S, Decision, MovingWindow
from gateway.shared.link import LEASE_S, Link
from gateway.shared.wire import Part, RedisAway, Script

BUCKETS: Final = 32
"""How many epochs there are; in a cluster, over how many slots the windows are spread."""

TELL_MAX: Final = 500
"""Most admissions that are told in one command."""

ROUNDS_MAX: Final = 3
"""How often a request follows Redis to another epoch before its process decides alone."""

WINDOW_US: Final = round(WINDOW_S * 1_000_000)

_CURRENT: Final = """
local epoch = redis.call('GET', KEYS[#KEYS])
if not epoch then epoch = ARGV[2]; redis.call('SET', KEYS[#KEYS], epoch) end
"""
"""KEYS: (the window,) the epoch. ARGV: the epoch that the caller knows, one to begin with."""

LOOK: Final = Script(f"{_CURRENT} return epoch")

TELL: Final = Script(
    f"""{_CURRENT}
if epoch ~= ARGV[1] then return epoch end
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
for i = 4, #ARGV, 2 do redis.call('ZADD', KEYS[1], 'NX', now - ARGV[i], ARGV[i + 1]) end
redis.call('PEXPIRE', KEYS[1], math.ceil(ARGV[3] / 1000))
return {{1}}
"""
)
"""ARGV: epochs, the window's length, then the age and the name of each admission. Times are in microseconds."""

TAKE: Final = Script(
    f"""{_CURRENT}
if epoch ~= ARGV[1] then return epoch end
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local length, limit = tonumber(ARGV[3]), tonumber(ARGV[4])
local window = KEYS[1]
-- After the clock was set back, nothing may stay longer than it would from now on.
for _, early in ipairs(redis.call('ZRANGEBYSCORE', window, string.format('(%.0f', now), '+inf')) do
    redis.call('ZADD', window, now, early)
end
redis.call('ZREMRANGEBYSCORE', window, '-inf', now - length)
local count = redis.call('ZCARD', window)
local allowed = count < limit
local retry = 0
if allowed then
    redis.call('ZADD', window, now, ARGV[5])
    redis.call('PEXPIRE', window, math.ceil(length / 1000))
    count = count + 1
else
    retry = redis.call('ZRANGE', window, count - limit, count - limit, 'WITHSCORES')[2] + length - now
end
local oldest = redis.call('ZRANGE', window, 0, 0, 'WITHSCORES')[2]
return {{allowed and 1 or 0, count, oldest + length - now, retry}}
"""
)
"""ARGV: epochs, the window's length, the limit, the name that this admission would have."""


class Taken(NamedTuple):
    """Redis's decision, and the epoch in which it was made. *held* is how many are in the window after it."""

    allowed: int
    held: int
    reset_us: int
    retry_us: int
    epoch: str


class Window(MovingWindow):
    """What this process admitted of one key.

    Attributes:
        names: of `admitted_at_s`, in the same order.
        untold: what Redis is not known to know, by name, with its time.
    """

    __slots__ = ("names", "untold")

    def __init__(self) -> None:
        super().__init__()
        self.names: deque[str] = deque()
        self.untold: dict[str, float] = {}

    def forget(self, now_s: float) -> None:
        super().forget(now_s)
        while len(self.names) > len(self.admitted_at_s):
            self.untold.pop(self.names.popleft(), None)

    def add(self, now_s: float, name: str, *, told: bool) -> None:
        self.admitted_at_s.append(now_s)
        self.names.append(name)
        if not told:
            self.untold[name] = now_s

    def tell_again(self) -> None:
        self.untold = dict(zip(self.names, self.admitted_at_s, strict=True))


class Bucket:
    """Windows under one hash tag. *epoch* is what their admissions were told to; empty before the first look."""

    __slots__ = ("epoch", "epoch_key", "tag", "windows")

    def __init__(self, number: int, windows_max: int) -> None:
        self.tag = f"farebox:{{rate:{number}}}:"
        self.epoch_key = f"{self.tag}epoch"
        self.epoch = ""
        self.windows: LRU[str, Window] = LRU(windows_max)

    def window(self, key_id: str) -> Window:
        window = self.windows.get(key_id)
        if window is None:
            window = Window()
            self.windows.put(key_id, window)
        return window

    def follow(self, epoch: str) -> None:
        """From now on *epoch* holds, and knows of nothing that we admitted before."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.tell_again()

    def tell_again(self) -> None:
        for _, window in self.windows.items():
            window.tell_again()


class SharedRateLimit:
    """Counts for all processes while Redis answers, else for this one. It never fails a request.

    A check costs one round trip; what is over the limit by this process's own count costs none.
    """

    def __init__(
        self,
        link: Link,
        *,
        monotonic_s: Callable[[], float] = time.monotonic,
        lease_s: float = LEASE_S,
        keys_max: int = KEYS_MAX,
    ) -> None:
        self._link = link
        self._monotonic_s = monotonic_s
        self._lease_s = lease_s
        self._buckets = [Bucket(number, max(1, keys_max // BUCKETS)) for number in range(BUCKETS)]
        self._process = secrets.token_hex(6)
        self._admissions = 0
        self._connected = asyncio.Event()
        self._telling: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._link.when_connected(self._tell_again)
        self._telling = asyncio.create_task(self._keep_telling(), name="rate-limit")

    async def stop(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.wait((self._telling,))

    async def check(self, key_id: str, limit_per_minute: int) -> Decision:
        if limit_per_minute <= 0:
            return UNLIMITED
        bucket = self._buckets[crc32(key_id.encode()) % BUCKETS]
        window = bucket.window(key_id)
        now_s = self._monotonic_s()
        window.forget(now_s)
        if not window.admits(limit_per_minute):
            return window.decision(False, limit_per_minute, now_s)
        self._admissions += 1
        name = f"{self._process}{self._admissions:x}"
        try:
            taken = await self._take(bucket, key_id, window, limit_per_minute, name)
        except (RedisAway, TimeoutError):
            return self._decide_alone(window, limit_per_minute, name)
        if taken.allowed:
            # The time after the reply: whoever is told of it later had better keep it too long than too short.
            window.add(self._monotonic_s(), name, told=taken.epoch == bucket.epoch)
        return Decision(
            allowed=bool(taken.allowed),
            limit=limit_per_minute,
            remaining=max(0, limit_per_minute - taken.held),
            reset_s=math.ceil(taken.reset_us / 1_000_000),
            retry_after_s=math.ceil(taken.retry_us / 1_000_000),
        )

    def check_at_once(self, key_id: str, limit_per_minute: int) -> Decision | None:
        return UNLIMITED if limit_per_minute <= 0 else None

    def _decide_alone(self, window: Window, limit: int, name: str) -> Decision:
        now_s = self._monotonic_s()
        window.forget(now_s)
        allowed = window.admits(limit)
        if allowed:
            window.add(now_s, name, told=False)
        return window.decision(allowed, limit, now_s)

    async def _take(self, bucket: Bucket, key_id: str, window: Window, limit: int, name: str) -> Taken:
        if bucket.epoch and not window.untold:
            taken = await self._take_now(bucket, key_id, limit, name)
            if taken is not None:
                return taken
        async with asyncio.timeout(self._link.timeout_s):
            for _ in range(ROUNDS_MAX):
                await self._tell(bucket, key_id, window)
                taken = await self._take_now(bucket, key_id, limit, name)
                if taken is not None:
                    return taken
        raise RedisAway("Redis forgets again and again")

    async def _take_now(self, bucket: Bucket, key_id: str, limit: int, name: str) -> Taken | None:
        """None when Redis has another epoch, which is followed now."""
        epoch = bucket.epoch
        reply = await self._ask(TAKE, bucket, key_id, WINDOW_US, limit, name)
        if isinstance(reply, bytes):
            bucket.follow(reply.decode())
            return None
        allowed, held, reset_us, retry_us = reply
        return Taken(allowed, held, reset_us, retry_us, epoch)

    def _ask(self, script: Script, bucket: Bucket, key_id: str | None, *arguments: Part) -> "asyncio.Future[Any]":
        keys = (bucket.epoch_key,) if key_id is None else (bucket.tag + key_id, bucket.epoch_key)
        return self._link.ask("rate_limit", script, keys, bucket.epoch, secrets.token_hex(8), *arguments)

    # Telling.

    async def _tell(self, bucket: Bucket, key_id: str, window: Window) -> None:
        """Tell Redis what it is not known to know of this window, as far as one epoch goes."""
        while untold := window.untold:
            now_s = self._monotonic_s()
            window.forget(now_s)
            part = dict(islice(untold.items(), TELL_MAX))
            ages: list[Part] = []
            for name, at_s in part.items():
                ages += (round((now_s - at_s) * 1_000_000), name)
            reply = await self._ask(TELL, bucket, key_id, WINDOW_US, *ages)
            if isinstance(reply, bytes):
                bucket.follow(reply.decode())
                return
            for name in part:
                untold.pop(name, None)  # Of this one: another epoch has another, and must be told.

    def _tell_again(self) -> None:
        for bucket in self._buckets:
            bucket.tell_again()
        self._connected.set()

    async def _keep_telling(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._lease_s):
                    await self._connected.wait()
            self._connected.clear()
            if self._link.up:
                await asyncio.gather(*(self._refresh(bucket) for bucket in self._buckets if self._in_use(bucket)))

    def _in_use(self, bucket: Bucket) -> bool:
        now_s = self._monotonic_s()
        in_use = False
        for _, window in bucket.windows.items():
            window.forget(now_s)
            in_use = in_use or bool(window.names)
        return in_use

    async def _refresh(self, bucket: Bucket) -> None:
        try:
            bucket.follow((await self._ask(LOOK, bucket, None)).decode())
            for key_id, window in tuple(bucket.windows.items()):
                await self._tell(bucket, key_id, window)
        except RedisAway:
            return  # The next link tells everything again.
