"""Reconciliation: is every payment of the processor in the journal, once and in full, and nothing else?

How it works. The processor's movements since a time are listed and kept, and the journal's clearing entries since then
are read. Each payment that either side names is looked at as a whole, also where it began before: then the processor
is asked for it. What differs is reported. Where the journal may only have missed news, the payment can be told again
to whoever hears the processor's events: a payment has one effect, whoever brings the news of it.

News takes a while. A payment of which the processor moved something within the time of grace is not held against the
journal yet; nor is one that is still on its way.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec
import structlog

from gateway.database import Database
from gateway.identity.tenants import Tenants
from gateway.payments.clearing import Booked, Clearing, Entry, booked, payment_of_block
from gateway.payments.comparison import MENDABLE, Difference, Paid, compare, payments_of
from gateway.payments.observed import Observed, OrderRef, Unreadable, facts_of
from gateway.payments.orders import Order, Orders
from gateway.payments.processor import MODES, ProcessorNotFound, StripeMode, pays_for
from gateway.payments.processor_transactions import (
    SECOND_US,
    Movement,
    ProcessorTransactions,
    movement_of,
    order_of,
)
from gateway.payments.settling import NotBooked, Outcome
from ledger.model import Scope

GRACE_S: Final = 3_600
"""How long the news of a payment may take, where nobody says otherwise."""

LISTED_PAGE: Final = 200
"""How many movements are listed before they are kept."""

GONE: Final = ("failed", "canceled")
"""What a refund is that gave nothing back."""

log = structlog.get_logger(__name__)


class Processor(Protocol):
    """What is asked of the processor: a part of `StripeAPI`."""

    @property
    def mode(self) -> StripeMode: ...

    def balance_transactions(self, since_s: int, until_s: int) -> AsyncIterator[Mapping[str, Any]]: ...

    async def session(self, session_id: str) -> Mapping[str, Any]: ...

    async def payment_intent(self, payment_intent_id: str) -> Mapping[str, Any]: ...

    async def refunds_of(self, payment_intent_id: str) -> list[Mapping[str, Any]]: ...

    async def disputes_of(self, payment_intent_id: str) -> list[Mapping[str, Any]]: ...


class Hears(Protocol):
    """Who makes true what follows from news of a payment: a part of `Settler`."""

    async def observe(self, observed: Observed) -> Outcome: ...

    async def settle(self, order: Order) -> Order: ...


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was compared, and where it differs.

    *movements*, *payments* and *entries* are how many there were; *others* are payments on the processor's account
    that are for none of our orders, and *in_flight* those of which the news may be on its way. *mended* differed until
    they were told again; *differences* still do.
    """

    since_us: int
    until_us: int
    movements: int
    payments: int
    entries: int
    others: int
    in_flight: int
    differences: tuple[Difference, ...]
    mended: tuple[Difference, ...] = ()


@dataclass(slots=True)
class _Found:
    """What is known so far: the processor's payments by their ids, and the journal's entries by their scopes."""

    paid: dict[str, Paid] = field(default_factory=dict)
    entries: dict[Scope, list[Entry]] = field(default_factory=dict)
    orders: dict[OrderRef, Order] = field(default_factory=dict)


class Reconciler:
    """Compares the processor's books with ours.

    Args:
        operator: the scope that the processor's movements are kept in.
        settler: is told again what the journal may have missed, as if it came by an event.
    """

    def __init__(
        self,
        *,
        processor: Processor,
        database: Database,
        tenants: Tenants,
        orders: Orders,
        operator: Callable[[], Awaitable[Scope]],
        settler: Hears,
        now_us: Callable[[], int],
    ) -> None:
        self._processor = processor
        self._tenants = tenants
        self._orders = orders
        self._operator = operator
        self._settler = settler
        self._now_us = now_us
        self._clearing = Clearing(database)
        self._transactions = ProcessorTransactions(database, now_us=now_us)

    async def run(
        self,
        since_us: int,
        until_us: int,
        *,
        repair: bool = False,
        grace_s: int = GRACE_S,
        again: Collection[Difference] = (),
    ) -> Report:
        """Look at every payment of which something was moved or booked from *since_us* on and before *until_us*.

        Args:
            repair: tell the journal again what it may have missed.
            grace_s: how long the news of a movement may still be on its way.
            again: what differed before: these payments are looked at, too, whenever they were made.

        Raises:
            ProcessorUnavailable, ProcessorRefused, DatabaseUnavailable, NoOperator
        """
        began_us = self._now_us()
        movements = await self._list_movements(since_us)
        within = {each.payment_intent for each in movements if each.at_us < until_us}
        found = _Found()
        found.paid = await self._payments([each for each in movements if each.payment_intent in within])
        for payment_intent in {each.payment_intent for each in again} - {None, *found.paid}:
            if payment_intent is not None and (asked := await self._ask(payment_intent)) is not None:
                found.paid[payment_intent] = asked
        scopes = await self._scopes()
        orders = {*(each.order for each in found.paid.values()), *(each.order for each in again)}
        named = {each for each in orders if each is not None and each.scope in scopes}
        entries = 0
        for scope in scopes:
            recent = [each for each in await self._clearing.since(scope, since_us) if each.at_us < until_us]
            entries += len(recent)
            refs = {ref.order_id for ref in named if ref.scope == scope}
            found.entries[scope] = await self._clearing.whole(scope, recent, refs)
            await self._add_orders(found, scope, refs | {*payment_of_block(found.entries[scope]).values()})
        differences, others = self._compare(found)
        late_us = began_us - grace_s * SECOND_US
        in_flight = [each for each in differences if each.kind in MENDABLE and each.at_us > late_us]
        differences = [each for each in differences if each not in in_flight]
        mended: list[Difference] = []
        if repair:
            mended = [each for each in differences if await self._mend(each)]
            differences = [each for each in differences if each not in mended]
        return Report(
            since_us=since_us,
            until_us=until_us,
            movements=len(movements),
            payments=len(found.paid),
            entries=entries,
            others=len(others),
            in_flight=len(in_flight),
            differences=tuple(differences),
            mended=tuple(mended),
        )

    async def _list_movements(self, since_us: int) -> list[Movement]:
        """The movements of payments from then on until now; all that are listed are kept."""
        operator = await self._operator()
        movements: list[Movement] = []
        page: list[Mapping[str, Any]] = []
        listed = self._processor.balance_transactions(since_us // SECOND_US, self._now_us() // SECOND_US + 1)
        async for transaction in listed:
            page.append(transaction)
            movement = movement_of(transaction)
            if movement is not None:
                movements.append(movement)
            if len(page) == LISTED_PAGE:
                await self._transactions.keep(operator, page)
                page = []
        await self._transactions.keep(operator, page)
        return movements

    async def _scopes(self) -> list[Scope]:
        """Those whose customers pay by this account."""
        modes = [mode for mode in MODES if pays_for(self._processor.mode, mode)]
        return [Scope(tenant.id, mode) for tenant in await self._tenants.list_tenants() for mode in modes]

    async def _payments(self, movements: Sequence[Movement]) -> dict[str, Paid]:
        """What each payment has come to. One whose charge is not among *movements* is asked for."""
        whole = {each.payment_intent for each in movements if each.kind == "charge"}
        paid = {each.payment_intent: each for each in payments_of(movements) if each.payment_intent in whole}
        for payment_intent in {each.payment_intent for each in movements} - whole:
            asked = await self._ask(payment_intent)
            if asked is not None:
                paid[payment_intent] = asked
        return paid

    async def _add_orders(self, found: _Found, scope: Scope, order_ids: Iterable[str]) -> None:
        """The orders of these ids, as far as there are any, and those of their payments that were not listed."""
        known = {each.order for each in found.paid.values()}
        for order_id in order_ids:
            order = await self._orders.find(scope, order_id)
            if order is None:
                continue
            ref = OrderRef(scope, order_id)
            found.orders[ref] = order
            payment_intent = await self._payment_of(order) if ref not in known else None
            asked = None if payment_intent is None else await self._ask(payment_intent)
            if asked is not None:
                found.paid[asked.payment_intent] = asked

    async def _payment_of(self, order: Order) -> str | None:
        if order.payment_intent is not None or order.session_id is None:
            return order.payment_intent
        try:
            session = await self._processor.session(order.session_id)
        except ProcessorNotFound:
            return None
        named = session.get("payment_intent")
        return named["id"] if isinstance(named, Mapping) else named

    async def _ask(self, payment_intent: str) -> Paid | None:
        """What a payment has come to, from its own objects; None where the processor knows none."""
        try:
            return _asked(await self._objects(payment_intent))
        except ProcessorNotFound:
            return None

    async def _objects(self, payment_intent: str) -> list[Mapping[str, Any]]:
        """The payment, its refunds and its disputes."""
        intent = await self._processor.payment_intent(payment_intent)
        refunds = await self._processor.refunds_of(payment_intent)
        return [intent, *refunds, *await self._processor.disputes_of(payment_intent)]

    def _compare(self, found: _Found) -> tuple[list[Difference], list[Paid]]:
        sides: list[Booked] = []
        for scope, entries in found.entries.items():
            sides += booked(scope, entries)
        return compare(found.orders, found.paid.values(), sides)

    async def _mend(self, difference: Difference) -> bool:
        """Tell the journal what it may have missed of a payment; whether the two sides agree then."""
        ref, payment_intent = difference.order, difference.payment_intent
        if difference.kind not in MENDABLE or ref is None or payment_intent is None:
            return False
        try:
            objects = await self._objects(payment_intent)
            await self._tell(ref, objects)
        except (ProcessorNotFound, NotBooked, Unreadable) as error:
            log.exception("a payment cannot be told again", payment_intent=payment_intent, reason=type(error).__name__)
            return False
        found = _Found(paid={payment_intent: _asked(objects)})
        found.entries[ref.scope] = await self._clearing.whole(ref.scope, [], [ref.order_id])
        await self._add_orders(found, ref.scope, [ref.order_id])
        return not self._compare(found)[0]

    async def _tell(self, ref: OrderRef, objects: Iterable[Mapping[str, Any]]) -> None:
        """Let the settler know *objects*; what it knew of them already it makes true again."""
        for each in objects:
            observed = facts_of(each)
            if observed is not None:
                await self._settler.observe(observed)
        order = await self._orders.find(ref.scope, ref.order_id)
        if order is not None:
            await self._settler.settle(order)


def _asked(objects: Sequence[Mapping[str, Any]]) -> Paid:
    """What a payment, its refunds and its disputes come to."""
    intent, *others = objects
    paid = intent["status"] == "succeeded"
    gross = int(intent["amount_received"]) if paid else 0
    taken = sum(_taken(each, intent["currency"], gross) for each in others)
    return Paid(
        payment_intent=intent["id"],
        order=order_of(intent),
        currency=intent["currency"],
        gross=gross,
        taken=taken,
        at_us=max(map(_changed_s, objects)) * SECOND_US,
    )


def _changed_s(source: Mapping[str, Any]) -> int:
    """When it was made; of a dispute, when it last moved money."""
    return max(int(each["created"]) for each in (source, *(source.get("balance_transactions") or ())))


def _taken(source: Mapping[str, Any], currency: str, gross: int) -> int:
    """What a refund or a dispute has taken of a payment."""
    if source["object"] == "refund":
        return 0 if source["status"] in GONE else int(source["amount"])
    moved = [(each["currency"], int(each["amount"])) for each in source.get("balance_transactions") or ()]
    withdrawn = -sum(amount for _, amount in moved)
    if source["currency"] != currency:
        return gross if withdrawn > 0 else 0
    if all(of == currency for of, _ in moved):
        return withdrawn
    return int(source["amount"]) if withdrawn > 0 else 0
