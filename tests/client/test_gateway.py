"""Every method does at a gateway what it says."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import count

import httpx
import pytest

import farebox
from farebox import AsyncClient, Client, Retries, Tier, UsageEvent
from tests.e2e.farebox import Farebox

NUMBERS = count(1)


@pytest.fixture
def user(client: Client) -> str:
    """A customer with ten credits, whom no other test has."""
    name = f"user_{next(NUMBERS)}"
    client.grant(name, credits=10)
    return name


class Lossy(httpx.HTTPTransport):
    """Loses the first answer to every request: it was carried out, and nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.lost: set[str] = set()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = super().handle_request(request)
        key = request.headers.get("Idempotency-Key", "")
        if key in self.lost or not key:
            return answer
        self.lost.add(key)
        answer.close()
        raise httpx.ReadError("lost")


@pytest.fixture
def lossy(installation: Farebox, base_url: str) -> Iterator[Client]:
    with Client(base_url, installation.live_key, transport=Lossy(), retries=Retries(first_s=0)) as client:
        yield client


@pytest.mark.parametrize("name", ["cäsar/§ 1", "a/credits", "50%2F50", "x?y#z", "a/entitlements/b", "+49 1"])
def test_a_customer_may_have_any_name(client: Client, metric: str, name: str):
    client.grant(name, credits=1)
    assert client.get_customer(name).external_id == name
    assert client.credits(name).balance == 1
    assert client.check_entitlement(name, metric).balance == 1
    assert client.record_usage(name, metric).balance == Decimal("0.5")
    assert len(list(client.transactions(name))) == 2
    client.delete_customer(name)
    with pytest.raises(farebox.NotFound):
        client.get_customer(name)


def test_customers(client: Client):
    made = client.create_customer("cäsar/§ 1", metadata={"plan": "free"})
    assert client.get_customer("cäsar/§ 1") == made == client.get_customer(made.id)
    changed = client.update_customer(
        made.id, metadata={"plan": "pro"}, settings={"auto_buy_enabled": True}, version=made.version
    )
    assert (changed.metadata, changed.settings.auto_buy_enabled) == ({"plan": "pro"}, True)
    with pytest.raises(farebox.VersionMismatch) as stale:
        client.update_customer(made.id, metadata={}, version=made.version)
    assert stale.value.version == changed.version
    assert list(client.customers(external_id="cäsar/§ 1")) == [changed]
    client.delete_customer(made.id)
    with pytest.raises(farebox.NotFound):
        client.get_customer(made.id)


def test_a_list_is_read_to_its_end(client: Client):
    names = {f"listed_{number}" for number in range(5)}
    for name in names:
        client.create_customer(name)
    found = [customer.external_id for customer in client.customers(page_size=2)]
    assert names <= set(found)
    assert len(found) == len(set(found))


def test_grants_and_credits(client: Client):
    expires_at = datetime.now(UTC) + timedelta(days=30)
    granted = client.grant(
        "grantee",
        credits="2.5",
        expires_at=expires_at,
        priority=10,
        source="plan",
        metrics=["image"],
        metadata={"a": 1},
    )
    assert (granted.amount_granted, granted.balance_before, granted.balance) == (Decimal("2.5"), 0, Decimal("2.5"))
    client.grant("grantee", millicredits=500)
    held = client.credits("grantee")
    assert (held.balance, held.balance.millicredits, held.reserved) == (3, 3000, 0)
    assert held.blocks is not None
    plan, rest = held.blocks
    assert (plan.id, plan.expires_at, plan.restrictions.metrics) == (granted.block.id, expires_at, ("image",))
    assert (plan.metadata, rest.remaining_amount, rest.consumed_amount) == ({"a": 1}, Decimal("0.5"), 0)
    assert client.credits("grantee", metric="sms").effective_balance == Decimal("0.5")
    revoked = client.revoke("grantee", plan.id, credits=1, reason="too much")
    assert (revoked.revoked_amount, revoked.balance) == (1, 2)
    assert [(line.type, line.amount) for line in client.transactions("grantee", page_size=1)] == [
        ("revocation", -1),
        ("grant", Decimal("0.5")),
        ("grant", Decimal("2.5")),
    ]


def test_entitlements(client: Client, user: str, metric: str):
    allowed = client.check_entitlement(user, metric, 20)
    assert allowed
    assert (allowed.cost_per_unit, allowed.cost_total, allowed.affordable_units) == (Decimal("0.5"), 10, 20)
    assert not client.check_entitlement(user, metric, "20.5")


def test_usage(client: Client, user: str, metric: str):
    used = client.record_usage(user, metric, "1.5", metadata={"conversation": "c1"}, idempotency_key=f"{user}:1")
    assert (used.units, used.credits_used, used.balance) == (Decimal("1.5"), Decimal("0.75"), Decimal("9.25"))
    assert (
        client.record_usage(user, metric, "1.5", metadata={"conversation": "c1"}, idempotency_key=f"{user}:1") == used
    )
    with pytest.raises(farebox.IdempotencyKeyReused):
        client.record_usage(user, metric, 2, idempotency_key=f"{user}:1")
    with pytest.raises(farebox.InsufficientCredits) as refused:
        client.record_usage(user, metric, 100)
    assert (refused.value.needed, refused.value.available) == (50, Decimal("9.25"))
    (total,) = client.usage(["metric", "metadata.conversation"], customer=user, start=datetime.now(UTC).date())
    assert total.group == {"metric": metric, "metadata.conversation": "c1"}
    assert (total.events, total.units, total.credits_used) == (1, Decimal("1.5"), Decimal("0.75"))
    refund = client.refund(used.id, credits="0.5", reason="broken")
    assert (refund.amount, refund.refunded, refund.balance) == (Decimal("0.5"), Decimal("0.5"), Decimal("9.75"))
    assert client.refund(used.id, millicredits=250).refunded == Decimal("0.75")


def test_a_batch_tells_of_each_event(client: Client, user: str, metric: str):
    batch = client.record_usage_batch(
        [UsageEvent(user, metric, 2), UsageEvent(user, metric, 1000), UsageEvent(user, "nothing")]
    )
    first, second, third = batch.data
    assert isinstance(first, farebox.Usage)
    assert first.credits_used == 1
    assert isinstance(second, farebox.InsufficientCredits)
    assert second.needed == 500
    assert isinstance(third, farebox.NotFound)
    assert batch.refused == (second, third)


def test_whatever_is_lost_on_the_way_is_done_once(lossy: Client, client: Client, metric: str):
    lossy.grant("unlucky", credits=10)
    lossy.record_usage("unlucky", metric, 2)
    lossy.record_usage_batch([UsageEvent("unlucky", metric, 2), UsageEvent("unlucky", metric, 2)])
    with lossy.reserve("unlucky", metric, 4) as task:
        task.commit(1, final=False)
        task.extend(units=1)
        settled = task.commit(1)
    lossy.refund(settled.request_id or "", credits="0.5")
    assert client.credits("unlucky").balance == Decimal("6.5")
    assert len(list(client.transactions("unlucky"))) == 7


def test_a_reservation_is_committed_in_parts(client: Client, user: str, metric: str):
    with client.reserve(user, metric, 10, ttl_seconds=60, metadata={"job": 1}) as task:
        assert (task.state.status, task.state.reserved_amount, task.state.estimated_units) == ("active", 5, 10)
        assert client.credits(user).effective_balance == 5
        assert task.commit(2, final=False).reserved_amount == 4
        assert task.extend(ttl_seconds=600, credits=1).reserved_amount == 5
        assert task.commit(credits="1.5").charged_amount == Decimal("2.5")
    now = client.get_reservation(task.id)
    assert (now.status, now.charged_amount, now.metadata) == ("committed", Decimal("2.5"), {"job": 1})
    assert client.credits(user).balance == Decimal("7.5")
    with pytest.raises(farebox.ReservationSettled) as settled:
        client.commit(task.id, 1)
    assert settled.value.state == "committed"


def test_a_task_without_a_commit_costs_nothing(client: Client, user: str, metric: str):
    with client.reserve(user, credits=4) as task:
        pass
    assert client.get_reservation(task.id).status == "released"
    assert client.credits(user).effective_balance == 10


def test_a_task_that_fails_is_charged_for_what_was_committed(client: Client, user: str, metric: str):
    task = client.reserve(user, millicredits=4000)
    task.commit(credits=1, final=False)
    with pytest.raises(ZeroDivisionError), task:
        1 / 0  # noqa: B018
    assert client.get_reservation(task.id).status != "active"
    assert (client.credits(user).balance, client.credits(user).reserved) == (9, 0)


def test_a_reservation_without_with(client: Client, user: str):
    task = client.reserve(user, credits=4)
    assert client.extend(task.id, credits=1).reserved_amount == 5
    assert client.release(task.id).status == "released"
    assert task.release().charged_amount == 0


def test_packs(client: Client, user: str):
    pack = client.create_pack(
        "hour", name="An hour", price=2, credits="20.5", duration_seconds=3600, metrics=["image"], metadata={"a": 1}
    )
    assert (pack.price, pack.credits, pack.restrictions.metrics) == (2, Decimal("20.5"), ("image",))
    assert [each.key for each in client.packs()] == ["hour"]
    bought = client.buy_pack(user, "hour", price=3, metadata={"companion": 1})
    assert (bought.price, bought.credits, bought.balance) == (3, Decimal("20.5"), Decimal("27.5"))
    assert bought.expires_at is not None
    assert bought.expires_at - bought.created_at == timedelta(hours=1)


def test_metrics_and_prices(client: Client):
    made = client.create_metric("sms", name="SMS", overage_policy="notify", priority_max=5)
    assert (made.overage_policy, made.priority_max) == ("notify", 5)
    with pytest.raises(farebox.AlreadyExists):
        client.create_metric("sms")
    later = datetime.now(UTC) + timedelta(days=1)
    fine = client.create_rule("sms", credits="0.000000000001")
    package = client.create_rule("sms", cost_type="package", credits=2, package_size=1000, effective_from=later)
    tiers = [Tier(up_to=100, unit_cost="0.5"), Tier(unit_cost="0.25", flat_cost=1)]
    graduated = client.create_rule("sms", cost_type="graduated", tiers=tiers)
    assert fine.credit_cost == Decimal("0.000000000001")
    assert (package.package_cost, package.package_size, package.effective_from) == (2, 1000, later)
    assert graduated.tiers is not None
    assert [(tier.up_to, tier.unit_cost, tier.flat_cost) for tier in graduated.tiers] == [
        (100, Decimal("0.5"), 0),
        (None, Decimal("0.25"), 1),
    ]
    assert list(client.rules(metric="sms", page_size=2)) == [graduated, package, fine]
    assert client.archive_rule(graduated.id).archived
    assert client.archive_metric("sms").archived
    assert "sms" in [metric.key for metric in client.metrics()]


def test_budgets(client: Client, user: str, metric: str):
    budget = client.create_budget(
        "customer",
        user,
        credits=1,
        every="month",
        anchor_day=31,
        time_zone="Europe/Berlin",
        thresholds=[80],
        name="cap",
    )
    assert (budget.remaining, budget.thresholds, budget.period.anchor_day) == (1, (80,), 31)
    client.record_usage(user, metric, 2)
    with pytest.raises(farebox.BudgetExceeded) as refused:
        client.record_usage(user, metric, 1)
    assert (refused.value.budget, refused.value.needed, refused.value.available) == (budget.id, Decimal("0.5"), 0)
    assert refused.value.resets_at == budget.period.ends_at
    assert next(each.spent for each in client.budgets() if each.id == budget.id) == 1
    assert client.archive_budget(budget.id).archived


def test_webhook_endpoints_and_events(client: Client, user: str):
    made = client.create_webhook_endpoint("https://example.com/farebox", event_types=["credit.granted"])
    assert made.secret is not None
    assert made.secret.startswith("whsec_")
    (listed,) = client.webhook_endpoints()
    assert (listed.id, listed.event_types, listed.secret) == (made.id, ("credit.granted",), None)
    client.delete_webhook_endpoint(made.id)
    assert list(client.webhook_endpoints()) == []
    (event,) = client.events(type="credit.granted", customer=user)
    assert event.customer is not None
    assert event.credit_block is not None
    assert (event.customer.external_id, event.credit_block.granted_amount) == (user, 10)
    assert client.get_event(event.id) == event
    assert client.redeliver_event(event.id) == ()


def test_a_wrong_key(base_url: str):
    with Client(base_url, "fb_live_wrong") as client, pytest.raises(farebox.InvalidAPIKey) as refused:
        client.credits("alice")
    assert refused.value.status == 401
    assert (refused.value.request_id or "").startswith("req_")


async def test_the_same_awaited(installation: Farebox, base_url: str, metric: str):
    async with AsyncClient(base_url, installation.live_key) as client:
        await client.create_customer("async")
        await client.grant("async", credits=10)
        assert await client.check_entitlement("async", metric, 4)
        async with client.reserve("async", metric, 4) as task:
            settled = await task.commit(3)
        assert settled.charged_amount == Decimal("1.5")
        held = await client.reserve("async", credits=2)
        assert (await client.credits("async")).reserved == 2
        with pytest.raises(ZeroDivisionError):
            async with held:
                1 / 0  # noqa: B018
        async with client.reserve("async", credits=2):
            pass
        assert (await client.credits("async")).effective_balance == Decimal("8.5")
        lines = [line.type async for line in client.transactions("async", page_size=1)]
        assert lines == ["charge", "grant"]
