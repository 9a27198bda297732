"""What must always hold. Pure: the tests check it after every step, ``farebox verify`` over the whole journal.

How it works. :func:`violations` looks at one state and the transfers that led to it. :class:`Audit` follows the journal
command by command and checks, after each, all that the command touched, so that nothing is wrong even for a moment. It
keeps what is alive (wallets, blocks, open reservations) and of the rest a digest, so a long history fits in memory.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from typing import Any

import msgspec

from ledger import alerts
from ledger.model import (
    USD_ASSET,
    WALLET_PREFIX,
    Account,
    Block,
    Charge,
    Reservation,
    ReservationRef,
    ReservationState,
    Scope,
    WalletRef,
)
from ledger.outcomes import (
    BlockChanged,
    BlockOpened,
    Fact,
    KeyFreed,
    KeyTaken,
    ReservationChanged,
    Transfer,
    UsageRecorded,
    WalletChanged,
    WalletOpened,
)
from ledger.state import KeyRef, State, evolve
from ledger.store.protocol import JournalEntry

_WALLET_ACCOUNT = WALLET_PREFIX

_encode = msgspec.json.Encoder(order="deterministic").encode

HeldRef = tuple[WalletRef, str | None]

_Booking = tuple[Scope, str, str | None, str]
"""What one block paid to one account: scope, payer, block, payee."""

_CHARGE_ACCOUNTS = (Account.REVENUE, Account.TENANT_DUE, Account.TENANT_MARGIN, Account.DEVELOPER_PAYABLE)

_Rule = tuple[type[Fact], Callable[[Any, JournalEntry], bool], str]


class Violation(msgspec.Struct, frozen=True):
    """Something that must not be; *facts* say where and how much."""

    message: str
    facts: dict[str, Any]


def violations(state: State, transfers: Iterable[Transfer], *, operator: str | None = None) -> list[Violation]:
    """All that is wrong with a whole *state* and the *transfers* that led to it.

    Args:
        operator: the tenant whose wallets others may pay from; nothing else crosses scopes.
    """
    found: list[Violation] = []
    accounts: Counter[WalletRef] = Counter()
    for transfer in transfers:
        found += check_transfer(state, transfer)
        for ref, amount in wallet_amounts(transfer):
            accounts[ref] += amount
    for ref, wallet in state.wallets.items():
        remaining = sum(block.remaining for block in state.blocks.get(ref, {}).values())
        if accounts[ref] != remaining - wallet.receivable:
            found.append(_unequal(ref, accounts[ref], remaining, wallet.receivable))
    return found + list(check_state(state, operator=operator))


def check_state(state: State, *, operator: str | None = None) -> Iterator[Violation]:
    """What one state tells by itself."""
    for blocks in state.blocks.values():
        for block in blocks.values():
            yield from check_block(block)
    held: Counter[HeldRef] = Counter()
    for reservation in state.reservations.values():
        yield from check_reservation(reservation)
        yield from check_scopes(ReservationChanged(reservation=reservation), _scope(reservation.ref), operator)
        for part in reservation.slices:
            held[part.wallet, part.block] += part.amount
    for ref, wallet in state.wallets.items():
        if not set(wallet.rung) <= set(wallet.alerts):
            yield Violation("a wallet rings only what it is watched for", {"wallet": ref})
        if wallet.receivable < 0 or wallet.overdraft_reserved < 0 or wallet.overdraft_limit < 0:
            yield Violation("a wallet's amounts must not be negative", {"wallet": ref})
        yield from _check_held(held.pop((ref, None), 0), wallet.overdraft_reserved, ref, None)
        for block in state.blocks.get(ref, {}).values():
            yield from _check_held(held.pop((ref, block.id), 0), block.reserved, ref, block.id)
    for (ref, block_id), amount in held.items():
        yield Violation("a reservation holds what does not exist", {"wallet": ref, "block": block_id, "slices": amount})
    for key, taken in state.keys.items():
        if key != (taken.scope, taken.operation, taken.key):
            yield Violation("a key is filed under another", {"key": key})


def check_block(block: Block) -> Iterator[Violation]:
    amounts = (block.granted, block.consumed, block.expired, block.revoked, block.clawed, block.remaining)
    if min(amounts) < 0 or not 0 <= block.reserved <= block.remaining:
        yield Violation(
            "a block's amounts are not negative, and 0 <= reserved <= remaining",
            {"wallet": block.wallet, "block": block.id, "amounts": amounts, "reserved": block.reserved},
        )


def check_reservation(reservation: Reservation) -> Iterator[Violation]:
    if reservation.state is not ReservationState.OPEN and reservation.slices:
        yield Violation("a settled reservation holds nothing", {"reservation": reservation.ref})
    paid = [Charge() for _ in reservation.legs]
    for payment in reservation.payments:
        before = paid[payment.leg]
        paid[payment.leg] = Charge(base=before.base + payment.base, markup=before.markup + payment.markup)
    if tuple(paid) != reservation.charged:
        yield Violation(
            "what was charged is what was paid",
            {"reservation": reservation.ref, "charged": reservation.charged, "paid": tuple(paid)},
        )
    by_name = {payment.name: payment for payment in reservation.payments}
    for given in reservation.refunds:
        paid_there = by_name.get(given.name)
        if paid_there is None or not (0 <= given.base <= paid_there.base and 0 <= given.markup <= paid_there.markup):
            yield Violation("no more is given back than was paid", {"reservation": reservation.ref, "refund": given})


def check_transfer(state: State, transfer: Transfer) -> Iterator[Violation]:
    """An entry moves something between two accounts, in the asset of the wallets that it names."""
    if transfer.amount <= 0 or transfer.debit == transfer.credit:
        yield Violation("an entry must move something", {"transfer": transfer})
    for ref, _ in wallet_amounts(transfer):
        wallet = state.wallets.get(ref)
        if wallet is None:
            yield Violation("an entry names a wallet that does not exist", {"wallet": ref, "transfer": transfer})
        elif wallet.asset != transfer.asset:
            yield Violation("an entry is in another asset than its wallet", {"wallet": ref, "transfer": transfer})


def check_scopes(fact: Fact, scope: Scope, operator: str | None) -> Iterator[Violation]:
    """Nothing crosses from one tenant or mode to another, but for the wallets of *operator*."""
    for ref in _refs(fact):
        if ref[:2] != scope and (ref[0] != operator or ref[1] != scope.mode):
            yield Violation("a fact crosses scopes", {"scope": scope, "names": ref})


def wallet_amounts(transfer: Transfer) -> Iterator[tuple[WalletRef, int]]:
    """What *transfer* adds to the wallets that it names."""
    for account, amount in ((transfer.debit, -transfer.amount), (transfer.credit, transfer.amount)):
        if account.startswith(_WALLET_ACCOUNT):
            yield WalletRef(*transfer.scope, account.removeprefix(_WALLET_ACCOUNT)), amount


def digest(value: object) -> bytes:
    return blake2b(_encode(value), digest_size=16).digest()


class Audit:
    """Replays a journal and checks every step of it."""

    def __init__(self, *, operator: str | None = None) -> None:
        self.operator = operator
        self.entries = 0
        self.found: list[Violation] = []
        self.state = State()
        """Wallets, blocks and open reservations as the journal tells them. What is over is in the digests."""
        self.settled: dict[ReservationRef, bytes] = {}
        self.keys: dict[KeyRef, bytes] = {}
        self.usage_count = 0
        self.usage_sum = 0
        """The sum of the digests of all usage: equal for the same records in any order."""
        self._expired: dict[ReservationRef, Reservation] = {}
        self._refunded: dict[ReservationRef, Reservation] = {}
        self._accounts: Counter[WalletRef] = Counter()
        self._remaining: Counter[WalletRef] = Counter()
        self._held: Counter[HeldRef] = Counter()
        self._seq = 0
        self._rules = self._rules_of_facts()

    def observe(self, entry: JournalEntry) -> None:
        """Fold the next entry of the journal and check what it touches."""
        self.entries += 1
        if entry.seq <= self._seq:
            self._report("the journal's numbers must rise", entry)
        self._seq = entry.seq
        if entry.transfers_written != len(entry.transfers):
            self._report(
                "an entry's transfers must all be there",
                entry,
                written=entry.transfers_written,
                found=len(entry.transfers),
            )
        wallets: dict[WalletRef, None] = {}
        held: dict[HeldRef, None] = {}
        charged: Counter[_Booking] = Counter()
        for fact in entry.facts:
            self.found += check_scopes(fact, entry.scope, self.operator)
            if self._acceptable(fact, entry):
                if isinstance(fact, ReservationChanged):
                    charged.update(_bookings(fact.reservation))
                    charged.subtract(_bookings(self._before_in(fact.reservation, entry.kind)))
                self._fold(fact, wallets, held)
        for transfer in entry.transfers:
            self.found += check_scopes(transfer, entry.scope, self.operator)
            self.found += check_transfer(self.state, transfer)
            for ref, amount in wallet_amounts(transfer):
                self._accounts[ref] += amount
                wallets[ref] = None
        self._check_touched(wallets, held)
        self._check_rung(entry)
        self._check_cost(entry)
        self._check_booked(entry, charged)

    def finish(self) -> None:
        """Check the end state as a whole, once the journal is at its end."""
        self.found += check_state(self.state, operator=self.operator)

    def _acceptable(self, fact: Fact, entry: JournalEntry) -> bool:
        """Whether *fact* can follow what was before it; if not, that is a violation and it is left out."""
        for kind, holds, message in self._rules:
            if isinstance(fact, kind) and not holds(fact, entry):
                self._report(message, entry, fact=fact)
                return False
        return True

    def _rules_of_facts(self) -> tuple[_Rule, ...]:
        """What each kind of fact needs: the first that does not hold is told."""
        state = self.state
        return (
            (WalletOpened, lambda fact, _: fact.wallet.ref not in state.wallets, "a wallet is opened once"),
            (
                BlockOpened,
                lambda fact, _: fact.block.id not in state.blocks.get(fact.block.wallet, {}),
                "a block is opened once",
            ),
            (
                BlockChanged,
                lambda fact, _: fact.block in state.blocks.get(fact.wallet, {}),
                "a block changes after it was opened",
            ),
            (WalletChanged, lambda fact, _: fact.wallet in state.wallets, "a wallet changes after it was opened"),
            (
                WalletChanged,
                lambda fact, _: fact.at_us >= state.wallets[fact.wallet].last_fact_us,
                "a wallet's facts are in the order of time",
            ),
            (
                WalletChanged,
                self._debt_agreed,
                "a wallet goes below zero only as far as agreed, by a claw-back, or for work done without asking",
            ),
            (
                ReservationChanged,
                lambda fact, entry: self._may_change(fact.reservation, entry.kind),
                "a settled reservation stays settled",
            ),
            (
                KeyTaken,
                lambda fact, _: (fact.scope, fact.operation, fact.key) not in self.keys,
                "a key has one effect",
            ),
        )

    def _debt_agreed(self, change: WalletChanged, entry: JournalEntry) -> bool:
        wallet = self.state.wallets[change.wallet]
        if change.receivable <= 0 or entry.kind in {"revoke", "reverse"}:
            return True
        agreed = max(wallet.overdraft_limit, wallet.receivable + wallet.overdraft_reserved)
        if entry.kind in {"debit", "commit"}:
            # What its reservation says that it was left owing; that it says so, and is charged for it, is one fact.
            for fact in entry.facts:
                if isinstance(fact, ReservationChanged):
                    agreed += self._left_owing(fact.reservation, change.wallet)
        if entry.kind == "refund":
            # A pool gives back the markup that it was given, and may have spent it since.
            agreed += sum(entry_of.amount for entry_of in entry.transfers if entry_of.debit == wallet.account)
        return wallet.receivable + change.receivable <= agreed

    def _left_owing(self, reservation: Reservation, wallet: WalletRef) -> int:
        """How much more than before *reservation* says that *wallet* was left owing for it."""
        before = self._before(reservation.ref)
        debts = [(reservation.owed, 1), (() if before is None else before.owed, -1)]
        return sum(
            sign * owed
            for owed_by_leg, sign in debts
            for leg, owed in zip(reservation.legs, owed_by_leg, strict=False)
            if leg.wallets[0] == wallet
        )

    def _may_change(self, reservation: Reservation, kind: str) -> bool:
        """What is settled changes by refunds alone; and what expired by itself may still be committed, once."""
        ref = reservation.ref
        if ref not in self.settled:
            return True
        if kind == "refund":
            before = self._before(ref) or msgspec.structs.replace(reservation, refunds=())
            same = msgspec.structs.replace(reservation, refunds=before.refunds) == before
            return same and digest(before) == self.settled[ref]
        return ref in self._expired and reservation.state is ReservationState.COMMITTED

    def _fold(self, fact: Fact, wallets: dict[WalletRef, None], held: dict[HeldRef, None]) -> None:
        """Fold *fact*, and note what it touches in *wallets* and *held*."""
        match fact:
            case BlockOpened():
                self._remaining[fact.block.wallet] += fact.block.remaining
                held[fact.block.wallet, fact.block.id] = None
                wallets[fact.block.wallet] = None
            case BlockChanged():
                self._remaining[fact.wallet] += fact.granted - fact.consumed - fact.expired - fact.revoked
                held[fact.wallet, fact.block] = None
                wallets[fact.wallet] = None
            case WalletChanged():
                held[fact.wallet, None] = None
                wallets[fact.wallet] = None
            case ReservationChanged():
                self._fold_reservation(fact.reservation, held)
                return
            case KeyTaken():
                self.keys[fact.scope, fact.operation, fact.key] = digest(fact)
                return
            case KeyFreed():
                self.keys.pop((fact.scope, fact.operation, fact.key), None)
                return
            case UsageRecorded():
                self.usage_count += 1
                self.usage_sum += int.from_bytes(digest(fact))
                return
            case _:
                pass
        evolve(self.state, fact)

    def _fold_reservation(self, reservation: Reservation, held: dict[HeldRef, None]) -> None:
        self.found += check_reservation(reservation)
        ref = reservation.ref
        before = self.state.reservations.pop(ref, None)
        for part in () if before is None else before.slices:
            self._held[part.wallet, part.block] -= part.amount
            held[part.wallet, part.block] = None
        for part in reservation.slices:
            self._held[part.wallet, part.block] += part.amount
            held[part.wallet, part.block] = None
        self._expired.pop(ref, None)
        self._refunded.pop(ref, None)
        if reservation.state is ReservationState.OPEN:
            self.state.reservations[ref] = reservation
            return
        self.settled[ref] = digest(reservation)
        if reservation.refunds:
            self._refunded[ref] = reservation
        elif reservation.state is ReservationState.EXPIRED:
            self._expired[ref] = reservation

    def _check_touched(self, wallets: Iterable[WalletRef], held: Iterable[HeldRef]) -> None:
        state = self.state
        for ref in wallets:
            wallet = state.wallets.get(ref)
            receivable = 0 if wallet is None else wallet.receivable
            if self._accounts[ref] != self._remaining[ref] - receivable:
                self.found.append(_unequal(ref, self._accounts[ref], self._remaining[ref], receivable))
        for ref, block_id in held:
            slices = self._held[ref, block_id]
            if slices == 0:
                del self._held[ref, block_id]
            if block_id is None:
                wallet = state.wallets.get(ref)
                self.found += _check_held(slices, 0 if wallet is None else wallet.overdraft_reserved, ref, None)
                continue
            block = state.blocks.get(ref, {}).get(block_id)
            self.found += _check_held(slices, 0 if block is None else block.reserved, ref, block_id)
            self.found += () if block is None else check_block(block)

    def _before(self, ref: ReservationRef) -> Reservation | None:
        return self.state.reservations.get(ref) or self._expired.get(ref) or self._refunded.get(ref)

    def _before_in(self, reservation: Reservation, kind: str) -> Reservation | None:
        """A reservation before the entry that made it *reservation*. Of what is over the first refund tells it."""
        before = self._before(reservation.ref)
        if before is None and kind == "refund":
            return msgspec.structs.replace(reservation, refunds=())
        return before

    def _check_booked(self, entry: JournalEntry, charged: Counter[_Booking]) -> None:
        """What was paid, by which block and to whom, is the same in the reservation and in the journal's entries."""
        settles = any(isinstance(fact, ReservationChanged) for fact in entry.facts)
        booked: Counter[_Booking] = Counter()
        for transfer in entry.transfers:
            to = transfer.credit.partition(":")[0]
            if transfer.credit == Account.TENANT_DUE and not transfer.debit.startswith(_WALLET_ACCOUNT):
                pass  # The tenant owes what had been revenue: nobody paid.
            elif transfer.credit == Account.REVENUE and transfer.debit == Account.TENANT_DUE:
                pass  # And not any more.
            elif entry.kind == "refund":
                if transfer.credit.startswith(_WALLET_ACCOUNT):
                    booked[transfer.scope, transfer.credit, transfer.block, transfer.debit] -= transfer.amount
            elif transfer.debit == Account.LIMIT:
                pass  # A limit's period begins: nobody paid.
            elif to in _CHARGE_ACCOUNTS or (settles and transfer.credit.startswith(_WALLET_ACCOUNT)):
                booked[transfer.scope, transfer.debit, transfer.block, transfer.credit] += transfer.amount
        if booked != charged:
            wrong = [booking for booking in {**booked, **charged} if booked[booking] != charged[booking]]
            self._report("a charge is booked as its reservation tells it", entry, differing=wrong)

    def _check_rung(self, entry: JournalEntry) -> None:
        """What an entry says of a wallet's alerts is what they are, by the balance that it leaves.

        One that says nothing of them may be an older release's, which does not know of them.
        """
        for fact in entry.facts:
            if isinstance(fact, WalletChanged) and (fact.alerts, fact.rung) != (None, None):
                wallet = self.state.wallets.get(fact.wallet)
                balance = self.state.balance(fact.wallet, entry.at_us)
                if wallet is not None and wallet.rung != alerts.below(wallet.alerts, balance):
                    self._report("what has rung is what the balance is below of", entry, fact=fact, balance=balance)

    def _check_cost(self, entry: JournalEntry) -> None:
        """The provider's cost is in the journal as the usage tells it."""
        recorded = sum(fact.record.provider_cost_nanos for fact in entry.facts if isinstance(fact, UsageRecorded))
        booked = sum(
            transfer.amount
            for transfer in entry.transfers
            if transfer.debit == Account.PROVIDER_COST and transfer.asset == USD_ASSET
        )
        if recorded != booked:
            self._report("the provider's cost is booked as the usage tells it", entry, recorded=recorded, booked=booked)

    def _report(self, message: str, entry: JournalEntry, **facts: Any) -> None:
        self.found.append(Violation(message, {"seq": entry.seq, "command": entry.id, **facts}))


def _bookings(reservation: Reservation | None) -> Counter[_Booking]:
    """What a reservation's charges have booked so far."""
    booked: Counter[_Booking] = Counter()
    if reservation is None:
        return booked
    for payment in reservation.payments:
        payer = f"{_WALLET_ACCOUNT}{payment.wallet.wallet}"
        booked[payment.wallet.scope, payer, payment.block, payment.base_account] += payment.base
        booked[payment.wallet.scope, payer, payment.block, payment.markup_account] += payment.markup
    for given in reservation.refunds:
        payer = f"{_WALLET_ACCOUNT}{given.wallet.wallet}"
        booked[given.wallet.scope, payer, given.block, given.base_account] -= given.base
        booked[given.wallet.scope, payer, given.block, given.markup_account] -= given.markup
    booked[reservation.ref.scope, Account.METER_SHORTFALL, None, Account.REVENUE] += reservation.shortfall
    return booked


def _check_held(slices: int, reserved: int, ref: WalletRef, block_id: str | None) -> Iterator[Violation]:
    if slices != reserved:
        yield Violation(
            "what open reservations hold is what is reserved",
            {"wallet": ref, "block": block_id, "slices": slices, "reserved": reserved},
        )


def _unequal(ref: WalletRef, account: int, remaining: int, receivable: int) -> Violation:
    return Violation(
        "a wallet's account is what its blocks have left less what it owes",
        {"wallet": ref, "account": account, "remaining": remaining, "receivable": receivable},
    )


def _scope(ref: ReservationRef | WalletRef) -> Scope:
    return Scope(ref.tenant, ref.mode)


def _refs(fact: Fact) -> Iterator[tuple[str, ...]]:
    """What *fact* names, each beginning with tenant and mode."""
    match fact:
        case Transfer() | KeyTaken() | KeyFreed():
            yield fact.scope
        case WalletOpened():
            yield fact.wallet.ref
        case WalletChanged() | BlockChanged():
            yield fact.wallet
        case BlockOpened():
            yield fact.block.wallet
            if fact.block.pool is not None:
                yield fact.block.pool
        case UsageRecorded():
            yield fact.reservation
        case ReservationChanged():
            reservation = fact.reservation
            yield reservation.ref
            yield from (ref for leg in reservation.legs for ref in leg.wallets)
            yield from reservation.limits
            yield from (payment.wallet for payment in reservation.payments)
            yield from (part.wallet for part in reservation.slices)
            if reservation.unfunded is not None:
                yield reservation.unfunded
