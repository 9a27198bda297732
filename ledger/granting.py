"""Credits in, and back out unspent: grants, revocation, expiry, and the switches and events of a wallet."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ledger.commands import Expire, Freeze, Grant, Purchase, Revoke, SetOverdraft, Tell
from ledger.debts import repay
from ledger.draft import FUNDING_ACCOUNT, NO_TAGS, Draft, Source
from ledger.model import AMOUNT_MAX, Account, Block, Funding, Wallet, WalletRef
from ledger.outcomes import (
    BlockChanged,
    Changed,
    Expired,
    Granted,
    Outcome,
    Reason,
    Rejected,
    Revoked,
)
from ledger.state import State

BLOCKS_LIVE_MAX = 1_000
"""Most blocks with something left that a wallet has: every charge looks at each of them, and other wallets wait."""


class Lot(NamedTuple):
    """A part of what comes in that becomes a block of its own."""

    block_id: str
    operator_paid: bool
    amount: int


def grant(state: State, command: Grant, now_us: int) -> Outcome:
    effective_at_us = now_us if command.effective_at_us is None else command.effective_at_us
    if not _grantable(state, command, effective_at_us=max(now_us, effective_at_us)):
        return Rejected(Reason.INVALID_AMOUNT)
    if not _comes_from_somewhere(command):
        return Rejected(Reason.NOT_FOUND)
    blocks = state.blocks.get(command.wallet, {})
    if any(block_id in blocks for block_id in block_ids(command)):
        return Rejected(Reason.ALREADY_EXISTS)
    draft = Draft(state, command, now_us)
    wallet = draft.open_wallet(command.wallet, command.asset)
    if wallet.asset != command.asset:
        return Rejected(Reason.ASSET_MISMATCH)
    lots = _lots(draft, command, wallet)
    if isinstance(lots, Rejected):
        return lots
    repaid_in_all = 0
    for lot in lots:
        repaid = repay(draft, wallet, lot.amount, paid=lot.operator_paid)
        repaid_in_all += repaid
        block = Block(
            wallet=wallet.ref,
            id=lot.block_id,
            sequence=draft.next_block_sequence(wallet),
            granted=lot.amount,
            consumed=repaid,
            created_at_us=now_us,
            effective_at_us=effective_at_us,
            expires_at_us=command.expires_at_us,
            priority=command.priority,
            source=command.source,
            funding=command.funding,
            operator_paid=lot.operator_paid,
            restriction=command.restriction,
            pool=command.from_wallet,
            payment_reference=command.payment_reference,
            metadata=command.metadata,
        )
        draft.open_block(block)
        draft.raise_block_event("credit.granted", block)
    lapsed = _lapse_beyond_cap(draft, command, wallet)
    granted = Granted(
        block_id=command.block_id,
        amount=command.amount,
        balance_before=state.balance(wallet.ref, now_us),
        balance_after=draft.balance(wallet.ref),
        repaid=repaid_in_all,
        at_us=now_us,
        lapsed=lapsed,
    )
    return draft.applied(granted)


def _lapse_beyond_cap(draft: Draft, command: Grant, wallet: Wallet) -> int:
    """Let what is free of the wallet's oldest blocks of the grant's source lapse, down to its cap; how much that is.

    It counts as revoked: what a block loses to its expiry comes later, and is an event of its own.
    """
    if command.accumulation_cap is None:
        return 0
    there = draft.state.blocks.get(command.wallet, {}).values()
    alike = [block for block in there if _capped_with(block, command) and not block.expired_at(draft.now_us)]
    excess = sum(block.remaining for block in alike) + draft.opened(command.wallet) - command.accumulation_cap
    lapsed = 0
    for block in sorted(alike, key=lambda block: block.sequence):
        part = min(excess - lapsed, block.free)
        if part > 0:
            lapsed += part
            draft.change_block(block, revoked=part)
            draft.spend(Source(wallet, block, part), part, account=Account.BREAKAGE, reference=command.block_id)
            draft.raise_block_event("credit.expired", block, amount=part, cause="accumulation_cap")
    return lapsed


def _capped_with(block: Block, command: Grant) -> bool:
    """Whether a grant's cap counts a block: what was paid for never lapses because a gift has the same name."""
    return block.source == command.source and block.funding is command.funding


def _grantable(state: State, command: Grant, *, effective_at_us: int) -> bool:
    """Whether the amount and the time make sense: a wallet's blocks together stay within the bounds of an amount."""
    there = sum(block.remaining for block in state.blocks.get(command.wallet, {}).values())
    return (
        command.amount > 0
        and (command.accumulation_cap is None or command.amount <= command.accumulation_cap <= AMOUNT_MAX)
        and there + command.amount <= AMOUNT_MAX
        and (command.expires_at_us is None or effective_at_us < command.expires_at_us)
        and command.from_wallet != command.wallet
    )


def _bought(command: Grant) -> bool:
    """Somebody paid for it: it is never refused, and its price keeps its like from being many."""
    return command.funding is Funding.PAID and command.from_wallet is None


def _comes_from_somewhere(command: Grant) -> bool:
    """A developer's grant needs its pool, no grant comes out of another tenant's or mode's wallet, or of a limit."""
    if command.from_wallet is None:
        return command.funding not in (Funding.DEVELOPER_GRANT, Funding.LIMIT)
    return command.from_wallet[:2] == command.scope


def block_ids(command: Grant | Purchase) -> tuple[str, str]:
    """The blocks that it may open: neither may be there."""
    return command.block_id, f"{command.block_id}_2"


def _lots(draft: Draft, command: Grant, wallet: Wallet) -> list[Lot] | Rejected:
    """Bring the credits in. Nobody but the operator says that it was paid: credits from elsewhere never are."""
    live = sum(block.live for block in draft.state.blocks.get(command.wallet, {}).values())
    if live >= BLOCKS_LIVE_MAX and not _bought(command):
        return Rejected(Reason.TOO_MANY_BLOCKS)
    if command.from_wallet is not None:
        return _take_from_wallet(draft, command, command.from_wallet, wallet)
    draft.transfer(
        command.amount,
        asset=wallet.asset,
        debit=FUNDING_ACCOUNT[command.funding],
        credit=wallet.account,
        block_id=command.block_id,
    )
    paid = command.operator_paid and command.funding is not Funding.EXTERNAL
    return [Lot(command.block_id, paid, command.amount)]


def _take_from_wallet(draft: Draft, command: Grant, source: WalletRef, wallet: Wallet) -> list[Lot] | Rejected:
    """Move the amount out of *source*'s free blocks: what the operator was paid for, and what not, stay apart."""
    amount = command.amount
    giver = draft.wallet(source)
    if giver is None:
        return Rejected(Reason.INSUFFICIENT_CREDITS, needed=amount)
    if giver.asset != wallet.asset:
        return Rejected(Reason.ASSET_MISMATCH)
    if giver.frozen:
        return Rejected(Reason.WALLET_FROZEN)
    available = draft.available(source)
    if giver.receivable:
        return Rejected(Reason.RECEIVABLE_OUTSTANDING, needed=amount, available=0)
    if available < amount:
        return Rejected(Reason.INSUFFICIENT_CREDITS, needed=amount, available=available)
    blocks = draft.payable(source, NO_TAGS)
    taken = take_free(draft, giver, blocks, amount, account=wallet.account, reference=command.block_id)
    return lots_of(command, taken)


def take_free(
    draft: Draft, wallet: Wallet, blocks: Iterable[Block], amount: int, *, account: str, reference: str
) -> dict[bool, int]:
    """Move *amount*, which is there, out of the free part of *blocks*, in their order, to *account*.

    Returns what of it the operator was paid for, and what not.
    """
    taken = {True: 0, False: 0}
    for block in blocks:
        part = Source(wallet, block, min(amount, draft.free(block)))
        if part.amount > 0:
            amount -= part.amount
            taken[block.operator_paid] += part.amount
            draft.use(part, part.amount, held=False)
            draft.spend(part, part.amount, account=account, reference=reference)
    return taken


def lots_of(command: Grant | Purchase, amounts: Mapping[bool, int]) -> list[Lot]:
    """A lot for what the operator was paid for, and one for what not, as far as there is any."""
    kinds = [(paid, part) for paid, part in amounts.items() if part > 0]
    return [Lot(block_id, paid, part) for block_id, (paid, part) in zip(block_ids(command), kinds, strict=False)]


def revoke(state: State, command: Revoke, now_us: int) -> Outcome:
    if command.amount is not None and not 0 < command.amount <= AMOUNT_MAX:
        return Rejected(Reason.INVALID_AMOUNT)
    wallet = state.wallets.get(command.wallet)
    block = state.blocks.get(command.wallet, {}).get(command.block_id)
    if block is None or wallet is None:
        return Rejected(Reason.NOT_FOUND)
    asked = block.granted if command.amount is None else command.amount
    if asked > block.granted:
        return Rejected(Reason.INVALID_AMOUNT)
    draft = Draft(state, command, now_us)
    amount = min(asked, _revocable(block))
    free = min(amount, block.free)
    owed = amount - free if command.clawback and block.pool is None else 0
    if free + owed > 0:
        draft.change_block(block, revoked=free, clawed=owed)
        draft.change_wallet(wallet.ref, receivable=owed)
        taken = Source(wallet, block, free + owed)
        if block.pool is not None:
            draft.return_to_pool(taken, taken.amount, reference=command.reference)
        else:
            draft.spend(taken, taken.amount, account=_account_of_revoked(block), reference=command.reference)
        draft.raise_block_event("credit.clawed_back", block, amount=taken.amount, reference=command.reference)
    revoked = Revoked(amount=free, receivable=wallet.receivable + owed, balance=draft.balance(wallet.ref), owed=owed)
    return draft.applied(revoked)


def _account_of_revoked(block: Block) -> str:
    """Where revoked credits go: where they came from. But no money goes back, so what was paid stays the operator's."""
    return Account.BREAKAGE if block.funding is Funding.PAID else FUNDING_ACCOUNT[block.funding]


def _revocable(block: Block) -> int:
    """What was not taken back of a block yet, free, held or spent. What has lapsed was never had.

    Credits that came out of another wallet are only taken back unspent: they would be there again to be spent, and the
    debt unpaid.
    """
    return max(0, block.granted - block.expired - block.revoked - block.clawed)


def expire(state: State, command: Expire, now_us: int) -> Outcome:
    wallet = state.wallets.get(command.wallet)
    if wallet is None:
        return Rejected(Reason.NOT_FOUND)
    draft = Draft(state, command, now_us)
    lapsed: dict[str, int] = {}
    for block in state.blocks.get(command.wallet, {}).values():
        if not block.expired_at(now_us) or block.free == 0:
            continue
        lapsed[block.id] = block.free
        draft.change_block(block, expired=block.free)
        limit = block.funding is Funding.LIMIT
        account = Account.LIMIT if limit else Account.BREAKAGE
        draft.spend(Source(wallet, block, block.free), block.free, account=account, reference=None)
        if block.expired == 0 and not limit:
            draft.raise_block_event("credit.expired", block, amount=block.free)
    return draft.applied(Expired(blocks=tuple(lapsed), amount=sum(lapsed.values())))


def freeze(state: State, command: Freeze, now_us: int) -> Outcome:
    if command.wallet not in state.wallets:
        return Rejected(Reason.NOT_FOUND)
    draft = Draft(state, command, now_us)
    if command.block_id is None:
        draft.change_wallet(command.wallet, frozen=command.frozen)
        return draft.applied(Changed())
    if command.block_id not in state.blocks.get(command.wallet, {}):
        return Rejected(Reason.NOT_FOUND)
    draft.change_wallet(command.wallet)
    draft.other.append(BlockChanged(wallet=command.wallet, block=command.block_id, frozen=command.frozen))
    return draft.applied(Changed())


def set_overdraft(state: State, command: SetOverdraft, now_us: int) -> Outcome:
    if not 0 <= command.limit <= AMOUNT_MAX:
        return Rejected(Reason.INVALID_AMOUNT)
    draft = Draft(state, command, now_us)
    wallet = draft.open_wallet(command.wallet, command.asset)
    if wallet.asset != command.asset:
        return Rejected(Reason.ASSET_MISMATCH)
    draft.change_wallet(command.wallet, overdraft_limit=command.limit)
    return draft.applied(Changed())


def tell(state: State, command: Tell, now_us: int) -> Outcome:
    draft = Draft(state, command, now_us)
    wallet = draft.open_wallet(command.wallet, command.asset)
    if wallet.asset != command.asset:
        return Rejected(Reason.ASSET_MISMATCH)
    draft.raise_event(wallet.ref, command.event, command.body)
    return draft.applied(Changed())
