"""Credits in, and back out unspent: grants, revocation, expiry, and the switches of a wallet."""

import msgspec

from ledger.commands import (
    Expire,
    Freeze,
    Grant,
    Revoke,
    SetOverdraft,
)
from ledger.draft import NO_TAGS, Draft
from ledger.model import (
    AMOUNT_MAX,
    Account,
    Block,
    Funding,
    Wallet,
    WalletRef,
)
from ledger.outcomes import (
    Applied,
    BlockChanged,
    Changed,
    Expired,
    Granted,
    Outcome,
    Reason,
    Rejected,
    Revoked,
    WalletChanged,
)
from ledger.state import State

FUNDING_ACCOUNT = {
    Funding.PAID: Account.CLEARING,
    Funding.EXTERNAL: Account.EXTERNAL,
    Funding.PROMOTIONAL: Account.PROMO,
    Funding.PLAN: Account.PLAN,
}
"""Where a grant of this kind comes from. A developer's grant has none: it comes out of a pool, which is a wallet."""


def grant(state: State, command: Grant, now_us: int) -> Outcome:
    expires_at_us = command.expires_at_us
    effective_at_us = now_us if command.effective_at_us is None else command.effective_at_us
    if not 0 < command.amount <= AMOUNT_MAX or command.from_wallet == command.wallet:
        return Rejected(Reason.INVALID_AMOUNT)
    if expires_at_us is not None and expires_at_us <= max(now_us, effective_at_us):
        return Rejected(Reason.INVALID_AMOUNT)
    if command.block_id in state.blocks.get(command.wallet, {}):
        return Rejected(Reason.ALREADY_EXISTS)
    draft = Draft(state, command.id, now_us)
    wallet = draft.open_wallet(command.wallet, command.asset)
    if wallet.asset != command.asset:
        return Rejected(Reason.ASSET_MISMATCH)
    if command.from_wallet is None:
        lots = [(command.operator_paid, command.amount)]
        account = FUNDING_ACCOUNT[command.funding]
        draft.transfer(wallet, command.amount, debit=account, credit=wallet.account, block=command.block_id)
    else:
        taken = _take_from_wallet(draft, command.from_wallet, wallet, command.amount)
        if isinstance(taken, Rejected):
            return taken
        lots = taken
    balance_before = state.balance(wallet.ref, now_us)
    owed = wallet.receivable
    for number, (operator_paid, amount) in enumerate(lots, start=1):
        repaid = min(owed, amount)
        owed -= repaid
        block = Block(
            wallet=wallet.ref,
            id=command.block_id if number == 1 else f"{command.block_id}_{number}",
            sequence=draft.next_block_sequence(wallet),
            granted=amount,
            consumed=repaid,
            created_at_us=now_us,
            effective_at_us=effective_at_us,
            expires_at_us=expires_at_us,
            priority=command.priority,
            source=command.source,
            funding=command.funding,
            operator_paid=operator_paid,
            restriction=command.restriction,
            pool=command.from_wallet if command.funding is Funding.DEVELOPER_GRANT else None,
            payment_reference=command.payment_reference,
            metadata=command.metadata,
        )
        draft.open_block(block)
        draft.change_wallet(wallet.ref, receivable=-repaid)
        draft.raise_event(wallet.ref, "credit.granted", {"block": msgspec.to_builtins(block)})
    granted = Granted(
        block_id=command.block_id,
        amount=command.amount,
        balance_before=balance_before,
        balance_after=draft.balance(wallet.ref),
        repaid=wallet.receivable - owed,
        at_us=now_us,
    )
    return draft.applied(granted)


def _take_from_wallet(
    draft: Draft, source: WalletRef, wallet: Wallet, amount: int
) -> list[tuple[bool, int]] | Rejected:
    """Move *amount* out of *source*'s free blocks: how much of it the operator was paid for, and how much not."""
    giver = draft.wallet(source)
    if giver is None:
        return Rejected(Reason.INSUFFICIENT_CREDITS, needed=amount)
    if giver.asset != wallet.asset:
        return Rejected(Reason.ASSET_MISMATCH)
    if giver.frozen:
        return Rejected(Reason.WALLET_FROZEN)
    blocks = [] if giver.receivable else draft.payable(source, NO_TAGS)
    available = sum(draft.free(block) for block in blocks)
    if available < amount:
        reason = Reason.RECEIVABLE_OUTSTANDING if giver.receivable else Reason.INSUFFICIENT_CREDITS
        return Rejected(reason, needed=amount, available=available)
    lots = {True: 0, False: 0}
    for block in blocks:
        part = min(amount, draft.free(block))
        if part > 0:
            amount -= part
            lots[block.operator_paid] += part
            draft.change_block(block, consumed=part)
            draft.transfer(wallet, part, debit=giver.account, credit=wallet.account, block=block.id)
    return [(paid, part) for paid, part in lots.items() if part > 0]


def revoke(state: State, command: Revoke, now_us: int) -> Outcome:
    block = state.blocks.get(command.wallet, {}).get(command.block_id)
    wallet = state.wallets.get(command.wallet)
    if block is None or wallet is None:
        return Rejected(Reason.NOT_FOUND)
    if not 0 < command.amount <= block.granted:
        return Rejected(Reason.INVALID_AMOUNT)
    draft = Draft(state, command.id, now_us)
    free = min(command.amount, block.free)
    owed = command.amount - free if command.clawback else 0
    draft.change_block(block, revoked=free)
    draft.change_wallet(wallet.ref, receivable=owed)
    reference = command.reference or ""
    if block.pool is not None:
        draft.return_to_pool(wallet, block, free + owed, reference=reference)
    else:
        account = FUNDING_ACCOUNT[block.funding]
        draft.transfer(wallet, free + owed, debit=wallet.account, credit=account, block=block.id, reference=reference)
    body = {"block": msgspec.to_builtins(block), "amount": free + owed, "reference": command.reference}
    draft.raise_event(wallet.ref, "credit.clawed_back", body)
    revoked = Revoked(amount=free, receivable=wallet.receivable + owed, balance=draft.balance(wallet.ref))
    return draft.applied(revoked)


def expire(state: State, command: Expire, now_us: int) -> Outcome:
    wallet = state.wallets.get(command.wallet)
    if wallet is None:
        return Rejected(Reason.NOT_FOUND)
    draft = Draft(state, command.id, now_us)
    lapsed: dict[str, int] = {}
    for block in state.blocks.get(command.wallet, {}).values():
        if block.expires_at_us is None or now_us < block.expires_at_us or block.free == 0:
            continue
        lapsed[block.id] = block.free
        draft.change_block(block, expired=block.free)
        draft.transfer(wallet, block.free, debit=wallet.account, credit=Account.BREAKAGE, block=block.id)
        if block.expired == 0:
            event_id = f"evt_{block.id.partition('_')[2]}"
            body = {"block": msgspec.to_builtins(block), "amount": block.free}
            draft.raise_event(wallet.ref, "credit.expired", body, event_id=event_id)
    return draft.applied(Expired(blocks=tuple(lapsed), amount=sum(lapsed.values())))


def freeze(state: State, command: Freeze, now_us: int) -> Outcome:
    if command.wallet not in state.wallets:
        return Rejected(Reason.NOT_FOUND)
    if command.block_id is None:
        changed = WalletChanged(wallet=command.wallet, at_us=now_us, frozen=command.frozen)
        return Applied(result=Changed(), facts=(changed,))
    if command.block_id not in state.blocks.get(command.wallet, {}):
        return Rejected(Reason.NOT_FOUND)
    facts = (
        BlockChanged(wallet=command.wallet, block=command.block_id, frozen=command.frozen),
        WalletChanged(wallet=command.wallet, at_us=now_us),
    )
    return Applied(result=Changed(), facts=facts)


def set_overdraft(state: State, command: SetOverdraft, now_us: int) -> Outcome:
    if not 0 <= command.limit <= AMOUNT_MAX:
        return Rejected(Reason.INVALID_AMOUNT)
    draft = Draft(state, command.id, now_us)
    wallet = draft.open_wallet(command.wallet, command.asset)
    if wallet.asset != command.asset:
        return Rejected(Reason.ASSET_MISMATCH)
    draft.other.append(WalletChanged(wallet=command.wallet, at_us=now_us, overdraft_limit=command.limit))
    return draft.applied(Changed())
