"""What a wallet owes: how it comes to be owed, is repaid by what comes in, and is owed no more.

How it works. A wallet has one receivable, whatever it comes from. Of it, what reversed payments have left is told apart
(`Debts.reversed`), because the operator has lost that money: what repays it with credits that the operator was not paid
for becomes due from the tenant, or a gift would have made good a payment. It is repaid before other debts. When a debt
turns out not to be owed, it is struck out; what was repaid of it meanwhile comes back, and of the same kind: as paid
for at most as far as credits that were paid for have repaid debts like it. The two sorts never stand in for each other:
a line that was drawn once, for an overdraft, would let paid credits come back that had made a payment good.
"""

from collections.abc import Iterable

from msgspec.structs import replace

from ledger.draft import Draft
from ledger.model import Account, Debts, Slice, Wallet


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
        others = repaid - of_reversed
        after = replace(after, reversed_paid=debts.reversed_paid + of_reversed, repaid_paid=debts.repaid_paid + others)
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
    forgiven = min(amount, debts.reversed if of_reversed else draft.owed(wallet.ref) - debts.reversed)
    if forgiven > 0:
        changed = replace(debts, reversed=debts.reversed - forgiven) if of_reversed else None
        draft.change_wallet(wallet.ref, receivable=-forgiven, debts=changed)
    if forgiven < amount:
        _come_back(draft, wallet, amount - forgiven, of_reversed=of_reversed, reference=reference)


def owe_for_payment(draft: Draft, wallet: Wallet, amount: int, *, reference: str | None) -> None:
    """Let *amount* of the wallet's other debts, repaid or not, be of a reversed payment; a negative one not any more.

    What the tenant clawed back of a payment is like any other debt as long as the operator has the money.
    """
    debts = draft.debts(wallet.ref)
    sign = 1 if amount > 0 else -1
    owed, repaid = draft.owed(wallet.ref) - debts.reversed, debts.repaid_paid
    if amount < 0:
        owed, repaid = debts.reversed, debts.reversed_paid
    owed = sign * min(abs(amount), owed)
    paid = sign * min(abs(amount - owed), repaid)
    due = amount - owed - paid
    _make_due(draft, wallet, due, reference)
    after = Debts(
        reversed=debts.reversed + owed,
        reversed_paid=debts.reversed_paid + paid,
        repaid_paid=debts.repaid_paid - paid,
        repaid_due=debts.repaid_due + due,
    )
    draft.change_wallet(wallet.ref, debts=None if after == debts else after)


def _come_back(draft: Draft, wallet: Wallet, amount: int, *, of_reversed: bool, reference: str | None) -> None:
    """Give back what had repaid a debt. It repays what else is owed, and the rest is credits again."""
    debts = draft.debts(wallet.ref)
    paid = min(amount, debts.reversed_paid if of_reversed else debts.repaid_paid)
    unpaid = amount - paid
    if of_reversed:
        _make_due(draft, wallet, -unpaid, reference)
        after = replace(debts, reversed_paid=debts.reversed_paid - paid, repaid_due=debts.repaid_due - unpaid)
    else:
        after = replace(debts, repaid_paid=debts.repaid_paid - paid)
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
            owed = min(taken, reversal.owed)
            clawed = min(taken - owed, reversal.clawed)
            moved = replace(
                reversal,
                free=reversal.free + owed,
                owed=reversal.owed - owed,
                clawed=reversal.clawed - clawed,
                lapsed=reversal.lapsed + clawed,
            )
            draft.change_block(
                draft.block(ref, block.id),
                revoked=taken,
                clawed=-taken,
                reversal=None if moved == reversal else moved,
            )
            of_reversed = owed + clawed
            owe_no_more(draft, wallet, of_reversed, of_reversed=True, reference=reference)
            owe_no_more(draft, wallet, taken - of_reversed, of_reversed=False, reference=reference)
