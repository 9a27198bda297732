"""The management API over a real database, asked through ASGI: two tenants, and their keys."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx

from gateway.app import Gateway
from gateway.clock import now_us
from gateway.identity.keys import APP_SCOPES, KeyScope
from gateway.identity.wallets import app_wallet
from gateway.installation import Books, Gift, give
from gateway.settings import Settings
from pricing.money import CREDIT
from tests.gateway.rig import held_to_policies, installed_database, open_store

if TYPE_CHECKING:
    from tests.servers.stripe import FakeStripe

PUBLIC_URL: Final = "https://pay.example.com"


@dataclass
class Clock:
    """The time of day, moved on by a test."""

    ahead_us: int = 0

    def now_us(self) -> int:
        return now_us() + self.ahead_us

    def pass_s(self, seconds: int) -> None:
        self.ahead_us += seconds * 1_000_000


@dataclass
class Office:
    """A gateway, and clients with each kind of key. `other` is the key of another tenant's app."""

    gateway: Gateway
    tenant: str
    app: str
    keys: dict[str, str]
    client: httpx.AsyncClient
    clock: Clock

    async def ask(
        self, method: str, path: str, body: Any = None, *, key: str = "live", once: str | None = None, **options: Any
    ) -> httpx.Response:
        """One request with the key of that name; *once* is its idempotency key. Every answer has a request id."""
        headers = {"Authorization": f"Bearer {self.keys[key]}"} if key in self.keys else {}
        if once is not None:
            headers["Idempotency-Key"] = once
        headers |= options.pop("headers", {})
        if body is not None:
            options["json"] = body
        answer = await self.client.request(method, path, headers=headers, **options)
        assert answer.headers["x-request-id"].startswith("req_")
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert error["request_id"] == answer.headers["x-request-id"]
            assert error.keys() >= {"message", "type", "code", "param"}
        return answer

    async def get(self, path: str, **options: Any) -> Any:
        answer = await self.ask("GET", path, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def post(self, path: str, body: Any = None, **options: Any) -> Any:
        answer = await self.ask("POST", path, body, **options)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()

    async def refused(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, str, str | None]:
        """Status, code and param of a refusal."""
        answer = await self.ask(method, path, body, **options)
        assert answer.status_code >= 400, answer.text
        error = answer.json()["error"]
        return answer.status_code, error["code"], error["param"]

    async def ask_plain(self, path: str) -> httpx.Response:
        """A GET without a key."""
        return await self.client.get(path)

    async def fund_developer(self, credits: str, *, mode: str = "live") -> None:
        services = self.gateway.services
        books = Books(services.database, services.ledger, services.tenants, services.customers)
        wallet = app_wallet(self.tenant, mode, self.app)
        await give(books, wallet, Gift(amount=CREDIT.parse(credits), source="test"))

    async def chat(self, user: str | None = "alice", *, key: str = "live", **fields: Any) -> httpx.Response:
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}], **fields}
        headers = {} if user is None else {"X-Quota-User": user}
        return await self.ask("POST", "/v1/chat/completions", body, key=key, headers=headers)


def paid_with(stripe: "FakeStripe") -> dict[str, Any]:
    """The settings of an installation that takes payments there, and has a public address."""
    return {
        "stripe_secret_key": stripe.secret_key,
        "stripe_webhook_secret": stripe.webhook_secret,
        "stripe_api_base": stripe.url,
        "public_url": PUBLIC_URL,
    }


@contextlib.asynccontextmanager
async def open_office(folder: Path, **settings: Any) -> AsyncIterator[Office]:
    chosen = {
        "database_url": installed_database(folder),
        "journal_dir": folder / "journal",
        "default_upstream": "simulated",
        "rate_limit_per_minute": 0,
        "management_rate_limit_per_minute": 0,
        **settings,
    }
    clock = Clock()
    gateway = Gateway(Settings(**chosen), now_us=clock.now_us, open_store=open_store)
    await gateway.start()
    await held_to_policies(gateway.services.database)
    tenants = gateway.services.tenants
    first = await tenants.create_tenant("Acme", first=True)
    app = await tenants.create_app(first.id, "Chat")
    second = await tenants.create_tenant("Beta")
    their_app = await tenants.create_app(second.id, "Theirs")
    owners = [*APP_SCOPES, KeyScope.ADMIN]
    keys = {
        "live": await tenants.create_key(first.id, "live", app_id=app.id),
        "test": await tenants.create_key(first.id, "test", app_id=app.id),
        "owner": await tenants.create_key(first.id, "live", app_id=app.id, scopes=owners),
        "sandbox-owner": await tenants.create_key(
            first.id, "test", app_id=app.id, scopes=[*APP_SCOPES, KeyScope.ADMIN]
        ),
        "reader": await tenants.create_key(first.id, "live", app_id=app.id, scopes=[KeyScope.CREDITS_READ]),
        "admin": await tenants.create_key(first.id, "admin"),
        "other": await tenants.create_key(second.id, "live", app_id=their_app.id, scopes=list(KeyScope)),
    }
    running = gateway
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=gateway), base_url="http://farebox") as client:
            tokens = {name: key.token for name, key in keys.items()}
            office = Office(gateway=gateway, tenant=first.id, app=app.id, keys=tokens, client=client, clock=clock)
            try:
                yield office
            finally:
                running = office.gateway  # A test may have put another in its place.
    finally:
        await running.stop()
