"""What a reservation comes to: its own slices first, then what is free, an agreed overdraft, and at last our loss."""

import operator

import msgspec

from ledger.commands import Beyond, Commit, Debit, Lapse, Release
from ledger.debts import collect
from ledger.draft import NO_TAGS, Draft, Source, total
from ledger.limits import tell_thresholds
from ledger.model import (
    LIMIT_LEG,
    UNFUNDED_LEG,
    USD_ASSET,
    WALLET_PREFIX,
    Account,
    Block,
    Charge,
    Funding,
    Payment,
    Reservation,
    ReservationState,
    Settlement,
    Slice,
    WalletRef,
)
from ledger.outcomes import Applied, Changed, KeyFreed, Outcome, Reason, Rejected, UsageRecorded
from ledger.reserving import already_settled, debit_hold, may_charge, settled
from ledger.state import State


def commit(state: State, command: Commit, now_us: int) -> Outcome:
    reservation = state.reservations.get(command.reservation)
    if reservation is None:
        return Rejected(Reason.NOT_FOUND)
    if reservation.settled_by == command.id:
        return Applied(result=settled(reservation), replayed=True)
    if not may_charge(reservation, command.settlement):
        return Rejected(Reason.INVALID_AMOUNT)
    if _over(reservation):
        return already_settled(reservation)
    draft = Draft(state, command, now_us)
    late = reservation.state is ReservationState.EXPIRED
    settlement = _missing(command.settlement, reservation.mark) if late else command.settlement
    ends_as = ReservationState.COMMITTED if command.final or late else ReservationState.OPEN
    after = _settle(draft, reservation, settlement, ends_as, beyond=command.beyond)
    if command.tells_overage:
        _tell_overage(draft, after, owed_before=sum(reservation.owed))
    answers = None if command.response is None else reservation.key
    return draft.applied(settled(after, late=late), after, answers=answers)


def release(state: State, command: Release, now_us: int) -> Outcome:
    reservation = state.reservations.get(command.reservation)
    if reservation is None:
        return Rejected(Reason.NOT_FOUND)
    if reservation.state is ReservationState.RELEASED:
        return Applied(result=settled(reservation), replayed=True)
    if reservation.state is not ReservationState.OPEN:
        return already_settled(reservation)
    draft = Draft(state, command, now_us)
    after = _settle(draft, reservation, None, ReservationState.RELEASED)
    return draft.applied(settled(after), after)


def lapse(state: State, command: Lapse, now_us: int) -> Outcome:
    reservation = state.reservations.get(command.reservation)
    if reservation is None:
        return Rejected(Reason.NOT_FOUND)
    if reservation.state is not ReservationState.OPEN or now_us < reservation.expires_at_us:
        return Applied(result=Changed())
    draft = Draft(state, command, now_us)
    after = _settle(draft, reservation, reservation.mark, ReservationState.EXPIRED)
    body = {
        "reservation": after.ref.reservation,
        "request_id": after.request_id,
        "charged": sum(charge.total for charge in after.charged),
    }
    draft.raise_event(after.legs[0].wallets[0], "reservation.expired", body)
    return draft.applied(settled(after), after)


def debit(state: State, command: Debit, now_us: int) -> Outcome:
    known = state.reservations.get(command.reservation)
    if known is not None and known.settled_by == command.id:
        return Applied(result=settled(known), replayed=True)
    draft = Draft(state, command, now_us)
    beyond = command.beyond != "refuse"
    settlement = command.settlement
    late = False
    reservation: Reservation | Rejected
    if known is not None and command.beyond == "receivable" and _of_same_request(known, command):
        if not may_charge(known, settlement):
            return Rejected(Reason.INVALID_AMOUNT)
        if _over(known):
            return already_settled(known)
        late = known.state is ReservationState.EXPIRED
        settlement = _missing(settlement, known.mark) if late else settlement
        reservation = known
    else:
        reservation = debit_hold(draft, command)
        if isinstance(reservation, Rejected):
            return reservation
    whose: Beyond = "receivable" if beyond else "shortfall"
    after = _settle(draft, reservation, settlement, ReservationState.COMMITTED, beyond=whose)
    if command.tells_overage:
        _tell_overage(draft, after, owed_before=0)
    answers = None
    if command.response is not None and command.key is not None:
        answers = (command.key.operation, command.key.key)
    return draft.applied(settled(after, late=late), after, answers=answers)


def _tell_overage(draft: Draft, reservation: Reservation, *, owed_before: int) -> None:
    owed = sum(reservation.owed) - owed_before
    if owed > 0:
        body = {"reservation": reservation.ref.reservation, "request_id": reservation.request_id, "owed": owed}
        draft.raise_event(reservation.legs[0].wallets[0], "usage.overage", body)


def _over(reservation: Reservation) -> bool:
    """Whether no more can be charged: what has expired can, once, unless that charge was given back."""
    if reservation.state is ReservationState.EXPIRED:
        return len(reservation.refunds) > 0
    return reservation.state is not ReservationState.OPEN


def _of_same_request(reservation: Reservation, command: Debit) -> bool:
    usage = command.settlement.usage
    return usage is not None and reservation.request_id == usage.request_id


def _missing(settlement: Settlement, mark: Settlement | None) -> Settlement:
    """What a late commit still has to debit: what the work really cost less what its mark was charged for it.

    Never below zero. What the mark asked for and nobody could pay is written off already.
    """
    if mark is None:
        return settlement
    charges = []
    for actual, marked in zip(settlement.charges, mark.charges, strict=True):
        missing = max(0, actual.total - marked.total)
        base = min(max(0, actual.base - marked.base), missing)
        charges.append(Charge(base=base, markup=missing - base))
    usage = settlement.usage
    if usage is not None and mark.usage is not None:
        counted = mark.usage.units
        units = {unit: quantity - counted.get(unit, 0) for unit, quantity in usage.units.items()}
        usage = msgspec.structs.replace(
            usage,
            units={unit: quantity for unit, quantity in units.items() if quantity > 0},
            provider_cost_nanos=max(0, usage.provider_cost_nanos - mark.usage.provider_cost_nanos),
        )
    return Settlement(charges=tuple(charges), usage=usage)


def _settle(
    draft: Draft,
    reservation: Reservation,
    settlement: Settlement | None,
    ends_as: ReservationState,
    *,
    beyond: Beyond = "shortfall",
) -> Reservation:
    """Charge *settlement*, if any, and unless the reservation stays open free the rest of it; what it is then."""
    final = ends_as is not ReservationState.OPEN
    slices = list(reservation.slices)
    if settlement is not None:
        reservation = _charge(draft, reservation, settlement, slices, final=final, beyond=beyond)
    payer = reservation.legs[0].wallets[0]
    if not final:
        return msgspec.structs.replace(reservation, slices=tuple(slices), balance=draft.balance(payer))
    _free(draft, slices)
    collect(draft, reservation.slices, reference=reservation.ref.reservation)
    key = reservation.key
    if key is not None and ends_as is not ReservationState.COMMITTED and reservation.commits == 0:
        draft.other.append(KeyFreed(draft.command.scope, *key))
        key = None
    return msgspec.structs.replace(
        reservation,
        slices=(),
        state=ends_as,
        mark=settlement if ends_as is ReservationState.EXPIRED else None,
        balance=draft.balance(payer),
        settled_at_us=draft.now_us,
        settled_by=draft.command.id,
        key=key,
    )


def _free(draft: Draft, slices: list[Slice]) -> None:
    for held in slices:
        draft.hold(_source(draft, held), -held.amount)


def _charge(
    draft: Draft,
    reservation: Reservation,
    settlement: Settlement,
    slices: list[Slice],
    *,
    final: bool,
    beyond: Beyond,
) -> Reservation:
    """Charge every leg and draw on the limits: what the reservation is then, but for its *slices*, used up in place.

    Each leg uses its own slices first. What one leg does not need of them is free for another before anything is
    missing.
    """
    charges = settlement.charges
    parts = [_use_slices(draft, slices, charge.total, leg=leg) for leg, charge in enumerate(charges)]
    if final and len(charges) > 1:
        _free(draft, [held for held in slices if held.leg >= 0])
        slices[:] = [held for held in slices if held.leg < 0]
    for leg, charge in enumerate(charges):
        parts[leg] += _use_more(draft, reservation, leg, charge.total - total(parts[leg]))
    owed: list[int] = []
    if beyond == "receivable":
        for leg, charge in enumerate(charges):
            rest = charge.total - total(parts[leg])
            owed.append(rest)
            if rest > 0:
                parts[leg].append(_owe(draft, reservation, leg, rest))
    payments: list[Payment] = []
    charged: list[Charge] = []
    missing = 0
    for leg, charge in enumerate(charges):
        made, paid = _post(draft, reservation, leg, charge, parts[leg])
        payments += made
        charged.append(paid)
        missing += charge.total - paid.total
    waived, shortfall = (missing, 0) if beyond == "waive" else (0, missing)
    _draw_on_bounds(draft, reservation, slices, payments, payer_charged=charged[0].total)
    draft.transfer(
        shortfall,
        asset=reservation.asset,
        debit=Account.METER_SHORTFALL,
        credit=Account.REVENUE,
        reference=reservation.ref.reservation,
    )
    _record(draft, reservation, settlement, tuple(charged), shortfall)
    return msgspec.structs.replace(
        reservation,
        charged=tuple(map(_sum_of_charges, reservation.charged, charged)),
        shortfall=reservation.shortfall + shortfall,
        waived=reservation.waived + waived,
        payments=merged([*reservation.payments, *payments]),
        owed=_sum_of_debts(reservation.owed, owed) if any(owed) else reservation.owed,
        commits=reservation.commits + 1,
        mark=None,
    )


def _sum_of_charges(one: Charge, other: Charge) -> Charge:
    return Charge(one.base + other.base, one.markup + other.markup)


def _sum_of_debts(before: tuple[int, ...], owed: list[int]) -> tuple[int, ...]:
    return tuple(owed) if not before else tuple(map(operator.add, before, owed))


def _owe(draft: Draft, reservation: Reservation, leg: int, amount: int) -> Source:
    """Make *amount* a receivable of the leg's first wallet, whatever was agreed."""
    wallet = draft.open_wallet(reservation.legs[leg].wallets[0], reservation.asset)
    owed = Source(wallet, None, amount)
    draft.use(owed, amount, held=False)
    return owed


def merged(payments: list[Payment]) -> tuple[Payment, ...]:
    """Join what one block paid at several times, at the place of the first: many commits stay a short list."""
    if len(payments) < 2:
        return tuple(payments)
    joined: dict[tuple[object, ...], Payment] = {}
    for payment in payments:
        before = joined.get(payment.name)
        if before is None:
            joined[payment.name] = payment
        else:
            base, markup = before.base + payment.base, before.markup + payment.markup
            joined[payment.name] = msgspec.structs.replace(before, base=base, markup=markup)
    return tuple(joined.values())


def _use_more(draft: Draft, reservation: Reservation, leg: int, amount: int) -> list[Source]:
    """Use up what a leg's own slices did not cover: free blocks, then the agreed overdraft. It may come to less."""
    parts: list[Source] = []
    if amount == 0:
        return parts
    wallets = [wallet for wallet in map(draft.wallet, reservation.legs[leg].wallets) if wallet is not None]
    for source in draft.sources(wallets, reservation.tags):
        part = Source(source.wallet, source.block, min(amount, source.amount))
        draft.use(part, part.amount, held=False)
        parts.append(part)
        amount -= part.amount
        if amount == 0:
            break
    return parts


def _use_slices(
    draft: Draft, slices: list[Slice], amount: int, *, leg: int, wallet: WalletRef | None = None
) -> list[Source]:
    """Use up the *slices* of a leg (those of *wallet* alone, if one is named) in their order, in place."""
    parts: list[Source] = []
    kept: list[Slice] = []
    for held in slices:
        mine = held.leg == leg and (wallet is None or held.wallet == wallet)
        used = min(amount, held.amount) if mine else 0
        if used > 0:
            whole = _source(draft, held)
            draft.use(whole, used, held=True)
            parts.append(Source(whole.wallet, whole.block, used))
            amount -= used
        if used < held.amount:
            kept.append(held if used == 0 else msgspec.structs.replace(held, amount=held.amount - used))
    slices[:] = kept
    return parts


def _source(draft: Draft, held: Slice) -> Source:
    wallet = draft.wallet(held.wallet)
    assert wallet is not None, "a slice belongs to a wallet"
    return Source(wallet, None if held.block is None else draft.block(held.wallet, held.block), held.amount)


def _post(
    draft: Draft, reservation: Reservation, leg: int, charge: Charge, parts: list[Source]
) -> tuple[list[Payment], Charge]:
    """Book what each part pays of base and markup, pro rata; the payments, and what they come to.

    Shares are differences of the rounded-down running total: they are never negative, add up exactly, and the last
    part bears the remainder.
    """
    reference = reservation.ref.reservation
    payments: list[Payment] = []
    covered = base_covered = 0
    for part in parts:
        block = part.block
        covered += part.amount
        base = charge.base * covered // charge.total - base_covered
        base_covered += base
        markup = part.amount - base
        base_account, markup_account = _base_account(block), _markup_account(block, reservation.developer)
        draft.spend(part, base, account=base_account, reference=reference)
        if _returns_markup(block):
            draft.return_to_pool(part, markup, reference=reference)
        else:
            draft.spend(part, markup, account=markup_account, reference=reference)
        payment = Payment(
            leg, part.wallet.ref, None if block is None else block.id, base, markup, base_account, markup_account
        )
        payments.append(payment)
    return payments, Charge(base_covered, covered - base_covered)


def _base_account(block: Block | None) -> str:
    return Account.REVENUE if block is None or block.operator_paid else Account.TENANT_DUE


def _returns_markup(block: Block | None) -> bool:
    return block is not None and block.funding is Funding.DEVELOPER_GRANT


def _markup_account(block: Block | None, developer: str | None) -> str:
    if block is not None and block.pool is not None and _returns_markup(block):
        return f"{WALLET_PREFIX}{block.pool.wallet}"
    if block is not None and block.funding is Funding.PAID and block.operator_paid and developer is not None:
        return f"{Account.DEVELOPER_PAYABLE}:{developer}"
    return Account.TENANT_MARGIN


def _draw_on_bounds(
    draft: Draft, reservation: Reservation, slices: list[Slice], payments: list[Payment], *, payer_charged: int
) -> None:
    """Draw on the limits what the payer was charged, and on the unfunded line the base cost that nobody paid for."""
    for ref in reservation.limits:
        _draw(draft, reservation, slices, ref=ref, leg=LIMIT_LEG, amount=payer_charged)
    if reservation.unfunded is not None:
        burnt = sum(payment.base for payment in payments if _unfunded(payment))
        _draw(draft, reservation, slices, ref=reservation.unfunded, leg=UNFUNDED_LEG, amount=burnt)


def _unfunded(payment: Payment) -> bool:
    """Whether the operator was not paid for what paid this: an overdraft, or credits that came from elsewhere."""
    return payment.block is None or payment.base_account == Account.TENANT_DUE


def _draw(
    draft: Draft, reservation: Reservation, slices: list[Slice], *, ref: WalletRef, leg: int, amount: int
) -> None:
    """Use up a limit: its own slices, then what is free of it. Work that is done is never refused."""
    parts = _use_slices(draft, slices, amount, leg=leg, wallet=ref)
    amount -= total(parts)
    wallet = draft.wallet(ref)
    if wallet is None:
        return
    for block in draft.payable(ref, NO_TAGS):
        used = min(amount, draft.free(block))
        if used > 0:
            part = Source(wallet, block, used)
            draft.use(part, used, held=False)
            parts.append(part)
            amount -= used
    for part in parts:
        draft.spend(part, part.amount, account=Account.LIMIT, reference=reservation.ref.reservation)
    if leg == LIMIT_LEG:
        for name in dict.fromkeys(part.block.id for part in parts if part.block is not None):
            tell_thresholds(draft, draft.block(ref, name))


def _record(
    draft: Draft, reservation: Reservation, settlement: Settlement, charged: tuple[Charge, ...], shortfall: int
) -> None:
    """The usage row, the provider's cost in dollars, and the event: all in the charge's transaction."""
    usage = settlement.usage
    if usage is None:
        return
    reference = reservation.ref.reservation
    draft.other.append(
        UsageRecorded(
            reservation=reservation.ref,
            part=reservation.commits + 1,
            record=usage,
            charges=charged,
            shortfall=shortfall,
            at_us=draft.now_us,
        )
    )
    draft.transfer(
        usage.provider_cost_nanos,
        asset=USD_ASSET,
        debit=Account.PROVIDER_COST,
        credit=Account.PROVIDER_PAYABLE,
        reference=reference,
    )
    body = {
        "reservation": reference,
        "request_id": usage.request_id,
        "charged": sum(charge.total for charge in charged),
    }
    for name, value in (("metric", usage.metric), ("action", usage.action), ("model", usage.model)):
        if value is not None:
            body[name] = value
    draft.raise_event(reservation.legs[0].wallets[0], "usage.recorded", body)
