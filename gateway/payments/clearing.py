"""What the journal has on the clearing account: there, and only there, credits stand against the processor's money.

How it works. A credit books clearing -> wallet, and clearing -> package_spread for what the operator keeps; what is
taken back goes the other way. Every entry names the block that the payment paid for. Which payment that is, the block
says, or the entry that filled it; other entries refer to what took the credits.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, Select, and_, case, func, select, text
from sqlmodel import col

from gateway.database import Database, of
from gateway.payments.observed import OrderRef
from ledger.model import WALLET_PREFIX, Account, Scope
from ledger.store.tables import LedgerBlockRow, LedgerCommandRow, LedgerTransferRow

PAGE_ROWS: Final = 500

NAMES_MAX: Final = 200
"""How many payments or blocks one statement asks for."""

TOP_UP: Final = "top_up"
UNPAID: Final = "block "
"""How credits that are for no payment are named: this, and their block."""

CREDITING: Final = (TOP_UP, "grant")
"""The kinds of commands that bring credits in; what others move on the account is taken back, or given back again."""

# SQLite takes the primary key wherever it can, and would look through a whole journal. So the account stands here word
# for word as the indexes have it, and what begins that key stands in expressions.
_SEQ: Final = col(LedgerTransferRow.seq) + 0
_ON_CLEARING: Final = text("(debit = 'clearing' OR credit = 'clearing')")


class Entry(msgspec.Struct, frozen=True):
    """An entry of the account: *amount* > 0 went out of it, for credits, and < 0 came back.

    *withdrawn* tells that nobody has, or had, anything of its block: it was revoked, or lapsed.
    """

    seq: int
    position: int
    kind: str
    block: str | None
    amount: int
    asset: str
    at_us: int
    payment: str | None
    withdrawn: bool = False


class BookedBlock(msgspec.Struct, frozen=True, kw_only=True):
    """What came in with a block, spread and all, and what has gone back since."""

    id: str | None
    credited: int
    returned: int
    withdrawn: bool


class Booked(msgspec.Struct, frozen=True, kw_only=True):
    """All that the journal has of one payment, by the blocks that were opened for it, in the asset's smallest unit."""

    order: OrderRef
    asset: str
    blocks: tuple[BookedBlock, ...]
    at_us: int

    @property
    def credited(self) -> int:
        return sum(block.credited for block in self.blocks)

    @property
    def returned(self) -> int:
        return sum(block.returned for block in self.blocks)

    def standing(self, block_id: str | None = None) -> "Booked":
        """The same without blocks that are withdrawn, except *block_id*."""
        blocks = tuple(block for block in self.blocks if block.id == block_id or not block.withdrawn)
        return msgspec.structs.replace(self, blocks=blocks)


class Clearing:
    """The clearing accounts of all tenants; each method names whose."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def since(self, scope: Scope, since_us: int) -> list[Entry]:
        """The account's entries that were booked from then on."""
        transfer = LedgerTransferRow
        this = (col(transfer.tenant) == scope.tenant, col(transfer.mode) == scope.mode)
        return await self._pages(scope, _select(scope).where(*this, col(transfer.at_us) >= since_us))

    async def whole(self, scope: Scope, entries: Sequence[Entry], payments: Collection[str]) -> list[Entry]:
        """All entries of *payments* and of those that *entries* belong to, whenever they were booked.

        Credits for no payment are named as in what is `booked`.
        """
        found = {(each.seq, each.position): each for each in entries}
        unpaid = {each.removeprefix(UNPAID) for each in payments if each.startswith(UNPAID)}
        await self._add(found, scope, LedgerTransferRow.block, _blocks(found.values()) | unpaid)
        known = {*payments, *payment_of_block(found.values()).values()}
        await self._add(found, scope, LedgerTransferRow.reference, known)
        await self._add(found, scope, LedgerTransferRow.block, _blocks(found.values()))
        return list(found.values())

    async def _add(
        self, found: dict[tuple[int, int], Entry], scope: Scope, column: Any, values: Collection[str]
    ) -> None:
        wanted = sorted(values)
        for first in range(0, len(wanted), NAMES_MAX):
            page = wanted[first : first + NAMES_MAX]
            query = _select(scope).where(col(column).in_(page), _of_scope(scope))
            for each in await self._pages(scope, query):
                found[each.seq, each.position] = each

    async def _pages(self, scope: Scope, query: "Select[*tuple[Any, ...]]") -> list[Entry]:
        found: list[Entry] = []
        seq, position = _SEQ, col(LedgerTransferRow.position)
        while True:
            page = query
            if found:
                last = found[-1]
                page = query.where((seq > last.seq) | and_(seq == last.seq, position > last.position))
            async with self._database.read(of(*scope)) as connection:
                rows = (await connection.execute(page.order_by(seq, position).limit(PAGE_ROWS))).all()
            found += map(_entry, rows)
            if len(rows) < PAGE_ROWS:
                return found


def payment_of_block(entries: Iterable[Entry]) -> dict[str, str]:
    """Which payment each block is for, as far as *entries* tell."""
    return {each.block: each.payment for each in entries if each.block is not None and each.payment is not None}


def _blocks(entries: Iterable[Entry]) -> set[str]:
    return {each.block for each in entries if each.block is not None}


def booked(scope: Scope, entries: Iterable[Entry]) -> list[Booked]:
    """*entries* by their payment. A block that is for none is a payment of its own."""
    entries = list(entries)
    payments = payment_of_block(entries)
    grouped: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        grouped[payments.get(entry.block or "", f"{UNPAID}{entry.block}")].append(entry)
    return [_booked(OrderRef(scope, payment), found) for payment, found in sorted(grouped.items())]


def _booked(order: OrderRef, entries: Sequence[Entry]) -> Booked:
    by_block: dict[str | None, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_block[entry.block].append(entry)
    blocks = (
        BookedBlock(
            id=block,
            credited=sum(entry.amount for entry in of_block if entry.kind in CREDITING),
            returned=-sum(entry.amount for entry in of_block if entry.kind not in CREDITING),
            withdrawn=any(entry.withdrawn for entry in of_block),
        )
        for block, of_block in by_block.items()
    )
    return Booked(
        order=order, asset=entries[0].asset, blocks=tuple(blocks), at_us=max(entry.at_us for entry in entries)
    )


def _of_scope(scope: Scope) -> ColumnElement[bool]:
    named = col(LedgerTransferRow.tenant) + "/" + col(LedgerTransferRow.mode)
    return named == f"{scope.tenant}/{scope.mode}"


def _select(scope: Scope) -> "Select[*tuple[Any, ...]]":
    """The entries on the account, with the kind of their command and the payment that their block is for."""
    transfer, command, block = LedgerTransferRow, LedgerCommandRow, LedgerBlockRow
    account = case((col(transfer.debit) == Account.CLEARING, col(transfer.credit)), else_=col(transfer.debit))
    return (
        select(
            col(transfer.seq),
            col(transfer.position),
            col(command.kind),
            col(transfer.block),
            col(transfer.credit),
            col(transfer.amount),
            col(transfer.asset),
            col(transfer.at_us),
            col(transfer.reference),
            col(block.payment_reference),
            and_(col(block.remaining) == 0, col(block.consumed) <= col(block.clawed)),
        )
        # By its number alone, which is the journal's: with the scope, SQLite would look through all commands of it.
        .join(command, col(command.seq) == col(transfer.seq))
        .outerjoin(
            block,
            and_(
                col(block.tenant) == scope.tenant,
                col(block.mode) == scope.mode,
                col(block.id) == col(transfer.block),
                col(block.wallet) == func.substr(account, len(WALLET_PREFIX) + 1),
            ),
        )
        .where(_ON_CLEARING)
    )


def _entry(row: Any) -> Entry:
    seq, position, kind, block, credit, amount, asset, at_us, reference, of_block, gone = row
    signed = -amount if credit == Account.CLEARING else amount
    payment = of_block or (reference if kind == TOP_UP else None)
    return Entry(seq, position, kind, block, signed, asset, at_us, payment, bool(gone))
