"""Packs of credits, bought out of a wallet's own: the price goes and the plan comes, in one step."""

from collections.abc import Iterable

from ledger.burndown import payable
from ledger.commands import Purchase
from ledger.draft import Draft
from ledger.granting import BLOCKS_LIVE_MAX, block_ids, lots_of, take_free
from ledger.model import AMOUNT_MAX, Account, Block, Funding, Wallet
from ledger.outcomes import Outcome, Purchased, Reason, Rejected
from ledger.state import State


def purchase(state: State, command: Purchase, now_us: int) -> Outcome:
    blocks = state.blocks.get(command.wallet, {})
    plans = [block for block in blocks.values() if _active_plan(block, now_us)]
    expires_at_us = _expires_at_us(command, plans, now_us)
    if not _sensible(command, blocks.values(), expires_at_us):
        return Rejected(Reason.INVALID_AMOUNT)
    if any(block_id in blocks for block_id in block_ids(command)):
        return Rejected(Reason.ALREADY_EXISTS)
    draft = Draft(state, command, now_us)
    wallet = draft.open_wallet(command.wallet, command.asset)
    refusal = _refusal(command, wallet, plans, live=sum(block.live for block in blocks.values()))
    if refusal is not None:
        return refusal
    payers = payers_of(blocks.values(), command, now_us)
    available = sum(block.free for block in payers)
    if available < command.price:
        return Rejected(Reason.INSUFFICIENT_CREDITS, needed=command.price, available=available)
    taken = take_free(draft, wallet, payers, command.price, account=Account.PLAN, reference=command.block_id)
    paid = min(taken[True], command.amount)
    opened = []
    for lot in lots_of(command, {True: paid, False: command.amount - paid}):
        block = Block(
            wallet=wallet.ref,
            id=lot.block_id,
            sequence=draft.next_block_sequence(wallet),
            granted=lot.amount,
            created_at_us=now_us,
            effective_at_us=now_us,
            expires_at_us=expires_at_us,
            priority=command.priority,
            source=command.source,
            funding=Funding.PLAN,
            operator_paid=lot.operator_paid,
            restriction=command.restriction,
            metadata={**command.metadata, "pack": command.pack},
        )
        draft.open_block(block)
        draft.transfer(lot.amount, asset=wallet.asset, debit=Account.PLAN, credit=wallet.account, block_id=lot.block_id)
        opened.append(block)
    draft.raise_block_event(
        "pack.purchased",
        opened[0],
        blocks=[block.id for block in opened],
        pack=command.pack,
        price=command.price,
        amount=command.amount,
        cause=command.cause,
    )
    purchased = Purchased(
        block_id=opened[0].id,
        price=command.price,
        amount=command.amount,
        expires_at_us=expires_at_us,
        balance_before=state.balance(wallet.ref, now_us),
        balance_after=draft.balance(wallet.ref),
        at_us=now_us,
    )
    return draft.applied(purchased)


def payers_of(blocks: Iterable[Block], command: Purchase, now_us: int) -> list[Block]:
    """Which of a wallet's *blocks* pay the price, in burn order. Some of them may have nothing free."""
    return [block for block in payable(blocks, command.tags, now_us) if _may_pay(block, command)]


def _active_plan(block: Block, now_us: int) -> bool:
    return block.funding is Funding.PLAN and block.live and block.pays_at(now_us)


def _expires_at_us(command: Purchase, plans: list[Block], now_us: int) -> int | None:
    """A plan that is bought while others are there goes on where the last of them ends."""
    if command.duration_us is None:
        return None
    ends_us = [block.expires_at_us for block in plans if block.expires_at_us is not None]
    return max([now_us, *ends_us]) + command.duration_us


def _sensible(command: Purchase, blocks: Iterable[Block], expires_at_us: int | None) -> bool:
    """Whether the amounts and the time make sense: a wallet's blocks together stay within the bounds of an amount."""
    there = sum(block.remaining for block in blocks)
    return (
        0 <= command.price <= AMOUNT_MAX
        and command.amount > 0
        and there + command.amount <= AMOUNT_MAX
        and (command.duration_us is None or command.duration_us > 0)
        and (expires_at_us is None or expires_at_us <= AMOUNT_MAX)
    )


def _refusal(command: Purchase, wallet: Wallet, plans: list[Block], *, live: int) -> Rejected | None:
    """What forbids a purchase before its price is looked for. Who owes repays first."""
    if wallet.asset != command.asset:
        return Rejected(Reason.ASSET_MISMATCH)
    if command.unless_active and any(block.free > 0 for block in plans):
        return Rejected(Reason.PLAN_ACTIVE)
    if live >= BLOCKS_LIVE_MAX:
        return Rejected(Reason.TOO_MANY_BLOCKS)
    if wallet.frozen:
        return Rejected(Reason.WALLET_FROZEN)
    if wallet.receivable:
        return Rejected(Reason.RECEIVABLE_OUTSTANDING, needed=command.price)
    return None


def _may_pay(block: Block, command: Purchase) -> bool:
    """Plans buy no plans; nor does what burns with a plan, or before it, because it is there to be used as one."""
    return block.funding is not Funding.PLAN and (command.priority <= 0 or block.priority < command.priority)
