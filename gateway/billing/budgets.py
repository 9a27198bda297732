"""Spend limits in force: what each request says of them to the ledger, from a cache with a short lease.

How it works. A budget is enforced in the command that reserves or charges, which names its wallet and its periods. What
is looked up here is only which budgets there are: those of the tenant, its apps and its keys together, and those of a
customer one by one, where any customer has one. A tenant without budgets costs a look into a dictionary. An answer is
trusted for `lease_s`; a change that was answered is known at once in this process, and where processes are linked in
all. While the database cannot be asked, what was known goes on to be, for a while.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec

from gateway.billing.budget_book import CLOCKS_APART_US, Budget, BudgetBook, Subject
from gateway.billing.spender import Spender
from gateway.database import DatabaseUnavailable, within
from gateway.ids import new_id
from gateway.lru import LRU
from ledger.commands import Limit, LimitPeriod, SetLimit
from ledger.errors import LedgerUnavailable, LimitReached
from ledger.ledger import Ledger
from ledger.model import Block, Scope, WalletRef

LEASE_S: Final = 1.0
OUTAGE_LEASE_S: Final = 600.0
"""How long beyond its lease an answer is used while the database cannot be asked."""

OUTAGE_LOOK_S: Final = 1.0
"""How long the database is taken for away after a look-up has failed, by those who may go on without it."""

OUTAGE_WAIT_S: Final = 0.25
"""How long those who may go on without it wait for a database that was away a moment ago: it may hang."""

LOOK_UP_S: Final = 5.0
"""How long a look-up may take before the database is taken for away."""

LOOK_UPS_MAX: Final = 1_000
"""Look-ups under way at once. More are refused: an outage must not fill the memory."""

KEPT_MAX: Final = 100_000
"""Customers, and tenants with all the rest of theirs, whose budgets a process remembers."""

USED_UP_MAX: Final = 10_000
"""Limits with nothing left that a process remembers."""

APPLIED_MAX: Final = 5
"""How often a change is applied, because another came meanwhile."""


class BudgetExceeded(LimitReached):
    """A budget leaves less than is needed. It is filled again at *resets_at_us*; None is never."""

    def __init__(self, refused: LimitReached, budget_id: str, resets_at_us: int | None) -> None:
        super().__init__(str(refused), refused.needed, refused.available, refused.limit)
        self.budget_id = budget_id
        self.resets_at_us = resets_at_us


class BudgetState(msgspec.Struct, frozen=True):
    """What became of a budget in the *period* that is now, in the asset's smallest unit."""

    spent: int
    reserved: int
    remaining: int
    period: LimitPeriod


class _Name(NamedTuple):
    """Whose budgets: a customer's, or without one everybody else's of the scope."""

    scope: Scope
    customer_id: str | None


class _Served:
    """A budget, and its limit for as long as that stays the same."""

    __slots__ = ("_budget", "_from_us", "_limit", "_until_us")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._from_us = self._until_us = 0
        self._limit = Limit(wallet=WalletRef(*budget.scope, ""))

    def limit(self, at_us: int) -> Limit:
        if not self._from_us <= at_us < self._until_us:
            self._limit = self._budget.limit(at_us)
            self._from_us, self._until_us = at_us, at_us + CLOCKS_APART_US
            for period in self._limit.periods:
                for edge_us in (period.start_us, period.end_us):
                    for change_us in () if edge_us is None else (edge_us - CLOCKS_APART_US, edge_us + CLOCKS_APART_US):
                        if at_us < change_us < self._until_us:
                            self._until_us = change_us
        return self._limit


class _Lease(NamedTuple):
    budgets: dict[Subject, list[_Served]]
    of_customers: bool
    until_s: float


class Budgets:
    """Which limits a request is under, and what they leave.

    Args:
        lease_s: how long an answer is used before it is asked for again.
        monotonic_s: the clock of the leases.
    """

    def __init__(
        self,
        book: BudgetBook,
        ledger: Ledger,
        *,
        now_us: Callable[[], int],
        lease_s: float = LEASE_S,
        monotonic_s: Callable[[], float] = time.monotonic,
        kept_max: int = KEPT_MAX,
    ) -> None:
        self._book = book
        self._ledger = ledger
        self._now_us = now_us
        self._lease_s = lease_s
        self._monotonic_s = monotonic_s
        self._known: LRU[_Name, _Lease] = LRU(kept_max)
        self._under_way: dict[_Name, asyncio.Task[_Lease]] = {}
        self._away_until_s = float("-inf")
        self._used_up: LRU[WalletRef, tuple[int, str, Block | None]] = LRU(USED_UP_MAX)

    def invalidate(self) -> None:
        """Forget which budgets there are: the next request asks, whatever is being looked up now."""
        self._known.clear()
        self._under_way.clear()

    # What a request is under.

    async def limits(self, scope: Scope, spender: Spender) -> tuple[Limit, ...]:
        """The limits that *spender* is under now.

        Raises:
            LedgerUnavailable: nobody can say, so nothing is asked of the ledger.
        """
        name = _Name(scope, None)
        shared = self._known.get(name)
        if shared is None or self._monotonic_s() >= shared.until_s:
            shared = await self._lease(name)
        if not shared.budgets and not shared.of_customers:
            return ()
        budgets = shared.budgets
        served = budgets.get(Subject("tenant", scope.tenant), []) + budgets.get(Subject("key", spender.key_id), [])
        if spender.app_id is not None:
            served = served + budgets.get(Subject("app", spender.app_id), [])
        if shared.of_customers and spender.customer_id is not None:
            own = await self._lease(_Name(scope, spender.customer_id))
            served = served + own.budgets.get(Subject("customer", spender.customer_id), [])
        at_us = self._now_us()
        return tuple([budget.limit(at_us) for budget in served])

    def known_to_be_none(self, scope: Scope) -> bool:
        """Whether it is at hand that nobody of *scope* is under any limit.

        A lease that is half over is renewed meanwhile, so that a tenant in steady use is never waited for.
        """
        name = _Name(scope, None)
        shared = self._known.get(name)
        left_s = 0.0 if shared is None else shared.until_s - self._monotonic_s()
        if shared is None or left_s <= 0 or shared.budgets or shared.of_customers:
            return False
        if left_s < self._lease_s / 2 and len(self._under_way) < LOOK_UPS_MAX:
            self._begin_look_up(name)
        return True

    async def _lease(self, name: _Name) -> _Lease:
        lease = self._known.get(name)
        now_s = self._monotonic_s()
        if lease is not None and now_s < lease.until_s:
            return lease
        stale = lease if lease is not None and now_s < lease.until_s + OUTAGE_LEASE_S else None
        if stale is not None and now_s < self._away_until_s:
            return stale
        lately = now_s < self._away_until_s + LOOK_UP_S
        try:
            async with within(OUTAGE_WAIT_S if stale is not None and lately else LOOK_UP_S):
                return await self._look_up_once(name)
        except DatabaseUnavailable as error:
            self._away_until_s = self._monotonic_s() + OUTAGE_LOOK_S
            if stale is not None:
                return stale
            raise LedgerUnavailable(f"which budgets there are cannot be looked up: {error}") from error

    async def _look_up_once(self, name: _Name) -> _Lease:
        """All who ask for the same while it is looked up get one answer; one who goes away does not stop the others."""
        if name not in self._under_way and len(self._under_way) >= LOOK_UPS_MAX:
            raise DatabaseUnavailable(f"{LOOK_UPS_MAX} look-ups are under way already")
        return await asyncio.shield(self._begin_look_up(name))

    def _begin_look_up(self, name: _Name) -> "asyncio.Task[_Lease]":
        """The look-up that is under way, begun now if there is none."""
        task = self._under_way.get(name)
        if task is None:
            task = asyncio.create_task(self._look_up(name))
            self._under_way[name] = task
            task.add_done_callback(lambda done: self._landed(name, done))
        return task

    def _landed(self, name: _Name, task: asyncio.Task[_Lease]) -> None:
        if self._under_way.get(name) is task:
            del self._under_way[name]
        if not task.cancelled():
            task.exception()  # Seen here, in case all who waited have gone.

    async def _look_up(self, name: _Name) -> _Lease:
        # The lease begins before the rows are read: what changes while we read is noticed a lease later at most.
        until_s = self._monotonic_s() + self._lease_s
        async with within(LOOK_UP_S):
            found, of_customers = await self._book.in_force(name.scope, name.customer_id)
        budgets: dict[Subject, list[_Served]] = {}
        for budget in found:
            budgets.setdefault(budget.subject, []).append(_Served(budget))
        lease = _Lease(budgets, of_customers, until_s)
        if self._under_way.get(name) is asyncio.current_task():  # Otherwise it was invalidated while we read.
            self._known.put(name, lease)
        return lease

    def exceeded(self, refused: LimitReached, limits: tuple[Limit, ...]) -> LimitReached:
        """*refused*, and where one of *limits* is what was reached, which budget it is and when it is filled again."""
        at_us = self._now_us()
        for limit in limits:
            if limit.wallet == refused.limit:
                period = _period_at(limit, at_us)
                return BudgetExceeded(refused, _budget_of(limit), None if period is None else period.end_us)
        return refused

    # What is left of it.

    async def remaining(self, scope: Scope, spender: Spender) -> int | None:
        """The least that is left under the limits of *spender*, in the asset's smallest unit; None without a limit.

        Raises:
            LedgerUnavailable
        """
        limits = await self.limits(scope, spender)
        if not limits:
            return None
        return min([(await self._state(limit)).remaining for limit in limits])

    async def state(self, budget: Budget) -> BudgetState:
        """Raises LedgerUnavailable."""
        return await self._state(budget.limit(self._now_us()))

    async def _state(self, limit: Limit) -> BudgetState:
        period = _period_at(limit, self._now_us())
        assert period is not None, "a limit names the period that is now"
        block = await self._block(limit.wallet, period.block_id)
        if block is None:
            return BudgetState(spent=0, reserved=0, remaining=limit.amount, period=period)
        return BudgetState(spent=block.consumed, reserved=block.reserved, remaining=block.free, period=period)

    async def _block(self, ref: WalletRef, block_id: str) -> Block | None:
        """A block of a limit's wallet; None before its period was drawn on."""
        view = await self._ledger.wallet_view(ref)
        if view is None:
            return None
        for block in view.blocks:
            if block.id == block_id:
                return block
        # It is not open yet, or nothing is left of it: which of them stays so until the wallet's next version.
        used_up = self._used_up.get(ref)
        if used_up is None or used_up[:2] != (view.wallet.version, block_id):
            used_up = (view.wallet.version, block_id, await self._ledger.block(ref, block_id))
            self._used_up.put(ref, used_up)
        return used_up[2]

    # A change of it.

    async def apply(self, budget: Budget, asset: str) -> Budget:
        """Let the period that is under way have the amount of *budget*, or of what became of it meanwhile.

        Raises:
            LedgerUnavailable: it holds from the next period on, or when this is repeated.
        """
        for _ in range(APPLIED_MAX):
            limit = budget.limit(self._now_us())
            await self._ledger.execute(SetLimit(id=new_id("cmd"), scope=budget.scope, limit=limit, asset=asset))
            latest = await self._book.find(budget.scope, budget.id)
            if latest.amount == budget.amount:
                return latest
            # Somebody has changed it since, and the ledger may have heard of that first.
            budget = latest
        raise LedgerUnavailable("the budget changes faster than it can be applied")


def _period_at(limit: Limit, at_us: int) -> LimitPeriod | None:
    for period in limit.periods:
        if period.start_us <= at_us and (period.end_us is None or at_us < period.end_us):
            return period
    return None


def _budget_of(limit: Limit) -> str:
    return limit.wallet.wallet.partition(":")[2]
