"""A charge given back: its recorded entries reversed, the last slice first, whatever the burn order is today."""

from collections.abc import Iterator

import msgspec

from ledger.commands import Refund
from ledger.debts import collect, owe_no_more
from ledger.draft import NO_TAGS, RETURN_BLOCKS, Draft, Source
from ledger.granting import take_free
from ledger.model import Account, Payment, Reservation, Slice, WalletRef
from ledger.outcomes import Applied, Outcome, Reason, Refunded, Rejected
from ledger.settling import merged
from ledger.state import State


def refund(state: State, command: Refund, now_us: int) -> Outcome:
    reservation = state.reservations.get(command.reservation)
    if reservation is None:
        return Rejected(Reason.NOT_FOUND)
    if command.payments != reservation.payments:
        return Rejected(Reason.INVALID_AMOUNT)
    left = _left(reservation)
    amounts = [0] * len(reservation.legs)
    for payment in left:
        amounts[payment.leg] += payment.total
    if command.amounts is not None:
        within = len(command.amounts) == len(amounts)
        if not within or any(not 0 <= asked <= most for asked, most in zip(command.amounts, amounts, strict=True)):
            return Rejected(Reason.INVALID_AMOUNT)
        amounts = list(command.amounts)
    draft = Draft(state, command, now_us)
    given = list(_given(left, amounts))
    if command.unfunded is not None:
        refusal = _make_due(draft, reservation, given, command.unfunded)
        if refusal is not None:
            return refusal
    for part in given:
        _reverse(draft, reservation, part)
    after = msgspec.structs.replace(reservation, refunds=merged([*reservation.refunds, *given]))
    payer = reservation.legs[0].wallets[0]
    refunded = Refunded(reservation.ref.reservation, tuple(amounts), after.refunded, draft.balance(payer))
    if not given:
        return Applied(result=refunded)
    body = {
        "reservation": reservation.ref.reservation,
        "request_id": reservation.request_id,
        "refunded": sum(amounts),
    }
    if command.reason is not None:
        body["reason"] = command.reason
    draft.raise_event(payer, "charge.refunded", body)
    return draft.applied(msgspec.structs.replace(refunded, balance=draft.balance(payer)), after)


def _left(reservation: Reservation) -> list[Payment]:
    """What was paid and not given back yet, in the order of payment."""
    given = {payment.name: payment for payment in reservation.refunds}
    left = []
    for payment in reservation.payments:
        back = given.get(payment.name)
        base = payment.base - (0 if back is None else back.base)
        markup = payment.markup - (0 if back is None else back.markup)
        if base + markup > 0:
            left.append(msgspec.structs.replace(payment, base=base, markup=markup))
    return left


def _given(left: list[Payment], amounts: list[int]) -> Iterator[Payment]:
    """The parts of *left* that make up *amounts*, the last first; base and markup pro rata, markup rounded up."""
    missing = list(amounts)
    for payment in reversed(left):
        part = min(missing[payment.leg], payment.total)
        if part > 0:
            missing[payment.leg] -= part
            base = payment.base * part // payment.total
            yield msgspec.structs.replace(payment, base=base, markup=part - base)


def _make_due(draft: Draft, reservation: Reservation, given: list[Payment], line: WalletRef) -> Rejected | None:
    """Let the tenant owe the revenue that it gives back, within its line.

    What was burnt on an overdraft was drawn on the line then.
    """
    revenue = [part for part in given if part.base_account == Account.REVENUE]
    drawn = sum(part.base for part in revenue if part.block is not None)
    available = draft.available(line)
    if available < drawn:
        return Rejected(Reason.LIMIT_REACHED, needed=drawn, available=available, limit=line)
    wallet = draft.wallet(line)
    if wallet is not None:
        reference = reservation.ref.reservation
        take_free(draft, wallet, draft.payable(line, NO_TAGS), drawn, account=Account.LIMIT, reference=reference)
    for part in revenue:
        draft.transfer(
            part.base,
            asset=reservation.asset,
            debit=Account.EXTERNAL,
            credit=Account.TENANT_DUE,
            block_id=part.block,
            reference=reservation.ref.reservation,
            scope=part.wallet.scope,
        )
    return None


def _reverse(draft: Draft, reservation: Reservation, part: Payment) -> None:
    """Book *part* back to the wallet that paid it, and put it where it was."""
    wallet = draft.wallet(part.wallet)
    assert wallet is not None, "a payment was made from a wallet"
    reference = reservation.ref.reservation
    for account, amount in ((part.base_account, part.base), (part.markup_account, part.markup)):
        draft.transfer(
            amount,
            asset=wallet.asset,
            debit=account,
            credit=wallet.account,
            block_id=part.block,
            reference=reference,
            scope=wallet.ref.scope,
        )
    if part.block is None:
        owe_no_more(draft, wallet, part.total, of_reversed=False, reference=reference)
        return
    block = draft.block(part.wallet, part.block)
    gone = 0 if part.pool is None else _take_from_pool(draft, part.pool, part.markup, paid=block.operator_paid)
    back = part.total
    if gone > 0 and not block.expired_at(draft.now_us):
        back -= gone
        # Others have used it up that the operator was paid for: nobody knows that of what comes back.
        draft.change_block(draft.returns_block(wallet, operator_paid=False), granted=gone)
    draft.change_block(block, consumed=-back)
    collect(draft, (Slice(part.leg, part.wallet, part.block, back),), reference=reference)
    if block.expired_at(draft.now_us):
        lapsed = min(back, draft.free(block))
        draft.change_block(block, expired=lapsed)
        draft.spend(Source(wallet, block, lapsed), lapsed, account=Account.BREAKAGE, reference=reference)


def _take_from_pool(draft: Draft, ref: WalletRef, amount: int, *, paid: bool) -> int:
    """Take *amount* of markup back out of a pool. What the pool has spent meanwhile, it owes.

    Markup that the operator was *paid* for comes out of the like first. Returns what there was no more of: others have
    used it up, and it must not be there twice.
    """
    pool = draft.wallet(ref)
    assert pool is not None, "markup was returned to a wallet"
    missing = amount if paid else 0
    blocks = draft.payable(ref, NO_TAGS)
    blocks.sort(key=lambda block: (block.operator_paid is not paid, block.id not in RETURN_BLOCKS.values()))
    for block in blocks:
        part = min(amount, draft.free(block))
        if part > 0:
            draft.use(Source(pool, block, part), part, held=False)
            amount -= part
            missing -= part if paid and block.operator_paid else 0
    if amount > 0:
        draft.use(Source(pool, None, amount), amount, held=False)
    return missing
