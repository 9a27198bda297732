"""The accounts of a month: what was sold and not yet used, what it earned, what is owed, and what the processor took.

How it works. The journal is read once from its beginning, at one moment. What was booked before the month makes the
opening amounts, what was booked in it the lines between; an opening and its lines come to the closing. Months are UTC
and half-open. `docs/accounting.md` says what each line is, and what an accountant does with it.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Final

import msgspec
from sqlalchemy import select
from sqlmodel import col

from gateway.database import Database
from gateway.identity.wallets import bounds_spending
from gateway.payments.credit_flows import KINDS, LINES, CreditFlows, Kind
from gateway.payments.packages import DEFAULT_EXPONENT, EXPONENTS
from gateway.payments.processor import MODES
from gateway.payments.processor_transactions import MovementSum, ProcessorTransactions
from gateway.tables import AssetVersion
from ledger.model import USD_ASSET, WALLET_PREFIX, Scope, WalletRef
from ledger.outcomes import Transfer, WalletChanged
from ledger.store.protocol import JournalEntry, Store
from pricing.money import PICOS_PER_USD, Asset, format_decimal

LATE_US: Final = 3_600 * 1_000_000
"""How much later than its successors an entry of the journal may have been numbered."""

POSITIONS: Final[Mapping[Kind, str]] = {
    "paid": "deferred_revenue",
    "given": "given_credits",
    "other": "tenant_credits",
}
"""What the credits that are left come to, by who stands behind them."""

DOLLARS: Final = Asset(USD_ASSET, 9, PICOS_PER_USD)
"""What the providers' cost is kept in."""

WALLETS: Final = "wallets"
PROCESSOR: Final = "stripe"


class Month(msgspec.Struct, frozen=True):
    """A calendar month, UTC."""

    year: int
    month: int

    @classmethod
    def parse(cls, text: str) -> "Month":
        """`2026-11`.

        Raises:
            ValueError
        """
        first = datetime.strptime(text, "%Y-%m")
        return cls(first.year, first.month)

    @property
    def start_us(self) -> int:
        return int(datetime(self.year, self.month, 1, tzinfo=UTC).timestamp()) * 1_000_000

    @property
    def end_us(self) -> int:
        """The beginning of the next one."""
        return Month(self.year + self.month // 12, self.month % 12 + 1).start_us

    def __str__(self) -> str:
        return f"{self.year:04}-{self.month:02}"


class StatementLine(msgspec.Struct, frozen=True):
    """*amount* is signed, in the smallest unit, 10**-*scale* of an asset, or of a currency in the processor's lines.

    *usd* is what it is worth in dollars by the asset's value at the end of the month, exactly; None for a currency.
    """

    tenant: str
    mode: str
    asset: str
    line: str
    amount: int
    scale: int
    usd: str | None

    @property
    def decimal(self) -> str:
        return format_decimal(self.amount, self.scale)


class Statement(msgspec.Struct, frozen=True):
    """A month's accounts. *entries* is how much of the journal was read."""

    month: Month
    lines: tuple[StatementLine, ...]
    entries: int

    def amount(self, scope: Scope, line: str, asset: str | None = None) -> int:
        """What a line says, 0 where there is none."""
        return sum(
            each.amount
            for each in self.lines
            if (each.tenant, each.mode, each.line) == (*scope, line) and asset in (None, each.asset)
        )


Place = tuple[Scope, str]
"""A scope and an asset."""


class Books:
    """What the journal comes to before a month and in it: pure, fed with entries in their order."""

    def __init__(self, month: Month, *, bounds: Callable[[WalletRef], bool] = bounds_spending) -> None:
        self._start_us, self._end_us = month.start_us, month.end_us
        self._bounds = bounds
        self._flows = CreditFlows(bounds=bounds)
        self._credits: Counter[tuple[Place, Kind, str]] = Counter()
        self._accounts: Counter[tuple[Place, str, str]] = Counter()
        """By place, account and line: `opening`, or a direction and the other side."""
        self._owed: Counter[tuple[Place, str]] = Counter()
        self.entries = 0

    def observe(self, entry: JournalEntry) -> None:
        """Take in the next entry. What is later than the month only tells what its blocks are."""
        self.entries += 1
        flows = list(self._flows.observe(entry))
        if entry.at_us >= self._end_us:
            return
        before = entry.at_us < self._start_us
        for flow in flows:
            line = "opening" if before else flow.line
            self._credits[(flow.scope, flow.asset), flow.kind, line] += flow.amount
        for fact in entry.facts:
            if isinstance(fact, WalletChanged) and fact.receivable and not self._bounds(fact.wallet):
                place = (fact.wallet.scope, self._flows.asset_of(fact.wallet))
                grown = "increase" if fact.receivable > 0 else "decrease"
                self._owed[place, "opening" if before else grown] += fact.receivable
        for transfer in entry.transfers:
            self._post(transfer, before=before)

    def lines(self) -> Iterable[tuple[Place, str, int]]:
        """Every line, also those that nothing happened on where there is a position."""
        places = {place for place, _, _ in self._credits} | {place for place, _, _ in self._accounts}
        for place in sorted(places | {place for place, _ in self._owed}):
            if place[1] != USD_ASSET:
                yield from self._positions(place)
            yield from self._balances(place)

    def _positions(self, place: Place) -> Iterable[tuple[Place, str, int]]:
        """What is left of credits of each kind, what is owed, and the proof that both are what the accounts say."""
        wallets = 0
        for kind in KINDS:
            amounts = [("opening", self._credits[place, kind, "opening"])]
            amounts += [(line, self._credits[place, kind, line]) for line in LINES]
            amounts.append(("closing", sum(amount for _, amount in amounts)))
            wallets += amounts[-1][1]
            for line, amount in amounts:
                yield place, f"{POSITIONS[kind]}.{line}", amount
        owed = [(line, self._owed[place, line]) for line in ("opening", "increase", "decrease")]
        owed.append(("closing", sum(amount for _, amount in owed)))
        for line, amount in owed:
            yield place, f"receivables.{line}", amount
        in_accounts = sum(amount for (at, _, _), amount in self._accounts.items() if at == place)
        yield place, "proof.difference", wallets - owed[-1][1] + in_accounts

    def _balances(self, place: Place) -> Iterable[tuple[Place, str, int]]:
        """The accounts that are no wallets: what came into each and left it, by where it came from and went."""
        by_account: dict[str, dict[str, int]] = defaultdict(dict)
        for (at, account, line), amount in self._accounts.items():
            if at == place:
                by_account[account][line] = amount
        for account, moved in sorted(by_account.items()):
            amounts = [("opening", moved.pop("opening", 0)), *sorted(moved.items())]
            amounts.append(("closing", sum(amount for _, amount in amounts)))
            for line, amount in amounts:
                yield place, f"account.{account}.{line}", amount

    def _post(self, transfer: Transfer, *, before: bool) -> None:
        sides = (transfer.debit, transfer.credit)
        if any(self._bounds(WalletRef(*transfer.scope, each.removeprefix(WALLET_PREFIX))) for each in sides):
            return
        place = (transfer.scope, transfer.asset)
        for account, other, way, amount in (
            (transfer.debit, transfer.credit, "out", -transfer.amount),
            (transfer.credit, transfer.debit, "in", transfer.amount),
        ):
            if not account.startswith(WALLET_PREFIX):
                self._accounts[place, account, "opening" if before else f"{way}.{_side(other)}"] += amount


class Accounts:
    """A month's accounts, from the journal and from what is known of the processor's movements.

    Args:
        operator: the tenant with which those are kept.
    """

    def __init__(self, store: Store, database: Database, *, operator: str) -> None:
        self._store = store
        self._database = database
        self._operator = operator
        self._transactions = ProcessorTransactions(database)

    async def month(self, month: Month, *, tenant: str | None = None) -> Statement:
        """The accounts of *month*, of all tenants or of one.

        It reads the whole journal up to the month's end, at one moment, beside a gateway in use.

        Raises:
            StoreUnavailable, DatabaseUnavailable, DamagedRow
        """
        books = Books(month)
        async with self._store.snapshot() as snapshot:
            async for entry in snapshot.journal():
                if entry.at_us >= month.end_us + LATE_US:
                    break
                books.observe(entry)
        assets = await self._assets(month.end_us)
        lines = [
            StatementLine(*scope, asset, line, amount, *_worth(assets.get((scope.tenant, asset)), asset, amount))
            for (scope, asset), line, amount in books.lines()
            if tenant in (None, scope.tenant)
        ]
        for mode in MODES if tenant in (None, self._operator) else ():
            scope = Scope(self._operator, mode)
            lines += _processor_lines(scope, await self._transactions.sums(scope, month.start_us, month.end_us))
        return Statement(month, tuple(lines), books.entries)

    async def _assets(self, until_us: int) -> dict[tuple[str, str], Asset]:
        """Each tenant's assets, as they were worth before *until_us*."""
        table = AssetVersion
        query = (
            select(col(table.tenant), col(table.code), col(table.scale), col(table.usd_value_picos))
            .where(col(table.effective_from_us) < until_us)
            .order_by(col(table.effective_from_us))
        )
        async with self._database.read_every_tenant() as connection:
            rows = (await connection.execute(query)).all()
        return {(tenant, code): Asset(code, scale, value) for tenant, code, scale, value in rows}


def _side(account: str) -> str:
    """The other side of an entry, as lines name it: all wallets are one, and so are all developers."""
    return WALLETS if account.startswith(WALLET_PREFIX) else account.partition(":")[0]


def _worth(asset: Asset | None, code: str, amount: int) -> tuple[int, str | None]:
    """The asset's scale, and what *amount* of it is worth in dollars."""
    if asset is None:
        if code != USD_ASSET:
            return 0, None
        asset = DOLLARS
    return asset.scale, asset.to_usd_text(amount)


def _processor_lines(operator: Scope, sums: Iterable[MovementSum]) -> Iterable[StatementLine]:
    """What the processor moved, by the type of its movements, in the currency of the balance."""
    for each in sums:
        for line, amount in (("amount", each.amount), ("fee", -each.fee), ("net", each.net)):
            name = f"{PROCESSOR}.{each.type}.{line}"
            yield StatementLine(*operator, each.currency, name, amount, exponent_of(each.currency), None)


def exponent_of(currency: str) -> int:
    """How many decimal places a currency's minor unit has."""
    return EXPONENTS.get(currency, DEFAULT_EXPONENT)
