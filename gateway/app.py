"""The composition root: the one module that wires all others, and the door that each request comes through.

How it works. `Gateway` is the ASGI application. Its lifespan opens everything in the order in which it is needed and
closes it in reverse: no new requests, settlements under way, periodic work, upstreams, the ledger, the database. A chat
completion goes straight to the proxy; everything else to the management API.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final, Protocol

import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api.application import create_api
from gateway.api.entitlements import Answer, Checks, route_of
from gateway.api.event_view import Rendering, customer_object
from gateway.api.frame import Frame
from gateway.api.services import Services
from gateway.billing.alerts import Alerts
from gateway.billing.auto_buy import AutoBuy
from gateway.billing.budget_book import BudgetBook
from gateway.billing.budgets import Budgets
from gateway.billing.catalog import Catalog
from gateway.billing.charging import Charging
from gateway.billing.entitlements import Entitlements
from gateway.billing.erasure import Erasure
from gateway.billing.metrics import BillableMetrics
from gateway.billing.packs import Packs
from gateway.billing.refunds import Refunds
from gateway.billing.reservations import Reservations
from gateway.billing.rollups import Rollups
from gateway.billing.usage import Metering
from gateway.billing.usage_queries import UsageQueries
from gateway.billing.welcome import Welcomes
from gateway.clock import now_us
from gateway.database import Database
from gateway.errors import ApiError, shutting_down
from gateway.events.event import Reaction
from gateway.events.webhooks import Webhooks
from gateway.identity.customers import Customers
from gateway.identity.principals import Principals
from gateway.identity.tenants import Tenants
from gateway.ids import new_id
from gateway.logs import masked
from gateway.payments.links import no_page
from gateway.payments.nightly import Nightly
from gateway.payments.packages import Packages
from gateway.payments.service import Payments, open_payments
from gateway.prices import ServedModels, price_book
from gateway.proxy.chat import ChatProxy
from gateway.proxy.hold import LiveHolds
from gateway.proxy.journal import SettlementJournal
from gateway.proxy.journey import JOURNEY, UNTRACED, Journey, Trace
from gateway.proxy.quoting import Quoter
from gateway.proxy.rate_limit import ProcessRateLimit, RateLimit
from gateway.proxy.routing import Router
from gateway.proxy.shield import Shield
from gateway.proxy.simulated import SimulatedUpstream
from gateway.proxy.upkeep import Upkeep
from gateway.proxy.upstream import HTTPUpstream, Upstream
from gateway.readiness import OK, Readiness
from gateway.refusals import REFUSALS
from gateway.settings import SIMULATED, Settings
from gateway.shared.balances import Balances
from gateway.shared.changes import Changes
from gateway.shared.leases import Leases
from gateway.shared.link import Link
from gateway.shared.rate_limit import SharedRateLimit
from gateway.shared.wallets import SharedWallets, holders_key
from gateway.stores import SQLITE, OpenStore, open_store
from gateway.telemetry import PROXIED, Metrics
from ledger.ledger import Ledger
from ledger.outcomes import Applied
from ledger.store.protocol import SchemaMissing, StoreUnavailable
from ledger.store.sqlite import SqliteStore
from pricing.tokens import PromptCounter, TextCounter, encoding_for, warm

CHAT_PATH: Final = PROXIED
USERS_PATH: Final = "/v1/users/"
USER_CHAT_SUFFIX: Final = "/chat/completions"
USER_CHAT_ROUTE: Final = f"{USERS_PATH}{{user}}{USER_CHAT_SUFFIX}"

GAUGES_S: Final = 5.0
"""How often the gauges are set that nothing sets by itself."""

WRITE_S: Final = 0.001
"""A write that takes longer waits for its client to read."""

log = structlog.get_logger(__name__)


BeginTrace = Callable[[Scope], Trace]


@dataclass(frozen=True, slots=True)
class Parts:
    """What runs between start and stop."""

    services: Services
    chat: ChatProxy
    checks: Checks
    framed_checks: ASGIApp
    api: ASGIApp
    begin_trace: BeginTrace | None


class Gateway:
    """The application, raw ASGI.

    Attributes:
        draining: it is about to shut down, and says so to whoever asks whether it is ready. Requests are served for
            as long as they come, which is the server's to decide; after `stop` they are turned away.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        metrics: Metrics | None = None,
        upstreams: Mapping[str, Upstream] | None = None,
        now_us: Callable[[], int] = now_us,
        open_store: OpenStore = open_store,
        access_log: Callable[[Journey, str], None] | None = None,
    ) -> None:
        """*upstreams* come before those of the settings, by their names. *access_log* writes each request's line."""
        self._open_store = open_store
        self._now_us = now_us
        self._settings = settings
        self._metrics = metrics or Metrics()
        self._given = upstreams or {}
        self._stack = AsyncExitStack()
        self._parts: Parts | None = None
        self._under_way = 0
        self._idle = asyncio.Event()
        self._access_log = access_log
        self._stopping = False
        self.draining = False

    @property
    def services(self) -> Services:
        """What the endpoints work with, while it runs."""
        assert self._parts is not None, "the gateway has not been started"
        return self._parts.services

    async def start(self) -> None:
        """Open everything; or nothing, and raise."""
        self._parts = await self._stack.enter_async_context(
            running_parts(
                self._settings,
                self._metrics,
                self._given,
                draining=lambda: self.draining,
                now_us=self._now_us,
                open_store=self._open_store,
            )
        )

    async def stop(self) -> None:
        """Finish every settlement, then close everything. Repeatable.

        The server has cancelled what did not end within its grace; such a request still has to settle.
        """
        self.draining = self._stopping = True
        if self._under_way:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), self._settings.ledger_timeout_s)
        await self._stack.aclose()
        self._parts = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._request(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)

    def answer_at_once(self, scope: Scope) -> Answer | None:
        """The answer to a request that needs nobody else: a check whose facts are all at hand. Else None."""
        parts = self._parts
        route = route_of(scope)
        if not route or parts is None or self._stopping:
            return None
        try:
            return parts.checks.at_once(scope, route)
        except Exception:
            return None  # Asked again in order, it breaks where it is logged and answered.

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts = self._parts
        if parts is None or (self._stopping and not scope["path"].startswith("/health/")):
            await _refuse(shutting_down(), send)
            return
        if scope["method"] == "POST":
            path: str = scope["path"]
            if path == CHAT_PATH:
                await self._counted(parts, scope, receive, send, None)
                return
            if path.startswith(USERS_PATH) and path.endswith(USER_CHAT_SUFFIX):
                user = path[len(USERS_PATH) : -len(USER_CHAT_SUFFIX)]
                await self._counted(parts, scope, receive, send, user)
                return
        if route_of(scope):
            await parts.framed_checks(scope, receive, send)
            return
        await parts.api(scope, receive, send)

    async def _counted(self, parts: Parts, scope: Scope, receive: Receive, send: Send, user: str | None) -> None:
        """Serve one proxied request, and note how it went."""
        journey = Journey(UNTRACED if parts.begin_trace is None else parts.begin_trace(scope))
        scope[JOURNEY] = journey

        async def heard() -> MutableMapping[str, Any]:
            began_s = perf_counter()
            message = await receive()
            if message["type"] == "http.request":
                journey.client_s += perf_counter() - began_s
            return message

        async def counted(message: MutableMapping[str, Any]) -> None:
            began_s = perf_counter()
            if message["type"] == "http.response.start":
                journey.begun(message["status"])
            await send(message)
            took_s = perf_counter() - began_s
            if took_s > WRITE_S:
                journey.client_s += took_s

        metrics = self._metrics
        metrics.open_requests.inc()
        self._under_way += 1
        try:
            await parts.chat(scope, heard, counted, path_user=user)
        finally:
            journey.end()
            metrics.open_requests.dec()
            metrics.count(journey)
            if self._access_log is not None:
                self._access_log(journey, CHAT_PATH if user is None else USER_CHAT_ROUTE)
            self._under_way -= 1
            if self._stopping and not self._under_way:
                self._idle.set()

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self.start()
                except Exception as error:
                    if not isinstance(error, OSError | StoreUnavailable | SchemaMissing):  # These say what to do.
                        log.exception("the gateway could not start")
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                try:
                    await self.stop()
                except Exception as error:
                    log.exception("the gateway did not stop in good order")
                    await send({"type": "lifespan.shutdown.failed", "message": str(error)})
                    return
                await send({"type": "lifespan.shutdown.complete"})
                return


def build(settings: Settings) -> Gateway:
    """The application for *settings*; its lifespan opens and closes what it needs."""
    return Gateway(settings)


@asynccontextmanager
async def running_parts(
    settings: Settings,
    metrics: Metrics,
    given: Mapping[str, Upstream],
    *,
    draining: Callable[[], bool],
    now_us: Callable[[], int],
    open_store: OpenStore,
) -> AsyncIterator[Parts]:
    """Everything that a gateway needs, open until the block ends, then closed in reverse."""
    async with AsyncExitStack() as stack:
        database = Database(settings.database_url)
        stack.push_async_callback(database.close)
        journal = SettlementJournal(settings.journal_dir, name=_process_name(), report=log.warning)
        journal.prepare()
        stack.callback(journal.close)
        link = None if settings.redis_url is None else await _linked(settings.redis_url, metrics, stack)
        webhooks = Webhooks(
            database, counters=metrics, allow_private=settings.webhooks_allow_private, now_us=now_us, new_id=new_id
        )
        ledger = await _open_ledger(
            settings,
            metrics,
            link,
            stack,
            journal=journal,
            applied=_to_both(metrics.count_applied, webhooks.applied),
            now_us=now_us,
            open_store=open_store,
        )
        principals = Principals(database, now_us=now_us, looked_up=metrics.cache("principals"))
        welcomes = Welcomes(ledger, now_us=now_us, new_id=new_id)
        customers = Customers(database, welcome=welcomes.give, now_us=now_us)
        tenants = Tenants(database, now_us=now_us)
        budget_book = BudgetBook(database, now_us=now_us)
        budgets = Budgets(budget_book, ledger, now_us=now_us)
        catalog, billables, alerts = Catalog(database), BillableMetrics(database, now_us=now_us), Alerts(database)
        caches = (
            principals.invalidate,
            customers.forget,
            catalog.invalidate,
            budgets.invalidate,
            alerts.invalidate,
        )
        changes = Changes(*caches, url=settings.redis_url, link=link)
        _run(changes, stack)
        rate_limit = ProcessRateLimit() if link is None else await _counting_together(link, stack)

        upstreams = {**configured_upstreams(settings), **given}
        for upstream in upstreams.values():
            stack.push_async_callback(upstream.close)
        router = Router(settings, upstreams, price_book(settings))
        quoter = Quoter(settings, PromptCounter(), catalog)

        packs = Packs(database, ledger, now_us=now_us)
        auto_buy = AutoBuy(database, ledger, packs)
        charging = Charging(ledger, budgets=budgets, alerts=alerts, auto_buy=auto_buy)
        packages = Packages(settings.packages)
        payments = open_payments(
            settings, packages=packages, database=database, ledger=ledger, tenants=tenants, now_us=now_us, new_id=new_id
        )
        if payments is not None:
            _keep_payments(payments, stack, metrics=metrics, now_us=now_us)
        live, shield = LiveHolds(ledger), Shield()
        upkeep = Upkeep(
            ledger=ledger,
            live=live,
            journal=journal,
            heartbeat_s=settings.heartbeat_s,
            now_us=now_us,
            swept=metrics.count_swept,
        )
        _run(upkeep, stack)
        _run(Rollups(database), stack)
        stack.push_async_callback(shield.drain)
        chat = ChatProxy(
            settings=settings,
            principals=principals,
            customers=customers,
            rate_limit=rate_limit,
            router=router,
            quoter=quoter,
            ledger=ledger,
            charging=charging,
            live=live,
            journal=journal,
            shield=shield,
            top_up_url=no_page if payments is None else payments.links.url_of,
            errors=REFUSALS,
            new_counter=lambda model: TextCounter(encoding_for(model)),
            new_id=new_id,
            now_us=now_us,
        )
        readiness = Readiness(
            database=database,
            ledger=ledger,
            journal_dir=settings.journal_dir,
            draining=draining,
            degraded=lambda: _degraded(journal, link),
        )
        stack.push_async_callback(readiness.close)
        rendering = Rendering(database, customer=customer_object(customers))
        services = Services(
            settings=settings,
            database=database,
            ledger=ledger,
            principals=principals,
            changes=changes,
            tenants=tenants,
            customers=customers,
            erasure=Erasure(
                database,
                ledger,
                now_us=now_us,
                announce=changes.announce,
                forget_customer=None if payments is None else payments.forget,
            ),
            rate_limit=rate_limit,
            router=router,
            models=ServedModels(settings, now_us),
            quoter=quoter,
            charging=charging,
            budgets=budgets,
            budget_book=budget_book,
            alerts=alerts,
            refunds=Refunds(ledger, new_id=new_id),
            reservations=Reservations(catalog=catalog, charging=charging, ledger=ledger, new_id=new_id, now_us=now_us),
            packs=packs,
            catalog=catalog,
            entitlements=Entitlements(
                ledger=ledger, catalog=catalog, customers=customers, budgets=budgets, now_us=now_us
            ),
            billables=billables,
            metering=Metering(catalog=catalog, charging=charging, ledger=ledger, new_id=new_id, now_us=now_us),
            proxy=chat,
            metrics=metrics,
            now_us=now_us,
            new_id=new_id,
            readiness=readiness,
            usage_queries=UsageQueries(database),
            webhooks=webhooks,
            event_view=rendering.view,
            packages=packages,
            payments=payments,
        )
        webhooks.start(render=rendering.text, reactions=(Reaction(frozenset({"credit.expired"}), auto_buy.on_event),))
        stack.push_async_callback(webhooks.stop)
        gauges = asyncio.create_task(_set_gauges(metrics, ledger, live, journal, readiness), name="gauges")
        stack.push_async_callback(_cancelled, gauges)
        # The ranks take a third of a second to load; the first request need not wait for them.
        warming = asyncio.create_task(asyncio.to_thread(warm), name="warm")
        stack.push_async_callback(_finished, warming)
        checks = Checks(services)
        yield Parts(
            services=services,
            chat=chat,
            checks=checks,
            framed_checks=Frame(checks, metrics=metrics, new_id=new_id),
            api=create_api(services),
            begin_trace=_open_tracing(settings, stack),
        )


def configured_upstreams(settings: Settings) -> dict[str, Upstream]:
    """The upstreams that the settings name, and the built-in one."""
    upstreams: dict[str, Upstream] = {SIMULATED: SimulatedUpstream()}
    for upstream in settings.upstreams:
        upstreams[upstream.name] = HTTPUpstream(
            name=upstream.name,
            base_url=upstream.base_url,
            api_key=None if upstream.api_key is None else upstream.api_key.get_secret_value(),
            headers={name: secret.get_secret_value() for name, secret in upstream.headers.items()},
            connect_timeout_s=upstream.connect_timeout_s,
            first_byte_timeout_s=upstream.first_byte_timeout_s,
            idle_timeout_s=upstream.idle_timeout_s,
        )
    return upstreams


def _to_both(first: Callable[[Applied], None], second: Callable[[Applied], None]) -> Callable[[Applied], None]:
    def tell(applied: Applied) -> None:
        first(applied)
        second(applied)

    return tell


async def _open_ledger(
    settings: Settings,
    metrics: Metrics,
    link: Link | None,
    stack: AsyncExitStack,
    *,
    journal: SettlementJournal,
    applied: Callable[[Applied], None],
    now_us: Callable[[], int],
    open_store: OpenStore,
) -> Ledger:
    """The ledger in front of its store, with the cache of wallets that its reads go through."""
    shared = None
    if link is not None and not settings.database_url.startswith(SQLITE):
        shared = SharedWallets(link, now_us=now_us, leases=await _leases(link, stack))
    store = await open_store(settings.database_url, clock=now_us, watcher=shared)
    balances = Balances(store, metrics, shared=shared, prompt=store if isinstance(store, SqliteStore) else None)
    ledger = await Ledger.open(
        store,
        clock=now_us,
        new_command_id=lambda: new_id("cmd"),
        abandoned=journal.undo,
        wait_s=settings.ledger_timeout_s,
        applied=applied,
        observed=metrics.count_batch,
        read_wallet=balances.wallet,
        kept_wallet=balances.kept,
    )
    stack.push_async_callback(ledger.close)
    return ledger


class _Running(Protocol):
    def start(self) -> None: ...

    async def stop(self) -> None: ...


def _run(part: _Running, stack: AsyncExitStack) -> None:
    """Start what works by itself, until the stack is closed."""
    part.start()
    stack.push_async_callback(part.stop)


def _keep_payments(payments: Payments, stack: AsyncExitStack, *, metrics: Metrics, now_us: Callable[[], int]) -> None:
    """Do what payments need done from time to time, until the stack is closed."""
    stack.push_async_callback(payments.close)
    payments.sweeps.add(Nightly(payments.reconciler, counters=metrics, now_us=now_us).sweep)
    _run(payments.sweeps, stack)


def _open_tracing(settings: Settings, stack: AsyncExitStack) -> BeginTrace | None:
    if settings.otlp_endpoint is None:
        return None
    # Not imported where nobody collects traces: it takes a quarter of a second, and memory.
    from gateway.tracing import open_tracing  # noqa: PLC0415

    tracing = open_tracing(settings.otlp_endpoint)
    stack.push_async_callback(tracing.close)
    return tracing.begin


async def _linked(redis_url: str, metrics: Metrics, stack: AsyncExitStack) -> Link:
    link = Link(redis_url, metrics)
    await link.start()
    stack.push_async_callback(link.stop)
    return link


async def _leases(link: Link, stack: AsyncExitStack) -> Leases:
    leases = Leases(link, holders_key=holders_key)
    leases.start()
    stack.push_async_callback(leases.stop)
    return leases


async def _counting_together(link: Link, stack: AsyncExitStack) -> RateLimit:
    rate_limit = SharedRateLimit(link)
    rate_limit.start()
    stack.push_async_callback(rate_limit.stop)
    return rate_limit


def _process_name() -> str:
    """A name that no live process shares, also not one in another container on the same disk."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def _degraded(journal: SettlementJournal, link: Link | None) -> dict[str, str]:
    """What works worse than it should, and is served all the same."""
    found = {}
    if journal.waiting:
        found["journal"] = f"{journal.waiting} settlements wait on local disk for the ledger"
    if link is not None and not link.up:
        found["redis"] = masked(link.describe())
    return found


async def _set_gauges(
    metrics: Metrics, ledger: Ledger, live: LiveHolds, journal: SettlementJournal, readiness: Readiness
) -> None:
    while True:
        metrics.ledger_queue.set(ledger.queue_length)
        metrics.journal_waiting.set(journal.waiting)
        metrics.held.set(live.held)
        metrics.database_up.set((await readiness.report()).checks["database"] == OK)
        await asyncio.sleep(GAUGES_S)


async def _finished(task: asyncio.Task[Any]) -> None:
    await asyncio.wait((task,))


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _refuse(refusal: ApiError, send: Send) -> None:
    request_id = new_id("req")
    headers: Iterable[tuple[str, str]] = (
        ("content-type", "application/json"),
        ("x-request-id", request_id),
        ("connection", "close"),
        *refusal.headers,
    )
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": refusal.to_body(request_id)})
