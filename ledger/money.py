"""Whose money it is must always add up: what each payment has come to, and what the tenant owes of the revenue."""

from collections import Counter
from collections.abc import Iterator

from ledger.invariants import Violation
from ledger.model import NOT_REVERSED, WALLET_PREFIX, Account, Block, Funding, Scope, WalletRef
from ledger.outcomes import BlockChanged, BlockOpened, WalletChanged
from ledger.state import State
from ledger.store.protocol import JournalEntry


class MoneyAudit:
    """Follows the journal command by command, beside `ledger.invariants.Audit`."""

    def __init__(self) -> None:
        self._cleared: Counter[tuple[Scope, str]] = Counter()
        """What has come out of clearing for each block, less what went back."""
        self._repaid_due: dict[WalletRef, int] = {}
        self._owed: dict[tuple[WalletRef, str], int] = {}
        """What reversals have left owed, by the block."""
        self._owed_in_all: Counter[WalletRef] = Counter()

    def check(self, entry: JournalEntry, state: State) -> Iterator[Violation]:
        """What is wrong with the next *entry*, after which the wallets and blocks are as in *state*."""
        yield from self._check_cleared(entry, state)
        yield from self._check_due(entry)
        yield from _check_given_back(entry)
        yield from self._check_debts(entry, state)

    def _check_cleared(self, entry: JournalEntry, state: State) -> Iterator[Violation]:
        """A payment's part of the clearing account is what it was worth less what was taken back of it."""
        for transfer in entry.transfers:
            # An older release booked a tenant's revocation there, too.
            if transfer.block is not None and entry.kind != "revoke":
                sign = (transfer.debit == Account.CLEARING) - (transfer.credit == Account.CLEARING)
                if sign:
                    self._cleared[transfer.scope, transfer.block] += sign * transfer.amount
        for block in _paid_blocks(entry, state):
            gone = block.reversal
            there = block.granted + gone.spread - gone.taken - gone.spread_taken
            if self._cleared[block.wallet.scope, block.id] != there:
                yield _violation("clearing has of a payment what was not taken back of it", entry, block)
            bounds = (
                (gone.free, block.revoked),
                (gone.owed, block.clawed - gone.clawed),
                (gone.clawed, block.clawed - gone.owed),
                (gone.lapsed, block.expired + block.revoked - gone.free),
                (gone.spread_taken, gone.spread),
            )
            if not all(0 <= part <= most for part, most in bounds):
                yield _violation("what a reversal has taken of a block was there to be taken", entry, block)

    def _check_debts(self, entry: JournalEntry, state: State) -> Iterator[Violation]:
        """What reversals have left owed is still owed, or was repaid, to the last unit."""
        touched: dict[WalletRef, None] = {}
        for fact in entry.facts:
            if isinstance(fact, WalletChanged) and fact.debts is not None:
                touched[fact.wallet] = None
            elif isinstance(fact, BlockChanged) and fact.reversal is not None:
                owed = fact.reversal.owed + fact.reversal.clawed
                self._owed_in_all[fact.wallet] += owed - self._owed.get((fact.wallet, fact.block), 0)
                self._owed[fact.wallet, fact.block] = owed
                touched[fact.wallet] = None
        for wallet in [state.wallets[ref] for ref in touched if ref in state.wallets]:
            debts = wallet.debts
            repaid = (debts.reversed_paid, debts.repaid_paid, debts.repaid_due)
            if not 0 <= debts.reversed <= wallet.receivable or min(repaid) < 0:
                yield _violation("what is owed of reversed payments is a part of the receivable", entry, wallet)
            if debts.reversed + debts.reversed_paid + debts.repaid_due != self._owed_in_all[wallet.ref]:
                yield _violation("what reversals have left owed is owed still, or was repaid", entry, wallet)

    def _check_due(self, entry: JournalEntry) -> Iterator[Violation]:
        """Revenue becomes due from the tenant exactly as far as free credits have repaid reversed payments."""
        due = 0
        for fact in entry.facts:
            if isinstance(fact, WalletChanged) and fact.debts is not None:
                due += fact.debts.repaid_due - self._repaid_due.get(fact.wallet, 0)
                self._repaid_due[fact.wallet] = fact.debts.repaid_due
        for transfer in entry.transfers:
            if (transfer.debit, transfer.credit) == (Account.REVENUE, Account.TENANT_DUE):
                due -= transfer.amount
            if (transfer.debit, transfer.credit) == (Account.TENANT_DUE, Account.REVENUE):
                due += transfer.amount
        if due != 0:
            yield _violation("what free credits repaid of reversed payments is due from the tenant", entry, due)


def _check_given_back(entry: JournalEntry) -> Iterator[Violation]:
    """What a tenant owes for a refund is all of the revenue that it gave back; the operator owes nobody for his own."""
    due = revenue = 0
    for transfer in entry.transfers:
        if (transfer.debit, transfer.credit) == (Account.EXTERNAL, Account.TENANT_DUE):
            due += transfer.amount
        elif transfer.debit == Account.REVENUE and transfer.credit.startswith(WALLET_PREFIX):
            revenue += transfer.amount
    if due not in (0, revenue):
        yield _violation("a tenant owes the revenue that it gives back", entry, (due, revenue))


def _paid_blocks(entry: JournalEntry, state: State) -> Iterator[Block]:
    """The blocks of payments that *entry* opens or changes."""
    for fact in entry.facts:
        match fact:
            case BlockOpened() if entry.kind == "top_up":
                block = fact.block
            case BlockChanged() if fact.block in state.blocks.get(fact.wallet, {}):
                block = state.blocks[fact.wallet][fact.block]
                if block.reversal == NOT_REVERSED:
                    continue
            case _:
                continue
        if block.funding is Funding.PAID:
            yield block


def _violation(message: str, entry: JournalEntry, found: object) -> Violation:
    return Violation(message, {"seq": entry.seq, "command": entry.id, "found": found})
