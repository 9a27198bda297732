"""Wallets as they were a moment ago, shared by all processes, and never older than an answer.

How it works. Beside a wallet's cached value stands its floor: the lowest version that may be served. Whoever is about
to commit a change raises the floor to the new version first, and puts the new value after. A reader that finds no value
on or above the floor reads the store, and puts what it read under the same conditions: not below the floor, newer than
what is cached. So a value that an answer has overtaken is never served, whoever dies, aborts or is slow in between: an
abort leaves the floor too high, which costs reads of the store until it goes.

A value lives `VALUE_LIFE_S` from when its owner began to read it, by Redis's clock; a put that comes later than that
is refused. A floor lives much longer than a batch may take. Only when Redis forgot a floor, or a writer could not
reach it, may an answer be as old as a value lives.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec

from gateway.shared.link import Link
from gateway.shared.wire import RedisAway, Script
from ledger.model import WalletRef
from ledger.store.protocol import WalletBlocks, WalletVersion

VALUE_LIFE_S: Final = 1.0
FLOOR_LIFE_S: Final = 60.0
"""Longer than any batch takes, from telling of it to its commit."""

VALUE_BYTES_MAX: Final = 64 * 1024
"""A wallet with more blocks than fit is read from the store each time."""

VALUE_FORMAT: Final = 1
"""Stands in the keys of values, which processes of another version may not be able to read. Floors have none."""

_NOW: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""
"""Milliseconds."""

RAISE: Final = Script(
    f"""{_NOW}
local floor = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), tonumber(ARGV[1]))
redis.call('SET', KEYS[1], string.format('%.0f', floor), 'PX', ARGV[2])
return {{now, redis.call('EXISTS', KEYS[2])}}
"""
)
"""KEYS: floor, value. ARGV: the version that comes, the floor's life. Also tells whether anybody looked lately."""

LOOK: Final = Script(
    f"""{_NOW}
local kept = redis.call('HMGET', KEYS[2], 'version', 'value')
if kept[1] and tonumber(kept[1]) >= tonumber(redis.call('GET', KEYS[1]) or '0') then return {{now, kept[2]}} end
return {{now}}
"""
)

PUT: Final = Script(
    f"""{_NOW}
local version, from, life = tonumber(ARGV[1]), tonumber(ARGV[3]), tonumber(ARGV[4])
local left = from + life - now
if left <= 0 or from > now then return 0 end
if version < tonumber(redis.call('GET', KEYS[1]) or '0') then return 0 end
if version <= tonumber(redis.call('HGET', KEYS[2], 'version') or '-1') then return 0 end
redis.call('HSET', KEYS[2], 'version', ARGV[1], 'value', ARGV[2])
redis.call('PEXPIRE', KEYS[2], left)
return 1
"""
)
"""ARGV: version, value, when reading it began, how long it lives from then."""


class Look(NamedTuple):
    """What is cached, if anything may be served, and when Redis was asked, by its clock."""

    found: WalletBlocks | None
    at_ms: int


class SharedWallets:
    """The cache, and the store's `Watcher`. Values are put only for wallets that somebody looked at lately."""

    def __init__(self, link: Link, *, now_us: Callable[[], int]) -> None:
        self._link = link
        self._now_us = now_us
        self._raised_at_ms: dict[WalletRef, int] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(WalletBlocks)

    async def changing(self, versions: Sequence[WalletVersion]) -> None:
        """Raise the floors, all in one round trip."""
        self._raised_at_ms = {}
        life_ms = round(FLOOR_LIFE_S * 1000)
        try:
            replies = [
                (ref, self._link.ask("balance", RAISE, _keys(ref), version, life_ms)) for ref, version in versions
            ]
            for ref, reply in replies:
                at_ms, wanted = await reply
                if wanted:
                    self._raised_at_ms[ref] = at_ms
        except RedisAway:
            # The commit goes on: what is cached goes by itself, a value's life later at most.
            return

    def changed(self, wallets: Sequence[WalletBlocks]) -> None:
        for value in wallets:
            at_ms = self._raised_at_ms.pop(value.wallet.ref, None)
            if at_ms is not None:
                self.put(value, at_ms)

    async def look(self, ref: WalletRef) -> Look:
        """Raises RedisAway."""
        at_ms, *value = await self._link.ask("balance", LOOK, _keys(ref))
        if not value:
            return Look(None, at_ms)
        try:
            return Look(self._decoder.decode(value[0]), at_ms)
        except msgspec.MsgspecError:
            return Look(None, at_ms)  # Not ours, or not whole: the store knows.

    def put(self, value: WalletBlocks, at_ms: int) -> None:
        """Offer *value*, which was read, or committed, after *at_ms* of Redis's clock. It returns at once."""
        life_ms = round(VALUE_LIFE_S * 1000)
        expiries_us = [block.expires_at_us for block in value.blocks if block.expires_at_us is not None]
        if expiries_us:
            life_ms = min(life_ms, (min(expiries_us) - self._now_us()) // 1000)
        if life_ms <= 0 or not self._link.up:
            return
        encoded = self._encoder.encode(value)
        if len(encoded) > VALUE_BYTES_MAX:
            return
        wallet = value.wallet
        try:
            self._link.ask("balance", PUT, _keys(wallet.ref), wallet.version, encoded, at_ms, life_ms)
        except RedisAway:
            return  # Nobody needs it.


def _keys(ref: WalletRef) -> tuple[str, str]:
    tag = f"farebox:{{{ref.tenant}/{ref.mode}/{ref.wallet}}}:"
    return f"{tag}floor", f"{tag}value:{VALUE_FORMAT}"
