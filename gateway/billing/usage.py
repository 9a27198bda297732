"""Metered usage: one event, priced by its metric's rule and charged at once, durably before the answer.

What the wallet cannot pay is the metric's overage policy to decide: it is refused and nothing is recorded, or the
wallet owes it. A frozen wallet and a spend limit refuse it either way. The operator has no cost in an event, so all of
its price is the tenant's; the usage row has metric, customer, app, API key, metadata, units, and the rule's id.
"""

from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final

import msgspec

from gateway.billing.catalog import Catalog, MetricNotFound, MetricNotPriced, PricedMetric
from gateway.billing.charging import Charging, Spender
from gateway.identity.principals import Principal
from gateway.identity.wallets import customer_wallet
from ledger.commands import Debit, Key, Release, ReserveLeg
from ledger.errors import NotFound
from ledger.ledger import Ledger
from ledger.model import Charge, ReservationRef, Scope, Settlement, UsageRecord
from ledger.outcomes import Applied, Settled
from pricing.metering import cost, microunits

MICROUNITS: Final = "microunits"
"""The unit in which a usage row of a metric counts: a millionth of the metric's own."""

SOURCE: Final = "reported"
"""How the units are known: the tenant's app says so."""


class UsageEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant's app reports. *units* are 0 to `UNITS_MAX`, with six decimal places at most.

    *amount*, in the asset's smallest unit, is what it costs where the app says so itself, whatever the rule.
    """

    customer_id: str
    metric_key: str
    units: Decimal
    metadata: dict[str, Any]
    key: Key | None
    amount: int | None = None


class UsageAccepted(msgspec.Struct, frozen=True, kw_only=True):
    """What an event came to: *charged* and the *balance* after it are in the asset's smallest unit.

    Attributes:
        replayed: its key came before; this is what the first one came to.
    """

    request_id: str
    charged: int
    balance: int
    replayed: bool


class Metering:
    """Records usage."""

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

    async def record(self, principal: Principal, event: UsageEvent) -> UsageAccepted:
        """Charge *event* to its customer. Repeating its key gives the first answer, whatever it would cost by now.

        Raises:
            MetricNotFound, MetricNotPriced: nothing says what it costs.
            UnitsInvalid, ChargeTooLarge: its units are no quantity, or cost more than an account can hold.
            InsufficientCredits, ReceivableOutstanding: the wallet cannot pay it, and the metric's policy is `block`.
            LedgerError: as `Charging.ask`.
        """
        scope = Scope(principal.tenant_id, principal.mode)
        at_us = self._now_us()
        try:
            priced = await self._catalog.priced(*scope, event.metric_key, at_us=at_us)
        except (MetricNotFound, MetricNotPriced):
            earlier = await self._earlier(scope, event.key)
            if earlier is None:
                raise
            return _accepted(earlier)
        command = self._debit(scope, principal, event, priced, at_us)
        spender = Spender(app_id=principal.app_id, key_id=principal.key_id, customer_id=event.customer_id)
        return _accepted(await self._charging.ask(command, spender))

    def _debit(self, scope: Scope, principal: Principal, event: UsageEvent, priced: PricedMetric, at_us: int) -> Debit:
        metric = priced.metric
        price = cost(priced.rule, event.units, principal.asset) if event.amount is None else event.amount
        request_id = self._new_id("req")
        usage = UsageRecord(
            request_id=request_id,
            units={MICROUNITS: microunits(event.units)},
            price_version=priced.price_version if event.amount is None else None,
            source=SOURCE,
            app_id=principal.app_id,
            key_id=principal.key_id,
            customer_id=event.customer_id,
            metric=metric.key,
            started_at_us=at_us,
            metadata=event.metadata,
        )
        wallet = customer_wallet(*scope, event.customer_id)
        return Debit(
            id=self._new_id("cmd"),
            scope=scope,
            key=event.key,
            reservation=ReservationRef(*scope, f"rsv_{request_id.partition('_')[2]}"),
            asset=principal.asset.code,
            legs=(ReserveLeg(wallets=(wallet,), amount=price, minimum=price),),
            developer=principal.app_id,
            tags=priced.tags(principal.app_id),
            settlement=Settlement(charges=(Charge(markup=price),), usage=usage),
            beyond="refuse" if metric.overage_policy == "block" else "overage",
            tells_overage=metric.overage_policy == "notify",
        )

    async def _earlier(self, scope: Scope, key: Key | None) -> Applied | None:
        """What came of the event that *key* stands for; None when there is none.

        The ledger looks at a command's key before it looks at the command. One that releases what nobody reserved
        changes nothing, so all that it can come to is what the key stands for.

        Raises:
            KeyReused: the key is another event's.
        """
        if key is None:
            return None
        nobodys = ReservationRef(*scope, self._new_id("rsv"))
        try:
            return await self._ledger.execute(
                Release(id=self._new_id("cmd"), scope=scope, key=key, reservation=nobodys)
            )
        except NotFound:
            return None


def _accepted(applied: Applied) -> UsageAccepted:
    settled = applied.result
    assert isinstance(settled, Settled), "the key of a usage event stands for its debit"
    return UsageAccepted(
        request_id=f"req_{settled.reservation.partition('_')[2]}",
        charged=sum(charge.total for charge in settled.charged),
        balance=settled.balance,
        replayed=applied.replayed,
    )
