"""The state that the journal adds up to. ``evolve`` is its only writer; replaying all facts gives it again."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ledger.model import Block, Reservation, ReservationRef, Scope, Wallet, WalletRef
from ledger.outcomes import (
    BlockChanged,
    BlockOpened,
    Fact,
    KeyFreed,
    KeyTaken,
    ReservationChanged,
    WalletChanged,
    WalletOpened,
)

KeyRef = tuple[Scope, str, str]


@dataclass(slots=True)
class State:
    """Wallets, their blocks, reservations and keys. A batch loads only those that its commands name."""

    wallets: dict[WalletRef, Wallet] = field(default_factory=dict)
    blocks: dict[WalletRef, dict[str, Block]] = field(default_factory=dict)
    reservations: dict[ReservationRef, Reservation] = field(default_factory=dict)
    keys: dict[KeyRef, KeyTaken] = field(default_factory=dict)

    def balance(self, ref: WalletRef, now_us: int) -> int:
        """What has not expired of the wallet's blocks, reserved or not, less what it owes."""
        wallet = self.wallets.get(ref)
        if wallet is None:
            return 0
        balance = -wallet.receivable
        for block in self.blocks.get(ref, {}).values():
            if not block.expired_at(now_us):
                balance += block.remaining
        return balance


def evolve(state: State, fact: Fact) -> None:
    """Fold one fact into *state*. Transfers and usage are the journal's own and change nothing here."""
    fold = _FOLDS.get(type(fact))
    if fold is not None:
        fold(state, fact)


def _change_block(state: State, change: BlockChanged) -> None:
    blocks = state.blocks[change.wallet]
    block = blocks[change.block]
    blocks[change.block] = changed_block(block, change)


def changed_block(block: Block, change: BlockChanged) -> Block:
    return msgspec.structs.replace(
        block,
        granted=block.granted + change.granted,
        consumed=block.consumed + change.consumed,
        reserved=block.reserved + change.reserved,
        expired=block.expired + change.expired,
        revoked=block.revoked + change.revoked,
        clawed=block.clawed + change.clawed,
        frozen=block.frozen if change.frozen is None else change.frozen,
        reversal=block.reversal if change.reversal is None else change.reversal,
    )


def _change_wallet(state: State, change: WalletChanged) -> None:
    wallet = state.wallets[change.wallet]
    state.wallets[change.wallet] = msgspec.structs.replace(
        wallet,
        receivable=wallet.receivable + change.receivable,
        overdraft_reserved=wallet.overdraft_reserved + change.overdraft_reserved,
        blocks_opened=wallet.blocks_opened + change.blocks_opened,
        events_raised=wallet.events_raised + change.events_raised,
        frozen=wallet.frozen if change.frozen is None else change.frozen,
        overdraft_limit=wallet.overdraft_limit if change.overdraft_limit is None else change.overdraft_limit,
        debts=wallet.debts if change.debts is None else change.debts,
        alerts=wallet.alerts if change.alerts is None else change.alerts,
        rung=wallet.rung if change.rung is None else change.rung,
        version=wallet.version + 1,
        last_fact_us=max(wallet.last_fact_us, change.at_us),
    )


def _change_reservation(state: State, change: ReservationChanged) -> None:
    state.reservations[change.reservation.ref] = change.reservation


def _open_block(state: State, opened: BlockOpened) -> None:
    state.blocks.setdefault(opened.block.wallet, {})[opened.block.id] = opened.block


def _open_wallet(state: State, opened: WalletOpened) -> None:
    state.wallets[opened.wallet.ref] = opened.wallet


def _take_key(state: State, taken: KeyTaken) -> None:
    state.keys[taken.scope, taken.operation, taken.key] = taken


def _free_key(state: State, freed: KeyFreed) -> None:
    state.keys.pop((freed.scope, freed.operation, freed.key), None)


_FOLDS: dict[type[Fact], Callable[[State, Any], None]] = {
    BlockChanged: _change_block,
    WalletChanged: _change_wallet,
    ReservationChanged: _change_reservation,
    BlockOpened: _open_block,
    WalletOpened: _open_wallet,
    KeyTaken: _take_key,
    KeyFreed: _free_key,
}
