"""What a tenant gives to every new customer: once, before they are served, whoever dies in between."""

import asyncio
from typing import Any, Final

import pytest

from gateway.app import Gateway
from gateway.identity.customers import LEASE_S, Customers
from gateway.identity.default_grant import Welcome
from ledger.errors import LedgerUnavailable
from tests.gateway.office import Office
from tests.gateway.rig import open_store

CONFIG: Final = "/v1/tenants/me/config"
GIFT: Final = {"credits": 50_000, "priority": 3, "source": "free", "metadata": {"plan": "free"}}


async def give(office: Office, **terms: Any) -> dict[str, Any]:
    """Set the default grant."""
    answer = await office.ask("PATCH", CONFIG, {"default_grant": {**GIFT, **terms}}, key="owner")
    assert answer.status_code == 200, answer.text
    config: dict[str, Any] = answer.json()
    return config


async def blocks_of(office: Office, customer: str, *, key: str = "live") -> list[dict[str, Any]]:
    credits = await office.get(f"/v1/customers/{customer}/credits?include_blocks=true", key=key)
    found: list[dict[str, Any]] = credits["blocks"]
    return found


# What a tenant has chosen.


async def test_a_tenant_sees_and_changes_what_it_has_chosen(office: Office):
    answer = await office.ask("GET", CONFIG, key="owner")
    nothing = {
        "tenant_id": office.tenant,
        "default_grant": None,
        "when_ledger_is_down": "closed",
        "open_allowance": 0,
        "open_allowance_decimal": "0",
        "low_balance_thresholds": [],
        "version": 1,
    }
    assert (answer.json(), answer.headers["etag"]) == (nothing, '"1"')
    changed = await give(office, expires_after_seconds=3600, models=["gpt-4o-mini"])
    assert changed["default_grant"] == {
        **GIFT,
        "credits_decimal": "50",
        "expires_after_seconds": 3600,
        "apps": [],
        "metrics": [],
        "models": ["gpt-4o-mini"],
    }
    opened = {"when_ledger_is_down": "open", "open_allowance": 1500}
    both = (await office.ask("PATCH", f"/v1/tenants/{office.tenant}/config", opened, key="admin")).json()
    assert both == {**changed, **opened, "open_allowance_decimal": "1.5", "version": 3}
    assert (await office.ask("PATCH", CONFIG, {}, key="owner")).json() == both, "to change nothing is no version"
    ended = (await office.ask("PATCH", CONFIG, {"default_grant": None}, key="owner")).json()
    assert ended == {**both, "default_grant": None, "version": 4}
    assert await office.get(CONFIG, key="owner") == ended


async def test_a_change_of_an_older_version_is_refused(office: Office):
    await give(office)
    late = await office.refused("PATCH", CONFIG, {"default_grant": None}, key="owner", headers={"If-Match": '"1"'})
    assert late[:2] == (412, "version_mismatch")
    assert (await office.get(CONFIG, key="owner"))["default_grant"] is not None


async def test_it_is_the_tenants_own_and_for_who_administers_it(office: Office):
    for key in ("live", "reader"):
        assert (await office.refused("GET", CONFIG, key=key))[0] == 403
        assert (await office.refused("PATCH", CONFIG, {}, key=key))[0] == 403
    assert (await office.refused("PATCH", CONFIG, {}, key="sandbox-owner"))[0] == 403
    for tenant in ("ten_nobody", "you"):
        assert (await office.refused("GET", f"/v1/tenants/{tenant}/config", key="owner"))[0] == 404
    for key in ("other", "owner"):
        theirs = (await office.get(CONFIG, key="owner" if key == "other" else "other"))["tenant_id"]
        for method, body in (("GET", None), ("PATCH", {"default_grant": GIFT})):
            assert (await office.refused(method, f"/v1/tenants/{theirs}/config", body, key=key))[0] == 404


@pytest.mark.parametrize(
    ("terms", "param"),
    [
        ({"credits": 0}, "default_grant.credits"),
        ({"credits": 1.5}, "default_grant.credits"),
        ({"credits": 2**63}, "default_grant.credits"),
        ({"credits": 1, "expires_after_seconds": 0}, "default_grant.expires_after_seconds"),
        ({"credits": 1, "expires_after_seconds": 10**12}, "default_grant.expires_after_seconds"),
        ({"credits": 1, "priority": 10**7}, "default_grant.priority"),
        ({"credits": 1, "metadata": {"a": "x" * 20_000}}, "default_grant.metadata"),
        ({"credits": 1, "expires_at": "2036-01-01T00:00:00Z"}, "default_grant.expires_at"),
        ({}, "default_grant.credits"),
    ],
)
async def test_terms_that_cannot_be_are_refused(office: Office, terms: dict[str, Any], param: str):
    refused = await office.refused("PATCH", CONFIG, {"default_grant": terms}, key="owner")
    assert refused == (400, "invalid_request", param)
    assert (await office.get(CONFIG, key="owner"))["version"] == 1


# Who gets it.


async def test_however_a_customer_comes_they_have_it_before_they_are_served(office: Office):
    await give(office, expires_after_seconds=86_400, apps=[office.app])
    await office.post("/v1/customers", {"external_id": "created"})
    await office.post("/v1/topup/grant", {"customer_id": "granted", "credits": 1})
    assert (await office.chat("chatting")).status_code == 200
    await office.ask(
        "POST",
        "/v1/users/in-the-path/chat/completions",
        {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}]},
    )
    for customer in ("created", "granted", "chatting", "in-the-path"):
        (gift,) = (block for block in await blocks_of(office, customer) if block["source"] == "free")
        assert (gift["granted_amount"], gift["priority"], gift["funding"]) == (50_000, 3, "external"), customer
        assert (gift["metadata"], gift["restrictions"]["apps"]) == ({"plan": "free"}, [office.app])
        assert gift["expires_at"] is not None
    office.clock.pass_s(86_400)
    assert await blocks_of(office, "created") == []


async def test_it_is_given_in_each_mode(office: Office):
    await give(office)
    for key in ("live", "test"):
        await office.post("/v1/customers", {"external_id": "alice"}, key=key)
        assert [block["granted_amount"] for block in await blocks_of(office, "alice", key=key)] == [50_000]


async def test_who_was_there_before_gets_nothing_and_who_came_in_time_keeps_the_terms(office: Office):
    await office.post("/v1/customers", {"external_id": "before"})
    await give(office)
    await office.post("/v1/customers", {"external_id": "during"})
    await office.ask("PATCH", CONFIG, {"default_grant": None}, key="owner")
    await office.post("/v1/customers", {"external_id": "after"})
    for _ in range(2):
        for customer in ("before", "during", "after"):
            await office.chat(customer)
            await office.post("/v1/customers", {"external_id": customer})
    assert [len(await blocks_of(office, each)) for each in ("before", "during", "after")] == [0, 1, 0]


async def test_of_fifty_first_requests_at_once_over_two_gateways_one_grant_comes(office: Office):
    await give(office)
    second = Gateway(office.gateway.services.settings, now_us=office.clock.now_us, open_store=open_store)
    await second.start()
    try:
        resolvers = [office.gateway.services.customers, second.services.customers]
        found = await asyncio.gather(
            *(resolvers[n % 2].resolve(office.tenant, "live", "alice") for n in range(40)),
            *(office.post("/v1/customers", {"external_id": "alice"}) for _ in range(10)),
        )
    finally:
        await second.stop()
    assert len({each if isinstance(each, str) else each["id"] for each in found}) == 1
    assert [block["granted_amount"] for block in await blocks_of(office, "alice")] == [50_000]
    assert (await office.get("/v1/customers/alice/credits"))["balance"] == 50_000


async def test_the_same_key_fifty_times_at_once_is_one_customer_and_one_grant(office: Office):
    await give(office)
    answers = await asyncio.gather(
        *(office.ask("POST", "/v1/customers", {"external_id": "alice"}, once="k") for _ in range(50))
    )
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.text for answer in answers}) == 1
    assert sum("x-idempotent-replayed" in answer.headers for answer in answers) == 49
    assert len(await blocks_of(office, "alice")) == 1


# What goes wrong.


async def test_while_the_ledger_is_away_a_new_customer_is_refused_and_has_it_afterwards(
    office: Office, monkeypatch: pytest.MonkeyPatch
):
    await office.post("/v1/topup/grant", {"customer_id": "known", "credits": 1000})
    await give(office)
    ledger = office.gateway.services.ledger

    async def away(command: Any) -> Any:
        raise LedgerUnavailable("the test took it away")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "execute", away)
        created = await office.ask("POST", "/v1/customers", {"external_id": "alice"}, once="k")
        assert (created.status_code, created.json()["error"]["code"]) == (503, "ledger_unavailable")
        assert (await office.chat("bob")).status_code == 503
        assert (await office.ask("POST", "/v1/customers", {"external_id": "known"})).status_code == 200
    assert await blocks_of(office, "alice") == []
    replayed = await office.ask("POST", "/v1/customers", {"external_id": "alice"}, once="k")
    assert (replayed.status_code, replayed.headers["x-idempotent-replayed"]) == (201, "true")
    assert (await office.chat("bob")).status_code == 200
    for customer in ("alice", "bob"):
        assert [block["granted_amount"] for block in await blocks_of(office, customer)] == [50_000]


@pytest.mark.parametrize("again", ["by name", "by our id", "another process"])
async def test_who_dies_between_the_grant_and_the_mark_leaves_one_grant(
    office: Office, monkeypatch: pytest.MonkeyPatch, again: str
):
    """It was granted, and the row still says that it is due: the next request of theirs sets that right."""
    await give(office)
    customers = office.gateway.services.customers
    given = customers._welcome
    assert given is not None

    async def dies(tenant: str, mode: str, customer: str, welcome: Welcome) -> None:
        await given(tenant, mode, customer, welcome)
        raise LedgerUnavailable("the process is gone")

    with monkeypatch.context() as patch:
        patch.setattr(customers, "_welcome", dies)
        assert (await office.chat("alice")).status_code == 503
    (gift,) = await blocks_of(office, "alice")
    office.clock.pass_s(60)
    if again == "by name":
        assert (await office.chat("alice")).status_code == 200
    elif again == "by our id":
        await office.post("/v1/topup/grant", {"customer_id": gift["customer_id"], "credits": 1})
    else:
        other = Customers(office.gateway.services.database, welcome=given)
        assert await other.named(office.tenant, "live", gift["customer_id"]) == gift["customer_id"]
    assert [block["id"] for block in await blocks_of(office, "alice") if block["source"] == "free"] == [gift["id"]]
    monkeypatch.setattr(customers, "_welcome", dies)
    assert await customers.named(office.tenant, "live", gift["customer_id"]) == gift["customer_id"], "it is marked"


async def test_a_known_customers_request_asks_nobody(office: Office, monkeypatch: pytest.MonkeyPatch):
    await give(office)
    services = office.gateway.services
    customer_id = await services.customers.resolve(office.tenant, "live", "alice")

    def asked(*given: Any) -> Any:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(services.ledger, "execute", asked)
    monkeypatch.setattr(services.database, "read", asked)
    monkeypatch.setattr(services.database, "write", asked)
    assert await services.customers.resolve(office.tenant, "live", "alice") == customer_id


# Names that come to mean somebody else.


async def test_a_name_is_looked_at_again_once_its_lease_has_run_out(office: Office):
    """Another process has renamed the customer, and nobody told this one."""
    services, now_s = office.gateway.services, [0.0]
    customers = Customers(services.database, monotonic_s=lambda: now_s[0])
    before = await customers.resolve(office.tenant, "live", "alice")
    await office.ask("PATCH", "/v1/customers/alice", {"external_id": "bob"})
    now_s[0] = LEASE_S - 1
    assert await customers.resolve(office.tenant, "live", "alice") == before
    now_s[0] = LEASE_S
    assert await customers.resolve(office.tenant, "live", "alice") == before, "who asks does not wait"
    await asyncio.gather(*customers._under_way.values())
    assert await customers.resolve(office.tenant, "live", "alice") != before


async def test_while_the_database_is_away_a_known_name_serves_on(office: Office, monkeypatch: pytest.MonkeyPatch):
    services, now_s = office.gateway.services, [0.0]
    customers = Customers(services.database, monotonic_s=lambda: now_s[0])
    known = await customers.resolve(office.tenant, "live", "alice")
    now_s[0], looks = LEASE_S, []

    async def away(name: Any) -> Any:
        looks.append(name)
        raise ConnectionError("the database is away")

    monkeypatch.setattr(customers, "_found_or_created", away)
    for _ in range(5):
        assert await customers.resolve(office.tenant, "live", "alice") == known
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert len(looks) == 1, "it is not asked with every request"
