"""May this customer do that now, and how much more of it: the check before an app does what it will then record.

How it works. Everything that a check needs is kept in this process for as long as it cannot be wrong: who calls, whom
they name and what the metric costs under leases of their own, the wallet as `Balances` says. Where all of it is at
hand, `check_at_once` answers without waiting for anybody, in some fifty microseconds; else `check` asks. Both decide
by the same arithmetic, in the smallest unit of the tenant's asset.

The answer is that of one moment: what is not reserved may be gone in the next.
"""

from collections.abc import Callable
from decimal import Decimal
from typing import Final, NamedTuple

import msgspec

from gateway.billing.budgets import Budgets
from gateway.billing.catalog import Catalog, PricedMetric
from gateway.billing.spender import Spender
from gateway.identity.customers import Customers
from gateway.identity.principals import Principal
from gateway.identity.wallets import customer_wallet
from ledger.ledger import Ledger, WalletView
from ledger.model import Scope
from pricing.metering import affordable_units, cost

ONE: Final = Decimal(1)


class Named(NamedTuple):
    """A customer as they are named: by our id or the tenant's, or, if *external*, by the tenant's alone.

    `param` is where in the request that stands.
    """

    reference: str
    param: str = "customer_id"
    external: bool = False


class Entitlement(msgspec.Struct, frozen=True, kw_only=True):
    """What a check found. Amounts are in the smallest unit of the tenant's asset.

    `balance` is the whole wallet's, less what it owes; `effective_balance` is what this app could spend on this metric
    now. `affordable_units` are whole units; None where nothing bounds them. With `overage_allowed` the metric's policy
    lets the wallet owe. `short` tells that the wallet is what does not suffice: credits would help.
    """

    allowed: bool
    customer_id: str
    metric_key: str
    balance: int
    effective_balance: int
    cost_per_unit: int
    cost_total: int
    affordable_units: int | None
    overage_allowed: bool
    short: bool


class Entitlements:
    """Answers checks. Never older than any change of a wallet that was answered before the check began."""

    def __init__(
        self, *, ledger: Ledger, catalog: Catalog, customers: Customers, budgets: Budgets, now_us: Callable[[], int]
    ) -> None:
        self._ledger = ledger
        self._budgets = budgets
        self._catalog = catalog
        self._customers = customers
        self._now_us = now_us

    async def check(self, principal: Principal, named: Named, metric_key: str, units: Decimal) -> Entitlement:
        """Whether a customer may have *units* of a metric now.

        A customer whom nobody has named before is created: the check is often the first that is heard of them.

        Raises:
            ApiError: 404 for an id of ours that is not there, 400 for an external id that cannot be one.
            MetricNotFound, MetricNotPriced
            UnitsInvalid, ChargeTooLarge: *units* are no quantity, or one that costs more than any account can hold.
            DatabaseUnavailable, LedgerUnavailable
        """
        tenant_id, mode = principal.tenant_id, principal.mode
        priced = await self._catalog.priced(tenant_id, mode, metric_key, at_us=self._now_us())
        find = self._customers.resolve if named.external else self._customers.named
        customer_id = await find(tenant_id, mode, named.reference, param=named.param)
        wallet = customer_wallet(tenant_id, mode, customer_id)
        view = await self._ledger.wallet_view(wallet, priced.tags(principal.app_id))
        left = await self._budgets.remaining(Scope(tenant_id, mode), _spender(principal, customer_id))
        return _entitlement(principal, customer_id, priced, units, view=view, left=left)

    def check_at_once(self, principal: Principal, named: Named, metric_key: str, units: Decimal) -> Entitlement | None:
        """The same without waiting; None where somebody has to be asked, or something is wrong with the question.

        Raises:
            UnitsInvalid, ChargeTooLarge
        """
        tenant_id, mode = principal.tenant_id, principal.mode
        priced = self._catalog.known(tenant_id, mode, metric_key, at_us=self._now_us())
        customer_id = self._customers.known(tenant_id, mode, named.reference, external=named.external)
        if priced is None or customer_id is None or not self._budgets.known_to_be_none(Scope(tenant_id, mode)):
            return None
        wallet = customer_wallet(tenant_id, mode, customer_id)
        view = self._ledger.wallet_view_at_once(wallet, priced.tags(principal.app_id))
        return None if view is None else _entitlement(principal, customer_id, priced, units, view=view, left=None)


def _spender(principal: Principal, customer_id: str) -> Spender:
    return Spender(app_id=principal.app_id, key_id=principal.key_id, customer_id=customer_id)


def _entitlement(
    principal: Principal,
    customer_id: str,
    priced: PricedMetric,
    units: Decimal,
    *,
    view: WalletView | None,
    left: int | None,
) -> Entitlement:
    """*left* is what budgets leave, which no overage policy exceeds; None without a budget."""
    asset, rule = principal.asset, priced.rule
    frozen = view is not None and view.wallet.frozen
    spendable = 0 if view is None else view.effective_balance
    effective = spendable if left is None else min(spendable, left)
    cost_total = cost(rule, units, asset)
    affordable = affordable_units(rule, effective, asset)
    overage_allowed = priced.metric.overage_policy != "block"
    within = effective >= cost_total or overage_allowed
    return Entitlement(
        allowed=within and not frozen and (left is None or cost_total <= left),
        customer_id=customer_id,
        metric_key=priced.metric.key,
        balance=0 if view is None else view.balance,
        effective_balance=effective,
        cost_per_unit=cost_total if units == ONE else cost(rule, ONE, asset),
        cost_total=cost_total,
        affordable_units=None if affordable is None else int(affordable),
        overage_allowed=overage_allowed,
        short=not frozen and not overage_allowed and spendable < cost_total,
    )
