"""One command's changes, gathered until they are all known: the differences and entries that become its facts.

A draft sees the state with its own changes on top, so that a step can build on the one before it.
"""

from typing import Any

from ledger.burndown import payable
from ledger.model import Block, Funding, Scope, Tags, Wallet, WalletRef
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
from ledger.state import State

BlockRef = tuple[WalletRef, str]

NO_TAGS = Tags()
"""The tags of what is not a charge: only unrestricted blocks serve."""


class Draft:
    """Collects differences by block and wallet; :meth:`facts` turns each into one fact."""

    def __init__(self, state: State, command_id: str, now_us: int) -> None:
        self.state = state
        self.now_us = now_us
        self.transfers: list[Transfer] = []
        self.events: list[Event] = []
        self.other: list[Fact] = []
        self._command_id = command_id
        self._wallets_opened: dict[WalletRef, Wallet] = {}
        self._blocks_opened: dict[BlockRef, Block] = {}
        self._blocks: dict[BlockRef, dict[str, int]] = {}
        self._wallets: dict[WalletRef, dict[str, int]] = {}
        self._reservation: ReservationChanged | None = None

    # What is there, with this draft's changes on top.

    def wallet(self, ref: WalletRef) -> Wallet | None:
        return self.state.wallets.get(ref) or self._wallets_opened.get(ref)

    def block(self, ref: WalletRef, block_id: str) -> Block:
        return self._blocks_opened.get((ref, block_id)) or self.state.blocks[ref][block_id]

    def free(self, block: Block) -> int:
        """What no reservation holds and nothing has used."""
        change = self._blocks.get((block.wallet, block.id))
        if change is None:
            return block.free
        used = change.get("consumed", 0) + change.get("expired", 0) + change.get("revoked", 0)
        return block.free + change.get("granted", 0) - used - change.get("reserved", 0)

    def payable(self, ref: WalletRef, tags: Tags) -> list[Block]:
        return payable(self.state.blocks.get(ref, {}).values(), tags, self.now_us)

    def overdraft_free(self, wallet: Wallet) -> int:
        """How much further below zero the wallet may go."""
        change = self._wallets.get(wallet.ref, {})
        receivable = wallet.receivable + change.get("receivable", 0)
        held = wallet.overdraft_reserved + change.get("overdraft_reserved", 0)
        return max(0, wallet.overdraft_limit - receivable - held)

    def owes_too_much(self, wallet: Wallet) -> bool:
        return wallet.receivable > wallet.overdraft_limit

    def balance(self, ref: WalletRef) -> int:
        """The wallet's balance after this draft."""
        total = self.state.balance(ref, self.now_us)
        for (wallet, block_id), change in self._blocks.items():
            if wallet == ref and self._unexpired(self.block(ref, block_id)):
                used = change.get("consumed", 0) + change.get("expired", 0) + change.get("revoked", 0)
                total += change.get("granted", 0) - used
        total += sum(
            block.remaining
            for (wallet, _), block in self._blocks_opened.items()
            if wallet == ref and self._unexpired(block)
        )
        return total - self._wallets.get(ref, {}).get("receivable", 0)

    def _unexpired(self, block: Block) -> bool:
        return block.expires_at_us is None or self.now_us < block.expires_at_us

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

    def next_block_sequence(self, wallet: Wallet) -> int:
        return wallet.blocks_opened + self._wallets.get(wallet.ref, {}).get("blocks_opened", 0) + 1

    def change_block(self, block: Block, **differences: int) -> None:
        _add(self._blocks.setdefault((block.wallet, block.id), {}), differences)
        self.change_wallet(block.wallet)

    def change_wallet(self, ref: WalletRef, **differences: int) -> None:
        _add(self._wallets.setdefault(ref, {}), differences)

    def change_reservation(self, changed: ReservationChanged) -> None:
        self._reservation = changed

    def transfer(
        self, wallet: Wallet, amount: int, *, debit: str, credit: str, block: str | None = None, reference: str = ""
    ) -> None:
        """Book an entry in *wallet*'s scope and asset. Nothing is booked for nothing."""
        if amount > 0:
            scope = Scope(wallet.ref.tenant, wallet.ref.mode)
            entry = Transfer(
                scope=scope,
                debit=debit,
                credit=credit,
                amount=amount,
                asset=wallet.asset,
                block=block,
                reference=reference or None,
            )
            self.transfers.append(entry)

    def raise_event(self, ref: WalletRef, kind: str, body: dict[str, Any], *, event_id: str | None = None) -> None:
        wallet = self.wallet(ref)
        if wallet is None:
            return
        self.change_wallet(ref, events_raised=1)
        sequence = wallet.events_raised + self._wallets[ref]["events_raised"]
        identity = event_id or f"evt_{self._command_id.partition('_')[2]}{len(self.events):02d}"
        self.events.append(Event(id=identity, wallet=ref, sequence=sequence, type=kind, at_us=self.now_us, body=body))

    def return_to_pool(self, wallet: Wallet, block: Block, amount: int, *, reference: str) -> None:
        """Give *amount* of a developer's grant back to the pool that funded it."""
        assert block.pool is not None
        if amount == 0:
            return
        pool = self.open_wallet(block.pool, wallet.asset)
        kind = "paid" if block.operator_paid else "unpaid"
        block_id = f"blk_returns_{kind}"
        self.transfer(wallet, amount, debit=wallet.account, credit=pool.account, block=block.id, reference=reference)
        returns = self._blocks_opened.get((pool.ref, block_id)) or self.state.blocks.get(pool.ref, {}).get(block_id)
        if returns is None:
            self.open_block(
                Block(
                    wallet=pool.ref,
                    id=block_id,
                    sequence=self.next_block_sequence(pool),
                    granted=0,
                    created_at_us=self.now_us,
                    effective_at_us=self.now_us,
                    source="returned",
                    funding=Funding.PAID if block.operator_paid else Funding.EXTERNAL,
                    operator_paid=block.operator_paid,
                )
            )
            returns = self._blocks_opened[pool.ref, block_id]
        self.change_block(returns, granted=amount)

    # What it comes to.

    def applied(self, result: Result) -> Applied:
        return Applied(result=result, facts=self.facts(), events=tuple(self.events))

    def facts(self) -> tuple[Fact, ...]:
        """All facts of this draft; a changed wallet's version rises once."""
        gathered: list[Fact] = list(self.transfers)
        gathered += [WalletOpened(wallet=wallet) for wallet in self._wallets_opened.values()]
        gathered += [BlockOpened(block=block) for block in self._blocks_opened.values()]
        gathered += [
            BlockChanged(wallet=wallet, block=block_id, **change)  # type: ignore[arg-type]
            for (wallet, block_id), change in self._blocks.items()
            if any(change.values())
        ]
        gathered += [
            WalletChanged(wallet=wallet, at_us=self.now_us, **change)  # type: ignore[arg-type]
            for wallet, change in self._wallets.items()
        ]
        if self._reservation is not None:
            gathered.append(self._reservation)
        return tuple(gathered + self.other)


def _add(totals: dict[str, int], differences: dict[str, int]) -> None:
    for name, difference in differences.items():
        totals[name] = totals.get(name, 0) + difference
