"""Automatic top-ups: what a customer has agreed to is bought when their wallet falls below a threshold, once at a time.

How it works. The ledger tells, in the transaction of the charge that crossed, that a top-up is due. Our reaction writes
that down with the customer and wakes this process; it does not wait for the processor, so the outbox goes on. Whoever
takes the customer's turn (see `Turns`) looks at the wallet, and decides and writes an order in one transaction, in
which the customer's agreement and the month's orders cannot change. An open order is the only one; the database says
so. Only then the processor is asked, under an idempotency key that is the order's.

So a process may die anywhere. Before the order is there, the turn's lease runs out, and another looks again. After
that, the next turn goes on with the order: it asks for the same payment under the same key, which is made once. Keys
end after a day: later, and where the payment may not be made any more, it is looked for among the customer's payments.

What came of a payment is for the `Settler`, as of any other: it credits, or fails the order. A failure sets the time of
the next attempt where the order ends, once.
"""

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import structlog
from sqlalchemy import select
from sqlmodel import col

from gateway.database import Database, DatabaseUnavailable, Joined, of
from gateway.events.event import StoredEvent, customer_of
from gateway.identity.wallets import customer_wallet
from gateway.payments.agreements import Agreements
from gateway.payments.auto_top_up_terms import (
    SECOND_US,
    Agreement,
    Decision,
    Standing,
    decide,
    month_of,
    reversal_of,
    stopped,
)
from gateway.payments.links import Links
from gateway.payments.observed import Observed
from gateway.payments.off_session import OffSession
from gateway.payments.orders import Order, Orders
from gateway.payments.processor import ProcessorUnavailable
from gateway.payments.settling import Settler
from gateway.payments.top_up_turns import Turn, Turns
from gateway.tables import PaymentCustomer
from ledger.commands import Key, Tell
from ledger.errors import LedgerUnavailable
from ledger.ledger import Ledger, WalletView
from ledger.model import Scope

POLL_S: Final = 30.0
"""What this process was not told of is found within so long."""

PAUSE_LEAST: Final = 0.75
"""Each pause is drawn from this part of it to all of it: processes do not come in step."""

PAGE: Final = 100
AT_ONCE_MAX: Final = 8
"""Customers whom a process looks at together."""

TURNS_MAX: Final = 8
"""Orders, one after the other, that a customer gets before others have their turn."""

ALONE_US: Final = 60 * SECOND_US
"""So long an order is left to whoever made it. Longer than the processor is waited for."""

KEY_LIFE_US: Final = 23 * 3600 * SECOND_US
"""So long an idempotency key is surely known to the processor, which forgets them after a day."""

ASK_AGAIN_US: Final = (60 * SECOND_US, 6 * 3600 * SECOND_US)
"""How soon, and how late at most, an order that stays open is asked after again: when it is twice as old."""

DUE: Final = "topup.due"
TRIGGERS: Final = frozenset({DUE, "topup.succeeded"})

FAILED: Final = "topup.failed"
DIGEST: Final = "auto"
"""A cause is told once, whatever would be said of it the second time."""

log = structlog.get_logger(__name__)


class AutoTopUps:
    """Looks at customers' wallets and tops them up, from `start` to `stop`."""

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        *,
        agreements: Agreements,
        orders: Orders,
        off_session: OffSession,
        settler: Settler,
        links: Links,
        now_us: Callable[[], int],
        new_id: Callable[[str], str],
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._agreements = agreements
        self._orders = orders
        self._off_session = off_session
        self._settler = settler
        self._links = links
        self._now_us = now_us
        self._new_id = new_id
        self._news = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self.turns = Turns(database, now_us=now_us, new_id=new_id)

    # What brings news.

    async def on_event(self, event: StoredEvent) -> None:
        """A wallet has crossed the customer's threshold, or was topped up, perhaps not far enough. Repeatable.

        Raises:
            DatabaseUnavailable, LedgerUnavailable: tell of the event again.
        """
        customer_id = customer_of(event.wallet)
        if customer_id is None:
            return
        scope = Scope(event.tenant, event.mode)
        await self.turns.news(scope, customer_id)
        self.wake()
        if event.type == DUE:
            await self.tell_if_no_method(scope, customer_id, cause=event.id)

    def wake(self) -> None:
        """There are news of somebody."""
        self._news.set()

    async def consider(self, scope: Scope, customer_id: str) -> None:
        """Top the wallet up now if that is due, and nobody else is at it. Repeatable at any time.

        Raises:
            DatabaseUnavailable, LedgerUnavailable: the next turn goes on, when the lease has run out.
        """
        await self.turns.news(scope, customer_id)
        await self._take_turns(scope, customer_id)

    async def tell_if_no_method(self, scope: Scope, customer_id: str, *, cause: str) -> None:
        """Tell, once for each *cause*, that a top-up is due and there is nothing to pay it with."""
        async with self._database.read(of(*scope)) as connection:
            agreement = await self._agreements.find(connection, scope, customer_id)
            known = select(col(PaymentCustomer.payment_method)).where(
                col(PaymentCustomer.tenant) == scope.tenant,
                col(PaymentCustomer.mode) == scope.mode,
                col(PaymentCustomer.customer_id) == customer_id,
            )
            method = (await connection.execute(known)).scalar_one_or_none()
        if agreement is None or method is not None:
            return
        balance, _ = _standing(await self._ledger.wallet_view(customer_wallet(*scope, customer_id)))
        if balance < agreement.threshold:
            await self._tell(scope, customer_id, agreement, "no_payment_method", cause=cause)

    # The loop.

    def start(self) -> None:
        self._loop = asyncio.create_task(self._keep_up(), name="automatic top-ups")

    async def stop(self) -> None:
        """End; what is under way is given up, and taken up again by somebody when its lease has run out."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
            self._loop = None

    async def round(self) -> int:
        """Look at a page of the customers who are due; how many there were.

        Raises:
            DatabaseUnavailable
        """
        due = await self.turns.due(page=PAGE)
        at_once = asyncio.Semaphore(AT_ONCE_MAX)

        async def look_at(scope: Scope, customer_id: str) -> None:
            async with at_once:
                try:
                    await self._take_turns(scope, customer_id)
                except (DatabaseUnavailable, LedgerUnavailable):
                    log.warning("the database is away", upkeep="top-ups")
                except Exception:
                    # Their turn comes again when the lease has run out; the others have theirs now.
                    log.exception("an automatic top-up is held up", tenant=scope.tenant, customer=customer_id)

        async with asyncio.TaskGroup() as looks:
            for scope, customer_id in due:
                looks.create_task(look_at(scope, customer_id))
        return len(due)

    async def _keep_up(self) -> None:
        while True:
            self._news.clear()
            found = 0
            try:
                found = await self.round()
            except DatabaseUnavailable:
                log.warning("the database is away", upkeep="top-ups")
            except Exception:
                log.exception("upkeep failed", upkeep="top-ups")
            if found == PAGE:
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S * random.uniform(PAUSE_LEAST, 1)):  # noqa: S311
                    await self._news.wait()

    # A turn.

    async def _take_turns(self, scope: Scope, customer_id: str) -> None:
        for _ in range(TURNS_MAX):
            turn = await self.turns.take(scope, customer_id)
            if turn is None:
                return
            look_at_us = await self._look(turn)
            await self.turns.end(turn, look_at_us)

    async def _look(self, turn: Turn) -> int | None:
        """Do what is due for a customer; when to look again, if ever."""
        order = await self._orders.open_automatic(turn.scope, turn.customer_id)
        if order is None:
            view = await self._ledger.wallet_view(customer_wallet(*turn.scope, turn.customer_id))
            begun = await self._begin(turn, view)
            if isinstance(begun, Decision):
                return begun.look_at_us
            order = begun
            asked = self._off_session.charge(order, turn)
        else:
            if order.payment_intent is None and self._now_us() < order.created_at_us + ALONE_US:
                return order.created_at_us + ALONE_US
            asked = self._found(turn, order)
        try:
            return await self._heard(order, await asked)
        except ProcessorUnavailable as away:
            log.warning("an automatic top-up waits for the payment processor", order=order.id, reason=str(away))
            return self._later(order)

    async def _begin(self, turn: Turn, view: WalletView | None) -> Order | Decision:
        """Decide, and write the order that follows; in one transaction, so that what is decided by stays true."""
        scope, now_us = turn.scope, self._now_us()
        month = month_of(now_us)
        balance, frozen = _standing(view)
        async with self._database.write(of(*scope)) as connection:
            here = Joined(connection, of(*scope))
            agreement = await self._agreements.find(connection, scope, turn.customer_id, hold=True)
            if not await self.turns.within(here).holds(turn):
                return Decision("not_needed", now_us)  # There are news: the next turn looks at the wallet again.
            orders = self._orders.within(here)
            spent_minor = 0
            if agreement is not None:
                spent_minor = await orders.automatic_minor(
                    scope, turn.customer_id, currency=agreement.package.currency, month=month
                )
            standing = Standing(
                balance=balance,
                frozen=frozen,
                spent_minor=spent_minor,
                has_method=turn.has_method,
                failures=turn.failures,
                last_failure=turn.last_failure,
            )
            decision = decide(agreement, standing, now_us)
            if agreement is not None and decision.reason == "due":
                order = self._order(turn, agreement, now_us)
                # None is open, or another process made one since we looked.
                return order if await orders.add(order) else Decision("not_needed", now_us)
        if agreement is not None and decision.reason == "monthly_cap":
            cause = f"{turn.customer_id}:{month.start_us}:{agreement.cap_minor}"
            await self._tell(scope, turn.customer_id, agreement, "monthly_cap", cause=cause)
        if agreement is not None and decision.reason == "stopped" and balance < agreement.threshold:
            reversal = reversal_of(turn.last_failure)
            if reversal is not None:
                await self._tell(scope, turn.customer_id, agreement, reversal, cause=f"{turn.last_failure}")
        return decision

    def _order(self, turn: Turn, agreement: Agreement, now_us: int) -> Order:
        package, bought = agreement.package, agreement.bought
        return Order(
            tenant=turn.scope.tenant,
            mode=turn.scope.mode,
            id=self._new_id("ord"),
            kind="auto",
            status="open",
            customer_id=turn.customer_id,
            package=package.id,
            price_minor=package.price_minor,
            currency=package.currency,
            asset=agreement.asset,
            credited=bought.credited,
            bonus=bought.bonus,
            spread=bought.spread,
            created_at_us=now_us,
        )

    # The payment of an order.

    async def _found(self, turn: Turn, order: Order) -> Observed | None:
        """Go on with an order that somebody has left."""
        async with self._database.read(of(*turn.scope)) as connection:
            agreement = await self._agreements.find(connection, turn.scope, turn.customer_id)
        young = self._now_us() < order.created_at_us + KEY_LIFE_US
        wanted = agreement is not None and not stopped(turn.failures, turn.last_failure)
        if order.payment_intent is None and young and wanted and turn.has_method:
            return await self._off_session.charge(order, turn)
        return await self._off_session.find(order, turn)

    async def _heard(self, order: Order, observed: Observed | None) -> int:
        """Let what is known of the payment have its effect; when to look again."""
        if observed is None:
            await self._orders.ended(order, "expired")
            return self._now_us()
        await self._settler.observe(observed)
        after = await self._orders.find(order.scope, order.id)
        if after is not None and after.status == "open":
            if observed.payment_intent is not None and after.payment_intent is None:
                await self._orders.note_payment(order, observed.payment_intent)
            return self._later(order)
        if after is not None and after.status == "failed" and observed.payment_intent is not None:
            await self._off_session.let_go(observed.payment_intent)
        return self._now_us()

    def _later(self, order: Order) -> int:
        least_us, most_us = ASK_AGAIN_US
        now_us = self._now_us()
        return now_us + min(most_us, max(least_us, now_us - order.created_at_us))

    async def _tell(self, scope: Scope, customer_id: str, agreement: Agreement, reason: str, *, cause: str) -> None:
        """That a top-up is due and cannot be: once for each cause."""
        await self._ledger.execute(
            Tell(
                id=self._new_id("cmd"),
                scope=scope,
                key=Key(FAILED, f"{reason}:{cause}", DIGEST),
                wallet=customer_wallet(*scope, customer_id),
                asset=agreement.asset,
                event=FAILED,
                body={
                    "reason": reason,
                    "package": agreement.package.id,
                    "top_up_url": self._links.url_of(scope, customer_id, package=agreement.package.id),
                },
            )
        )


def _standing(view: WalletView | None) -> tuple[int, bool]:
    """The balance, and whether the wallet is frozen."""
    return (0, False) if view is None else (view.balance, view.wallet.frozen)
