"""The pure part of a batch, the same for every store: what to load, the fold, and what to write.

How it works. A store locks and loads what :func:`needs` names, in two steps, because the wallets of a reservation are
known only when it is loaded, and the pools of a wallet's blocks only when these are. Then :func:`fold` decides the
commands one after the other on the loaded state, each on top of those before it, and gathers in :class:`Writes` what
the store has to write. So a batch comes to what its commands come to one by one, in its order.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ledger.commands import (
    AnyCommand,
    Commit,
    Debit,
    Extend,
    Freeze,
    Grant,
    Hold,
    Lapse,
    Limit,
    Purchase,
    Refund,
    Release,
    Reserve,
    Reverse,
    Revoke,
    SetLimit,
    TopUp,
)
from ledger.core import decide
from ledger.draft import RETURN_BLOCKS
from ledger.granting import block_ids
from ledger.model import Block, Reservation, ReservationRef, Scope, Wallet, WalletRef
from ledger.outcomes import (
    Applied,
    BlockChanged,
    BlockOpened,
    Event,
    Fact,
    KeyFreed,
    KeyTaken,
    Outcome,
    Reason,
    Rejected,
    ReservationChanged,
    Result,
    Transfer,
    UsageRecorded,
    WalletChanged,
    WalletOpened,
)
from ledger.state import KeyRef, State, evolve
from ledger.store.rows import Row, response_row
from ledger.topping_up import paid_block_ids

RESPONSE_LIFE_US = 24 * 3600 * 1_000_000
"""How long a stored response is replayed."""

BlockRef = tuple[WalletRef, str]
CommandRef = tuple[Scope, str]


@dataclass(frozen=True, slots=True)
class Needs:
    """What commands name, as sets of references. Not all of it exists."""

    commands: set[CommandRef]
    wallets: set[WalletRef]
    blocks: set[BlockRef]
    """Blocks that are needed even when nothing is left in them. A wallet's live blocks come with the wallet."""
    reservations: set[ReservationRef]
    keys: set[KeyRef]


def needs(commands: Iterable[AnyCommand]) -> Needs:
    """What *commands* name themselves; :func:`reserved_wallets` and :func:`pools` tell the rest after a first load."""
    named = Needs(commands=set(), wallets=set(), blocks=set(), reservations=set(), keys=set())
    for command in commands:
        named.commands.add((command.scope, command.id))
        if command.key is not None:
            named.keys.add((command.scope, command.key.operation, command.key.key))
        for limit in _limits_of(command):
            named.blocks.update(limit.blocks)
        match command:
            case Hold():
                named.reservations.add(command.reservation)
                named.wallets.update(_wallets_named(command))
            case Extend() | Commit() | Release() | Lapse():
                named.reservations.add(command.reservation)
            case Refund():
                named.reservations.add(command.reservation)
                named.wallets.update(command.wallets)
                named.blocks.update(_blocks_refunded(command))
            case Grant() | Purchase():
                named.wallets.update(_wallets_named(command))
                named.blocks.update((command.wallet, block_id) for block_id in block_ids(command))
            case TopUp() | Reverse() | Revoke() | Freeze():
                named.wallets.add(command.wallet)
                named.blocks.update(_blocks_named(command))
            case _:
                named.wallets.add(command.wallet)
    return named


def _blocks_named(command: TopUp | Reverse | Revoke | Freeze) -> Iterator[BlockRef]:
    """What is taken back may turn out not to be owed, also by a later command of the batch: its debt comes back."""
    if isinstance(command, TopUp | Reverse):
        yield from ((command.wallet, block_id) for block_id in paid_block_ids(command))
    elif command.block_id is not None:
        yield command.wallet, command.block_id
    if isinstance(command, Reverse | Revoke):
        yield from return_blocks((command.wallet,))


def _limits_of(command: AnyCommand) -> tuple[Limit, ...]:
    if isinstance(command, SetLimit):
        return (command.limit,)
    return command.limits if isinstance(command, (Hold, Extend)) else ()


def reserved_wallets(reservation: Reservation) -> set[WalletRef]:
    """The wallets that a command on *reservation* may touch. What its slices name is live, and comes with them."""
    wallets = set(reservation.limits)
    for leg in reservation.legs:
        wallets.update(leg.wallets)
    for held in reservation.slices:
        wallets.add(held.wallet)
    if reservation.unfunded is not None:
        wallets.add(reservation.unfunded)
    return wallets


def used_up(state: State, commands: Sequence[AnyCommand]) -> set[WalletRef]:
    """The wallets whose blocks *commands* may use up.

    Reservations may also be made by an earlier one of the same *commands*.
    """
    reserving = {command.reservation: command for command in commands if isinstance(command, Reserve)}
    found: set[WalletRef] = set()
    for command in commands:
        if isinstance(command, _USING_UP):
            found |= _wallets_touched(state, command)
        if reserving and isinstance(command, (Commit, Lapse, Debit)) and command.reservation in reserving:
            found |= _wallets_named(reserving[command.reservation])
    return found


_USING_UP = (Commit, Lapse, Debit, Revoke)


def pools(state: State, commands: Sequence[AnyCommand]) -> set[WalletRef]:
    """The grant pools behind the blocks that *commands* may use up: markup, and what is revoked, goes back there.

    Blocks may also be made by an earlier one of the same *commands*.
    """
    wallets = used_up(state, commands)
    found: set[WalletRef] = set()
    for command in commands:
        if isinstance(command, Grant) and command.from_wallet is not None and command.wallet in wallets:
            found.add(command.from_wallet)
    return found | _pools_of(state, wallets)


def _pools_of(state: State, wallets: Iterable[WalletRef]) -> set[WalletRef]:
    found: set[WalletRef] = set()
    for ref in wallets:
        for block in state.blocks.get(ref, {}).values():
            if block.pool is not None:
                found.add(block.pool)
    return found


def _blocks_refunded(command: Refund) -> Iterator[BlockRef]:
    """The blocks that a refund may fill again: nothing may be left in them."""
    for payment in command.payments:
        if payment.block is not None:
            yield payment.wallet, payment.block
        yield from return_blocks((payment.wallet,))
        if payment.pool is not None:
            yield from return_blocks((payment.pool,))


def return_blocks(wallets: Iterable[WalletRef]) -> set[BlockRef]:
    """The blocks that take what comes back to *wallets*."""
    return {(ref, block_id) for ref in wallets for block_id in RETURN_BLOCKS.values()}


def clawed(state: State, wallets: Iterable[WalletRef]) -> set[WalletRef]:
    """Those of *wallets* that may have repaid a debt which turns out not to be owed: it comes back."""
    return {ref for ref in wallets if any(block.clawed > 0 for block in state.blocks.get(ref, {}).values())}


def _wallets_named(command: Hold | Grant | Purchase) -> set[WalletRef]:
    if isinstance(command, Hold):
        return set(command.wallets)
    if isinstance(command, Grant) and command.from_wallet is not None:
        return {command.wallet, command.from_wallet}
    return {command.wallet}


def _wallets_touched(state: State, command: AnyCommand) -> set[WalletRef]:
    """The wallets of *command* but for pools, as far as *state* knows them."""
    match command:
        case Debit():
            # It may settle a reservation that is there already, whoever was to pay for that one.
            reservation = state.reservations.get(command.reservation)
            return _wallets_named(command) | (set() if reservation is None else reserved_wallets(reservation))
        case Hold() | Grant():
            return _wallets_named(command)
        case Extend() | Commit() | Release() | Lapse():
            reservation = state.reservations.get(command.reservation)
            return set() if reservation is None else reserved_wallets(reservation)
        case Refund():
            return set(command.wallets)
        case _:
            return {command.wallet}


class JournalRow(NamedTuple):
    """One applied command as the journal keeps it, before it has its number."""

    scope: Scope
    id: str
    kind: str
    at_us: int
    facts: tuple[Fact, ...]
    transfers: tuple[Transfer, ...]
    result: Result


class AppliedBefore(NamedTuple):
    """A command that an earlier batch applied: a repetition answers with the same."""

    kind: str
    result: Result


@dataclass(slots=True)
class Writes:
    """What a batch changes. Values are as after the batch; ``*_changed`` are rows that were there before it."""

    journal: list[JournalRow] = field(default_factory=list)
    wallets_opened: list[Wallet] = field(default_factory=list)
    wallets_changed: list[tuple[Wallet, int]] = field(default_factory=list)
    """With the version that the wallet was loaded with."""
    wallets_watched: list[Wallet] = field(default_factory=list)
    """Those of both whose alerts, or what of them has rung, are others than before: few batches change that."""
    blocks_opened: list[Block] = field(default_factory=list)
    blocks_changed: list[tuple[Block, bool]] = field(default_factory=list)
    """With whether the block was live when it was loaded."""
    reservations_opened: list[Reservation] = field(default_factory=list)
    reservations_changed: list[Reservation] = field(default_factory=list)
    keys_taken: list[KeyTaken] = field(default_factory=list)
    keys_freed: list[KeyRef] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    usage: list[UsageRecorded] = field(default_factory=list)
    responses: list[Row] = field(default_factory=list)


class Folded(NamedTuple):
    outcomes: list[Outcome]
    writes: Writes


class _Touched:
    """What the state held before the batch, for all that the batch has changed."""

    def __init__(self) -> None:
        self.wallets: dict[WalletRef, Wallet | None] = {}
        self.blocks: dict[BlockRef, Block | None] = {}
        self.reservations: dict[ReservationRef, Reservation | None] = {}
        self.keys: dict[KeyRef, None] = {}

    def remember(self, state: State, fact: Fact) -> None:
        """Keep what *fact* is about to change, unless an earlier fact of the batch has."""
        match fact:
            case WalletChanged():
                self.wallets.setdefault(fact.wallet, state.wallets.get(fact.wallet))
            case BlockChanged():
                self.blocks.setdefault((fact.wallet, fact.block), state.blocks[fact.wallet][fact.block])
            case ReservationChanged():
                ref = fact.reservation.ref
                self.reservations.setdefault(ref, state.reservations.get(ref))
            case WalletOpened():
                self.wallets.setdefault(fact.wallet.ref, None)
            case BlockOpened():
                self.blocks.setdefault((fact.block.wallet, fact.block.id), None)
            case KeyTaken() | KeyFreed():
                self.keys[fact.scope, fact.operation, fact.key] = None
            case _:
                pass


def fold(
    state: State, commands: Sequence[AnyCommand], clock_us: int, applied_before: Mapping[CommandRef, AppliedBefore]
) -> Folded:
    """Decide *commands* in turn; *state* is afterwards as after the batch.

    A command's time is the clock's, but never before the last fact of a wallet that it touches: hosts' clocks differ.
    An id that comes again, in this batch or from *applied_before*, has no second effect.
    """
    writes = Writes()
    touched = _Touched()
    outcomes: list[Outcome] = []
    known = dict(applied_before)
    for command in commands:
        identity = (command.scope, command.id)
        before = known.get(identity)
        if before is None:
            outcome = _decide_one(state, command, clock_us, writes, touched)
            if isinstance(outcome, Applied) and outcome.facts:
                known[identity] = AppliedBefore(kind_of(command), outcome.result)
        elif before.kind == kind_of(command):
            outcome = Applied(result=before.result, replayed=True)
        else:
            outcome = Rejected(Reason.KEY_REUSED)
        outcomes.append(outcome)
    _gather(state, touched, writes)
    return Folded(outcomes, writes)


def kind_of(command: AnyCommand) -> str:
    return str(type(command).__struct_config__.tag)


def _decide_one(state: State, command: AnyCommand, clock_us: int, writes: Writes, touched: _Touched) -> Outcome:
    now_us = clock_us
    wallets = _wallets_touched(state, command)
    if isinstance(command, _USING_UP):
        wallets |= _pools_of(state, wallets)
    for ref in wallets:
        wallet = state.wallets.get(ref)
        if wallet is not None and wallet.last_fact_us > now_us:
            now_us = wallet.last_fact_us
    outcome = decide(state, command, now_us)
    if isinstance(outcome, Rejected) or not outcome.facts:
        return outcome
    kept: list[Fact] = []
    transfers: list[Transfer] = []
    for fact in outcome.facts:
        if isinstance(fact, Transfer):
            transfers.append(fact)
            continue
        kept.append(fact)
        if isinstance(fact, UsageRecorded):
            writes.usage.append(fact)
        touched.remember(state, fact)
        evolve(state, fact)
    writes.journal.append(
        JournalRow(command.scope, command.id, kind_of(command), now_us, tuple(kept), tuple(transfers), outcome.result)
    )
    writes.events.extend(outcome.events)
    if outcome.answers is not None and isinstance(command, (Commit, Debit)) and command.response is not None:
        expires_at_us = now_us + RESPONSE_LIFE_US
        writes.responses.append(
            response_row(command.scope, *outcome.answers, command.response, expires_at_us=expires_at_us)
        )
    return outcome


def _gather(state: State, touched: _Touched, writes: Writes) -> None:
    for ref, wallet in touched.wallets.items():
        after = state.wallets[ref]
        if wallet is None:
            writes.wallets_opened.append(after)
        else:
            writes.wallets_changed.append((after, wallet.version))
        known = ((), ()) if wallet is None else (wallet.alerts, wallet.rung)
        if known != (after.alerts, after.rung):
            writes.wallets_watched.append(after)
    for (ref, block_id), block in touched.blocks.items():
        if block is None:
            writes.blocks_opened.append(state.blocks[ref][block_id])
        else:
            writes.blocks_changed.append((state.blocks[ref][block_id], block.live))
    for reservation_ref, reservation in touched.reservations.items():
        target = writes.reservations_opened if reservation is None else writes.reservations_changed
        target.append(state.reservations[reservation_ref])
    for key in touched.keys:
        taken = state.keys.get(key)
        if taken is None:
            writes.keys_freed.append(key)
        else:
            writes.keys_taken.append(taken)
