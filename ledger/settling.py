"""What a reservation comes to: its own slices first, then what is free, an agreed overdraft, and at last our loss."""

from typing import NamedTuple

import msgspec

from ledger.commands import (
    Commit,
    Debit,
    Lapse,
    Release,
)
from ledger.draft import NO_TAGS, Draft
from ledger.model import (
    AMOUNT_MAX,
    LIMIT_LEG,
    UNFUNDED_LEG,
    USD_ASSET,
    Account,
    Block,
    Charge,
    Funding,
    Payment,
    Reservation,
    ReservationState,
    Scope,
    Settlement,
    Slice,
    Wallet,
    WalletRef,
)
from ledger.outcomes import (
    Applied,
    Changed,
    KeyFreed,
    Outcome,
    Reason,
    Rejected,
    ReservationChanged,
    Transfer,
    UsageRecorded,
)
from ledger.reserving import already_settled, free_slice, hold_all, settled
from ledger.state import State


def commit(state: State, command: Commit, now_us: int) -> Outcome:
    reservation = state.reservations.get(command.reservation)
    if reservation is None:
        return Rejected(Reason.NOT_FOUND)
    if reservation.state is not ReservationState.OPEN and reservation.settled_by == command.id:
        balance = state.balance(reservation.legs[0].wallets[0], now_us)
        return Applied(result=settled(reservation, balance=balance), replayed=True)
    if reservation.state in (ReservationState.COMMITTED, ReservationState.RELEASED):
        return already_settled(reservation)
    if not _chargeable(command.settlement, reservation):
        return Rejected(Reason.INVALID_AMOUNT)
    draft = Draft(state, command.id, now_us)
    late = reservation.state is ReservationState.EXPIRED
    settlement = _missing(command.settlement, reservation) if late else command.settlement
    after = _charge(draft, reservation, settlement)
    if command.final or late:
        after = _free_all(draft, after, ReservationState.COMMITTED, command.id)
    answers = reservation.key if command.response is not None else None
    result = settled(after, balance=draft.balance(after.legs[0].wallets[0]), late=late)
    draft.change_reservation(ReservationChanged(reservation=after))
    return msgspec.structs.replace(draft.applied(result), answers=answers)


def release(state: State, command: Release, now_us: int) -> Outcome:
    reservation = state.reservations.get(command.reservation)
    if reservation is None:
        return Rejected(Reason.NOT_FOUND)
    if reservation.state is ReservationState.RELEASED:
        balance = state.balance(reservation.legs[0].wallets[0], now_us)
        return Applied(result=settled(reservation, balance=balance), replayed=True)
    if reservation.state is not ReservationState.OPEN:
        return already_settled(reservation)
    draft = Draft(state, command.id, now_us)
    return _end(draft, reservation, ReservationState.RELEASED, command.id)


def lapse(state: State, command: Lapse, now_us: int) -> Outcome:
    reservation = state.reservations.get(command.reservation)
    if reservation is None:
        return Rejected(Reason.NOT_FOUND)
    if reservation.state is not ReservationState.OPEN or now_us < reservation.expires_at_us:
        return Applied(result=Changed())
    draft = Draft(state, command.id, now_us)
    if reservation.mark is not None and _chargeable(reservation.mark, reservation):
        reservation = _charge(draft, reservation, reservation.mark)
    body = {
        "reservation": reservation.ref.reservation,
        "request_id": reservation.request_id,
        "charged": sum(charge.total for charge in reservation.charged),
    }
    draft.raise_event(reservation.legs[0].wallets[0], "reservation.expired", body)
    return _end(draft, reservation, ReservationState.EXPIRED, command.id)


def debit(state: State, command: Debit, now_us: int) -> Outcome:
    if command.reservation in state.reservations:
        return Rejected(Reason.ALREADY_EXISTS, state=state.reservations[command.reservation].state)
    draft = Draft(state, command.id, now_us)
    reservation = hold_all(draft, command, ttl_us=0)
    if isinstance(reservation, Rejected):
        return reservation
    if not _chargeable(command.settlement, reservation):
        return Rejected(Reason.INVALID_AMOUNT)
    charged = _charge(draft, reservation, command.settlement)
    return _end(draft, charged, ReservationState.COMMITTED, command.id)


def _end(draft: Draft, reservation: Reservation, state: ReservationState, command_id: str) -> Applied:
    """Free what is held and say so; a reservation that charged nothing gives its key back."""
    after = _free_all(draft, reservation, state, command_id)
    if state is not ReservationState.COMMITTED and after.key is not None and after.commits == 0:
        operation, key = after.key
        scope = Scope(after.ref.tenant, after.ref.mode)
        draft.other.append(KeyFreed(scope=scope, operation=operation, key=key))
        after = msgspec.structs.replace(after, key=None)
    draft.change_reservation(ReservationChanged(reservation=after))
    return draft.applied(settled(after, balance=draft.balance(after.legs[0].wallets[0])))


def _free_all(draft: Draft, reservation: Reservation, state: ReservationState, command_id: str) -> Reservation:
    for held in reservation.slices:
        free_slice(draft, held)
    return msgspec.structs.replace(
        reservation,
        slices=(),
        state=state,
        balance=draft.balance(reservation.legs[0].wallets[0]),
        settled_at_us=draft.now_us,
        settled_by=command_id,
        mark=None,
    )


def _chargeable(settlement: Settlement, reservation: Reservation) -> bool:
    amounts = [amount for charge in settlement.charges for amount in (charge.base, charge.markup)]
    return len(settlement.charges) == len(reservation.legs) and all(0 <= amount <= AMOUNT_MAX for amount in amounts)


def _missing(settlement: Settlement, reservation: Reservation) -> Settlement:
    """What a late commit still has to debit: the actual charge less what was charged without it, never below zero."""
    charges = []
    for number, (actual, charged) in enumerate(zip(settlement.charges, reservation.charged, strict=True)):
        written_off = reservation.shortfall if number == 0 else 0
        total = max(0, actual.total - charged.total - written_off)
        base = min(max(0, actual.base - charged.base), total)
        charges.append(Charge(base=base, markup=total - base))
    usage = settlement.usage
    if usage is not None:
        cost_nanos = max(0, usage.provider_cost_nanos - reservation.provider_cost_nanos)
        usage = msgspec.structs.replace(usage, provider_cost_nanos=cost_nanos)
    return Settlement(charges=tuple(charges), usage=usage)


class _Part(NamedTuple):
    """A part of a charge: from a block, or the wallet's overdraft when *block* is None."""

    wallet: Wallet
    block: Block | None
    amount: int


def _charge(draft: Draft, reservation: Reservation, settlement: Settlement) -> Reservation:
    """Charge every leg and draw on the limits; the reservation afterwards, with what is left of its slices."""
    slices = list(reservation.slices)
    charged: list[Charge] = []
    payments: list[Payment] = []
    shortfall = 0
    for number, charge in enumerate(settlement.charges):
        parts = _collect(draft, reservation, number, charge.total, slices)
        paid, missed = _post(draft, reservation, number, charge, parts)
        payments += paid
        shortfall += missed
        charged.append(
            Charge(base=sum(payment.base for payment in paid), markup=sum(payment.markup for payment in paid))
        )
    for ref in reservation.limits:
        _draw(draft, reservation, slices, ref=ref, leg=LIMIT_LEG, amount=charged[0].total)
    if reservation.unfunded is not None:
        burnt = sum(payment.base for payment in payments if payment.base_account == Account.TENANT_DUE)
        _draw(draft, reservation, slices, ref=reservation.unfunded, leg=UNFUNDED_LEG, amount=burnt)
    if settlement.usage is not None:
        _record(draft, reservation, settlement, tuple(charged), shortfall)
    return msgspec.structs.replace(
        reservation,
        slices=tuple(slices),
        charged=tuple(
            Charge(base=before.base + now.base, markup=before.markup + now.markup)
            for before, now in zip(reservation.charged, charged, strict=True)
        ),
        shortfall=reservation.shortfall + shortfall,
        payments=(*reservation.payments, *payments),
        commits=reservation.commits + 1,
        provider_cost_nanos=reservation.provider_cost_nanos
        + (settlement.usage.provider_cost_nanos if settlement.usage else 0),
    )


def _collect(draft: Draft, reservation: Reservation, leg: int, amount: int, slices: list[Slice]) -> list[_Part]:
    """Consume *amount* for a leg: its own slices, then free blocks, then the agreed overdraft. It may come to less."""
    parts, amount = _consume_slices(draft, leg, amount, slices)
    for ref in reservation.legs[leg].wallets:
        wallet = draft.wallet(ref)
        if wallet is None or amount == 0:
            continue
        for block in draft.payable(ref, reservation.tags):
            part = min(amount, draft.free(block))
            if part > 0:
                draft.change_block(block, consumed=part)
                parts.append(_Part(wallet, block, part))
                amount -= part
        part = min(amount, draft.overdraft_free(wallet))
        if part > 0:
            draft.change_wallet(ref, receivable=part)
            parts.append(_Part(wallet, None, part))
            amount -= part
    return parts


def _consume_slices(draft: Draft, leg: int, amount: int, slices: list[Slice]) -> tuple[list[_Part], int]:
    """Use up *slices* of *leg* in their order, in place: the parts, and what of *amount* they did not cover."""
    parts: list[_Part] = []
    kept: list[Slice] = []
    for held in slices:
        part = min(amount, held.amount) if held.leg == leg else 0
        if part > 0:
            wallet = draft.wallet(held.wallet)
            assert wallet is not None
            if held.block is None:
                draft.change_wallet(held.wallet, overdraft_reserved=-part, receivable=part)
                parts.append(_Part(wallet, None, part))
            else:
                block = draft.block(held.wallet, held.block)
                draft.change_block(block, reserved=-part, consumed=part)
                parts.append(_Part(wallet, block, part))
            amount -= part
        if part < held.amount:
            kept.append(msgspec.structs.replace(held, amount=held.amount - part))
    slices[:] = kept
    return parts, amount


def _post(
    draft: Draft, reservation: Reservation, leg: int, charge: Charge, parts: list[_Part]
) -> tuple[list[Payment], int]:
    """Book what each part pays of base and markup, pro rata; the payments, and what nobody paid.

    Shares are differences of the rounded-down running total, so that they add up exactly and the last part bears
    the remainder.
    """
    reference = reservation.ref.reservation
    payments: list[Payment] = []
    covered = base_covered = 0
    for part in parts:
        covered += part.amount
        base = charge.base * covered // charge.total - base_covered
        base_covered += base
        payment = Payment(
            leg=leg,
            wallet=part.wallet.ref,
            block=part.block.id if part.block else None,
            base=base,
            markup=part.amount - base,
            base_account=_base_account(part.block),
            markup_account=_markup_account(part.block, reservation.developer),
        )
        payments.append(payment)
        draft.transfer(
            part.wallet,
            base,
            debit=part.wallet.account,
            credit=payment.base_account,
            block=payment.block,
            reference=reference,
        )
        if part.block is not None and part.block.pool is not None:
            draft.return_to_pool(part.wallet, part.block, payment.markup, reference=reference)
        else:
            draft.transfer(
                part.wallet,
                payment.markup,
                debit=part.wallet.account,
                credit=payment.markup_account,
                block=payment.block,
                reference=reference,
            )
    missed = charge.total - covered
    payer = draft.wallet(reservation.legs[leg].wallets[0])
    if payer is not None:
        draft.transfer(payer, missed, debit=Account.METER_SHORTFALL, credit=Account.REVENUE, reference=reference)
    return payments, missed


def _base_account(block: Block | None) -> str:
    return Account.REVENUE if block is None or block.operator_paid else Account.TENANT_DUE


def _markup_account(block: Block | None, developer: str | None) -> str:
    if block is not None and block.pool is not None:
        return f"wallet:{block.pool.wallet}"
    if block is not None and block.funding is Funding.PAID and developer is not None:
        return f"{Account.DEVELOPER_PAYABLE}:{developer}"
    return Account.TENANT_MARGIN


def _draw(
    draft: Draft, reservation: Reservation, slices: list[Slice], *, ref: WalletRef, leg: int, amount: int
) -> None:
    """Use up a limit: its own slices, then what is free of it. Work that is done is never refused."""
    own = [held for held in slices if held.wallet == ref and held.leg == leg]
    rest = [held for held in slices if not (held.wallet == ref and held.leg == leg)]
    parts, amount = _consume_slices(draft, leg, amount, own)
    slices[:] = rest + own
    wallet = draft.wallet(ref)
    if wallet is None:
        return
    for block in draft.payable(ref, NO_TAGS):
        part = min(amount, draft.free(block))
        if part > 0:
            draft.change_block(block, consumed=part)
            parts.append(_Part(wallet, block, part))
            amount -= part
    for used in parts:
        draft.transfer(
            wallet,
            used.amount,
            debit=wallet.account,
            credit=Account.LIMIT,
            block=used.block.id if used.block else None,
            reference=reservation.ref.reservation,
        )


def _record(
    draft: Draft, reservation: Reservation, settlement: Settlement, charged: tuple[Charge, ...], shortfall: int
) -> None:
    """The usage row, the provider's cost in dollars, and the event: all in the charge's transaction."""
    usage = settlement.usage
    assert usage is not None
    row = UsageRecorded(
        reservation=reservation.ref,
        part=reservation.commits + 1,
        record=usage,
        charges=charged,
        shortfall=shortfall,
        at_us=draft.now_us,
    )
    draft.other.append(row)
    if usage.provider_cost_nanos > 0:
        entry = Transfer(
            scope=Scope(reservation.ref.tenant, reservation.ref.mode),
            debit=Account.PROVIDER_COST,
            credit=Account.PROVIDER_PAYABLE,
            amount=usage.provider_cost_nanos,
            asset=USD_ASSET,
            reference=reservation.ref.reservation,
        )
        draft.transfers.append(entry)
    body = {
        "reservation": reservation.ref.reservation,
        "request_id": usage.request_id,
        "charged": sum(charge.total for charge in charged),
    }
    draft.raise_event(reservation.legs[0].wallets[0], "usage.recorded", body)
