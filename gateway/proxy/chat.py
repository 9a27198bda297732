"""The journey of one chat completion: authenticate, admit, payer, quote, reserve, forward, stream, settle.

How it works. The journey is one coroutine, read from top to bottom. Whatever it ends with, its reservation is settled:
by the step that knows the ending, else by ``_held`` on the way out. Settling is shielded from cancellation, and the
last byte of an answer leaves only after the charge is durable.
"""

import asyncio
import contextlib
import hashlib
import random
from collections.abc import AsyncIterator, Callable
from typing import Final, TypeVar

import msgspec
import structlog

from gateway.errors import (
    ApiError,
    ErrorTable,
    charge_waits,
    idempotency_key_reused,
    insufficient_credits,
    internal_error,
    invalid_request,
    rate_limit_exceeded,
    request_already_completed,
    request_in_progress,
    subsidy_unaffordable,
    upstream_error,
    upstream_timeout,
)
from gateway.identity.customers import Customers
from gateway.identity.keys import KeyScope
from gateway.identity.principals import Principal, Principals
from gateway.proxy.answer import Answer, NoAnswer, quota_of
from gateway.proxy.exchange import ClientGone, Exchange, Receive, Scope, Send
from gateway.proxy.hold import Hold, LiveHolds
from gateway.proxy.journal import SettlementJournal
from gateway.proxy.meter import StreamMeter
from gateway.proxy.open_serving import OpenServing
from gateway.proxy.payer import Payer, resolve_payer
from gateway.proxy.quoting import Plan, Quoter
from gateway.proxy.rate_limit import RateLimit
from gateway.proxy.request import parse_chat
from gateway.proxy.routing import Candidate, Router
from gateway.proxy.settlement import Ending
from gateway.proxy.shield import Shield
from gateway.proxy.stream import StreamedAnswer
from gateway.proxy.tally import Counter
from gateway.proxy.upstream import (
    Phase,
    UpstreamBodyTooLarge,
    UpstreamError,
    UpstreamRequest,
    UpstreamResponse,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.settings import Settings
from ledger.commands import Key, Reserve, StoredResponse
from ledger.errors import InsufficientCredits, LedgerUnavailable, LimitReached, ReceivableOutstanding
from ledger.ledger import Ledger
from ledger.model import (
    ReservationRef,
    ReservationState,
    Tags,
    UsageRecord,
)
from ledger.model import Scope as LedgerScope
from ledger.outcomes import Applied, Reserved, Settled
from pricing.usage import Usage

OPERATION: Final = "chat"
"""The scope of a chat request's idempotency key."""

KEY_LENGTH_MAX: Final = 255
ANSWER_BYTES_MAX: Final = 64 * 2**20
ERROR_BYTES_MAX: Final = 2**20

WAITING_BYTES_MAX: Final = 512 * 2**20
"""The bodies of all requests that wait for their reservation, together. More are turned away: when the ledger hangs,
what waits for it must not fill the memory."""

RETRY_WAIT_S: Final = 0.05
TRIED_AGAIN: Final = frozenset({502, 503, 504})
"""Statuses with which an upstream says that it did not do the work, and may do it soon."""

TRIED_ELSEWHERE: Final = TRIED_AGAIN | {408, 409, 425, 429, 500, 529}
"""Statuses with which the next candidate is asked."""

EVENT_STREAM: Final = b"text/event-stream"

_UNAFFORDABLE: Final = (InsufficientCredits, LimitReached, ReceivableOutstanding)

T = TypeVar("T")
log = structlog.get_logger(__name__)


class ChatProxy:
    """The raw ASGI endpoint of chat completions."""

    def __init__(
        self,
        *,
        settings: Settings,
        principals: Principals,
        customers: Customers,
        rate_limit: RateLimit,
        router: Router,
        quoter: Quoter,
        ledger: Ledger,
        live: LiveHolds,
        journal: SettlementJournal,
        shield: Shield,
        errors: ErrorTable,
        new_counter: Callable[[str], Counter],
        new_id: Callable[[str], str],
        now_us: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._principals = principals
        self._customers = customers
        self._rate_limit = rate_limit
        self._router = router
        self._quoter = quoter
        self._ledger = ledger
        self._live = live
        self._journal = journal
        self._errors = errors
        self._new_counter = new_counter
        self._new_id = new_id
        self._now_us = now_us
        self._shield = shield
        self._waiting_bytes = 0
        self._open = OpenServing(ledger=ledger, journal=journal, shield=shield, new_id=new_id)

    async def __call__(self, scope: Scope, receive: Receive, send: Send, *, path_user: str | None = None) -> None:
        exchange = Exchange(scope, receive, send, request_id=self._new_id("req"))
        try:
            await self._journey(exchange, path_user)
        except ClientGone:
            return
        except Exception as error:
            refusal = self._refusal(error, exchange)
            if not exchange.started:
                await exchange.refuse(refusal)
        finally:
            exchange.unwatch()

    def _refusal(self, error: Exception, exchange: Exchange) -> ApiError:
        refusal = self._errors.translate(error)
        if refusal is None:
            log.exception("request failed", request_id=exchange.request_id, exc_info=error)
            refusal = internal_error()
        exchange.journey.code = refusal.code
        return refusal

    # The journey.

    async def _journey(self, exchange: Exchange, path_user: str | None) -> None:
        began_us = self._now_us()
        principal = await self._authenticate(exchange)
        await self._admit(exchange, principal)
        user = exchange.header(self._settings.user_header)
        payer = await resolve_payer(principal, self._customers, header=user, path=path_user)
        body = await exchange.body(self._settings.body_bytes_max)
        request = parse_chat(body)
        plan = await self._quoter.plan(
            request,
            self._router.route(request.model, mode=principal.mode, at_us=began_us),
            principal=principal,
            payer=payer,
            action=exchange.header("X-Quota-Action"),
            clamping=exchange.header("X-Quota-Clamping") != "off",
            max_cost=exchange.header("X-Quota-Max-Cost"),
        )
        exchange.journey.model, exchange.journey.stream = request.model, request.stream
        key = _idempotency_key(exchange, payer, body)
        with exchange.journey.trace.step("reserve"):
            hold = await self._reserve(exchange, plan, principal, payer, key=key, began_us=began_us, size=len(body))
        if hold is None:
            return
        async with self._held(hold):
            response = await self._forward(exchange, plan, hold)
            try:
                if not 200 <= response.status < 300:
                    await self._refused(exchange, hold, response)
                elif request.stream and _is_event_stream(response):
                    meter = StreamMeter(
                        self._counter_of(hold),
                        wants_usage=request.wants_usage,
                        hidden_reasoning=hold.tariff.card.hidden_reasoning,
                    )
                    stream = StreamedAnswer(exchange, plan, hold, response, meter)
                    await stream.pass_on(grace_s=self._grace_s(principal, plan))
                else:
                    await self._whole(exchange, plan, hold, response, keep=key is not None)
            finally:
                await response.close()

    async def _authenticate(self, exchange: Exchange) -> Principal:
        principal = await self._principals.authenticate(exchange.token())
        principal.require(KeyScope.PROXY)
        return principal

    async def _admit(self, exchange: Exchange, principal: Principal) -> None:
        limit = self._settings.rate_limit_per_minute
        decision = await self._rate_limit.check(principal.key_id, limit)
        exchange.extra += decision.headers()
        if not decision.allowed:
            raise rate_limit_exceeded(limit=limit, retry_after_s=decision.retry_after_s)

    # Reserve.

    async def _reserve(
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
        """Set the plan's credits aside. None when the request's key had an earlier answer, which has been given."""
        tenant, mode, asset = principal.tenant_id, principal.mode, principal.asset
        record = UsageRecord(
            request_id=exchange.request_id,
            app_id=principal.app_id,
            key_id=principal.key_id,
            customer_id=payer.customer_id,
            model=plan.request.model,
            action=plan.tariff.action.key if plan.tariff.action else None,
            upstream=plan.candidate.upstream.name,
            started_at_us=began_us,
        )
        reservation = ReservationRef(tenant, mode, f"rsv_{exchange.request_id.partition('_')[2]}")
        ttl_us = int(self._settings.reservation_life_s * 1_000_000)
        unanswered = Usage(input=plan.prompt_tokens) if plan.request.stream else plan.expected
        command = Reserve(
            id=self._new_id("cmd"),
            scope=LedgerScope(tenant, mode),
            key=key,
            reservation=reservation,
            asset=asset.code,
            legs=plan.legs,
            ttl_us=ttl_us,
            unfunded=payer.unfunded,
            developer=principal.app_id,
            tags=Tags(app=principal.app_id, model=plan.request.model),
            request_id=exchange.request_id,
            mark=plan.tariff.settlement(
                unanswered, msgspec.structs.replace(record, source="partial", ending=Ending.DIED)
            ),
        )
        try:
            applied = await self._asked(command, size)
        except LedgerUnavailable as error:
            return await self._reserve_open(exchange, plan, principal, command, record=record, unavailable=error)
        except _UNAFFORDABLE as error:
            if plan.tariff.action is not None and error.needed != plan.tariff.action.price:
                raise subsidy_unaffordable() from None
            raise insufficient_credits(needed=error.needed, available=error.available, asset=asset) from None
        reserved = applied.result
        assert isinstance(reserved, Reserved | Settled)
        if applied.replayed and reserved.reservation != reservation.reservation:
            await self._answer_again(exchange, principal, ReservationRef(tenant, mode, reserved.reservation), key)
            return None
        assert isinstance(reserved, Reserved), "a key that a settlement took is another request's"
        exchange.add("X-Quota-Reserved", asset.format(reserved.held[0]))
        return Hold(
            ledger=self._ledger,
            journal=self._journal,
            shield=self._shield,
            new_id=self._new_id,
            reservation=reservation,
            tariff=plan.tariff,
            record=record,
            prompt_tokens=plan.prompt_tokens,
            prompt_tokens_max=plan.prompt_tokens_max,
            held=reserved.held,
            ttl_us=ttl_us,
        )

    async def _asked(self, command: Reserve, size: int) -> Applied:
        """Have the ledger do *command* for a request of so many bytes, within the bound on what waits."""
        if self._waiting_bytes + size > WAITING_BYTES_MAX:
            raise LedgerUnavailable(f"requests of {WAITING_BYTES_MAX} bytes wait already")
        self._waiting_bytes += size
        try:
            return await self._ledger.execute(command)
        finally:
            self._waiting_bytes -= size

    async def _reserve_open(
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
                if command.key is not None and await self._answer_open(exchange, principal, command.key):
                    return None
                hold = await self._open.hold(
                    command,
                    limit=principal.open_allowance,
                    tariff=plan.tariff,
                    record=record,
                    prompt_tokens=plan.prompt_tokens,
                    prompt_tokens_max=plan.prompt_tokens_max,
                )
        finally:
            if hold is None and unavailable.in_doubt:
                self._journal.withdraw(command)
        if hold is None:
            raise unavailable
        exchange.add("X-Quota-Reserved", principal.asset.format(hold.held[0]))
        exchange.add("X-Quota-Ledger", "away")
        return hold

    async def _answer_open(self, exchange: Exchange, principal: Principal, key: Key) -> bool:
        """Give the answer that this process gave under *key* since the ledger went away; False if it gave none."""
        earlier = self._open.answer(LedgerScope(principal.tenant_id, principal.mode), key)
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
        await _replay(exchange, earlier.response, quota_of(principal.asset, cost=earlier.cost, balance=None))
        return True

    async def _answer_again(
        self, exchange: Exchange, principal: Principal, ref: ReservationRef, key: Key | None
    ) -> None:
        """Give the answer of the request that came first with this key."""
        earlier = await self._ledger.reservation(ref)
        if earlier is None or earlier.state is ReservationState.OPEN:
            raise request_in_progress()
        assert key is not None
        stored = await self._ledger.stored_response(LedgerScope(ref.tenant, ref.mode), key.operation, key.key)
        if stored is None:
            raise request_already_completed(earlier.request_id or ref.reservation)
        exchange.request_id = earlier.request_id or exchange.request_id  # It is that one's receipt.
        quota = quota_of(principal.asset, cost=earlier.charged[0].total, balance=earlier.balance)
        await _replay(exchange, stored, quota)

    @contextlib.asynccontextmanager
    async def _held(self, hold: Hold) -> AsyncIterator[None]:
        """Keep the hold alive; whatever happens, it is settled on the way out."""
        self._live.add(hold)
        try:
            yield
        finally:
            self._live.remove(hold)
            if not hold.settled:
                await hold.release()

    # Forward.

    async def _forward(self, exchange: Exchange, plan: Plan, hold: Hold) -> UpstreamResponse:
        """Send the request to the candidates in their order, until one answers with more than a fault of its own.

        Raises:
            ApiError: 502, 504. Nothing of an answer has come, and nothing is charged.
        """
        clamped = plan.clamped(sum(hold.held))
        if clamped is not None:
            exchange.add("X-Quota-Clamped-Max-Tokens", str(clamped))
        failure: UpstreamError | None = None
        last = plan.route.candidates[-1]
        for candidate in plan.route.candidates:
            response, failure = await self._try(candidate, plan, exchange, clamped)
            if response is None:
                continue
            if response.status in TRIED_ELSEWHERE and candidate is not last:
                await response.close()
                continue
            hold.serve(msgspec.structs.replace(plan.tariff, card=candidate.card))
            hold.record = msgspec.structs.replace(hold.record, upstream=candidate.upstream.name)
            return response
        assert failure is not None
        raise _unanswered(failure)

    async def _try(
        self, candidate: Candidate, plan: Plan, exchange: Exchange, clamped: int | None
    ) -> tuple[UpstreamResponse | None, UpstreamError | None]:
        """One candidate's answer, or its failure; it is asked again only where it cannot have done the work."""
        request = plan.request
        body = request.body(
            model=candidate.model,
            ask_usage=candidate.stream_usage,
            output_tokens_max=clamped,
            limit_field=candidate.limit_field,
        )
        sent = UpstreamRequest(
            path="/chat/completions", body=body, stream=request.stream, request_id=exchange.request_id
        )
        for attempt in range(candidate.retries + 1):
            final = attempt == candidate.retries
            try:
                response = await exchange.journey.send(candidate, sent)
            except UpstreamError as error:
                if final or not _not_sent(error):
                    return None, error
            else:
                if final or response.status not in TRIED_AGAIN:
                    return response, None
                await response.close()
            pause_s = RETRY_WAIT_S * 2**attempt * random.uniform(0.5, 1)  # noqa: S311 - spreads retries
            exchange.journey.upstream_s += pause_s
            await asyncio.sleep(pause_s)
        raise AssertionError("the last attempt returns")

    async def _refused(self, exchange: Exchange, hold: Hold, response: UpstreamResponse) -> None:
        """The upstream says no: nothing is charged. Its own 4xx passes as it came, anything else is our 502."""
        try:
            body = await response.read(ERROR_BYTES_MAX)
        except UpstreamError as error:
            raise _unanswered(error) from None
        await hold.release()
        if not 400 <= response.status < 500:
            raise upstream_error(f"The upstream answered with {response.status}. Nothing was charged.")
        await exchange.respond(response.status, body, response.headers)

    # A whole answer.

    async def _whole(
        self, exchange: Exchange, plan: Plan, hold: Hold, response: UpstreamResponse, *, keep: bool
    ) -> None:
        """Read the answer, charge it, and pass it on. A client that has gone is charged all the same."""
        try:
            body = await response.read(ANSWER_BYTES_MAX)
            answer = Answer(body, hidden_reasoning=hold.tariff.card.hidden_reasoning)
        except UpstreamBodyTooLarge:
            raise upstream_error("The upstream's answer is too large. Nothing was charged.") from None
        except UpstreamError as error:
            raise _unanswered(error) from None
        except NoAnswer:
            raise upstream_error("What the upstream sent is not an answer. Nothing was charged.") from None
        counted = Usage(input=plan.prompt_tokens)
        if answer.reported is None:
            output, reasoning = await asyncio.to_thread(answer.counted, self._counter_of(hold))
            counted = Usage(input=plan.prompt_tokens, output=output, reasoning=reasoning)
            answer.report(counted)
        headers = [header for header in response.headers if header[0] != b"x-request-id"]
        stored = None
        if keep:
            shown = tuple((name.decode(), value.decode()) for name, value in headers)
            stored = StoredResponse(status=response.status, headers=shown, body=answer.body({}))
        with exchange.journey.trace.step("settle"):
            charged = await hold.settle(Ending.FINISHED, reported=answer.reported, counted=counted, response=stored)
        exchange.journey.settled(Ending.FINISHED, charged.usage)
        if charged.cost is None:
            raise charge_waits()
        quota = quota_of(plan.tariff.asset, cost=charged.cost, balance=charged.balance)
        _show(exchange, quota)
        await exchange.respond(response.status, answer.body(quota), headers)

    def _grace_s(self, principal: Principal, plan: Plan) -> float:
        """How long an abandoned stream is read on to learn its usage: the app's choice, else the settings'."""
        settings = self._settings
        by_default = settings.on_disconnect_hidden_reasoning if plan.route.hidden_reasoning else settings.on_disconnect
        return settings.drain_timeout_s if (principal.on_disconnect or by_default) == "drain" else 0

    def _counter_of(self, hold: Hold) -> Callable[[], Counter]:
        model = hold.tariff.card.model
        return lambda: self._new_counter(model)


async def _replay(exchange: Exchange, stored: StoredResponse, quota: dict[str, str]) -> None:
    exchange.add("X-Idempotent-Replayed", "true")
    _show(exchange, quota)
    headers = [(name.encode(), value.encode()) for name, value in stored.headers]
    await exchange.respond(stored.status, Answer(stored.body).body(quota), headers)


def _show(exchange: Exchange, quota: dict[str, str]) -> None:
    """What a whole answer cost, in its headers."""
    for name, value in quota.items():
        exchange.add(f"X-Quota-{name.title()}", value)


def _idempotency_key(exchange: Exchange, payer: Payer, body: bytes) -> Key | None:
    """The request's key, with a digest of all that the charge depends on."""
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


def _is_event_stream(response: UpstreamResponse) -> bool:
    return any(name == b"content-type" and value.startswith(EVENT_STREAM) for name, value in response.headers)


def _not_sent(error: UpstreamError) -> bool:
    """Whether the upstream cannot have done the work."""
    unconnected = isinstance(error, UpstreamTimeout) and error.phase is Phase.CONNECT
    return unconnected or isinstance(error, UpstreamUnreachable)


def _unanswered(error: UpstreamError) -> ApiError:
    return upstream_timeout() if isinstance(error, UpstreamTimeout) else upstream_error()
