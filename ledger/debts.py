"""What a wallet owes: how it comes to be owed, is repaid by what comes in, and is owed no more.

How it works. A wallet has one receivable, whatever it comes from. Of it, what reversed payments have left is told apart
(`Debts.reversed`), because the operator has lost that money: what repays it with credits that the operator was not paid
for becomes due from the tenant, or a gift would have made good a payment. It is repaid before other debts. When a debt
turns out not to be owed, but was repaid meanwhile, what repaid it comes back, and of the same kind: as paid for at most
as far as credits that were paid for have repaid any debt of the wallet.
"""

from collections.abc import Iterable

from msgspec.structs import replace

from ledger.draft import Draft
from ledger.model import Account, Slice, Wallet


def repay(draft: Draft, wallet: Wallet, amount: int, *, paid: bool, reference: str | None = None) -> int:
    """Let up to *amount* of what comes in repay what the wallet owes; how much that is.

    Args:
        paid: whether the operator was paid for it.
    """
    repaid = min(amount, draft.owed(wallet.ref))
    if repaid == 0:
        return 0
    debts = draft.debts(wallet.ref)
    of_reversed = min(repaid, debts.reversed)
    after = replace(debts, reversed=debts.reversed - of_reversed)
    if paid:
        after = replace(after, repaid_paid=debts.repaid_paid + repaid)
    elif of_reversed > 0:
        after = replace(after, repaid_due=debts.repaid_due + of_reversed)
        _make_due(draft, wallet, of_reversed, reference)
    draft.change_wallet(wallet.ref, receivable=-repaid, debts=None if after == debts else after)
    return repaid


def owe_reversed(draft: Draft, wallet: Wallet, amount: int) -> None:
    """Let the wallet owe *amount* of a reversed payment."""
    debts = draft.debts(wallet.ref)
    draft.change_wallet(wallet.ref, receivable=amount, debts=replace(debts, reversed=debts.reversed + amount))


def owe_no_more(draft: Draft, wallet: Wallet, amount: int, *, of_reversed: bool, reference: str | None) -> None:
    """Let the wallet owe *amount* less. What it does not owe any more was repaid: that comes back.

    Args:
        of_reversed: whether it was owed because of a reversed payment.
    """
    debts = draft.debts(wallet.ref)
    owed = draft.owed(wallet.ref)
    forgiven = min(amount, debts.reversed if of_reversed else owed)
    if forgiven > 0:
        left = debts.reversed - forgiven if of_reversed else min(debts.reversed, owed - forgiven)
        changed = None if left == debts.reversed else replace(debts, reversed=left)
        draft.change_wallet(wallet.ref, receivable=-forgiven, debts=changed)
    if forgiven < amount:
        _come_back(draft, wallet, amount - forgiven, of_reversed=of_reversed, reference=reference)


def _come_back(draft: Draft, wallet: Wallet, amount: int, *, of_reversed: bool, reference: str | None) -> None:
    """Give back what had repaid a debt. It repays what else is owed, and the rest is credits again."""
    debts = draft.debts(wallet.ref)
    paid = min(amount, debts.repaid_paid)
    unpaid = amount - paid
    due = min(unpaid, debts.repaid_due) if of_reversed else 0
    _make_due(draft, wallet, -due, reference)
    after = replace(debts, repaid_paid=debts.repaid_paid - paid, repaid_due=debts.repaid_due - due)
    draft.change_wallet(wallet.ref, debts=after)
    for part, operator_paid in ((paid, True), (unpaid, False)):
        back = part - repay(draft, wallet, part, paid=operator_paid, reference=reference)
        if back > 0:
            draft.change_block(draft.returns_block(wallet, operator_paid=operator_paid), granted=back)


def _make_due(draft: Draft, wallet: Wallet, amount: int, reference: str | None) -> None:
    """Book that the tenant owes *amount* that had been the operator's revenue; a negative one goes back."""
    debit, credit = Account.REVENUE, Account.TENANT_DUE
    if amount < 0:
        debit, credit = credit, debit
    draft.transfer(
        abs(amount), asset=wallet.asset, debit=debit, credit=credit, reference=reference, scope=wallet.ref.scope
    )


def collect(draft: Draft, slices: Iterable[Slice], *, reference: str) -> None:
    """Take what was clawed back of the blocks of *slices* while it was held or spent, and is free now.

    It is owed no more. No entry is booked: it left the wallet with the claw-back, and the wallet has less left and owes
    less, or has back what had repaid the debt.
    """
    for ref, block_id in dict.fromkeys((held.wallet, held.block) for held in slices):
        block = None if block_id is None else draft.block_after(draft.block(ref, block_id))
        if block is None or block.clawed == 0:
            continue
        taken = min(block.clawed - block.consumed - block.reserved, block.free)
        wallet = draft.wallet(ref)
        assert wallet is not None, "a block belongs to a wallet"
        if taken > 0:
            reversal = block.reversal
            of_reversed = min(taken, reversal.owed)
            moved = replace(reversal, owed=reversal.owed - of_reversed, free=reversal.free + of_reversed)
            draft.change_block(
                draft.block(ref, block.id),
                revoked=taken,
                clawed=-taken,
                reversal=moved if of_reversed > 0 else None,
            )
            owe_no_more(draft, wallet, of_reversed, of_reversed=True, reference=reference)
            owe_no_more(draft, wallet, taken - of_reversed, of_reversed=False, reference=reference)
