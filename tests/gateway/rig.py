"""A whole gateway in the test's own loop: real sockets, a real SQLite file, and an upstream that the test commands."""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from sqlmodel import SQLModel

from gateway.clock import now_us
from gateway.database import Database
from gateway.errors import ErrorTable
from gateway.identity.customers import Customers
from gateway.identity.principals import Principals
from gateway.identity.tenants import Tenants
from gateway.identity.wallets import app_wallet, customer_wallet
from gateway.ids import new_id
from gateway.proxy.chat import ChatProxy
from gateway.proxy.exchange import Receive, Scope, Send
from gateway.proxy.hold import LiveHolds
from gateway.proxy.journal import SettlementJournal
from gateway.proxy.quoting import Quoter
from gateway.proxy.rate_limit import ProcessRateLimit
from gateway.proxy.routing import Router
from gateway.proxy.shield import Shield
from gateway.proxy.simulated import SimulatedUpstream
from gateway.proxy.upkeep import Upkeep
from gateway.proxy.upstream import HTTPUpstream, Upstream
from gateway.settings import Settings
from ledger.commands import Grant
from ledger.ledger import Ledger, WalletView
from ledger.model import Funding
from ledger.model import Scope as LedgerScope
from ledger.store.sqlite import SqliteStore
from pricing.catalog import PriceOverride, build_price_book
from pricing.money import CREDIT
from pricing.tokens import PromptCounter, TextCounter, encoding_for


@dataclass
class Rig:
    """A gateway that runs, its parts, and a client for it."""

    base_url: str
    client: httpx.AsyncClient
    ledger: Ledger
    tenants: Tenants
    customers: Customers
    proxy: ChatProxy
    upkeep: Upkeep
    tenant: str
    app: str
    keys: dict[str, str]
    counter: Any = field(default_factory=itertools.count)

    def headers(self, user: str | None = "alice", mode: str = "live", **more: str) -> dict[str, str]:
        given = {"Authorization": f"Bearer {self.keys[mode]}"}
        if user is not None:
            given["X-Quota-User"] = user
        return {**given, **{name.replace("_", "-"): value for name, value in more.items()}}

    async def chat(self, body: dict[str, Any], **options: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json=body, headers=self.headers(**options))

    async def grant(self, credits: str, *, user: str = "alice", mode: str = "live", **options: Any) -> None:
        customer = await self.customers.resolve(self.tenant, mode, user)
        await self._grant(customer_wallet(self.tenant, mode, customer), mode, credits, options)

    async def fund_developer(self, credits: str, *, mode: str = "live") -> None:
        await self._grant(app_wallet(self.tenant, mode, self.app), mode, credits, {})

    async def _grant(self, wallet: Any, mode: str, credits: str, options: dict[str, Any]) -> None:
        given = {"funding": Funding.PAID, **options}
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

    async def wallet(self, user: str = "alice", *, mode: str = "live") -> WalletView:
        customer = await self.customers.resolve(self.tenant, mode, user)
        view = await self.ledger.wallet_view(customer_wallet(self.tenant, mode, customer))
        assert view is not None
        return view

    async def balance(self, user: str = "alice", *, mode: str = "live") -> str:
        return CREDIT.format((await self.wallet(user, mode=mode)).balance)


@contextlib.asynccontextmanager
async def running(
    folder: Path, *, settings: Settings | None = None, upstreams: dict[str, Upstream] | None = None, markup_bps: int = 0
) -> AsyncIterator[Rig]:
    """Run a gateway in *folder* until the block ends. Without upstreams, live traffic is simulated too."""
    settings = settings or Settings(default_upstream="simulated", rate_limit_per_minute=0, journal_dir=folder / "kept")
    url = f"sqlite:///{folder / 'farebox.db'}"
    database = Database(url)
    async with database.write() as connection:
        await connection.run_sync(SQLModel.metadata.create_all)
    store = await SqliteStore.open(url, clock=now_us)
    ledger = await Ledger.open(store, clock=now_us, new_command_id=lambda: new_id("cmd"))
    tenants, customers = Tenants(database), Customers(database)
    tenant = (await tenants.create_tenant("Acme", first=True)).id
    app = (await tenants.create_app(tenant, "Chat", markup_bps=markup_bps)).id
    keys = {mode: (await tenants.create_key(tenant, mode, app_id=app)).token for mode in ("live", "test")}
    live, shield = LiveHolds(ledger), Shield()
    journal = SettlementJournal(settings.journal_dir, name="rig", report=lambda message: None)
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
    overrides = [
        PriceOverride(model=model.name, **model.price.model_dump(exclude_none=True))
        for model in settings.models
        if model.price is not None
    ]
    proxy = ChatProxy(
        settings=settings,
        principals=Principals(database),
        customers=customers,
        rate_limit=ProcessRateLimit(),
        router=Router(settings, served, build_price_book(overrides)),
        quoter=Quoter(settings, PromptCounter()),
        ledger=ledger,
        live=live,
        journal=journal,
        shield=shield,
        errors=ErrorTable({}),
        new_counter=lambda model: TextCounter(encoding_for(model)),
        new_id=new_id,
        now_us=now_us,
    )
    upkeep = Upkeep(ledger=ledger, live=live, journal=journal, heartbeat_s=settings.heartbeat_s, now_us=now_us)
    upkeep.start()

    async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
        parts = scope["path"].split("/")
        await proxy(scope, receive, send, path_user=parts[3] if parts[2] == "users" else None)

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(asgi, lifespan="off", log_level="error", ws="none"))
    serving = asyncio.create_task(server._serve([listener]))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0)
        yield Rig(
            base_url=f"http://127.0.0.1:{port}/v1",
            client=client,
            ledger=ledger,
            tenants=tenants,
            customers=customers,
            proxy=proxy,
            upkeep=upkeep,
            tenant=tenant,
            app=app,
            keys=keys,
        )
    server.should_exit = True
    await serving
    await shield.drain()
    await upkeep.stop()
    for upstream in served.values():
        await upstream.close()
    journal.close()
    await ledger.close()
    await database.close()
