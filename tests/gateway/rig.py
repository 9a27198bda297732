"""A whole gateway in the test's own loop: real sockets, a real database, and an upstream that the test commands."""

import asyncio
import contextlib
import functools
import json
import socket
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from sqlalchemy import text

from gateway.billing.alerts import Alerts
from gateway.billing.auto_buy import AutoBuy
from gateway.billing.budget_book import BudgetBook
from gateway.billing.budgets import Budgets
from gateway.billing.catalog import Catalog
from gateway.billing.charging import Charging
from gateway.billing.metrics import BillableMetrics
from gateway.billing.packs import Packs
from gateway.billing.welcome import Welcomes
from gateway.clock import now_us
from gateway.database import NOBODY, Database
from gateway.identity.customers import Customers
from gateway.identity.principals import Principals
from gateway.identity.tenants import Tenants
from gateway.identity.wallets import app_wallet, customer_wallet, pool_wallet
from gateway.ids import new_id
from gateway.migrations import migrate
from gateway.payments.links import no_page
from gateway.prices import price_book
from gateway.proxy.chat import ChatProxy
from gateway.proxy.exchange import Receive, Scope, Send
from gateway.proxy.hold import LiveHolds
from gateway.proxy.journal import SettlementJournal
from gateway.proxy.quoting import Quoter
from gateway.proxy.rate_limit import ProcessRateLimit
from gateway.proxy.routing import Router
from gateway.proxy.shield import Shield
from gateway.proxy.simulated import SimulatedServer, SimulatedUpstream, serve_simulated
from gateway.proxy.simulated.upstream import SimulatedResponse
from gateway.proxy.sse import SSEDecoder
from gateway.proxy.upkeep import Upkeep
from gateway.proxy.upstream import HTTPUpstream, Upstream, UpstreamRequest
from gateway.refusals import REFUSALS
from gateway.settings import Settings
from ledger.commands import AnyCommand, Grant, Reserve
from ledger.ledger import Ledger, Receipt, WalletView
from ledger.model import Funding, Restriction
from ledger.model import Scope as LedgerScope
from ledger.outcomes import Outcome
from ledger.store.postgres import PostgresStore
from ledger.store.protocol import Store, StoreUnavailable, Transaction, Watcher
from ledger.store.sqlite import SqliteStore
from ledger.verify import verify
from pricing.money import CREDIT
from pricing.tokens import PromptCounter, TextCounter, encoding_for

DATABASE = "database.url"
"""The file that names the database of the gateway that runs in its folder."""

GETS_AROUND_POLICIES = """
SELECT bool_or(rolsuper OR rolbypassrls) OR EXISTS (SELECT FROM pg_class WHERE relrowsecurity AND relowner = role.oid)
FROM pg_roles AS role WHERE rolname = current_user GROUP BY role.oid
"""


class Clock:
    """The real time, until a test moves it."""

    def __init__(self) -> None:
        self.ahead_us = 0

    def now_us(self) -> int:
        return now_us() + self.ahead_us

    def pass_s(self, seconds: float) -> None:
        self.ahead_us += round(seconds * 1_000_000)


Around = Callable[[Sequence[AnyCommand]], Awaitable[None]]


async def nothing(commands: Sequence[AnyCommand]) -> None:
    """What happens around a batch unless a test says otherwise."""


def has(commands: Sequence[AnyCommand], *kinds: type[AnyCommand]) -> bool:
    return any(isinstance(command, kinds) for command in commands)


class FragileStore:
    """A real store, whose database a test can take away, or make slow.

    Attributes:
        away: the commands that find no database.
        before, after: run around each batch; what they raise is the batch's failure.
        seen: the commands that were tried.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.away: Callable[[AnyCommand], bool] = lambda command: False
        self.before: Around = nothing
        self.after: Around = nothing
        self.seen: list[AnyCommand] = []

    async def run_batch(self, commands: Sequence[AnyCommand]) -> list[Outcome]:
        self.seen += commands
        await self.before(commands)
        if any(self.away(command) for command in commands):
            raise StoreUnavailable("the test took the database away")
        outcomes = await self._store.run_batch(commands)
        await self.after(commands)
        return outcomes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def count(self, kind: type[AnyCommand], **fields: Any) -> int:
        """How many commands of a kind were tried, with these values."""
        return sum(
            isinstance(each, kind) and all(getattr(each, name) == value for name, value in fields.items())
            for each in self.seen
        )


class GatedUpstream:
    """The simulated upstream, which sends a piece of its answer only when the test allows one more."""

    name = "gated"

    def __init__(self) -> None:
        self._simulated = SimulatedUpstream()
        self.permits = asyncio.Semaphore(0)
        self.reached = asyncio.Event()
        self.requests: list[UpstreamRequest] = []
        self.closed = 0

    def allow(self, pieces: int = 1_000_000) -> None:
        for _ in range(min(pieces, 10_000)):
            self.permits.release()

    async def send(self, request: UpstreamRequest) -> "GatedResponse":
        self.requests.append(request)
        self.reached.set()
        return GatedResponse(await self._simulated.send(request), self)

    async def close(self) -> None:
        """There is nothing to close."""


class GatedResponse:
    def __init__(self, response: SimulatedResponse, gate: GatedUpstream) -> None:
        self._response = response
        self._gate = gate
        self.status = response.status
        self.headers = response.headers

    async def read(self, bytes_max: int) -> bytes:
        await self._gate.permits.acquire()
        return await self._response.read(bytes_max)

    async def chunks(self) -> AsyncIterator[bytes]:
        chunks = self._response.chunks()
        while True:
            await self._gate.permits.acquire()
            try:
                yield await anext(chunks)
            except StopAsyncIteration:
                return

    async def close(self) -> None:
        self._gate.closed += 1
        await self._response.close()


@dataclass(frozen=True)
class Streamed:
    """A stream as its client got it."""

    status: int
    headers: httpx.Headers
    raw: bytes
    whole: bool
    """The body came to its end, rather than being cut off."""

    @property
    def data(self) -> list[bytes]:
        return [event.data for event in SSEDecoder().feed(self.raw) if event.data is not None]

    @property
    def done(self) -> bool:
        return self.whole and self.data[-1:] == [b"[DONE]"]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        return [json.loads(data) for data in self.data if data != b"[DONE]"]

    @property
    def choices(self) -> list[dict[str, Any]]:
        return [choice for chunk in self.chunks for choice in chunk.get("choices") or ()]

    def text(self, index: int = 0) -> str:
        deltas = (choice["delta"] for choice in self.choices if choice["index"] == index)
        return "".join(delta.get("content") or "" for delta in deltas)

    def arguments(self, index: int = 0) -> str:
        """The name and the arguments of a choice's only tool call."""
        deltas = (choice["delta"] for choice in self.choices if choice["index"] == index)
        calls = (call["function"] for delta in deltas for call in delta.get("tool_calls") or ())
        return "".join((call.get("name") or "") + (call.get("arguments") or "") for call in calls)

    @property
    def finish_reasons(self) -> list[str]:
        return [choice["finish_reason"] for choice in self.choices if choice["finish_reason"] is not None]

    @property
    def usage(self) -> dict[str, Any]:
        """The last usage that the stream tells of."""
        usage: dict[str, Any] = [chunk["usage"] for chunk in self.chunks if chunk.get("usage")][-1]
        return usage

    @property
    def error(self) -> dict[str, Any] | None:
        """The error that the stream ends with."""
        error: dict[str, Any] | None = self.chunks[-1].get("error") if self.chunks else None
        return error


@dataclass
class Rig:
    """A gateway that runs, its parts, and a client for it."""

    base_url: str
    client: httpx.AsyncClient
    ledger: Ledger
    store: FragileStore
    tenants: Tenants
    customers: Customers
    billables: BillableMetrics
    proxy: ChatProxy
    live: LiveHolds
    journal: SettlementJournal
    upkeep: Upkeep
    clock: Clock
    tenant: str
    app: str
    keys: dict[str, str]

    def headers(self, user: str | None = "alice", mode: str = "live", **more: str) -> dict[str, str]:
        given = {"Authorization": f"Bearer {self.keys[mode]}"}
        if user is not None:
            given["X-Quota-User"] = user
        return {**given, **{name.replace("_", "-"): value for name, value in more.items()}}

    async def chat(self, body: Any, *, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.post(path, content=content, headers=self.headers(**options))

    async def stream(self, body: dict[str, Any], **options: Any) -> Streamed:
        """A whole stream; or its error, as the stream's raw bytes."""
        headers = self.headers(**options)
        sent = self.client.stream("POST", "/v1/chat/completions", content=_streaming(body), headers=headers)
        parts: list[bytes] = []
        whole = True
        async with sent as response:
            try:
                async for part in response.aiter_bytes():
                    parts.append(part)
            except httpx.RemoteProtocolError:
                whole = False
        return Streamed(response.status_code, response.headers, b"".join(parts), whole)

    async def leave_after(
        self, body: dict[str, Any], events: int, *, gate: GatedUpstream | None = None, **options: Any
    ) -> Streamed:
        """Begin a stream and close the connection after so many events; not before the request has come to *gate*."""
        content = _streaming(body)
        headers = {**self.headers(**options), "Host": "test", "Content-Length": str(len(content))}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        reader, writer = await asyncio.open_connection("127.0.0.1", int(self.base_url.split(":")[2].split("/")[0]))
        writer.write(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + content)
        got = b""
        while got.count(b"\n\n") < events:
            part = await reader.read(65_536)
            assert part, got
            got += part
        if gate is not None:
            await gate.reached.wait()
        writer.close()
        await writer.wait_closed()
        _, _, chunked = got.partition(b"\r\n\r\n")
        raw = b"".join(part for part in chunked.split(b"\r\n") if part.startswith((b"data:", b":")))
        return Streamed(200, httpx.Headers(), raw, whole=False)

    async def settled(self) -> None:
        """Wait until no request is under way."""
        while len(self.live):  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.001)

    async def receipt(self, response: httpx.Response | Streamed, *, mode: str = "live") -> Receipt:
        return await self.receipt_of(response.headers["X-Request-Id"], mode=mode)

    async def receipt_of(self, request_id: str, *, mode: str = "live") -> Receipt:
        receipt = await self.ledger.receipt(self.tenant, mode, request_id)
        assert receipt is not None
        return receipt

    async def newest_receipt(self) -> Receipt:
        """The receipt of the request that reserved last."""
        reserved = [command for command in self.store.seen if isinstance(command, Reserve)]
        assert reserved[-1].request_id is not None
        return await self.receipt_of(reserved[-1].request_id, mode=reserved[-1].scope.mode)

    async def statement(self, user: str = "alice", *, mode: str = "live") -> list[Transaction]:
        """The wallet's journal, newest first."""
        return list((await self.ledger.transactions((await self.wallet(user, mode=mode)).wallet.ref)).transactions)

    async def grant(self, credits: str, *, user: str = "alice", mode: str = "live", **options: Any) -> None:
        customer = await self.customers.resolve(self.tenant, mode, user)
        await self._grant(customer_wallet(self.tenant, mode, customer), mode, credits, options)

    async def give(self, credits: str, *, user: str = "alice") -> None:
        """Grant from the pool of the rig's app, which is filled with as much."""
        pool = pool_wallet(self.tenant, "live", self.app)
        await self._grant(pool, "live", credits, {})
        restriction = Restriction(apps=(self.app,))
        given: dict[str, Any] = {
            "funding": Funding.DEVELOPER_GRANT,
            "from_wallet": pool,
            "restriction": restriction,
            "priority": 100,
        }
        await self.grant(credits, user=user, **given)

    async def fund_developer(self, credits: str, *, mode: str = "live") -> None:
        await self._grant(app_wallet(self.tenant, mode, self.app), mode, credits, {})

    async def _grant(self, wallet: Any, mode: str, credits: str, options: dict[str, Any]) -> None:
        given = {"funding": Funding.PAID, "operator_paid": True, **options}
        await self.ledger.execute(
            Grant(
                id=new_id("cmd"),
                scope=LedgerScope(self.tenant, mode),
                wallet=wallet,
                asset=CREDIT.code,
                block_id=new_id("blk"),
                amount=CREDIT.parse(credits),
                **given,
            )
        )

    async def wallet(self, user: str | None = "alice", *, mode: str = "live") -> WalletView:
        """A user's wallet, or the developer's."""
        ref = app_wallet(self.tenant, mode, self.app)
        if user is not None:
            ref = customer_wallet(self.tenant, mode, await self.customers.resolve(self.tenant, mode, user))
        view = await self.ledger.wallet_view(ref)
        assert view is not None
        return view

    async def balance(self, user: str | None = "alice", *, mode: str = "live") -> str:
        return CREDIT.format((await self.wallet(user, mode=mode)).balance)


def _streaming(body: dict[str, Any]) -> bytes:
    return json.dumps({**body, "stream": body.get("stream", True)}).encode()


@functools.cache
def empty_database() -> bytes:
    """A migrated file, made once: to migrate one takes longer than most tests."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "farebox.db"
        migrate(f"sqlite:///{path}")
        with contextlib.closing(sqlite3.connect(path)) as connection:
            return connection.serialize()


def name_database(folder: Path, url: str) -> None:
    """The gateway that runs in *folder* has its database there, rather than in a file."""
    (folder / DATABASE).write_text(url)


def installed_database(folder: Path) -> str:
    """The URL of an empty database with all tables."""
    if (folder / DATABASE).exists():
        return (folder / DATABASE).read_text()
    if not (folder / "farebox.db").exists():
        (folder / "farebox.db").write_bytes(empty_database())
    return f"sqlite:///{folder / 'farebox.db'}"


async def open_store(database_url: str, *, clock: Callable[[], int], watcher: Watcher | None = None) -> Store:
    """As the gateway opens its store; but *clock* tells the time on a server too."""
    if database_url.startswith("sqlite:"):
        return await SqliteStore.open(database_url, clock=clock)
    return await PostgresStore.open(database_url, clock=clock, watcher=watcher)


async def held_to_policies(database: Database) -> None:
    """Nothing is tested as a role of PostgreSQL that owns a table or that no policy binds."""
    async with database.read(NOBODY) as connection:
        if connection.dialect.name == "postgresql":
            free = await connection.scalar(text(GETS_AROUND_POLICIES))
            assert free is False, "this role gets around the policies"


@contextlib.asynccontextmanager
async def running(
    folder: Path,
    *,
    settings: Settings | None = None,
    upstreams: dict[str, Upstream] | None = None,
    markup_bps: int = 0,
    **app_options: Any,
) -> AsyncIterator[Rig]:
    """Run a gateway in *folder* until the block ends. Without upstreams, live traffic is simulated too.

    At the end the ledger must verify, nothing may be reserved, and no task may have failed unseen.
    """
    unseen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(context))
    clock = Clock()
    settings = settings or Settings(default_upstream="simulated", rate_limit_per_minute=0, journal_dir=folder / "kept")
    url = installed_database(folder)
    database = Database(url)
    await held_to_policies(database)
    journal = SettlementJournal(settings.journal_dir, name="rig", report=lambda message: None)
    store = FragileStore(await open_store(url, clock=clock.now_us))
    ledger = await Ledger.open(
        store,
        clock=clock.now_us,
        new_command_id=lambda: new_id("cmd"),
        abandoned=journal.undo,
        wait_s=settings.ledger_timeout_s,
    )
    welcomes = Welcomes(ledger, now_us=clock.now_us, new_id=new_id)
    tenants, customers = Tenants(database), Customers(database, welcome=welcomes.give)
    tenant = (await tenants.create_tenant("Acme", first=True)).id
    app = (await tenants.create_app(tenant, "Chat", markup_bps=markup_bps, **app_options)).id
    keys = {mode: (await tenants.create_key(tenant, mode, app_id=app)).token for mode in ("live", "test")}
    live, shield = LiveHolds(ledger), Shield()
    configured: dict[str, Upstream] = {
        upstream.name: HTTPUpstream(
            name=upstream.name,
            base_url=upstream.base_url,
            api_key=None,
            connect_timeout_s=upstream.connect_timeout_s,
            first_byte_timeout_s=upstream.first_byte_timeout_s,
            idle_timeout_s=upstream.idle_timeout_s,
        )
        for upstream in settings.upstreams
    }
    served = {"simulated": SimulatedUpstream(), **configured, **(upstreams or {})}
    proxy = ChatProxy(
        settings=settings,
        principals=Principals(database),
        customers=customers,
        rate_limit=ProcessRateLimit(),
        router=Router(settings, served, price_book(settings)),
        quoter=Quoter(settings, PromptCounter(), Catalog(database)),
        ledger=ledger,
        charging=Charging(
            ledger,
            budgets=Budgets(BudgetBook(database), ledger, now_us=clock.now_us),
            alerts=Alerts(database),
            auto_buy=AutoBuy(database, ledger, Packs(database, ledger)),
        ),
        live=live,
        journal=journal,
        shield=shield,
        top_up_url=no_page,
        errors=REFUSALS,
        new_counter=lambda model: TextCounter(encoding_for(model)),
        new_id=new_id,
        now_us=clock.now_us,
    )
    upkeep = Upkeep(ledger=ledger, live=live, journal=journal, heartbeat_s=settings.heartbeat_s, now_us=clock.now_us)
    upkeep.start()

    async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
        parts = scope["path"].split("/")
        await proxy(scope, receive, send, path_user=parts[3] if parts[2] == "users" else None)

    listener = socket.socket(proto=socket.IPPROTO_TCP)  # Without it asyncio leaves Nagle's algorithm on.
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    config = uvicorn.Config(asgi, lifespan="off", log_level="error", ws="none", date_header=False, server_header=False)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup([listener])  # Not `serve`, which looks only every tenth of a second whether to end.
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, verify=False)
    try:
        yield Rig(
            base_url=f"http://127.0.0.1:{port}/v1",
            client=client,
            ledger=ledger,
            store=store,
            tenants=tenants,
            customers=customers,
            billables=BillableMetrics(database),
            proxy=proxy,
            live=live,
            journal=journal,
            upkeep=upkeep,
            clock=clock,
            tenant=tenant,
            app=app,
            keys=keys,
        )
    finally:
        await client.aclose()
        await server.shutdown([listener])
        await shield.drain()
        await upkeep.stop()
        for upstream in served.values():
            await upstream.close()
        journal.close()
        verified = await verify(store)
        await ledger.close()
        await database.close()
    assert verified.violations == ()
    assert len(live) == 0
    assert unseen == []


@contextlib.asynccontextmanager
async def simulated_server() -> AsyncIterator[SimulatedServer]:
    """The simulated upstream behind a real socket."""
    server = await serve_simulated()
    try:
        yield server
    finally:
        await server.close()
