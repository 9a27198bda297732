"""The state that the journal adds up to. ``evolve`` is its only writer; replaying all facts gives it again."""

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


class State:
    """Wallets, their blocks, reservations and keys. A batch loads only those that its commands name."""

    __slots__ = ("blocks", "keys", "reservations", "wallets")

    def __init__(self) -> None:
        self.wallets: dict[WalletRef, Wallet] = {}
        self.blocks: dict[WalletRef, dict[str, Block]] = {}
        self.reservations: dict[ReservationRef, Reservation] = {}
        self.keys: dict[KeyRef, KeyTaken] = {}

    def balance(self, ref: WalletRef, now_us: int) -> int:
        """What has not expired of the wallet's blocks, reserved or not, less what it owes."""
        wallet = self.wallets.get(ref)
        if wallet is None:
            return 0
        live = sum(
            block.remaining
            for block in self.blocks.get(ref, {}).values()
            if block.expires_at_us is None or now_us < block.expires_at_us
        )
        return live - wallet.receivable


def evolve(state: State, fact: Fact) -> None:
    """Fold one fact into *state*. Transfers and usage are the journal's own and change nothing here."""
    match fact:
        case BlockChanged():
            blocks = state.blocks[fact.wallet]
            blocks[fact.block] = _changed_block(blocks[fact.block], fact)
        case WalletChanged():
            state.wallets[fact.wallet] = _changed_wallet(state.wallets[fact.wallet], fact)
        case ReservationChanged():
            state.reservations[fact.reservation.ref] = fact.reservation
        case BlockOpened():
            state.blocks.setdefault(fact.block.wallet, {})[fact.block.id] = fact.block
        case WalletOpened():
            state.wallets[fact.wallet.ref] = fact.wallet
        case KeyTaken():
            state.keys[fact.scope, fact.operation, fact.key] = fact
        case KeyFreed():
            state.keys.pop((fact.scope, fact.operation, fact.key), None)
        case _:
            pass


def _changed_block(block: Block, change: BlockChanged) -> Block:
    return msgspec.structs.replace(
        block,
        granted=block.granted + change.granted,
        consumed=block.consumed + change.consumed,
        reserved=block.reserved + change.reserved,
        expired=block.expired + change.expired,
        revoked=block.revoked + change.revoked,
        frozen=block.frozen if change.frozen is None else change.frozen,
    )


def _changed_wallet(wallet: Wallet, change: WalletChanged) -> Wallet:
    return msgspec.structs.replace(
        wallet,
        receivable=wallet.receivable + change.receivable,
        overdraft_reserved=wallet.overdraft_reserved + change.overdraft_reserved,
        blocks_opened=wallet.blocks_opened + change.blocks_opened,
        events_raised=wallet.events_raised + change.events_raised,
        frozen=wallet.frozen if change.frozen is None else change.frozen,
        overdraft_limit=wallet.overdraft_limit if change.overdraft_limit is None else change.overdraft_limit,
        version=wallet.version + 1,
        last_fact_us=max(wallet.last_fact_us, change.at_us),
    )
