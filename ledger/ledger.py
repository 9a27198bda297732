"""The ledger as the gateway uses it: commands in, results or small exceptions out, and the reads beside them."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import msgspec

from ledger.burndown import payable
from ledger.commands import AnyCommand, Expire, Freeze, Lapse, StoredResponse
from ledger.draft import NO_TAGS
from ledger.errors import LedgerUnavailable, NotFound, error_of
from ledger.model import Block, Reservation, ReservationRef, Scope, Tags, Wallet, WalletRef
from ledger.outcomes import Applied, Outcome, Rejected, UsageRecorded
from ledger.state import State
from ledger.store.protocol import PAGE_MAX, Position, Store, StoreUnavailable, Transaction, WalletBlocks
from ledger.writer import QUEUE_MAX, WAIT_S, Abandoned, Observed, Writer

SWEEP_PAGE = 200
"""How many candidates a sweep reads, and settles, at once."""

SWEEP_PAGES_MAX = 50
"""A sweep ends after so many pages; the next one goes on."""

Clock = Callable[[], int]

ReadWallet = Callable[[WalletRef], Awaitable[WalletBlocks | None]]
KeptWallet = Callable[[WalletRef], WalletBlocks | None]

T = TypeVar("T")
Ref = TypeVar("Ref", WalletRef, ReservationRef)


class WalletView(msgspec.Struct, frozen=True):
    """A wallet at one moment.

    *balance* is what has not expired of its blocks, reserved or not, less what it owes. *effective_balance* is what a
    reservation with the given tags could hold now. *blocks* are those with something left, in the order of opening.
    """

    wallet: Wallet
    blocks: tuple[Block, ...]
    balance: int
    effective_balance: int
    reserved: int
    receivable: int


class Receipt(msgspec.Struct, frozen=True):
    """What a request held and was charged; *usage* has a part for each commit."""

    reservation: Reservation
    usage: tuple[UsageRecorded, ...]


class TransactionsPage(msgspec.Struct, frozen=True):
    """Newest first; *cursor* goes on with what is older, and is None at the end."""

    transactions: tuple[Transaction, ...]
    cursor: str | None


class Swept(msgspec.Struct, frozen=True):
    """What a sweep settled; what failed is tried again by the next one."""

    reservations: int
    wallets: int
    responses: int
    failures: tuple[BaseException, ...]


class Ledger:
    """The one way in. Reads see every commit that was answered before they began."""

    def __init__(
        self,
        store: Store,
        writer: Writer,
        clock: Clock,
        new_command_id: Callable[[], str],
        applied: Callable[[Applied], None] | None,
        *,
        read_wallet: ReadWallet | None = None,
        kept_wallet: KeptWallet | None = None,
    ) -> None:
        self._store = store
        self._read_wallet = read_wallet
        self._kept_wallet = kept_wallet
        self._applied = applied
        self._writer = writer
        self._clock = clock
        self._new_command_id = new_command_id

    @classmethod
    async def open(
        cls,
        store: Store,
        *,
        clock: Clock,
        new_command_id: Callable[[], str],
        abandoned: Abandoned | None = None,
        queue_max: int = QUEUE_MAX,
        wait_s: float = WAIT_S,
        applied: Callable[[Applied], None] | None = None,
        observed: Observed | None = None,
        read_wallet: ReadWallet | None = None,
        kept_wallet: KeptWallet | None = None,
    ) -> "Ledger":
        """Put a writer in front of *store*, which is then the ledger's to close.

        Args:
            clock: microseconds since the epoch, UTC.
            new_command_id: makes the ids of the sweep's own commands; unique, and time-ordered.
            abandoned: see :class:`~ledger.writer.Writer`.
            applied: sees every command that was applied here and its facts, to count them; it must not fail.
            observed: see :class:`~ledger.writer.Writer`.
            read_wallet: reads a wallet for a view of it, instead of the store; never older than what was answered.
            kept_wallet: the same without waiting, where it is at hand.
        """
        writer = Writer(
            store.run_batch,
            at_once=store.batches_at_once,
            abandoned=abandoned,
            observed=observed,
            queue_max=queue_max,
            wait_s=wait_s,
        )
        return cls(store, writer, clock, new_command_id, applied, read_wallet=read_wallet, kept_wallet=kept_wallet)

    async def close(self) -> None:
        """Answer everybody who waits, then close the store."""
        await self._writer.close()
        await self._store.close()

    @property
    def queue_length(self) -> int:
        return self._writer.queue_length

    def new_command_id(self) -> str:
        return self._new_command_id()

    async def execute(self, command: AnyCommand) -> Applied:
        """Do *command*, durably. Repeating it (its id, or its key) gives the first result and has no second effect.

        Raises:
            LedgerError: the one exception of its reason; nothing has changed.
            LedgerUnavailable: it is not known; try the same command again.
        """
        outcome: Outcome = await self._writer.submit(command)
        if isinstance(outcome, Rejected):
            raise error_of(outcome)
        if self._applied is not None and outcome.facts:
            self._applied(outcome)
        return outcome

    async def wallet_view(
        self, ref: WalletRef, tags: Tags | None = None, *, unfunded: WalletRef | None = None
    ) -> WalletView | None:
        """The wallet now; None when nothing was ever granted to it.

        *unfunded* is the line that a reservation would name, as in :class:`~ledger.commands.Hold`.
        """
        found = await _reading(self._wallet(ref))
        if found is None:
            return None
        now_us = max(self._clock(), found.wallet.last_fact_us)
        line = None if unfunded is None else await self._line(unfunded, now_us)
        return _view(found, tags or NO_TAGS, now_us, line=line)

    def wallet_view_at_once(self, ref: WalletRef, tags: Tags) -> WalletView | None:
        """The same without waiting, as new as that; None where somebody has to be asked."""
        found = None if self._kept_wallet is None else self._kept_wallet(ref)
        if found is None:
            return None
        return _view(found, tags, max(self._clock(), found.wallet.last_fact_us), line=None)

    def _wallet(self, ref: WalletRef) -> Awaitable[WalletBlocks | None]:
        return (self._read_wallet or self._store.wallet)(ref)

    async def _line(self, ref: WalletRef, now_us: int) -> int:
        """What is left of a line for credits that the operator was not paid for."""
        found = await _reading(self._wallet(ref))
        return 0 if found is None else sum(block.free for block in payable(found.blocks, NO_TAGS, now_us))

    async def latest_plan(self, ref: WalletRef) -> Block | None:
        """The block of a plan that the wallet got last, used up or not; None when it never had one."""
        return await _reading(self._store.latest_plan(ref))

    async def block(self, ref: WalletRef, block_id: str) -> Block | None:
        """One block of a wallet, whether anything is left in it or not."""
        return await _reading(self._store.block(ref, block_id))

    async def reservation(self, ref: ReservationRef) -> Reservation | None:
        return await _reading(self._store.reservation(ref))

    async def receipt(self, tenant: str, mode: str, request_id: str) -> Receipt | None:
        scope = Scope(tenant, mode)
        reservation = await _reading(self._store.reservation_of_request(scope, request_id))
        if reservation is None:
            return None
        return Receipt(reservation, await _reading(self._store.usage_of_request(scope, request_id)))

    async def stored_response(self, scope: Scope, operation: str, key: str) -> StoredResponse | None:
        """The answer kept under an idempotency key, for as long as it is kept."""
        return await _reading(self._store.response(scope, operation, key, now_us=self._clock()))

    async def transactions(self, ref: WalletRef, cursor: str | None = None, limit: int = 100) -> TransactionsPage:
        """The wallet's journal as a statement.

        Raises:
            ValueError: *cursor* is not one of ours.
        """
        before = None if cursor is None else _position(cursor)
        limit = min(limit, PAGE_MAX - 1)
        found = await _reading(self._store.transactions(ref, before=before, limit=limit + 1))
        page = found[:limit]
        more = len(found) > limit
        return TransactionsPage(tuple(page), cursor_after(page[-1]) if more else None)

    async def erase(self, wallet: WalletRef, *, customer_id: str) -> None:
        """Take away what a customer's *wallet*, usage, events and stored answers say of the person, for ever.

        That is metadata, and answers that are kept to be repeated. Every number stays, and the journal is untouched:
        it never had either. The wallet is frozen: nobody spends what is left. Repeatable.

        Raises:
            LedgerUnavailable: some of it may still be there; do it again.
        """
        await _reading(self._store.erase(wallet, customer_id=customer_id, now_us=self._clock()))
        # It reads the wallet anew and raises its version, so whoever has kept it, in any process, does so, too.
        with suppress(NotFound):
            await self.execute(Freeze(id=self._new_command_id(), scope=wallet.scope, wallet=wallet, frozen=True))
        # What was written meanwhile out of what others had kept.
        await _reading(self._store.erase(wallet, customer_id=customer_id, now_us=self._clock()))

    async def sweep(self, now_us: int) -> Swept:
        """Settle what has run out by *now_us*: reservations lapse, blocks expire, old responses go.

        Candidates are read without locks; the commands look again. Safe in every process at once.
        """
        failures: list[BaseException] = []
        lapsed = await self._sweep_each(
            lambda limit: self._store.due_reservations(now_us, limit=limit),
            lambda ref: Lapse(id=self._new_command_id(), scope=Scope(ref.tenant, ref.mode), reservation=ref),
            failures,
        )
        expired = await self._sweep_each(
            lambda limit: self._store.due_wallets(now_us, limit=limit),
            lambda ref: Expire(id=self._new_command_id(), scope=Scope(ref.tenant, ref.mode), wallet=ref),
            failures,
        )
        purged = await _reading(self._store.purge_responses(now_us, limit=SWEEP_PAGE))
        return Swept(reservations=lapsed, wallets=expired, responses=purged, failures=tuple(failures))

    async def _sweep_each(
        self,
        candidates: Callable[[int], Awaitable[list[Ref]]],
        command_for: Callable[[Ref], AnyCommand],
        failures: list[BaseException],
    ) -> int:
        """Page after page, until one brings nothing new: how many were settled.

        One that fails stops no other: it stays due, and a page is as much longer as there are of its kind.
        """
        settled = 0
        tried: set[Ref] = set()
        limit = SWEEP_PAGE
        for _ in range(SWEEP_PAGES_MAX):
            found = await _reading(candidates(limit))
            page = [ref for ref in found if ref not in tried]
            tried.update(page)
            outcomes = await asyncio.gather(*(self.execute(command_for(ref)) for ref in page), return_exceptions=True)
            failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
            failures += failed
            settled += sum(bool(outcome.facts) for outcome in outcomes if isinstance(outcome, Applied))
            if not page or len(found) < limit:
                break
            limit = min(limit + len(failed), PAGE_MAX)
        return settled


def _view(found: WalletBlocks, tags: Tags, now_us: int, *, line: int | None) -> WalletView:
    wallet, blocks = found
    return WalletView(
        wallet=wallet,
        blocks=blocks,
        balance=_balance(wallet, blocks, now_us),
        effective_balance=_effective_balance(wallet, blocks, tags, now_us, line=line),
        reserved=sum(block.reserved for block in blocks) + wallet.overdraft_reserved,
        receivable=wallet.receivable,
    )


def _balance(wallet: Wallet, blocks: Sequence[Block], now_us: int) -> int:
    state = State()
    state.wallets[wallet.ref] = wallet
    state.blocks[wallet.ref] = {block.id: block for block in blocks}
    return state.balance(wallet.ref, now_us)


def _effective_balance(wallet: Wallet, blocks: Sequence[Block], tags: Tags, now_us: int, *, line: int | None) -> int:
    if wallet.frozen or wallet.receivable > wallet.overdraft_limit:
        return 0
    able = payable(blocks, tags, now_us)
    paid = sum(block.free for block in able if block.operator_paid)
    overdraft = max(0, wallet.overdraft_limit - wallet.receivable - wallet.overdraft_reserved)
    unpaid = sum(block.free for block in able if not block.operator_paid) + overdraft
    return paid + (unpaid if line is None else min(unpaid, line))


def cursor_after(transaction: Transaction) -> str:
    """Goes on with what is older than *transaction*, wherever in a page it stands."""
    return f"{transaction.seq}.{transaction.position}"


_DIGITS_MAX = 18
"""What fits a column of the journal, however a cursor was tampered with."""


def _position(cursor: str) -> Position:
    seq, _, position = cursor.partition(".")
    if not (seq.isdecimal() and position.isdecimal() and max(len(seq), len(position)) <= _DIGITS_MAX):
        raise ValueError("the cursor is not one that a page of transactions gave")
    return Position(int(seq), int(position))


async def _reading(read: Awaitable[T]) -> T:
    try:
        return await read
    except StoreUnavailable as error:
        raise LedgerUnavailable(str(error)) from error
