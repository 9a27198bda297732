"""Wallets as they were a moment ago, shared by all processes, and never older than an answer.

How it works. Beside a wallet's cached value stands its floor: the lowest version that may be served. Whoever is about
to commit a change raises the floor to the new version first, and puts the new value after. A reader that finds no value
on or above the floor reads the store, and puts what it read under the same conditions: not below the floor, newer than
what is cached. So a value that an answer has overtaken is never served, whoever dies, aborts or is slow in between: an
abort leaves the floor too high, which costs reads of the store until it goes.

A value lives `VALUE_LIFE_S` from when its owner began to read it, by Redis's clock; a put that comes later than that
is refused. A floor lives much longer than a batch may take. Only when Redis forgot a floor, or a writer could not
reach it, may an answer be as old as a value lives.

Who takes a value may go on serving it for a while without asking: see `Leases`, which a raised floor tells.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import msgspec

from gateway.shared.leases import CHANNEL, HOLDER_LIFE_S, LEASE_S, RENEWED, Ask, Copy, Leases
from gateway.shared.link import Link
from gateway.shared.wire import Part, RedisAway, Script
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

_SIGN: Final = """
if {signature} ~= '' then
    redis.call('HSET', KEYS[3], {signature}, string.format('%.0f', now))
    redis.call('PEXPIRE', KEYS[3], 60000)
end
"""

RAISE: Final = Script(
    f"""{_NOW}
local floor = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), tonumber(ARGV[1]))
redis.call('SET', KEYS[1], string.format('%.0f', floor), 'PX', {FLOOR_LIFE_S * 1000:.0f})
local reply = {{now, redis.call('EXISTS', KEYS[2])}}
local holders = redis.call('HGETALL', KEYS[3])
for i = 1, #holders, 2 do
    if math.abs(now - tonumber(holders[i + 1])) > {HOLDER_LIFE_S * 1000:.0f} then
        redis.call('HDEL', KEYS[3], holders[i])
    elseif holders[i] ~= ARGV[2] then
        redis.call('PUBLISH', '{CHANNEL}' .. holders[i], KEYS[1] .. ' ' .. ARGV[2] .. ' ' .. ARGV[4])
        reply[#reply + 1] = holders[i]
        reply[#reply + 1] = holders[i + 1]
    end
end
{_SIGN.format(signature="ARGV[3]")}
return reply
"""
)
"""KEYS: floor, value, holders. ARGV: the version that comes; who we are, our signature for what comes or nothing, our
ticket. Also tells whether anybody looked lately, and who is told of it, each with when they signed.
"""

STRIKE: Final = Script(
    """
if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then redis.call('HDEL', KEYS[1], ARGV[1]) end
return 1
"""
)
"""KEYS: holders. ARGV: one whose lease is over, and when they signed; not if they have signed anew."""

LOOK: Final = Script(
    f"""{_NOW}
local kept = redis.call('HMGET', KEYS[2], 'version', 'value')
local left = redis.call('PTTL', KEYS[2])
if kept[1] and left >= tonumber(ARGV[2]) and tonumber(kept[1]) >= tonumber(redis.call('GET', KEYS[1]) or '0') then
    {_SIGN.format(signature="ARGV[1]")}
    return {{now, kept[2], left}}
end
return {{now}}
"""
)
"""ARGV: our signature, and how long the value must at least live on."""

PUT: Final = Script(
    f"""{_NOW}
local version, from, life = tonumber(ARGV[1]), tonumber(ARGV[3]), tonumber(ARGV[4])
local left = from + life - now
if left <= 0 or from > now then return 0 end
if version < tonumber(redis.call('GET', KEYS[1]) or '0') then return 0 end
local kept = tonumber(redis.call('HGET', KEYS[2], 'version') or '-1')
if version < kept or version == kept and left <= redis.call('PTTL', KEYS[2]) then return 0 end
redis.call('HSET', KEYS[2], 'version', ARGV[1], 'value', ARGV[2])
redis.call('PEXPIRE', KEYS[2], left)
{_SIGN.format(signature="ARGV[5]")}
return left
"""
)
"""ARGV: version, value, when reading it began, how long it lives from then, our signature. It returns what is left.
"""


class Look(NamedTuple):
    """What is cached, if anything may be served, and when Redis was asked, by its clock."""

    found: WalletBlocks | None
    at_ms: int


class SharedWallets:
    """The cache, and the store's `Watcher`. Values are put only for wallets that somebody looked at lately.

    Args:
        leases: the copies of this process; without them it has none, and others are told of changes all the same.
    """

    def __init__(self, link: Link, *, now_us: Callable[[], int], leases: Leases | None = None) -> None:
        self._link = link
        self._now_us = now_us
        self._leases = leases
        self._raised_at_ms: dict[WalletRef, int] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(WalletBlocks)

    async def changing(self, versions: Sequence[WalletVersion]) -> None:
        """Raise the floors, all in one round trip; return when no process serves a copy of what was before."""
        self._raised_at_ms = {}
        try:
            if self._leases is None:
                told = [(ref, self._raise(ref, version, "", "", 0)) for ref, version in versions]
                if any([await self._raised(ref, reply) for ref, reply in told]):
                    await asyncio.sleep(LEASE_S)  # Who cannot be heard is waited for.
            else:
                await self._tell(self._leases, versions)
        except RedisAway:
            # The commit goes on: what is cached goes by itself, a value's life later at most.
            if self._leases is not None:
                for ref, _ in versions:
                    self._leases.let_go(ref)  # Nobody knows that we would hold what comes.
        # Where Redis was lost, by all at once, it goes on when the leases from before are over: also where Redis is
        # back, for it may have forgotten them. A link that comes and goes is not waited for each time: it would make
        # every charge slow.
        wait_s = LEASE_S - self._link.lost_s
        if wait_s > 0:
            await asyncio.sleep(wait_s)

    async def _tell(self, leases: Leases, versions: Sequence[WalletVersion]) -> None:
        told: list[tuple[int, WalletRef, asyncio.Future[Any]]] = []
        holders: dict[int, dict[str, Part]] = {}
        try:
            for ref, version in versions:
                signature = leases.process if leases.changing(ref) else ""
                ticket = leases.ticket()
                leases.unsure(ref)
                holders[ticket] = {}
                told.append((ticket, ref, self._raise(ref, version, leases.process, signature, ticket)))
            for ticket, ref, reply in told:
                holders[ticket] = await self._raised(ref, reply)
            if any(holders.values()):
                silent = await leases.acknowledged({ticket: signed.keys() for ticket, signed in holders.items()})
                for ticket, ref, _ in told:
                    for holder in silent[ticket]:  # Or each change would wait for one that died.
                        self._link.ask("balance", STRIKE, (holders_key(ref),), holder, holders[ticket][holder])
        finally:
            leases.forget(holders)
            for ref, _ in versions[: len(holders)]:
                leases.sure(ref)

    def _raise(self, ref: WalletRef, version: int, process: str, signature: str, ticket: int) -> "asyncio.Future[Any]":
        return self._link.ask("balance", RAISE, _all_keys(ref), version, process, signature, ticket)

    async def _raised(self, ref: WalletRef, reply: "asyncio.Future[Any]") -> dict[str, Part]:
        """Who is told of it, and when they signed."""
        at_ms, wanted, *holders = await reply
        if wanted:
            self._raised_at_ms[ref] = at_ms
        return {holder.decode(): signed for holder, signed in zip(holders[::2], holders[1::2], strict=True)}

    def changed(self, wallets: Sequence[WalletBlocks]) -> None:
        for value in wallets:
            if self._leases is not None:
                self._leases.changed(value, life_s=self._life_ms(value) / 1000)
            at_ms = self._raised_at_ms.pop(value.wallet.ref, None)
            if at_ms is not None:
                self.put(value, at_ms)

    def copy(self, ref: WalletRef) -> Copy | None:
        """What this process may serve without asking."""
        return None if self._leases is None else self._leases.copy(ref)

    def wears_off(self, copy: Copy) -> bool:
        return self._leases is not None and self._leases.wears_off(copy)

    async def look(self, ref: WalletRef, *, renewing: bool = False) -> Look:
        """What may be served; a value that goes soon is none for who is *renewing* what they have.

        Raises:
            RedisAway
        """
        life_ms = round(VALUE_LIFE_S * RENEWED[1] * 1000) if renewing else 0
        if self._leases is None:
            return (await self._look(ref, "", life_ms))[0]
        ask, found, left_ms = self._leases.ask(ref), None, 0
        signature = self._leases.signature
        try:
            (found, at_ms), left_ms = await self._look(ref, signature, life_ms)
        finally:
            self._leases.answer(ask, found if signature else None, life_s=left_ms / 1000)
        return Look(found, at_ms)

    async def _look(self, ref: WalletRef, signature: str, life_ms: int) -> tuple[Look, int]:
        at_ms, *value = await self._link.ask("balance", LOOK, _all_keys(ref), signature, life_ms)
        if not value:
            return Look(None, at_ms), 0
        try:
            return Look(self._decoder.decode(value[0]), at_ms), value[1]
        except msgspec.MsgspecError:
            return Look(None, at_ms), 0  # Not ours, or not whole: the store knows.

    def put(self, value: WalletBlocks, at_ms: int) -> None:
        """Offer *value*, which was read, or committed, after *at_ms* of Redis's clock. It returns at once."""
        life_ms = self._life_ms(value)
        if life_ms <= 0 or not self._link.up:
            return
        encoded = self._encoder.encode(value)
        if len(encoded) > VALUE_BYTES_MAX:
            return
        wallet = value.wallet
        signature = "" if self._leases is None else self._leases.signature
        try:
            reply = self._link.ask(
                "balance", PUT, _all_keys(wallet.ref), wallet.version, encoded, at_ms, life_ms, signature
            )
        except RedisAway:
            return  # Nobody needs it.
        if self._leases is not None and signature:
            reply.add_done_callback(partial(_put, self._leases, self._leases.ask(wallet.ref), value))

    def _life_ms(self, value: WalletBlocks) -> int:
        """How long *value* may live: until the first of its blocks expires, if that comes before its time."""
        life_ms = round(VALUE_LIFE_S * 1000)
        expiries_us = [block.expires_at_us for block in value.blocks if block.expires_at_us is not None]
        return min(life_ms, (min(expiries_us) - self._now_us()) // 1000) if expiries_us else life_ms


def _put(leases: Leases, ask: Ask, value: WalletBlocks, reply: "asyncio.Future[Any]") -> None:
    left_ms = 0 if reply.cancelled() or reply.exception() is not None else reply.result()
    leases.answer(ask, value if left_ms else None, life_s=left_ms / 1000)


def holders_key(ref: WalletRef) -> str:
    """Who may serve a copy of a wallet, each with when they signed."""
    return f"{_tag(ref)}holders"


def _tag(ref: WalletRef) -> str:
    return f"farebox:{{{ref.tenant}/{ref.mode}/{ref.wallet}}}:"


def _all_keys(ref: WalletRef) -> tuple[str, str, str]:
    return *_keys(ref), holders_key(ref)


def _keys(ref: WalletRef) -> tuple[str, str]:
    return f"{_tag(ref)}floor", f"{_tag(ref)}value:{VALUE_FORMAT}"
