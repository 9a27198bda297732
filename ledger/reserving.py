"""Setting credits aside: slices of blocks in burn order, over payers and limits, all or nothing."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from ledger.commands import (
    Debit,
    Extend,
    Reserve,
    ReserveLeg,
)
from ledger.draft import NO_TAGS, Draft
from ledger.model import (
    AMOUNT_MAX,
    LIMIT_LEG,
    UNFUNDED_LEG,
    Charge,
    Leg,
    Reservation,
    ReservationState,
    Settlement,
    Slice,
    WalletRef,
)
from ledger.outcomes import (
    Applied,
    Outcome,
    Reason,
    Rejected,
    ReservationChanged,
    Reserved,
    Settled,
)
from ledger.state import State

RESERVATION_LIFE_US_MAX = 24 * 3600 * 1_000_000
"""No reservation outlives a day: an expired block that it pins must lapse at last."""


class _Hold(NamedTuple):
    """What a leg could get hold of: its slices, and the sum of what there was at most."""

    slices: list[Slice]
    amount: int


def reserve(state: State, command: Reserve, now_us: int) -> Outcome:
    known = state.reservations.get(command.reservation)
    if known is not None:
        if known.state is ReservationState.OPEN and known.request_id == command.request_id:
            return Applied(result=_reserved(known), replayed=True)
        return Rejected(Reason.ALREADY_EXISTS, state=known.state)
    draft = Draft(state, command.id, now_us)
    reservation = hold_all(draft, command, ttl_us=command.ttl_us, mark=command.mark, metadata=command.metadata)
    if isinstance(reservation, Rejected):
        return reservation
    draft.change_reservation(ReservationChanged(reservation=reservation))
    return draft.applied(_reserved(reservation))


def hold_all(
    draft: Draft,
    command: Reserve | Debit,
    *,
    ttl_us: int,
    mark: Settlement | None = None,
    metadata: dict[str, Any] | None = None,
) -> Reservation | Rejected:
    """Hold every leg and every limit, or refuse."""
    if not command.legs or any(not 0 <= leg.minimum <= leg.amount <= AMOUNT_MAX for leg in command.legs):
        return Rejected(Reason.INVALID_AMOUNT)
    refused = _unusable(draft, (ref for leg in command.legs for ref in leg.wallets), command.asset)
    if refused is not None:
        return refused
    draft.open_wallet(command.legs[0].wallets[0], command.asset)
    reservation = Reservation(
        ref=command.reservation,
        state=ReservationState.OPEN,
        asset=command.asset,
        created_at_us=draft.now_us,
        expires_at_us=draft.now_us + min(ttl_us, RESERVATION_LIFE_US_MAX),
        legs=tuple(Leg(wallets=leg.wallets) for leg in command.legs),
        limits=command.limits,
        unfunded=command.unfunded,
        developer=command.developer,
        tags=command.tags,
        request_id=getattr(command, "request_id", None),
        mark=mark,
        charged=(Charge(),) * len(command.legs),
        key=None if command.key is None else (command.key.operation, command.key.key),
        metadata=metadata or {},
    )
    slices: list[Slice] = []
    for number, leg in enumerate(command.legs):
        held = _hold_leg(draft, reservation, number, leg)
        if isinstance(held, Rejected):
            return held
        slices += held
    reserved = sum(held.amount for held in slices if held.leg >= 0)
    return msgspec.structs.replace(reservation, slices=tuple(slices), reserved=reserved)


def _unusable(draft: Draft, wallets: Iterable[WalletRef], asset: str) -> Rejected | None:
    for ref in wallets:
        wallet = draft.wallet(ref)
        if wallet is not None and wallet.asset != asset:
            return Rejected(Reason.ASSET_MISMATCH)
    return None


def _hold_leg(draft: Draft, reservation: Reservation, number: int, leg: ReserveLeg) -> list[Slice] | Rejected:
    """Hold *leg.amount*, or what there is down to *leg.minimum*, with what it draws on limits and the unfunded line."""
    wanted = leg.amount
    if number == 0:
        for ref in reservation.limits:
            wanted = min(wanted, _available_in(draft, ref))
        if wanted < leg.minimum:
            return Rejected(Reason.LIMIT_REACHED, needed=leg.minimum, available=wanted)
    found = _find(draft, reservation, number, leg.wallets, wanted)
    if found.amount < leg.minimum:
        return _refusal(draft, leg, found.amount)
    for held in found.slices:
        _hold_slice(draft, held)
    unfunded = sum(held.amount for held in found.slices if not _operator_paid(draft, held))
    slices = list(found.slices)
    if number == 0:
        for ref in reservation.limits:
            slices += _hold_plain(draft, ref, found.amount, leg=LIMIT_LEG)
    if reservation.unfunded is not None and unfunded:
        slices += _hold_plain(draft, reservation.unfunded, unfunded, leg=UNFUNDED_LEG)
    return slices


def _find(draft: Draft, reservation: Reservation, leg: int, wallets: tuple[WalletRef, ...], wanted: int) -> _Hold:
    """The slices of *wallets* that make up *wanted*, in burn order, or all there are."""
    line = AMOUNT_MAX if reservation.unfunded is None else _available_in(draft, reservation.unfunded)
    slices: list[Slice] = []
    missing = wanted
    for ref in wallets:
        wallet = draft.wallet(ref)
        if wallet is None or wallet.frozen or draft.owes_too_much(wallet):
            continue
        for block in draft.payable(ref, reservation.tags):
            part = min(missing, draft.free(block))
            if not block.operator_paid:
                part = min(part, line)
                line -= part
            if part > 0:
                slices.append(Slice(leg=leg, wallet=ref, block=block.id, amount=part))
                missing -= part
        part = min(missing, draft.overdraft_free(wallet))
        if part > 0:
            slices.append(Slice(leg=leg, wallet=ref, block=None, amount=part))
            missing -= part
    return _Hold(slices, wanted - missing)


def _refusal(draft: Draft, leg: ReserveLeg, available: int) -> Rejected:
    """Why a leg cannot hold its minimum: the first reason in order of precedence."""
    wallets = [wallet for wallet in map(draft.wallet, leg.wallets) if wallet is not None]
    reason = Reason.INSUFFICIENT_CREDITS
    if any(draft.owes_too_much(wallet) for wallet in wallets):
        reason = Reason.RECEIVABLE_OUTSTANDING
    if any(wallet.frozen for wallet in wallets):
        reason = Reason.WALLET_FROZEN
    return Rejected(reason, needed=leg.minimum, available=available)


def _available_in(draft: Draft, ref: WalletRef) -> int:
    return sum(draft.free(block) for block in draft.payable(ref, NO_TAGS))


def _hold_plain(draft: Draft, ref: WalletRef, amount: int, *, leg: int) -> list[Slice]:
    """Hold *amount* of a limit, which is known to be there."""
    slices = []
    for block in draft.payable(ref, NO_TAGS):
        part = min(amount, draft.free(block))
        if part > 0:
            amount -= part
            held = Slice(leg=leg, wallet=ref, block=block.id, amount=part)
            _hold_slice(draft, held)
            slices.append(held)
    return slices


def _hold_slice(draft: Draft, held: Slice) -> None:
    if held.block is None:
        draft.change_wallet(held.wallet, overdraft_reserved=held.amount)
    else:
        draft.change_block(draft.block(held.wallet, held.block), reserved=held.amount)


def free_slice(draft: Draft, held: Slice) -> None:
    """Undo a hold. What goes back to a block that has expired meanwhile pays no more: ``Expire`` books it."""
    if held.block is None:
        draft.change_wallet(held.wallet, overdraft_reserved=-held.amount)
    else:
        draft.change_block(draft.block(held.wallet, held.block), reserved=-held.amount)


def _operator_paid(draft: Draft, held: Slice) -> bool:
    return held.block is None or draft.block(held.wallet, held.block).operator_paid


def extend(state: State, command: Extend, now_us: int) -> Outcome:
    reservation = state.reservations.get(command.reservation)
    if reservation is None:
        return Rejected(Reason.NOT_FOUND)
    if reservation.state is not ReservationState.OPEN:
        return already_settled(reservation)
    if not 0 <= command.minimum <= command.amount <= AMOUNT_MAX:
        return Rejected(Reason.INVALID_AMOUNT)
    draft = Draft(state, command.id, now_us)
    slices = list(reservation.slices)
    if command.amount > 0:
        leg = ReserveLeg(wallets=reservation.legs[0].wallets, amount=command.amount, minimum=command.minimum)
        more = _hold_leg(draft, reservation, 0, leg)
        if isinstance(more, Rejected):
            return more
        slices = _merged([*slices, *more])
    expires_at_us = reservation.expires_at_us
    if command.ttl_us is not None:
        latest_us = reservation.created_at_us + RESERVATION_LIFE_US_MAX
        expires_at_us = max(expires_at_us, min(now_us + command.ttl_us, latest_us))
    extended = msgspec.structs.replace(
        reservation,
        slices=tuple(slices),
        reserved=max(reservation.reserved, sum(held.amount for held in slices if held.leg >= 0)),
        expires_at_us=expires_at_us,
        mark=command.mark or reservation.mark,
    )
    draft.change_reservation(ReservationChanged(reservation=extended))
    return draft.applied(_reserved(extended))


def _merged(slices: list[Slice]) -> list[Slice]:
    """Join slices of one block and leg, at the place of the first: what was pinned first is used first."""
    totals: dict[tuple[int, WalletRef, str | None], int] = {}
    for held in slices:
        name = (held.leg, held.wallet, held.block)
        totals[name] = totals.get(name, 0) + held.amount
    return [Slice(leg=leg, wallet=ref, block=block, amount=amount) for (leg, ref, block), amount in totals.items()]


def _reserved(reservation: Reservation) -> Reserved:
    return Reserved(
        reservation=reservation.ref.reservation,
        held=tuple(reservation.held_by(number) for number in range(len(reservation.legs))),
        expires_at_us=reservation.expires_at_us,
    )


def already_settled(reservation: Reservation) -> Rejected:
    result = settled(reservation, balance=reservation.balance)
    return Rejected(Reason.RESERVATION_SETTLED, state=reservation.state, result=result)


def settled(reservation: Reservation, *, balance: int, late: bool = False) -> Settled:
    return Settled(
        reservation=reservation.ref.reservation,
        state=reservation.state,
        charged=reservation.charged,
        shortfall=reservation.shortfall,
        balance=balance,
        payments=reservation.payments,
        late=late,
    )
