"""What the ledger asks of a store: batches in, values out. The conformance suite of the tests is the contract."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

import msgspec

from ledger.commands import AnyCommand, StoredResponse
from ledger.model import Block, Reservation, ReservationRef, Scope, Wallet, WalletRef
from ledger.outcomes import Fact, KeyTaken, Outcome, Result, Transfer, UsageRecorded

PAGE_MAX = 500
"""Most rows that one read of a list returns."""


class StoreUnavailable(Exception):
    """The database cannot be reached, is busy or fails: nothing of the batch was done, and trying again may help."""


class SchemaMissing(Exception):
    """The database has no ledger in it yet: run ``farebox migrate``."""


class DamagedRow(Exception):
    """A stored row cannot be read, or its columns contradict each other."""


class JournalEntry(msgspec.Struct, frozen=True):
    """One applied command as the journal has it; *transfers_written* is how many transfers went with it."""

    seq: int
    scope: Scope
    id: str
    kind: str
    at_us: int
    facts: tuple[Fact, ...]
    transfers: tuple[Transfer, ...]
    transfers_written: int
    result: Result | None


class Transaction(msgspec.Struct, frozen=True):
    """A line of a wallet's statement: *amount* is negative when it left the wallet.

    What it was charged, or given back, for stands in the last four, where the charge has a usage.
    """

    seq: int
    position: int
    at_us: int
    command: str
    kind: str
    amount: int
    counterparty: str
    asset: str
    block: str | None
    reference: str | None
    request_id: str | None = None
    metric: str | None = None
    action: str | None = None
    model: str | None = None


class Position(NamedTuple):
    """Where a page of a statement ends; the next one is what is older."""

    seq: int
    position: int


class WalletBlocks(NamedTuple):
    """A wallet and those of its blocks that have something left, oldest first, at one moment."""

    wallet: Wallet
    blocks: tuple[Block, ...]


class Snapshot(Protocol):
    """The whole ledger at one moment, in pages, for replay. Iterators are used one at a time.

    Each may raise :class:`DamagedRow`.
    """

    def journal(self) -> AsyncIterator[JournalEntry]:
        """Every applied command in the order of its number."""
        ...

    def wallets(self) -> AsyncIterator[Wallet]: ...

    def blocks(self) -> AsyncIterator[Block]: ...

    def reservations(self) -> AsyncIterator[Reservation]: ...

    def keys(self) -> AsyncIterator[KeyTaken]: ...

    def usage(self) -> AsyncIterator[UsageRecorded]: ...


class WalletVersion(NamedTuple):
    wallet: WalletRef
    version: int


class Watcher(Protocol):
    """Is told of wallets on both sides of a commit, so that what is cached of them is never older than an answer."""

    async def changing(self, versions: Sequence[WalletVersion]) -> None:
        """Before the commit that brings wallets to these versions, or does not. It never raises, and is quick."""
        ...

    def changed(self, wallets: Sequence[WalletBlocks]) -> None:
        """After the commit, before its answers. It returns at once."""
        ...


class Store(Protocol):
    """A durable ledger. Every method may raise :class:`StoreUnavailable`."""

    @property
    def batches_at_once(self) -> int:
        """How many batches may be under way."""
        ...

    async def run_batch(self, commands: Sequence[AnyCommand]) -> list[Outcome]:
        """Decide *commands* in order in one transaction and commit it; one outcome each.

        Nothing has happened when it raises. Of batches that are under way together, those on the same wallets come in
        the order in which they were begun, unless one of them is tried again.
        """
        ...

    async def wallet(self, ref: WalletRef) -> WalletBlocks | None: ...

    async def wallet_version(self, ref: WalletRef) -> int | None:
        """The wallet's version: it rises with every change of the wallet, its blocks or what they hold for others."""
        ...

    async def reservation(self, ref: ReservationRef) -> Reservation | None: ...

    async def reservation_of_request(self, scope: Scope, request_id: str) -> Reservation | None:
        """The newest reservation that was made for this request."""
        ...

    async def usage_of_request(self, scope: Scope, request_id: str) -> tuple[UsageRecorded, ...]: ...

    async def response(self, scope: Scope, operation: str, key: str, *, now_us: int) -> StoredResponse | None: ...

    async def transactions(self, ref: WalletRef, *, before: Position | None, limit: int) -> list[Transaction]:
        """The wallet's transfers, newest first."""
        ...

    async def due_reservations(self, now_us: int, *, limit: int) -> list[ReservationRef]:
        """Open reservations whose time has run out, longest first. Candidates, read without locks."""
        ...

    async def due_wallets(self, now_us: int, *, limit: int) -> list[WalletRef]:
        """Wallets with a block that has expired and is not booked yet. Candidates, read without locks."""
        ...

    async def purge_responses(self, now_us: int, *, limit: int) -> int:
        """Delete stored responses that have outlived their day; how many."""
        ...

    def snapshot(self) -> AbstractAsyncContextManager[Snapshot]: ...

    async def close(self) -> None: ...
