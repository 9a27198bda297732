"""Setting credits aside: slices of blocks in burn order, over payers and limits, all or nothing."""

from collections.abc import Iterable
from typing import Any

import msgspec

from ledger import alerts
from ledger.commands import Debit, Extend, Hold, Reserve, ReserveLeg
from ledger.draft import NO_TAGS, Draft, Source, total
from ledger.limits import open_period, sensible
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
    Tags,
    Wallet,
    WalletRef,
)
from ledger.outcomes import Applied, Outcome, Reason, Rejected, Reserved, Settled
from ledger.state import State

RESERVATION_LIFE_US_MAX = 24 * 3600 * 1_000_000
"""No reservation outlives a day: an expired block that it pins must lapse at last."""


def reserve(state: State, command: Reserve, now_us: int) -> Outcome:
    if not _well_formed(command) or command.ttl_us <= 0:
        return Rejected(Reason.INVALID_AMOUNT)
    if command.mark is not None and not chargeable(command.mark, legs=len(command.legs)):
        return Rejected(Reason.INVALID_AMOUNT)
    known = state.reservations.get(command.reservation)
    if known is not None:
        if known.state is ReservationState.OPEN and known.request_id == command.request_id:
            return Applied(result=_reserved(known), replayed=True)
        return Rejected(Reason.ALREADY_EXISTS, state=known.state)
    draft = Draft(state, command, now_us)
    reservation = hold_all(
        draft,
        command,
        ttl_us=command.ttl_us,
        request_id=command.request_id,
        mark=command.mark,
        metadata=command.metadata,
        overage=command.overage,
    )
    if isinstance(reservation, Rejected):
        return reservation
    if command.key_stays:
        reservation = msgspec.structs.replace(reservation, key=None)
    return draft.applied(_reserved(reservation), reservation)


def debit_hold(draft: Draft, command: Debit) -> Reservation | Rejected:
    """What a debit holds, for no time at all, before it is committed."""
    if not _well_formed(command) or not chargeable(command.settlement, legs=len(command.legs)):
        return Rejected(Reason.INVALID_AMOUNT)
    known = draft.state.reservations.get(command.reservation)
    if known is not None:
        return Rejected(Reason.ALREADY_EXISTS, state=known.state)
    usage = command.settlement.usage
    request_id = None if usage is None else usage.request_id
    if command.beyond == "receivable":
        # Nothing is asked for, so nothing is refused: the charge takes what there is.
        nothing = tuple([ReserveLeg(leg.wallets, 0, 0) for leg in command.legs])
        command = msgspec.structs.replace(command, legs=nothing)
    return hold_all(draft, command, ttl_us=0, request_id=request_id, overage=command.beyond == "overage")


def _well_formed(command: Hold) -> bool:
    for leg in command.legs:
        if not leg.wallets or not 0 <= leg.minimum <= leg.amount <= AMOUNT_MAX:
            return False
    return len(command.legs) > 0 and all(map(sensible, command.limits)) and _watches_payers(command)


def _watches_payers(command: Hold) -> bool:
    for watch in command.watches:
        if not alerts.sensible(watch.alerts) or not any(watch.wallet in leg.wallets for leg in command.legs):
            return False
    return True


def chargeable(settlement: Settlement, *, legs: int, already: int = 0) -> bool:
    """Whether a settlement has one charge for each leg, and keeps the sum of all charges within bounds."""
    total = already
    for charge in settlement.charges:
        if charge.base < 0 or charge.markup < 0:
            return False
        total += charge.total
    cost_nanos = 0 if settlement.usage is None else settlement.usage.provider_cost_nanos
    return len(settlement.charges) == legs and total <= AMOUNT_MAX and 0 <= cost_nanos <= AMOUNT_MAX


def hold_all(
    draft: Draft,
    command: Hold,
    *,
    ttl_us: int,
    request_id: str | None,
    mark: Settlement | None = None,
    metadata: dict[str, Any] | None = None,
    overage: bool = False,
) -> Reservation | Rejected:
    """Hold every leg and every limit, or refuse; with *overage* what there is of the legs, and of the limits all.

    Payers, limits and the line may be the operator's wallets, and so another tenant's, but never of the other mode.
    """
    for ref in command.wallets:
        wallet = draft.wallet(ref)
        if ref.mode != command.scope.mode:
            return Rejected(Reason.NOT_FOUND)
        if wallet is not None and wallet.asset != command.asset:
            return Rejected(Reason.ASSET_MISMATCH)
    legs = tuple([Leg(_distinct(leg.wallets)) for leg in command.legs])
    draft.open_wallet(legs[0].wallets[0], command.asset)
    for watch in command.watches:
        draft.watch(watch.wallet, watch.alerts)
    reservation = Reservation(
        ref=command.reservation,
        state=ReservationState.OPEN,
        asset=command.asset,
        created_at_us=draft.now_us,
        expires_at_us=draft.now_us + min(ttl_us, RESERVATION_LIFE_US_MAX),
        legs=legs,
        limits=_distinct(tuple([limit.wallet for limit in command.limits])),
        unfunded=command.unfunded,
        developer=command.developer,
        tags=command.tags,
        request_id=request_id,
        mark=mark,
        charged=(_NOTHING,) * len(legs),
        key=None if command.key is None else (command.key.operation, command.key.key),
        metadata=metadata or {},
    )
    for limit in command.limits:
        open_period(draft, limit, command.asset, reference=command.reservation.reservation)
    slices: list[Slice] = []
    for number, leg in enumerate(command.legs):
        minimum = 0 if overage else leg.minimum
        held = _hold_leg(draft, reservation, number, amount=leg.amount, minimum=minimum, overage=overage)
        if isinstance(held, Rejected):
            return held
        slices += held
    return msgspec.structs.replace(reservation, slices=tuple(slices), reserved=_held(slices))


def _held(slices: Iterable[Slice]) -> int:
    """What the paying legs hold together."""
    amount = 0
    for held in slices:
        if held.leg >= 0:
            amount += held.amount
    return amount


_NOTHING = Charge()


def _distinct(wallets: tuple[WalletRef, ...]) -> tuple[WalletRef, ...]:
    """Each wallet once, at its first place: named twice, its credits must not be counted twice."""
    return wallets if len(wallets) < 2 else tuple(dict.fromkeys(wallets))


def _hold_leg(
    draft: Draft, reservation: Reservation, leg: int, *, amount: int, minimum: int, overage: bool
) -> list[Slice] | Rejected:
    """Hold *amount*, or what there is down to *minimum*, with what it draws on the limits and the unfunded line.

    With *overage* what the credits lack will be owed, so the limits must afford it, too, and hold it.
    """
    refs = reservation.legs[leg].wallets
    limits = reservation.limits if leg == 0 else ()
    unfunded = reservation.unfunded
    wallets = [wallet for wallet in map(draft.wallet, refs) if wallet is not None and _usable(wallet)]
    left = {ref: draft.available(ref) for ref in limits}
    wanted = min(amount, *left.values()) if left else amount
    if overage and any(wallet is not None and wallet.frozen for wallet in map(draft.wallet, refs)):
        return Rejected(Reason.WALLET_FROZEN, needed=amount)
    if overage and wanted < amount:
        tightest = min(left, key=left.__getitem__)
        return Rejected(Reason.LIMIT_REACHED, needed=amount, available=wanted, limit=tightest)
    line = None if unfunded is None else draft.available(unfunded)
    found = _find(draft, wallets, reservation.tags, wanted, line=line)
    held = total(found)
    if held < minimum:
        without_bounds = total(_find(draft, wallets, reservation.tags, minimum, line=None))
        if without_bounds >= minimum:
            # It is the tightest limit that is told of, or else the line.
            reached = min(left, key=left.__getitem__) if wanted < minimum else unfunded
            return Rejected(Reason.LIMIT_REACHED, needed=minimum, available=held, limit=reached)
        return _refusal(draft, refs, needed=minimum, available=held)
    slices = _hold(draft, found, leg=leg)
    for ref in limits:
        slices += _hold_plain(draft, ref, amount if overage else held, leg=LIMIT_LEG)
    if unfunded is not None:
        unpaid = total([part for part in found if not _operator_paid(part)])
        slices += _hold_plain(draft, unfunded, unpaid, leg=UNFUNDED_LEG)
    return slices


def _usable(wallet: Wallet) -> bool:
    return not wallet.frozen and not _owes_too_much(wallet)


def _owes_too_much(wallet: Wallet) -> bool:
    return wallet.receivable > wallet.overdraft_limit


def _find(draft: Draft, wallets: list[Wallet], tags: Tags, wanted: int, *, line: int | None) -> list[Source]:
    """The sources that make up *wanted*, in burn order, or all there are; at most *line* of them not operator-paid."""
    found: list[Source] = []
    for source in draft.sources(wallets, tags):
        if wanted == 0:
            break
        part = min(wanted, source.amount)
        if line is not None and not _operator_paid(source):
            part = min(part, line)
            line -= part
        if part > 0:
            found.append(Source(source.wallet, source.block, part))
            wanted -= part
    return found


def _operator_paid(source: Source) -> bool:
    """An overdraft is credit that nobody has paid for yet."""
    return source.block is not None and source.block.operator_paid


def _hold(draft: Draft, parts: list[Source], *, leg: int) -> list[Slice]:
    slices = []
    for part in parts:
        draft.hold(part, part.amount)
        slices.append(Slice(leg, part.wallet.ref, None if part.block is None else part.block.id, part.amount))
    return slices


def _hold_plain(draft: Draft, ref: WalletRef, amount: int, *, leg: int) -> list[Slice]:
    """Hold *amount* of a limit or a line, which is known to be there."""
    wallet = draft.wallet(ref)
    return [] if wallet is None else _hold(draft, _find(draft, [wallet], NO_TAGS, amount, line=None), leg=leg)


def _refusal(draft: Draft, wallets: tuple[WalletRef, ...], *, needed: int, available: int) -> Rejected:
    """Why a leg cannot hold its minimum: the first reason in order of precedence."""
    known = [wallet for wallet in map(draft.wallet, wallets) if wallet is not None]
    if any(wallet.frozen for wallet in known):
        reason = Reason.WALLET_FROZEN
    elif any(_owes_too_much(wallet) for wallet in known):
        reason = Reason.RECEIVABLE_OUTSTANDING
    else:
        reason = Reason.INSUFFICIENT_CREDITS
    return Rejected(reason, needed=needed, available=available)


def extend(state: State, command: Extend, now_us: int) -> Outcome:
    if not 0 <= command.minimum <= command.amount <= AMOUNT_MAX or not all(map(sensible, command.limits)):
        return Rejected(Reason.INVALID_AMOUNT)
    reservation = state.reservations.get(command.reservation)
    if reservation is None:
        return Rejected(Reason.NOT_FOUND)
    if command.mark is not None and not may_charge(reservation, command.mark):
        return Rejected(Reason.INVALID_AMOUNT)
    if reservation.state is not ReservationState.OPEN:
        return already_settled(reservation)
    draft = Draft(state, command, now_us)
    slices = reservation.slices
    if command.amount > 0:
        for limit in command.limits:
            if limit.wallet in reservation.limits:
                open_period(draft, limit, reservation.asset, reference=reservation.ref.reservation)
        more = _hold_leg(draft, reservation, 0, amount=command.amount, minimum=command.minimum, overage=command.overage)
        if isinstance(more, Rejected):
            return more
        slices = _merged([*slices, *more])
    extended = msgspec.structs.replace(
        reservation,
        slices=slices,
        reserved=max(reservation.reserved, _held(slices)),
        expires_at_us=_extended_until(reservation, command.ttl_us, now_us),
        mark=command.mark or reservation.mark,
    )
    return draft.applied(_reserved(extended), extended)


def _extended_until(reservation: Reservation, ttl_us: int | None, now_us: int) -> int:
    if ttl_us is None:
        return reservation.expires_at_us
    latest_us = reservation.created_at_us + RESERVATION_LIFE_US_MAX
    return max(reservation.expires_at_us, min(now_us + ttl_us, latest_us))


def _merged(slices: list[Slice]) -> tuple[Slice, ...]:
    """Join slices of one block and leg, at the place of the first: what was pinned first is used first."""
    totals: dict[tuple[int, WalletRef, str | None], int] = {}
    for held in slices:
        name = (held.leg, held.wallet, held.block)
        totals[name] = totals.get(name, 0) + held.amount
    return tuple(Slice(leg, ref, block, amount) for (leg, ref, block), amount in totals.items())


def _reserved(reservation: Reservation) -> Reserved:
    return Reserved(reservation.ref.reservation, reservation.held_by_leg, reservation.expires_at_us)


def may_charge(reservation: Reservation, settlement: Settlement) -> bool:
    already = reservation.shortfall + reservation.waived
    for charge in reservation.charged:
        already += charge.total
    return chargeable(settlement, legs=len(reservation.legs), already=already)


def already_settled(reservation: Reservation) -> Rejected:
    return Rejected(Reason.RESERVATION_SETTLED, state=reservation.state, result=settled(reservation))


def settled(reservation: Reservation, *, late: bool = False) -> Settled:
    return Settled(
        reservation=reservation.ref.reservation,
        state=reservation.state,
        charged=reservation.charged,
        shortfall=reservation.shortfall,
        balance=reservation.balance,
        payments=reservation.payments,
        late=late,
        held=reservation.held if reservation.slices else 0,
        waived=reservation.waived,
    )
