"""Reservations for tasks outside the proxy: credits held for work to come, charged for what it came to.

How it works. The reservation is the ledger's own. What makes it a task's is its `Terms`, which travel in its metadata:
whose it is, and the metering rule as it was when the task began, so that a price that changes meanwhile changes nothing
here. Nothing is charged where nobody settles: an abandoned reservation gives everything back when its time has run out.
"""

from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final

import msgspec

from gateway.billing.catalog import Catalog, OveragePolicy, PricedMetric
from gateway.billing.charging import Charging, Spender
from gateway.billing.usage import MICROUNITS, SOURCE
from gateway.identity.principals import Principal
from gateway.identity.wallets import customer_wallet
from ledger.commands import Commit, Extend, Key, Release, Reserve, ReserveLeg
from ledger.errors import InsufficientCredits, ReceivableOutstanding
from ledger.ledger import Ledger
from ledger.model import Charge, Reservation, ReservationRef, Scope, Settlement, Tags, UsageRecord
from ledger.outcomes import Applied, ReservationChanged, Reserved
from pricing.metering import Rule, cost, microunits
from pricing.money import Asset

TERMS: Final = "task"
"""Where in a reservation's metadata its terms stand."""

_NOT_THERE: Final = (InsufficientCredits, ReceivableOutstanding)


class TaskNotFound(Exception):
    """This tenant has no such reservation, or it is a completion's."""

    def __init__(self, reservation_id: str) -> None:
        super().__init__(f"there is no reservation {reservation_id[:64]!r}")
        self.reservation_id = reservation_id


class NoMetric(Exception):
    """The reservation was made in credits, so nothing says what a unit costs."""


class Quantity(msgspec.Struct, frozen=True):
    """How much work: *units* of the metric, or else an *amount* in the asset's smallest unit."""

    units: Decimal | None = None
    amount: int = 0


class NewTask(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be held, for whom. Without *metric_key* it is in credits, and so are its commits.

    *request_id* is given where it derives from a name of the caller's (`derived_id`): one name is one task, for ever.
    """

    customer_id: str
    metric_key: str | None
    estimate: Quantity
    ttl_us: int
    metadata: dict[str, Any]
    key: Key | None
    request_id: str | None = None


class Terms(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was agreed when a task began. *microunits* is the estimate; *price_version* the id of the *rule*."""

    customer_id: str
    metric: str | None = None
    overage_policy: OveragePolicy = "block"
    price_version: str | None = None
    rule: Rule | None = None
    microunits: int | None = None
    metadata: dict[str, Any] = {}

    def price(self, quantity: Quantity, asset: Asset) -> int:
        """What *quantity* costs by the rule of the beginning.

        Raises:
            NoMetric, UnitsInvalid, ChargeTooLarge
        """
        if quantity.units is None:
            return quantity.amount
        if self.rule is None:
            raise NoMetric
        return cost(self.rule, quantity.units, asset)


class Task(msgspec.Struct, frozen=True):
    reservation: Reservation
    terms: Terms


class Begun(msgspec.Struct, frozen=True):
    """*reserved* is as it was when it was made, *task* as it is now: on a repetition that may be another time."""

    task: Task
    reserved: Reserved
    replayed: bool


class Reservations:
    """Made, extended, committed and released by their tenant's own keys; each app's are its own."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        charging: Charging,
        ledger: Ledger,
        new_id: Callable[[str], str],
        now_us: Callable[[], int],
    ) -> None:
        self._catalog = catalog
        self._charging = charging
        self._ledger = ledger
        self._new_id = new_id
        self._now_us = now_us

    async def begin(self, principal: Principal, new: NewTask) -> Begun:
        """Hold what the task is expected to cost. Its key answers with this reservation for ever.

        Raises:
            MetricNotFound, MetricNotPriced, NoMetric, UnitsInvalid, ChargeTooLarge
            InsufficientCredits, ReceivableOutstanding: unless the metric's policy lets the wallet owe.
            LedgerError: as `Charging.ask`.
        """
        scope = Scope(principal.tenant_id, principal.mode)
        priced: PricedMetric | None = None
        if new.metric_key is not None:
            priced = await self._catalog.priced(*scope, new.metric_key, at_us=self._now_us())
        terms = _terms(new, priced)
        amount = terms.price(new.estimate, principal.asset)
        request_id = new.request_id or self._new_id("req")
        leg = ReserveLeg((customer_wallet(*scope, new.customer_id),), amount, amount)
        command = Reserve(
            id=self._new_id("cmd"),
            scope=scope,
            key=new.key,
            reservation=ReservationRef(*scope, reservation_id_of(request_id)),
            asset=principal.asset.code,
            legs=(leg,),
            developer=principal.app_id,
            tags=Tags(app=principal.app_id) if priced is None else priced.tags(principal.app_id),
            ttl_us=new.ttl_us,
            request_id=request_id,
            metadata={TERMS: msgspec.to_builtins(terms)},
            key_stays=True,
        )
        spender = Spender(app_id=principal.app_id, key_id=principal.key_id, customer_id=new.customer_id)
        try:
            applied = await self._charging.ask(command, spender)
        except _NOT_THERE:
            if terms.overage_policy == "block":
                raise
            what_there_is = msgspec.structs.replace(leg, minimum=0)
            command = msgspec.structs.replace(command, id=self._new_id("cmd"), legs=(what_there_is,))
            applied = await self._charging.ask(command, spender)
        assert isinstance(applied.result, Reserved)
        made = [fact.reservation for fact in applied.facts if isinstance(fact, ReservationChanged)]
        task = _task(made[0]) if made else await self.find(principal, applied.result.reservation)
        return Begun(task, applied.result, applied.replayed)

    async def find(self, principal: Principal, reservation_id: str) -> Task:
        """Raises TaskNotFound, also for what another app of the tenant has reserved."""
        ref = ReservationRef(principal.tenant_id, principal.mode, reservation_id)
        found = await self._ledger.reservation(ref)
        if found is None or TERMS not in found.metadata or not principal.sees_app(found.tags.app):
            raise TaskNotFound(reservation_id)
        return _task(found)

    async def commit(
        self, principal: Principal, reservation_id: str, quantity: Quantity, *, final: bool, key: Key | None
    ) -> Applied:
        """Charge *quantity*; unless it is *final*, keep the rest held. Each commit is priced as one event.

        Never refused for lack of credits. What neither the reservation nor free blocks nor an agreed overdraft cover
        is owed where the metric's policy says so, and else is not charged: it is the tenant's own price.

        Raises:
            TaskNotFound, NoMetric, UnitsInvalid, ChargeTooLarge
            ReservationSettled, KeyReused, LedgerUnavailable
        """
        task = await self.find(principal, reservation_id)
        reservation, terms = task.reservation, task.terms
        price = terms.price(quantity, principal.asset)
        units = {} if quantity.units is None else {MICROUNITS: microunits(quantity.units)}
        usage = UsageRecord(
            request_id=reservation.request_id or reservation_id,
            units=units,
            price_version=terms.price_version,
            source=SOURCE,
            app_id=reservation.tags.app,
            key_id=principal.key_id,
            customer_id=terms.customer_id,
            metric=terms.metric,
            started_at_us=reservation.created_at_us,
            metadata=terms.metadata,
        )
        return await self._ledger.execute(
            Commit(
                id=self._new_id("cmd"),
                scope=reservation.ref.scope,
                key=key,
                reservation=reservation.ref,
                settlement=Settlement(charges=(Charge(markup=price),), usage=usage),
                final=final,
                beyond="waive" if terms.overage_policy == "block" else "receivable",
                tells_overage=terms.overage_policy == "notify",
            )
        )

    async def release(self, principal: Principal, reservation_id: str, *, key: Key | None) -> Applied:
        """Give back what is held. What was charged by earlier commits stays charged. Repeatable.

        Raises:
            TaskNotFound, ReservationSettled, KeyReused, LedgerUnavailable
        """
        ref = (await self.find(principal, reservation_id)).reservation.ref
        return await self._ledger.execute(Release(id=self._new_id("cmd"), scope=ref.scope, key=key, reservation=ref))

    async def extend(
        self, principal: Principal, reservation_id: str, more: Quantity, *, ttl_us: int | None, key: Key | None
    ) -> Applied:
        """Hold *more*, all or nothing, live *ttl_us* from now, or both; never shorter than before.

        Raises:
            TaskNotFound, NoMetric, UnitsInvalid, ChargeTooLarge
            InsufficientCredits, ReceivableOutstanding, LimitReached, WalletFrozen
            ReservationSettled, KeyReused, LedgerUnavailable
        """
        task = await self.find(principal, reservation_id)
        amount = task.terms.price(more, principal.asset)
        ref = task.reservation.ref
        command = Extend(
            id=self._new_id("cmd"),
            scope=ref.scope,
            key=key,
            reservation=ref,
            amount=amount,
            minimum=amount if task.terms.overage_policy == "block" else 0,
            ttl_us=ttl_us,
        )
        spender = Spender(task.reservation.tags.app, principal.key_id, task.terms.customer_id)
        return await self._charging.ask(command, spender)


def reservation_id_of(request_id: str) -> str:
    """The id of the reservation that is charged as this request."""
    return f"rsv_{request_id.partition('_')[2]}"


def _terms(new: NewTask, priced: PricedMetric | None) -> Terms:
    """Raises UnitsInvalid."""
    units = new.estimate.units
    estimated = None if units is None else microunits(units)
    if priced is None:
        return Terms(customer_id=new.customer_id, microunits=estimated, metadata=new.metadata)
    return Terms(
        customer_id=new.customer_id,
        metric=priced.metric.key,
        overage_policy=priced.metric.overage_policy,
        price_version=priced.price_version,
        rule=priced.rule,
        microunits=estimated,
        metadata=new.metadata,
    )


def _task(reservation: Reservation) -> Task:
    return Task(reservation, msgspec.convert(reservation.metadata[TERMS], Terms))
