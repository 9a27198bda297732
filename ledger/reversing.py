"""A payment taken back, and given back again: its credits follow it exactly, wherever they are by then.

How it works. `Reverse` says how much of the payment is gone by now, and so how much of each block must be: the
difference to what reversals have taken of it already is taken or given back. What is free goes first, then what was
spent or is held, which is owed, and at last what the tenant had taken back or had lapsed, out of the operator's
breakage. Of that, a claw-back's debt is from then on owed for the payment. It comes back in the opposite order. So the
clearing account follows the processor's to the last credit, and a dispute that is won leaves no trace.
"""

from typing import NamedTuple

from msgspec.structs import replace

from ledger.commands import Reverse
from ledger.debts import owe_for_payment, owe_no_more, owe_reversed
from ledger.draft import FUNDING_ACCOUNT, Draft, Source
from ledger.model import AMOUNT_MAX, Account, Block, Funding, Wallet
from ledger.outcomes import Outcome, Reason, Rejected, Reversed
from ledger.state import State
from ledger.topping_up import paid_block_ids


class _Step(NamedTuple):
    """What a reversal does to one block."""

    draft: Draft
    command: Reverse
    wallet: Wallet
    block: Block


class _Moved(NamedTuple):
    """Credits that a reversal takes from a block, or gives back: of what is free, owed, clawed back before, lapsed."""

    free: int
    owed: int
    clawed: int
    lapsed: int


def reverse(state: State, command: Reverse, now_us: int) -> Outcome:
    if not (0 <= command.taken <= command.paid <= AMOUNT_MAX and command.paid > 0):
        return Rejected(Reason.INVALID_AMOUNT)
    there = state.blocks.get(command.wallet, {})
    blocks = [there[block_id] for block_id in paid_block_ids(command) if block_id in there]
    wallet = state.wallets.get(command.wallet)
    if wallet is None or command.block_id not in there or not _bought(blocks[0]):
        return Rejected(Reason.NOT_FOUND)
    draft = Draft(state, command, now_us)
    taken = given = 0
    if command.revision > blocks[0].reversal.revision:
        for block in blocks:
            step = _Step(draft, command, wallet, block)
            draft.change_block(
                block, reversal=replace(block.reversal, revision=command.revision, frozen=command.frozen)
            )
            missing = _part_of(block.granted, command) - block.reversal.taken
            if missing > 0:
                _take(step, missing)
                taken += missing
            elif missing < 0:
                _give_back(step, -missing)
                given -= missing
        _move_spread(_Step(draft, command, wallet, blocks[0]))
    result = Reversed(
        taken=taken,
        given=given,
        taken_in_all=sum(draft.block_after(block).reversal.taken for block in blocks),
        balance=draft.balance(wallet.ref),
        receivable=draft.owed(wallet.ref),
    )
    return draft.applied(result)


def _bought(block: Block) -> bool:
    """Whether a payment stands behind it: what came out of another wallet was paid for there."""
    return block.funding is Funding.PAID and block.pool is None


def _part_of(amount: int, command: Reverse) -> int:
    """What of *amount* is gone with the part of the payment that is taken, rounded down."""
    return amount * command.taken // command.paid


def _take(step: _Step, missing: int) -> None:
    draft, command, wallet, block = step
    free = min(missing, block.free)
    owed = min(missing - free, max(0, block.consumed + block.reserved - block.clawed))
    clawed = min(missing - free - owed, block.clawed - block.reversal.owed - block.reversal.clawed)
    lapsed = missing - free - owed - clawed
    _count(step, _Moved(free, owed, clawed, lapsed), sign=1)
    if owed > 0:
        owe_reversed(draft, wallet, owed)
    owe_for_payment(draft, wallet, clawed, reference=command.reference)
    source = Source(wallet, block, free + owed)
    draft.spend(source, source.amount, account=FUNDING_ACCOUNT[block.funding], reference=command.reference)
    _move_lapsed(step, clawed + lapsed)
    if source.amount > 0:
        _tell(step, "credit.clawed_back", amount=source.amount, owed=owed)


def _give_back(step: _Step, excess: int) -> None:
    """What was taken last comes back first. In a block that has expired meanwhile it lapses at once."""
    draft, command, wallet, block = step
    lapsed = min(excess, block.reversal.lapsed)
    clawed = min(excess - lapsed, block.reversal.clawed)
    owed = min(excess - lapsed - clawed, block.reversal.owed)
    free = excess - lapsed - clawed - owed
    _count(step, _Moved(free, owed, clawed, lapsed), sign=-1)
    draft.transfer(
        free + owed,
        asset=wallet.asset,
        debit=FUNDING_ACCOUNT[block.funding],
        credit=wallet.account,
        block_id=block.id,
        reference=command.reference,
    )
    owe_no_more(draft, wallet, owed, of_reversed=True, reference=command.reference)
    owe_for_payment(draft, wallet, -clawed, reference=command.reference)
    _move_lapsed(step, -clawed - lapsed)
    restored = free + owed
    if block.expired_at(draft.now_us):
        restored -= free
        draft.change_block(block, expired=free)
        draft.spend(Source(wallet, block, free), free, account=Account.BREAKAGE, reference=command.reference)
    if restored > 0:
        _tell(step, "credit.restored", amount=restored)


def _count(step: _Step, moved: _Moved, *, sign: int) -> None:
    """Change the block by what is taken of it (*sign* 1) or given back (-1)."""
    reversal = step.draft.block_after(step.block).reversal
    counted = replace(
        reversal,
        free=reversal.free + sign * moved.free,
        owed=reversal.owed + sign * moved.owed,
        clawed=reversal.clawed + sign * moved.clawed,
        lapsed=reversal.lapsed + sign * moved.lapsed,
    )
    step.draft.change_block(step.block, revoked=sign * moved.free, clawed=sign * moved.owed, reversal=counted)


def _move_lapsed(step: _Step, amount: int) -> None:
    """Pay *amount* back out of the breakage that it had become; a negative one becomes breakage again.

    A bonus was nobody's money: what has lapsed of it stays as it is booked.
    """
    if step.block.funding is Funding.PAID:
        _book(step, amount, Account.BREAKAGE)


def _move_spread(step: _Step) -> None:
    """Let the spread bear what is gone of the payment beyond the credits: together they are exactly its part."""
    reversal = step.draft.block_after(step.block).reversal
    gone = _part_of(step.block.granted + reversal.spread, step.command) - _part_of(step.block.granted, step.command)
    _book(step, gone - reversal.spread_taken, Account.PACKAGE_SPREAD)
    step.draft.change_block(step.block, reversal=replace(reversal, spread_taken=gone))


def _book(step: _Step, amount: int, account: str) -> None:
    """Move *amount* from *account* to clearing; a negative one back."""
    debit, credit = (account, Account.CLEARING) if amount > 0 else (Account.CLEARING, account)
    step.draft.transfer(
        abs(amount),
        asset=step.wallet.asset,
        debit=debit,
        credit=credit,
        block_id=step.block.id,
        reference=step.command.reference,
    )


def _tell(step: _Step, event: str, **facts: int) -> None:
    draft, command, _, block = step
    draft.raise_block_event(event, block, **facts, payment=block.payment_reference, reference=command.reference)
