"""Where credits come from and what becomes of them, by who stands behind them. Pure: entries in, amounts out.

How it works. The journal says of each block what came into it and what left it, and for which account. Credits that
a customer paid for can be moved on, into a pool or a pack, together with others. So each block is kept with what it
consists of: what came in by a payment (`paid`), what the operator gave (`given`), and what the operator was never paid
for (`other`). What leaves a block is taken from its parts in proportion, rounded down; the last of it takes all that is
left. What comes back to a block comes back in the proportion that the block had when it was filled. So a block of one
kind, which nearly all of them are, is always exact.

What a block gains or loses without an entry has to do with debts: a top-up repays what the wallet owes, or what had
been spent of a payment is clawed back and owed from then on.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, get_args

from gateway.identity.wallets import bounds_spending
from gateway.payments.clearing import CREDITING
from ledger.model import WALLET_PREFIX, Account, Scope, WalletRef
from ledger.outcomes import BlockChanged, BlockOpened, Fact, Transfer, WalletOpened
from ledger.store.protocol import JournalEntry

Kind = Literal["paid", "given", "other"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

Line = Literal[
    "brought_in",
    "taken_back",
    "revenue",
    "developer_payable",
    "tenant_margin",
    "tenant_due",
    "breakage",
    "packs",
    "moved",
    "debts",
]
LINES: Final[tuple[Line, ...]] = get_args(Line)

_LINE_OF_ACCOUNT: Final[dict[str, Line]] = {
    Account.REVENUE: "revenue",
    Account.DEVELOPER_PAYABLE: "developer_payable",
    Account.TENANT_MARGIN: "tenant_margin",
    Account.TENANT_DUE: "tenant_due",
    Account.BREAKAGE: "breakage",
}
_FUNDING: Final = (Account.CLEARING, Account.PROMO, Account.EXTERNAL)

BlockRef = tuple[WalletRef, str]


class Flow(NamedTuple):
    """*amount* came in (above zero) or left, of the credits of a kind in a scope's wallets."""

    scope: Scope
    asset: str
    kind: Kind
    line: Line
    amount: int


class Parts(NamedTuple):
    """An amount by who stands behind it."""

    paid: int = 0
    given: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        return self.paid + self.given + self.other

    def plus(self, more: "Parts") -> "Parts":
        return Parts(self.paid + more.paid, self.given + more.given, self.other + more.other)

    def minus(self, less: "Parts") -> "Parts":
        return Parts(self.paid - less.paid, self.given - less.given, self.other - less.other)

    def share(self, amount: int) -> "Parts":
        """*amount* in the proportion of these parts: all of them when it is all, never more of one than there is."""
        if self.total == 0:
            return Parts(other=amount)
        paid = self.paid * amount // self.total
        not_other = (self.paid + self.given) * amount // self.total
        return Parts(paid, not_other - paid, amount - not_other)


NOTHING: Final = Parts()


@dataclass(slots=True)
class _Held:
    """A block: what is left in it, and what it was filled with."""

    operator_paid: bool
    asset: str
    left: Parts = NOTHING
    filled: Parts = NOTHING


@dataclass(slots=True)
class _Move:
    """What one command does to one block.

    *known* is what its entries say, by line; *arrives* came without an entry of its own, out of another block; what
    is left to explain *change* is a matter of debts.
    """

    granted: int = 0
    change: int = 0
    funded: Counter[str] = field(default_factory=Counter)
    known: Counter[Line] = field(default_factory=Counter)
    sent: int = 0
    received: int = 0

    @property
    def arrives(self) -> int:
        """What the block was opened with, or grew by, and no account brought."""
        return max(0, self.granted - self.funded.total() - self.received)

    @property
    def debts(self) -> int:
        explained = self.funded.total() + self.known.total() + self.received - self.sent + self.arrives
        return self.change - explained


class CreditFlows:
    """The blocks of all wallets, entry by entry.

    Args:
        bounds: tells wallets that have no credits in them.
    """

    def __init__(self, *, bounds: Callable[[WalletRef], bool] = bounds_spending) -> None:
        self._bounds = bounds
        self._blocks: dict[BlockRef, _Held] = {}
        self._assets: dict[WalletRef, str] = {}

    def left(self) -> dict[tuple[Scope, str], Parts]:
        """What is left in all blocks now, by scope and asset."""
        sums: dict[tuple[Scope, str], Parts] = defaultdict(lambda: NOTHING)
        for (ref, _), held in self._blocks.items():
            sums[ref.scope, held.asset] = sums[ref.scope, held.asset].plus(held.left)
        return dict(sums)

    def asset_of(self, ref: WalletRef) -> str:
        """The asset of a wallet that is there."""
        return self._assets[ref]

    def observe(self, entry: JournalEntry) -> Iterator[Flow]:
        """What *entry*, the next of the journal, did to the credits."""
        moves = self._moves(entry)
        bag = {True: NOTHING, False: NOTHING}
        # In this order, because what leaves has to be there.
        yield from self._come_in(moves)
        yield from self._go_out(moves, bag)
        yield from self._arrive(moves, bag, entry)
        yield from self._repay(moves)
        yield from self._kept(entry, moves, bag[True].plus(bag[False]))

    def _come_in(self, moves: Mapping[BlockRef, _Move]) -> Iterator[Flow]:
        """What accounts bring or give back, and what is owed from now on although it was spent."""
        for ref, move in moves.items():
            held = self._blocks[ref]
            for account, amount in move.funded.items():
                yield from self._fill(ref, held, _parts_of(account, amount, held), "brought_in")
            for line, amount in move.known.items():
                if amount > 0:
                    yield from self._come_back(ref, held, amount, line)
            if move.debts > 0:
                yield from self._come_back(ref, held, move.debts, "debts")

    def _go_out(self, moves: Mapping[BlockRef, _Move], bag: dict[bool, Parts]) -> Iterator[Flow]:
        """What leaves for an account; and what leaves for other blocks goes into the *bag*."""
        for ref, move in moves.items():
            held = self._blocks[ref]
            for line, amount in move.known.items():
                if amount < 0:
                    yield from self._leave(ref, held, held.left.share(-amount), line)
            if move.sent:
                gone = held.left.share(move.sent)
                bag[held.operator_paid] = bag[held.operator_paid].plus(gone)
                yield from self._leave(ref, held, gone, "moved")

    def _arrive(self, moves: Mapping[BlockRef, _Move], bag: dict[bool, Parts], entry: JournalEntry) -> Iterator[Flow]:
        """What comes out of the *bag*; the ledger keeps what the operator was paid for apart from the rest."""
        for ref, move in moves.items():
            held = self._blocks[ref]
            wanted = move.arrives + move.received
            there = bag[held.operator_paid]
            taken = there.share(min(wanted, there.total))
            bag[held.operator_paid] = there.minus(taken)
            yield from self._fill(ref, held, taken, "moved")
            yield from self._made(ref, held, wanted - taken.total, entry)

    def _repay(self, moves: Mapping[BlockRef, _Move]) -> Iterator[Flow]:
        """What came in, and was gone at once: the wallet owed it."""
        for ref, move in moves.items():
            if move.debts < 0:
                held = self._blocks[ref]
                yield from self._leave(ref, held, held.left.share(-move.debts), "debts")

    def _moves(self, entry: JournalEntry) -> dict[BlockRef, _Move]:
        """What the entry does to each block that it touches."""
        moves: dict[BlockRef, _Move] = defaultdict(_Move)
        for fact in entry.facts:
            self._note(fact, moves)
        unnamed: Counter[WalletRef] = Counter()
        for transfer in entry.transfers:
            self._post(entry, transfer, moves, unnamed)
        for ref, move in moves.items():
            # Markup that is given back leaves a pool by an entry that names the block it goes to.
            if (less := min(-move.debts, unnamed[ref[0]])) > 0:
                move.sent += less
                unnamed[ref[0]] -= less
        return dict(moves)

    def _note(self, fact: Fact, moves: dict[BlockRef, _Move]) -> None:
        match fact:
            case WalletOpened():
                self._assets[fact.wallet.ref] = fact.wallet.asset
            case BlockOpened() if not self._bounds(fact.block.wallet):
                block = fact.block
                ref = (block.wallet, block.id)
                self._blocks[ref] = _Held(block.operator_paid, self._assets[block.wallet])
                moves[ref].granted += block.granted
                moves[ref].change += block.remaining
            case BlockChanged() if not self._bounds(fact.wallet):
                ref = (fact.wallet, fact.block)
                moves[ref].granted += fact.granted
                moves[ref].change += fact.granted - fact.consumed - fact.expired - fact.revoked
            case _:
                pass

    def _post(
        self, entry: JournalEntry, transfer: Transfer, moves: dict[BlockRef, _Move], unnamed: Counter[WalletRef]
    ) -> None:
        debit, credit = (_wallet(transfer.scope, account) for account in (transfer.debit, transfer.credit))
        if transfer.block is None:
            return  # Of an overdraft, or of no wallet at all.
        if debit is not None and credit is not None:
            # Only a refund names the block that it goes to; all else names that which it leaves.
            if entry.kind == "refund":
                moves[credit, transfer.block].received += transfer.amount
                unnamed[debit] += transfer.amount
            else:
                moves[debit, transfer.block].sent += transfer.amount
            return
        ref = debit or credit
        if ref is None or self._bounds(ref) or (ref, transfer.block) not in self._blocks:
            return
        move = moves[ref, transfer.block]
        account = transfer.credit if debit is not None else transfer.debit
        amount = -transfer.amount if debit is not None else transfer.amount
        if account == Account.PLAN:
            move.sent += max(0, -amount)
            move.received += max(0, amount)
        elif account in _FUNDING and amount > 0 and entry.kind in CREDITING:
            move.funded[account] += amount
        elif account in _FUNDING:
            move.known["taken_back"] += amount
        else:
            move.known[_LINE_OF_ACCOUNT[account.partition(":")[0]]] += amount

    def _fill(self, ref: BlockRef, held: _Held, parts: Parts, line: Line) -> Iterator[Flow]:
        held.left, held.filled = held.left.plus(parts), held.filled.plus(parts)
        yield from _flows(ref, held, parts, line)

    def _come_back(self, ref: BlockRef, held: _Held, amount: int, line: Line) -> Iterator[Flow]:
        back = held.filled.share(amount)
        held.left = held.left.plus(back)
        yield from _flows(ref, held, back, line)

    def _leave(self, ref: BlockRef, held: _Held, parts: Parts, line: Line) -> Iterator[Flow]:
        held.left = held.left.minus(parts)
        yield from _flows(ref, held, NOTHING.minus(parts), line)

    def _made(self, ref: BlockRef, held: _Held, amount: int, entry: JournalEntry) -> Iterator[Flow]:
        """Credits that came out of no block: a pack has more of them than it cost, or what repaid a debt comes back."""
        line: Line = "packs" if entry.kind == "purchase" else "debts"
        parts = Parts(paid=amount) if held.operator_paid else Parts(other=amount)
        yield from self._fill(ref, held, parts, line)

    def _kept(self, entry: JournalEntry, moves: Iterable[BlockRef], left: Parts) -> Iterator[Flow]:
        """What left blocks and arrived in none: a pack cost more credits than it has, or they went to repay a debt."""
        if left.total == 0:
            return
        to_packs = any(Account.PLAN in (transfer.debit, transfer.credit) for transfer in entry.transfers)
        ref = next(iter(moves))
        held = self._blocks[ref]
        yield from _flows(ref, held, left, "moved")
        yield from _flows(ref, held, NOTHING.minus(left), "packs" if to_packs else "debts")


def _parts_of(account: str, amount: int, held: _Held) -> Parts:
    """What an account brings into a block. A gift to a tenant whom it is due from is none of the operator's."""
    if account == Account.CLEARING and held.operator_paid:
        return Parts(paid=amount)
    return Parts(given=amount) if held.operator_paid else Parts(other=amount)


def _flows(ref: BlockRef, held: _Held, parts: Parts, line: Line) -> Iterator[Flow]:
    for kind, amount in zip(KINDS, parts, strict=True):
        if amount:
            yield Flow(ref[0].scope, held.asset, kind, line, amount)


def _wallet(scope: Scope, account: str) -> WalletRef | None:
    if not account.startswith(WALLET_PREFIX):
        return None
    return WalletRef(*scope, account.removeprefix(WALLET_PREFIX))
