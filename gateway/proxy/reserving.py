"""The step of the journey that sets a request's credits aside: in the ledger, or where it is away and the tenant chose
to be served, out of an allowance. A request whose idempotency key has an answer already is given that one instead.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from gateway.billing.charging import Charging, Spender
from gateway.errors import (
    idempotency_key_reused,
    invalid_request,
    request_already_completed,
    request_in_progress,
    subsidy_unaffordable,
)
from gateway.identity.principals import Principal
from gateway.payments.links import TopUpURL
from gateway.proxy.answer import quota_of
from gateway.proxy.exchange import Exchange
from gateway.proxy.hold import Hold
from gateway.proxy.journal import SettlementJournal
from gateway.proxy.open_serving import OpenServing
from gateway.proxy.payer import Payer
from gateway.proxy.quoting import Plan
from gateway.proxy.settlement import Ending
from gateway.proxy.shield import Shield
from gateway.proxy.whole import replay
from gateway.refusals import UNAFFORDABLE, unaffordable
from gateway.settings import Settings
from ledger.commands import Key, Reserve
from ledger.errors import LedgerUnavailable
from ledger.ledger import Ledger
from ledger.model import ReservationRef, ReservationState, Scope, UsageRecord
from ledger.outcomes import Reserved, Settled
from pricing.usage import Usage

OPERATION: Final = "chat"
"""The scope of a chat request's idempotency key."""

KEY_LENGTH_MAX: Final = 255

WAITING_BYTES_MAX: Final = 512 * 2**20
"""The bodies of all requests that wait for their reservation, together. More are turned away: when the ledger hangs,
what waits for it must not fill the memory."""


class Reserving:
    """Makes the holds of this process."""

    def __init__(
        self,
        *,
        settings: Settings,
        ledger: Ledger,
        charging: Charging,
        journal: SettlementJournal,
        shield: Shield,
        top_up_url: TopUpURL,
        new_id: Callable[[str], str],
    ) -> None:
        self._ledger = ledger
        self._charging = charging
        self._journal = journal
        self._shield = shield
        self._top_up_url = top_up_url
        self._new_id = new_id
        self._ttl_us = int(settings.reservation_life_s * 1_000_000)
        self._waiting_bytes = 0
        self.open = OpenServing(ledger=ledger, charging=charging, journal=journal, shield=shield, new_id=new_id)

    async def hold(
        self,
        exchange: Exchange,
        plan: Plan,
        principal: Principal,
        payer: Payer,
        *,
        key: Key | None,
        began_us: int,
        size: int,
    ) -> Hold | None:
        """Set the plan's credits aside. None when the request's key had an earlier answer, which has been given.

        Args:
            size: bytes of the request's body, which waits in memory meanwhile.

        Raises:
            ApiError: 402; 409 and 422 for a key that is another request's.
            LedgerUnavailable: nobody can say, and nothing may be served from an allowance.
        """
        scope = Scope(principal.tenant_id, principal.mode)
        if key is not None and await self._answer_open(exchange, principal, scope, key):
            return None
        action = plan.tariff.action
        record = UsageRecord(
            request_id=exchange.request_id,
            app_id=principal.app_id,
            key_id=principal.key_id,
            customer_id=payer.customer_id,
            model=plan.request.model,
            action=None if action is None else action.key,
            metric=None if action is None or action.metric is None else action.metric.metric.key,
            upstream=plan.candidate.upstream.name,
            started_at_us=began_us,
        )
        command = self._command(exchange, plan, principal, payer, key=key, record=record)
        spender = Spender(app_id=principal.app_id, key_id=principal.key_id, customer_id=payer.customer_id)
        try:
            with self._waiting(size):
                # What is served while the ledger is away is charged under the same limits, later.
                command = await self._charging.limited(command, spender)
                applied = await self._charging.ask(command, spender)
        except LedgerUnavailable as error:
            return await self._without_ledger(exchange, plan, principal, command, record=record, unavailable=error)
        except UNAFFORDABLE as error:
            if action is not None and error.needed != action.price:
                raise subsidy_unaffordable() from None
            raise unaffordable(error, principal.asset, top_up_url=self._page_of(scope, payer)) from None
        reserved = applied.result
        assert isinstance(reserved, Reserved | Settled)
        if applied.replayed and reserved.reservation != command.reservation.reservation:
            assert key is not None
            await self._answer_again(exchange, principal, ReservationRef(*scope, reserved.reservation), key)
            return None
        assert isinstance(reserved, Reserved), "a key that a settlement took is another request's"
        exchange.add("X-Quota-Reserved", principal.asset.format(reserved.held[0]))
        if principal.open_allowance > 0:
            return self.open.on_reservation(
                command, reserved.held, plan=plan, record=record, limit=principal.open_allowance
            )
        return Hold(
            ledger=self._ledger,
            charging=self._charging,
            journal=self._journal,
            shield=self._shield,
            new_id=self._new_id,
            reservation=command.reservation,
            tariff=plan.tariff,
            record=record,
            prompt_tokens=plan.prompt_tokens,
            prompt_tokens_max=plan.prompt_tokens_max,
            held=reserved.held,
            ttl_us=self._ttl_us,
            # An action's price is held in full; what it lacks later is the developer's to add.
            top_up_url=lambda: None if action is not None else self._page_of(scope, payer),
        )

    def _page_of(self, scope: Scope, payer: Payer) -> str | None:
        """Where whoever pays can add credits: a user, not the developer."""
        if not payer.user_pays or payer.customer_id is None:
            return None
        return self._top_up_url(scope, payer.customer_id)

    def _command(
        self,
        exchange: Exchange,
        plan: Plan,
        principal: Principal,
        payer: Payer,
        *,
        key: Key | None,
        record: UsageRecord,
    ) -> Reserve:
        scope = Scope(principal.tenant_id, principal.mode)
        unanswered = Usage(input=plan.prompt_tokens) if plan.request.stream else plan.expected
        died = msgspec.structs.replace(record, source="partial", ending=Ending.DIED)
        return Reserve(
            id=self._new_id("cmd"),
            scope=scope,
            key=key,
            reservation=ReservationRef(*scope, f"rsv_{exchange.request_id.partition('_')[2]}"),
            asset=principal.asset.code,
            legs=plan.legs,
            ttl_us=self._ttl_us,
            unfunded=payer.unfunded,
            developer=principal.app_id,
            tags=plan.tags(principal.app_id),
            request_id=exchange.request_id,
            mark=plan.tariff.settlement(unanswered, died),
        )

    @contextmanager
    def _waiting(self, size: int) -> Iterator[None]:
        """A request of so many bytes waits for its reservation, within the bound on what does.

        Raises:
            LedgerUnavailable: there is no room for it.
        """
        if self._waiting_bytes + size > WAITING_BYTES_MAX:
            raise LedgerUnavailable(f"requests of {WAITING_BYTES_MAX} bytes wait already")
        self._waiting_bytes += size
        try:
            yield
        finally:
            self._waiting_bytes -= size

    async def _without_ledger(
        self,
        exchange: Exchange,
        plan: Plan,
        principal: Principal,
        command: Reserve,
        *,
        record: UsageRecord,
        unavailable: LedgerUnavailable,
    ) -> Hold | None:
        """The ledger is away: serve the request out of the tenant's allowance, if it has one, or refuse it.

        Failing open is the tenant's own choice, and bounded; what is served is charged when the ledger is back.

        Raises:
            LedgerUnavailable: the tenant has chosen otherwise, or there is nothing left to serve from.
        """
        hold = None
        try:
            if principal.open_allowance > 0:
                key, scope = command.key, command.scope
                if key is not None and await self._answer_open(exchange, principal, scope, key):
                    return None
                hold = await self.open.hold(command, plan=plan, record=record, limit=principal.open_allowance)
        finally:
            if hold is None and unavailable.in_doubt:
                self._journal.withdraw(command)
        if hold is None:
            raise unavailable
        exchange.add("X-Quota-Reserved", principal.asset.format(hold.held[0]))
        exchange.add("X-Quota-Ledger", "away")
        return hold

    async def _answer_open(self, exchange: Exchange, principal: Principal, scope: Scope, key: Key) -> bool:
        """Give the answer that this process gave under *key* and the ledger has yet to be told; False if there is none.

        It is asked for before the ledger is, because the ledger, back again, would take the request for a new one.
        """
        earlier = self.open.answer(scope, key)
        if earlier is None:
            return False
        if earlier.digest != key.digest:
            raise idempotency_key_reused()
        if earlier.cost is None:
            raise request_in_progress()
        if earlier.response is None:
            raise request_already_completed(earlier.request_id)
        exchange.request_id = earlier.request_id
        exchange.add("X-Quota-Ledger", "away")
        await replay(exchange, earlier.response, quota_of(principal.asset, cost=earlier.cost, balance=None))
        return True

    async def _answer_again(self, exchange: Exchange, principal: Principal, ref: ReservationRef, key: Key) -> None:
        """Give the answer of the request that came first with this key."""
        earlier = await self._ledger.reservation(ref)
        if earlier is None or earlier.state is ReservationState.OPEN:
            raise request_in_progress()
        stored = await self._ledger.stored_response(Scope(ref.tenant, ref.mode), key.operation, key.key)
        if stored is None:
            raise request_already_completed(earlier.request_id or ref.reservation)
        exchange.request_id = earlier.request_id or exchange.request_id  # It is that one's receipt.
        quota = quota_of(principal.asset, cost=earlier.charged[0].total, balance=earlier.balance)
        await replay(exchange, stored, quota)


def idempotency_key(exchange: Exchange, payer: Payer, body: bytes) -> Key | None:
    """The request's key, with a digest of all that the charge depends on.

    Raises:
        ApiError: 400 for one that is none.
    """
    key = exchange.header("Idempotency-Key")
    if key is None:
        return None
    if not 0 < len(key) <= KEY_LENGTH_MAX:
        raise invalid_request(f"An idempotency key has 1 to {KEY_LENGTH_MAX} characters.", param="Idempotency-Key")
    digest = hashlib.sha256()
    for part in (payer.customer_id or "", exchange.header("X-Quota-Action") or ""):
        digest.update(part.encode() + b"\n")
    digest.update(body)
    return Key(operation=OPERATION, key=key, digest=digest.hexdigest())
