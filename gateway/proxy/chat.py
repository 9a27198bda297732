"""The journey of one chat completion: authenticate, admit, payer, quote, reserve, forward, stream, settle.

How it works. The journey is one coroutine, read from top to bottom. Whatever it ends with, its reservation is settled:
by the step that knows the ending, else by ``_held`` on the way out. Settling is shielded from cancellation, and the
last byte of an answer leaves only after the charge is durable.
"""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Final

import structlog

from gateway.billing.charging import Charging
from gateway.errors import (
    ApiError,
    ErrorTable,
    internal_error,
    rate_limit_exceeded,
    upstream_error,
)
from gateway.identity.customers import Customers
from gateway.identity.keys import KeyScope
from gateway.identity.principals import Principal, Principals
from gateway.payments.links import TopUpURL
from gateway.proxy.exchange import ClientGone, Exchange, Receive, Scope, Send
from gateway.proxy.forwarding import forward, unanswered
from gateway.proxy.hold import Hold, LiveHolds
from gateway.proxy.journal import SettlementJournal
from gateway.proxy.meter import StreamMeter
from gateway.proxy.payer import resolve_payer
from gateway.proxy.quoting import Plan, Quoter
from gateway.proxy.rate_limit import RateLimit
from gateway.proxy.request import parse_chat
from gateway.proxy.reserving import Reserving, idempotency_key
from gateway.proxy.routing import Router
from gateway.proxy.shield import Shield
from gateway.proxy.stream import StreamedAnswer
from gateway.proxy.tally import Counter
from gateway.proxy.upstream import (
    UpstreamError,
    UpstreamResponse,
)
from gateway.proxy.whole import pass_whole
from gateway.settings import Settings
from ledger.ledger import Ledger

ERROR_BYTES_MAX: Final = 2**20

EVENT_STREAM: Final = b"text/event-stream"

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
        charging: Charging,
        live: LiveHolds,
        journal: SettlementJournal,
        shield: Shield,
        top_up_url: TopUpURL,
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
        self._live = live
        self._errors = errors
        self._new_counter = new_counter
        self._new_id = new_id
        self._now_us = now_us
        self._reserving = Reserving(
            settings=settings,
            ledger=ledger,
            charging=charging,
            journal=journal,
            shield=shield,
            top_up_url=top_up_url,
            new_id=new_id,
        )

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
            at_us=began_us,
            action=exchange.header("X-Quota-Action"),
            clamping=exchange.header("X-Quota-Clamping") != "off",
            max_cost=exchange.header("X-Quota-Max-Cost"),
        )
        exchange.journey.model, exchange.journey.stream = request.model, request.stream
        key = idempotency_key(exchange, payer, body)
        with exchange.journey.trace.step("reserve"):
            hold = await self._reserving.hold(
                exchange, plan, principal, payer, key=key, began_us=began_us, size=len(body)
            )
        if hold is None:
            return
        async with self._held(hold):
            response = await forward(exchange, plan, hold)
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
                    counter, keep = self._counter_of(hold), key is not None
                    await pass_whole(exchange, plan, hold, response, new_counter=counter, keep=keep)
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

    async def _refused(self, exchange: Exchange, hold: Hold, response: UpstreamResponse) -> None:
        """The upstream says no: nothing is charged. Its own 4xx passes as it came, anything else is our 502."""
        try:
            body = await response.read(ERROR_BYTES_MAX)
        except UpstreamError as error:
            raise unanswered(error) from None
        await hold.release()
        if not 400 <= response.status < 500:
            raise upstream_error(f"The upstream answered with {response.status}. Nothing was charged.")
        await exchange.respond(response.status, body, response.headers)

    def _grace_s(self, principal: Principal, plan: Plan) -> float:
        """How long an abandoned stream is read on to learn its usage: the app's choice, else the settings'."""
        settings = self._settings
        by_default = settings.on_disconnect_hidden_reasoning if plan.route.hidden_reasoning else settings.on_disconnect
        return settings.drain_timeout_s if (principal.on_disconnect or by_default) == "drain" else 0

    def _counter_of(self, hold: Hold) -> Callable[[], Counter]:
        model = hold.tariff.card.model
        return lambda: self._new_counter(model)


def _is_event_stream(response: UpstreamResponse) -> bool:
    return any(name == b"content-type" and value.startswith(EVENT_STREAM) for name, value in response.headers)
