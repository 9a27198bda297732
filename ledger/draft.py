"""One command's changes, gathered until they are all known: the differences and entries that become its facts.

A draft sees the state with its own changes on top, so that a step can build on the one before it. A refused command's
draft is dropped, and nothing has happened.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from ledger import alerts
from ledger.burndown import payable
from ledger.commands import Command
from ledger.model import (
    NO_DEBTS,
    Account,
    Alert,
    Block,
    Debts,
    Funding,
    Reservation,
    Reversal,
    Scope,
    Tags,
    Wallet,
    WalletRef,
)
from ledger.outcomes import (
    Applied,
    BlockChanged,
    BlockOpened,
    Event,
    Fact,
    ReservationChanged,
    Result,
    Transfer,
    WalletChanged,
    WalletOpened,
)
from ledger.state import State, changed_block

BlockRef = tuple[WalletRef, str]

RETURN_BLOCKS = {True: "blk_returns_paid", False: "blk_returns_unpaid"}
"""The blocks of a wallet that take what comes back to it, by whether the operator was paid for it.

A store loads them even when nothing is left in them."""

NO_TAGS = Tags()
"""The tags of what is not a charge: only unrestricted blocks serve."""

FUNDING_ACCOUNT = {
    Funding.PAID: Account.CLEARING,
    Funding.EXTERNAL: Account.EXTERNAL,
    Funding.PROMOTIONAL: Account.PROMO,
    Funding.PLAN: Account.PLAN,
    Funding.LIMIT: Account.LIMIT,
}
"""Where a block of this kind comes from. A developer's grant has none: it comes out of a pool, which is a wallet."""


class Source(msgspec.Struct, frozen=True, gc=False):
    """Free credits of a block, or of the wallet's overdraft when *block* is None."""

    wallet: Wallet
    block: Block | None
    amount: int


def total(parts: list[Source]) -> int:
    amount = 0
    for part in parts:
        amount += part.amount
    return amount


class Draft:
    """Collects differences by block and wallet: each of them is one fact."""

    __slots__ = (
        "_blocks",
        "_blocks_opened",
        "_wallets",
        "_wallets_opened",
        "_watched",
        "command",
        "events",
        "now_us",
        "other",
        "state",
        "transfers",
    )

    def __init__(self, state: State, command: Command, now_us: int) -> None:
        self.state = state
        self.command = command
        self.now_us = now_us
        self.transfers: list[Transfer] = []
        self.events: list[Event] = []
        self.other: list[Fact] = []
        self._wallets_opened: dict[WalletRef, Wallet] = {}
        self._blocks_opened: dict[BlockRef, Block] = {}
        self._blocks: dict[BlockRef, BlockChanged] = {}
        self._wallets: dict[WalletRef, WalletChanged] = {}
        self._watched: dict[WalletRef, tuple[tuple[Alert, ...], tuple[Alert, ...]]] = {}
        """What a wallet is watched for from now on, and which of that counts as rung."""

    # What is there, with this draft's changes on top.

    def wallet(self, ref: WalletRef) -> Wallet | None:
        """The wallet as it was before this draft, or as this draft opened it."""
        return self.state.wallets.get(ref) or self._wallets_opened.get(ref)

    def block(self, ref: WalletRef, block_id: str) -> Block:
        """The block as it was before this draft, or as this draft opened it."""
        return self._blocks_opened.get((ref, block_id)) or self.state.blocks[ref][block_id]

    def find_block(self, ref: WalletRef, block_id: str) -> Block | None:
        """As `block`, where it may be missing."""
        return self._blocks_opened.get((ref, block_id)) or self.state.blocks.get(ref, {}).get(block_id)

    def block_after(self, block: Block) -> Block:
        change = self._blocks.get((block.wallet, block.id))
        return block if change is None else changed_block(block, change)

    def free(self, block: Block) -> int:
        """What no reservation holds and nothing has used."""
        change = self._blocks.get((block.wallet, block.id))
        if change is None:
            return block.free
        return block.free + _remaining(change) - change.reserved

    def payable(self, ref: WalletRef, tags: Tags) -> list[Block]:
        blocks = self.state.blocks.get(ref)
        if self._blocks_opened:
            opened = [block for block in self._blocks_opened.values() if block.wallet == ref]
            return payable([*(blocks or {}).values(), *opened], tags, self.now_us)
        return [] if blocks is None else payable(blocks.values(), tags, self.now_us)

    def available(self, ref: WalletRef) -> int:
        """What a wallet that is not a payer (a limit, a line, a pool) has free for anything."""
        return sum(self.free(block) for block in self.payable(ref, NO_TAGS))

    def sources(self, wallets: list[Wallet], tags: Tags) -> Iterator[Source]:
        """Where a charge can come from: the blocks of all *wallets* in burn order, before the overdraft of any."""
        for wallet in wallets:
            for block in self.payable(wallet.ref, tags):
                amount = self.free(block)
                if amount > 0:
                    yield Source(wallet, block, amount)
        for wallet in wallets:
            if wallet.overdraft_limit > 0:
                amount = self._overdraft_free(wallet)
                if amount > 0:
                    yield Source(wallet, None, amount)

    def _overdraft_free(self, wallet: Wallet) -> int:
        """How much further below zero the wallet may go."""
        free = wallet.overdraft_limit - wallet.receivable - wallet.overdraft_reserved
        change = self._wallets.get(wallet.ref)
        return free if change is None else free - change.receivable - change.overdraft_reserved

    def balance(self, ref: WalletRef) -> int:
        """The wallet's balance after this draft."""
        balance = self.state.balance(ref, self.now_us)
        for block in self._blocks_opened.values():
            if block.wallet == ref:
                balance += block.remaining
        for change in self._blocks.values():
            if change.wallet == ref and not self.block(ref, change.block).expired_at(self.now_us):
                balance += _remaining(change)
        wallet_change = self._wallets.get(ref)
        return balance if wallet_change is None else balance - wallet_change.receivable

    # What is watched.

    def watch(self, ref: WalletRef, watched: tuple[Alert, ...]) -> None:
        """Watch the wallet, if there is one, for *watched* instead of for what it was watched for."""
        wallet = self.wallet(ref)
        if wallet is None or wallet.alerts == watched:
            return
        self.change_wallet(ref)
        balance = self.state.balance(ref, self.now_us)
        self._watched[ref] = watched, alerts.carried(watched, wallet.alerts, wallet.rung, balance)

    def _ring(self) -> None:
        """Ring what the balances of this draft are below of, each alert once a crossing."""
        for ref in list(self._wallets):
            wallet = self.wallet(ref)
            assert wallet is not None, "what changes is there"
            news = self._watched.get(ref)
            if news is None and not wallet.alerts:
                continue
            watched, before = news or (wallet.alerts, wallet.rung)
            balance = self.balance(ref)
            rung = alerts.below(watched, balance)
            for alert in rung:
                if alert not in before:
                    self.raise_event(ref, alerts.EVENTS[alert.kind], alerts.facts(alert, balance))
            if watched != wallet.alerts:
                self._wallets[ref] = msgspec.structs.replace(self._wallets[ref], alerts=watched)
            if rung != wallet.rung:
                self._wallets[ref] = msgspec.structs.replace(self._wallets[ref], rung=rung)

    # What changes.

    def open_wallet(self, ref: WalletRef, asset: str) -> Wallet:
        """The wallet, made when it is missing."""
        wallet = self.wallet(ref)
        if wallet is None:
            wallet = self._wallets_opened[ref] = Wallet(ref=ref, asset=asset)
        return wallet

    def open_block(self, block: Block) -> None:
        self._blocks_opened[block.wallet, block.id] = block
        self.change_wallet(block.wallet, blocks_opened=1)

    def opened(self, ref: WalletRef) -> int:
        """What is left in the wallet's blocks that this draft opened."""
        return sum(block.remaining for block in self._blocks_opened.values() if block.wallet == ref)

    def next_block_sequence(self, wallet: Wallet) -> int:
        change = self._wallets.get(wallet.ref)
        return wallet.blocks_opened + (0 if change is None else change.blocks_opened) + 1

    def change_block(
        self,
        block: Block,
        *,
        granted: int = 0,
        consumed: int = 0,
        reserved: int = 0,
        expired: int = 0,
        revoked: int = 0,
        clawed: int = 0,
        reversal: Reversal | None = None,
    ) -> None:
        ref = (block.wallet, block.id)
        before = self._blocks.get(ref)
        if before is not None:
            granted += before.granted
            consumed += before.consumed
            reserved += before.reserved
            expired += before.expired
            revoked += before.revoked
            clawed += before.clawed
            reversal = before.reversal if reversal is None else reversal
        self._blocks[ref] = BlockChanged(
            block.wallet, block.id, granted, consumed, reserved, expired, revoked, clawed, None, reversal
        )
        if block.wallet not in self._wallets:
            self._wallets[block.wallet] = WalletChanged(block.wallet, self.now_us)

    def change_wallet(
        self,
        ref: WalletRef,
        *,
        receivable: int = 0,
        overdraft_reserved: int = 0,
        blocks_opened: int = 0,
        events_raised: int = 0,
        frozen: bool | None = None,
        overdraft_limit: int | None = None,
        debts: Debts | None = None,
    ) -> None:
        before = self._wallets.get(ref)
        if before is not None:
            receivable += before.receivable
            overdraft_reserved += before.overdraft_reserved
            blocks_opened += before.blocks_opened
            events_raised += before.events_raised
            frozen = before.frozen if frozen is None else frozen
            overdraft_limit = before.overdraft_limit if overdraft_limit is None else overdraft_limit
            debts = before.debts if debts is None else debts
        self._wallets[ref] = WalletChanged(
            ref,
            self.now_us,
            receivable,
            overdraft_reserved,
            blocks_opened,
            events_raised,
            frozen,
            overdraft_limit,
            debts,
        )

    def hold(self, source: Source, amount: int) -> None:
        """Set *amount* of a source aside; a negative one gives it back.

        What goes back to a block that has expired meanwhile pays no more: ``Expire`` books it.
        """
        if source.block is None:
            self.change_wallet(source.wallet.ref, overdraft_reserved=amount)
        else:
            self.change_block(source.block, reserved=amount)

    def use(self, source: Source, amount: int, *, held: bool) -> None:
        """Use *amount* of a source up, out of what was *held* of it or of what was free."""
        freed = amount if held else 0
        if source.block is None:
            self.change_wallet(source.wallet.ref, receivable=amount, overdraft_reserved=-freed)
        else:
            self.change_block(source.block, consumed=amount, reserved=-freed)

    def transfer(
        self,
        amount: int,
        *,
        asset: str,
        debit: str,
        credit: str,
        block_id: str | None = None,
        reference: str | None = None,
        scope: Scope | None = None,
    ) -> None:
        """Book an entry, in the command's scope unless another is named. Nothing is booked for nothing."""
        if amount > 0:
            where = scope or self.command.scope
            self.transfers.append(Transfer(where, debit, credit, amount, asset, block_id, reference))

    def spend(self, source: Source, amount: int, *, account: str, reference: str | None) -> None:
        """Book what leaves a source for an account, in the scope and asset of the source's wallet."""
        wallet = source.wallet
        self.transfer(
            amount,
            asset=wallet.asset,
            debit=wallet.account,
            credit=account,
            block_id=None if source.block is None else source.block.id,
            reference=reference,
            scope=None if wallet.ref[:2] == self.command.scope else wallet.ref.scope,
        )

    def raise_event(self, ref: WalletRef, kind: str, body: dict[str, Any]) -> None:
        wallet = self.wallet(ref)
        assert wallet is not None, "an event belongs to a wallet"
        self.change_wallet(ref, events_raised=1)
        sequence = wallet.events_raised + self._wallets[ref].events_raised
        event_id = f"evt_{self.command.id.removeprefix('cmd_')}{len(self.events):02d}"
        self.events.append(Event(event_id, ref, sequence, kind, self.now_us, body))

    def raise_block_event(self, kind: str, block: Block, **facts: Any) -> None:
        """An event that carries the whole block as it is after this draft; its wallet names the customer."""
        body = {"block": msgspec.to_builtins(self.block_after(block)), **facts}
        self.raise_event(block.wallet, kind, body)

    def return_to_pool(self, source: Source, amount: int, *, reference: str | None) -> None:
        """Give *amount* of a block back to the wallet that it came out of."""
        block = source.block
        assert block is not None
        assert block.pool is not None
        if amount == 0:
            return
        pool = self.open_wallet(block.pool, source.wallet.asset)
        self.spend(source, amount, account=pool.account, reference=reference)
        self.change_block(self.returns_block(pool, operator_paid=block.operator_paid), granted=amount)

    def returns_block(self, wallet: Wallet, *, operator_paid: bool) -> Block:
        """The block of *wallet* that takes what comes back to it, made when it is missing."""
        block_id = RETURN_BLOCKS[operator_paid]
        known = self.find_block(wallet.ref, block_id)
        if known is not None:
            return known
        opened = Block(
            wallet=wallet.ref,
            id=block_id,
            sequence=self.next_block_sequence(wallet),
            granted=0,
            created_at_us=self.now_us,
            effective_at_us=self.now_us,
            source="returned",
            funding=Funding.PAID if operator_paid else Funding.EXTERNAL,
            operator_paid=operator_paid,
        )
        self.open_block(opened)
        return opened

    def owed(self, ref: WalletRef) -> int:
        """The wallet's receivable after this draft."""
        wallet, change = self.wallet(ref), self._wallets.get(ref)
        return (0 if wallet is None else wallet.receivable) + (0 if change is None else change.receivable)

    def debts(self, ref: WalletRef) -> Debts:
        """The wallet's debts after this draft."""
        wallet, change = self.wallet(ref), self._wallets.get(ref)
        if change is not None and change.debts is not None:
            return change.debts
        return NO_DEBTS if wallet is None else wallet.debts

    # What it comes to.

    def applied(
        self, result: Result, reservation: Reservation | None = None, *, answers: tuple[str, str] | None = None
    ) -> Applied:
        """All facts of this draft, and the *reservation* as it is now; a changed wallet's version rises once."""
        self._ring()
        facts: list[Fact] = [*self.transfers]
        if self._wallets_opened:
            facts += map(WalletOpened, self._wallets_opened.values())
        if self._blocks_opened:
            facts += map(BlockOpened, self._blocks_opened.values())
        facts += self._blocks.values()
        facts += self._wallets.values()
        if reservation is not None:
            facts.append(ReservationChanged(reservation))
        facts += self.other
        return Applied(result, tuple(facts), tuple(self.events), False, answers)


def _remaining(change: BlockChanged) -> int:
    """What a change adds to a block's remainder."""
    return change.granted - change.consumed - change.expired - change.revoked
