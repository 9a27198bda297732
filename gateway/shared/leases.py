"""Copies of wallets that this process serves without asking anybody, and word from whoever is about to change one.

How it works. Whoever takes a value out of Redis, or puts one there, signs as its holder in the same step, and may serve
its copy for `LEASE_S` from before it asked. Whoever is about to commit a change raises the wallet's floor, which in the
same step tells all holders, and waits for their word that they have let go: `acknowledged`. A holder that gives none,
because it hangs, has died or cannot hear, is waited for as long as its lease can last. So when a change is answered no
copy of what was before is served anywhere. Only the rates of clocks matter, not what they show.

A copy is let go of when word comes, whatever else is under way: what was asked for before and arrives after is void. So
is what is asked for before Redis has answered that we let go, or that we are about to change the wallet ourselves: the
link may send a script again after later ones, where Redis did not know it.
"""

import asyncio
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from typing import Final, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import RedisError

from gateway.lru import LRU
from gateway.shared import link as links
from gateway.shared.changes import CHECK_S
from gateway.shared.link import Link
from gateway.shared.wire import CONNECT_TIMEOUT_S, RedisAway, Script
from ledger.model import WalletRef
from ledger.store.protocol import WalletBlocks

LEASE_S: Final = 1.0
"""How long a copy may be served after it was asked for: as long a holder that hangs can delay a change."""

HOLDER_LIFE_S: Final = 5.0
"""How long who signed as a holder is told of changes, by Redis's clock: so long that no step of that clock matters."""

RENEWED: Final = (0.2, 0.5)
"""Which part of a lease is left when a copy in use is renewed."""

COPIES_MAX: Final = 10_000

CHANNEL: Final = "farebox:leases:"
"""What the channel of a process begins with."""

RELEASE: Final = Script(
    """
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('PUBLISH', ARGV[2], ARGV[3])
return 1
"""
)
"""KEYS: the wallet's holders. ARGV: who has let go, whom to tell, the word. What is asked afterwards signs anew."""


class Ask:
    """A question to Redis that may bring a copy. *void*: word came meanwhile."""

    __slots__ = ("asked_s", "ref", "void")

    def __init__(self, ref: WalletRef, asked_s: float) -> None:
        self.ref = ref
        self.asked_s = asked_s
        self.void = False


class Copy(NamedTuple):
    """*renew_s*: from when on it had better be asked for again, so that a wallet in steady use is never waited for."""

    value: WalletBlocks
    until_s: float
    renew_s: float


class Leases:
    """The copies of one process.

    Attributes:
        process: signs as the holder, and names the channel on which it is told.
    """

    def __init__(
        self,
        link: Link,
        *,
        holders_key: Callable[[WalletRef], str],
        lease_s: float = LEASE_S,
        copies_max: int = COPIES_MAX,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._holders_key = holders_key
        self._lease_s = lease_s
        self._monotonic_s = monotonic_s
        self._copies: LRU[WalletRef, Copy] = LRU(copies_max)
        self._asks: dict[WalletRef, set[Ask]] = {}
        self._unsure: Counter[WalletRef] = Counter()
        self._coming: LRU[WalletRef, Ask] = LRU(copies_max)
        self._gone: dict[int, set[str]] = {}
        """By ticket, who has let go; holders may speak before it is known here who they are."""

        self._news = asyncio.Event()
        self._tickets = 0
        self._listening: asyncio.Task[None] | None = None
        self.process = secrets.token_hex(6)
        self.heard = asyncio.Event()
        """Set while it hears what it is told. One that is deaf signs nowhere: it would be waited for in vain."""

    def start(self) -> None:
        self._link.when_connected(self._copies.clear)  # Redis may have forgotten that we hold them.
        self._listening = asyncio.create_task(self._listen(), name="leases")

    async def stop(self) -> None:
        self._copies.clear()
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait((self._listening,))

    # Copies.

    @property
    def signature(self) -> str:
        """What a script signs with; nothing while we could not be told."""
        return self.process if self.heard.is_set() else ""

    def copy(self, ref: WalletRef) -> Copy | None:
        """The copy that may be served now; none while Redis is away, whoever can reach it may find it empty."""
        copy = self._copies.get(ref)
        if copy is None or not self._link.up or self._monotonic_s() >= copy.until_s:
            return None
        return copy

    def wears_off(self, copy: Copy) -> bool:
        return self._monotonic_s() >= copy.renew_s

    def ask(self, ref: WalletRef) -> Ask:
        """Before a question is sent; `answer` must follow."""
        ask = Ask(ref, self._monotonic_s())
        ask.void = ref in self._unsure
        self._asks.setdefault(ref, set()).add(ask)
        return ask

    def answer(self, ask: Ask, value: WalletBlocks | None = None, *, life_s: float = 0) -> None:
        """What came of it: keep *value* for *life_s* at the most, if we signed and nothing changed meanwhile."""
        asks = self._asks.get(ask.ref)
        if asks is not None:
            asks.discard(ask)
            if not asks:
                del self._asks[ask.ref]
        if value is not None and not ask.void:
            self._keep(ask, value, life_s)

    def _keep(self, ask: Ask, value: WalletBlocks, life_s: float) -> None:
        kept = self._copies.get(ask.ref)
        if kept is not None and kept.value.wallet.version > value.wallet.version:
            return
        until_s = ask.asked_s + min(self._lease_s, life_s)
        # Not all at once that came at once.
        renew_s = until_s - self._lease_s * random.uniform(*RENEWED)  # noqa: S311  (spreads the load)
        self._copies.put(ask.ref, Copy(value, until_s, renew_s))

    def let_go(self, ref: WalletRef) -> None:
        """The wallet is about to change: what we have of it, and what is on its way, is void."""
        self._copies.discard(ref)
        for ask in self._asks.get(ref, ()):
            ask.void = True
        coming = self._coming.get(ref)
        if coming is not None:
            coming.void = True

    def changing(self, ref: WalletRef) -> bool:
        """As `let_go`, for a change of our own; whether its outcome would be of use here."""
        wanted = self._copies.get(ref) is not None and self.heard.is_set() and ref not in self._unsure
        self.let_go(ref)
        self._coming.discard(ref)
        if wanted:
            self._coming.put(ref, Ask(ref, self._monotonic_s()))
        return wanted

    def changed(self, value: WalletBlocks, *, life_s: float) -> None:
        """Our change is committed, and we signed as a holder of what it made when we told of it."""
        ref = value.wallet.ref
        ask = self._coming.get(ref)
        self._coming.discard(ref)
        if ask is not None and not ask.void:
            self._keep(ask, value, life_s)

    def unsure(self, ref: WalletRef) -> None:
        """Until `sure` follows, what is asked for brings no copy."""
        self._unsure[ref] += 1

    def sure(self, ref: WalletRef) -> None:
        self._unsure[ref] -= 1
        if not self._unsure[ref]:
            del self._unsure[ref]

    # Telling.

    def ticket(self) -> int:
        """By which the holders of a wallet will say that they have let go of it; `forget` must follow."""
        self._tickets += 1
        self._gone[self._tickets] = set()
        return self._tickets

    def forget(self, tickets: Iterable[int]) -> None:
        for ticket in tickets:
            self._gone.pop(ticket, None)

    async def acknowledged(self, holders: Mapping[int, Set[str]]) -> dict[int, Set[str]]:
        """Wait until all *holders* of each ticket have let go, or their leases are over, which began before now.

        It returns by ticket who has said nothing.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._lease_s):
                while not all(told <= self._gone[ticket] for ticket, told in holders.items()):
                    self._news.clear()
                    await self._news.wait()
        return {ticket: told - self._gone[ticket] for ticket, told in holders.items()}

    # Hearing.

    async def _listen(self) -> None:
        while True:
            with suppress(RedisError, OSError, ValueError):  # The last for what is no word of ours.
                await self._hear()
            self.heard.clear()
            await asyncio.sleep(links.LEASE_S)

    async def _hear(self) -> None:
        client = Redis.from_url(
            self._link.url,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=CONNECT_TIMEOUT_S,
            health_check_interval=CHECK_S,
        )
        async with client, client.pubsub() as messages:
            await messages.subscribe(f"{CHANNEL}{self.process}")
            while True:
                message = await messages.get_message(timeout=CHECK_S)
                if message is None:
                    continue
                if message["type"] == "subscribe":
                    self.heard.set()
                elif message["type"] == "message":
                    self._take(message["data"])

    def _take(self, word: bytes) -> None:
        """`key writer ticket`: that wallet is about to change. `ticket holder`: the holder has let go of it."""
        first, *rest = word.decode().split(" ")
        if len(rest) == 1:
            gone = self._gone.get(int(first))
            if gone is not None:
                gone.add(rest[0])
                self._news.set()
            return
        writer, ticket = rest
        tenant, mode, wallet = first.partition("{")[2].rpartition("}")[0].split("/", 2)
        ref = WalletRef(tenant, mode, wallet)
        self.let_go(ref)
        with suppress(RedisAway):
            answer = f"{ticket} {self.process}"
            keys = (self._holders_key(ref),)
            reply = self._link.ask("balance", RELEASE, keys, self.process, f"{CHANNEL}{writer}", answer)
            self.unsure(ref)
            reply.add_done_callback(lambda _: self.sure(ref))
