"""A payment that has come in: what it paid for and what is given with it, as blocks that go back only with it."""

from typing import NamedTuple

from ledger.commands import Reverse, TopUp
from ledger.debts import repay
from ledger.draft import FUNDING_ACCOUNT, Draft
from ledger.model import AMOUNT_MAX, NOT_REVERSED, Account, Block, Funding, Reversal
from ledger.outcomes import Outcome, Reason, Rejected, ToppedUp
from ledger.state import State


class Lot(NamedTuple):
    """A part of what comes in that becomes a block of its own."""

    block_id: str
    amount: int
    funding: Funding
    spread: int = 0


def top_up(state: State, command: TopUp, now_us: int) -> Outcome:
    """Never refused for the number of the wallet's blocks: somebody has paid."""
    if not _sensible(state, command):
        return Rejected(Reason.INVALID_AMOUNT)
    blocks = state.blocks.get(command.wallet, {})
    if any(block_id in blocks for block_id in paid_block_ids(command)):
        return Rejected(Reason.ALREADY_EXISTS)
    draft = Draft(state, command, now_us)
    wallet = draft.open_wallet(command.wallet, command.asset)
    if wallet.asset != command.asset:
        return Rejected(Reason.ASSET_MISMATCH)
    paid_block, bonus_block = paid_block_ids(command)
    repaid = _open(draft, command, Lot(paid_block, command.amount, Funding.PAID, command.spread))
    draft.transfer(
        command.spread,
        asset=wallet.asset,
        debit=Account.CLEARING,
        credit=Account.PACKAGE_SPREAD,
        block_id=paid_block,
        reference=command.payment,
    )
    if command.bonus > 0:
        repaid += _open(draft, command, Lot(bonus_block, command.bonus, Funding.PROMOTIONAL))
    balance = draft.balance(wallet.ref)
    body = {"payment": command.payment, "amount": command.amount, "bonus": command.bonus, "balance": balance}
    draft.raise_event(wallet.ref, "topup.succeeded", {**command.body, **body})
    topped_up = ToppedUp(
        block_id=command.block_id,
        amount=command.amount,
        bonus=command.bonus,
        balance_before=state.balance(wallet.ref, now_us),
        balance_after=balance,
        repaid=repaid,
        at_us=now_us,
    )
    return draft.applied(topped_up)


def paid_block_ids(command: TopUp | Reverse) -> tuple[str, str]:
    """The block of what was paid for, and that of the bonus, which may not be there."""
    return command.block_id, f"{command.block_id}_bonus"


def _sensible(state: State, command: TopUp) -> bool:
    """Whether the amounts make sense: a wallet's blocks together stay within the bounds of an amount."""
    there = sum(block.remaining for block in state.blocks.get(command.wallet, {}).values())
    return (
        command.amount > 0
        and command.bonus >= 0
        and 0 <= command.spread <= AMOUNT_MAX - command.amount
        and there + command.amount + command.bonus <= AMOUNT_MAX
    )


def _open(draft: Draft, command: TopUp, lot: Lot) -> int:
    """Bring *lot* in; what of it repaid a debt."""
    wallet = draft.open_wallet(command.wallet, command.asset)
    draft.transfer(
        lot.amount,
        asset=wallet.asset,
        debit=FUNDING_ACCOUNT[lot.funding],
        credit=wallet.account,
        block_id=lot.block_id,
        reference=command.payment,
    )
    repaid = repay(draft, wallet, lot.amount, paid=True)
    block = Block(
        wallet=wallet.ref,
        id=lot.block_id,
        sequence=draft.next_block_sequence(wallet),
        granted=lot.amount,
        consumed=repaid,
        created_at_us=draft.now_us,
        effective_at_us=draft.now_us,
        source=command.source,
        funding=lot.funding,
        operator_paid=True,
        payment_reference=command.payment,
        metadata=command.metadata,
        reversal=Reversal(spread=lot.spread) if lot.spread else NOT_REVERSED,
    )
    draft.open_block(block)
    draft.raise_block_event("credit.granted", block)
    return repaid
