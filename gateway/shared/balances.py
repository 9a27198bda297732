"""Reads of wallets, from a cache where it cannot be stale.

How it works. Whoever looks at a wallet while it is being read does not join that read, which may have begun before
something that the newcomer has seen: all newcomers share the next one. A read asks Redis where the installation has
it, else it asks the store for the wallet's version and serves what this process kept of that version.

`kept` answers without waiting: with Redis from a copy under a lease, with a file by reading the version on the spot.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from gateway.lru import LRU
from gateway.shared.wallets import SharedWallets
from gateway.shared.wire import RedisAway
from gateway.telemetry import Metrics
from ledger.model import WalletRef
from ledger.store.protocol import StoreUnavailable, WalletBlocks

WALLETS_MAX: Final = 10_000
BLOCKS_MAX: Final = 100
"""A wallet with more blocks is not kept in this process."""

BLOCKS_AT_ONCE_MAX: Final = 20
"""A wallet that had more is not read on the spot: others wait for the loop meanwhile."""

CACHE: Final = "balance"


Looking = asyncio.Task[WalletBlocks | None]


class Source(Protocol):
    """What is read of a store."""

    async def wallet(self, ref: WalletRef) -> WalletBlocks | None: ...

    async def wallet_version(self, ref: WalletRef) -> int | None: ...


class PromptSource(Protocol):
    """A store that answers at once, on the thread that asks."""

    def wallet_at_once(self, ref: WalletRef) -> WalletBlocks | None: ...

    def wallet_version_at_once(self, ref: WalletRef) -> int | None: ...


class Balances:
    """Never older than any change that was answered before the look began; see `SharedWallets` for when Redis fails."""

    def __init__(
        self,
        source: Source,
        metrics: Metrics,
        *,
        shared: SharedWallets | None = None,
        prompt: PromptSource | None = None,
        wallets_max: int = WALLETS_MAX,
    ) -> None:
        self._source = source
        self._shared = shared
        self._prompt = prompt
        self._kept: LRU[WalletRef, WalletBlocks] = LRU(wallets_max)
        self._under_way: dict[WalletRef, Looking] = {}
        self._next: dict[WalletRef, Looking] = {}
        self._hit: Callable[[], None] = metrics.cache_looks.labels(CACHE, "hit").inc
        self._miss: Callable[[], None] = metrics.cache_looks.labels(CACHE, "miss").inc

    async def wallet(self, ref: WalletRef) -> WalletBlocks | None:
        """Raises what the source raises."""
        return await asyncio.shield(self._next_look(ref))

    def kept(self, ref: WalletRef) -> WalletBlocks | None:
        """The same without waiting, and as new; None where somebody has to be asked. It does not fail."""
        if self._shared is not None:
            return self._leased(self._shared, ref)
        kept = self._kept.get(ref)
        if self._prompt is None or kept is None:
            return None
        try:
            if self._prompt.wallet_version_at_once(ref) != kept.wallet.version:
                if len(kept.blocks) > BLOCKS_AT_ONCE_MAX:
                    return None
                kept = self._prompt.wallet_at_once(ref)
                if kept is None or len(kept.blocks) > BLOCKS_MAX:
                    return None
                self._kept.put(ref, kept)
        except StoreUnavailable:
            return None
        self._hit()
        return kept

    def _leased(self, shared: SharedWallets, ref: WalletRef) -> WalletBlocks | None:
        copy = shared.copy(ref)
        if copy is None:
            return None
        if shared.wears_off(copy) and ref not in self._under_way and ref not in self._next:
            self._next_look(ref)
        self._hit()
        return copy.value

    def _next_look(self, ref: WalletRef) -> Looking:
        look = self._next.get(ref)
        if look is None:
            look = asyncio.create_task(self._look_after(self._under_way.get(ref), ref))
            look.add_done_callback(_seen)
            self._next[ref] = look
        return look

    async def _look_after(self, before: Looking | None, ref: WalletRef) -> WalletBlocks | None:
        if before is not None:
            await asyncio.wait((before,))
        look = self._under_way[ref] = self._next.pop(ref)  # From here on nobody may join.
        try:
            return await self._look(ref)
        finally:
            if self._under_way.get(ref) is look:
                del self._under_way[ref]

    async def _look(self, ref: WalletRef) -> WalletBlocks | None:
        if self._shared is not None:
            try:
                return await self._look_shared(self._shared, ref)
            except RedisAway:
                pass  # This process does the same for itself, at the price of a look at the version.
        version = await self._source.wallet_version(ref)
        kept = self._kept.get(ref)
        if kept is not None and kept.wallet.version == version:
            self._hit()
            return kept
        self._miss()
        value = await self._source.wallet(ref)
        if value is not None and len(value.blocks) <= BLOCKS_MAX:
            self._kept.put(ref, value)
        return value

    async def _look_shared(self, shared: SharedWallets, ref: WalletRef) -> WalletBlocks | None:
        look = await shared.look(ref, renewing=shared.copy(ref) is not None)
        if look.found is not None:
            self._hit()
            return look.found
        self._miss()
        value = await self._source.wallet(ref)
        if value is not None:
            shared.put(value, look.at_ms)
        return value


def _seen(look: Looking) -> None:
    """Of a look that failed when all who waited have gone."""
    if not look.cancelled():
        look.exception()
