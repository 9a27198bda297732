"""Webhooks over a real socket: signed, at least once, in order for each customer, whatever the receiver does."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import func, select
from sqlmodel import col
from standardwebhooks import WebhookVerificationError

from gateway.clock import time_text
from gateway.database import of
from gateway.events.event import Reaction, StoredEvent
from gateway.events.lanes import LEASE_S
from gateway.events.post import ANSWER_BYTES_MAX
from gateway.events.schedule import ATTEMPTS_MAX
from gateway.events.target import Resolve
from gateway.events.webhooks import Webhooks
from gateway.identity.wallets import customer_wallet
from gateway.ids import new_id
from gateway.tables import WebhookLane
from ledger.commands import Release, Reserve, ReserveLeg
from ledger.errors import LedgerUnavailable
from ledger.model import ReservationRef, Scope
from ledger.store.tables import LedgerEventRow
from pricing.money import CREDIT
from tests.gateway.office import Office, open_office
from tests.gateway.receiver import Receiver, Reply, accept, comes, receiving

PLAN = {
    "customer_id": "alice",
    "credits": 200_000,
    "metadata": {"source": "plan_1hr", "priority": 10, "companion_id": "luna"},
}


@pytest.fixture
async def office(tmp_path: Path) -> AsyncIterator[Office]:
    async with open_office(tmp_path, webhooks_allow_private=True) as opened:
        yield opened


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


async def subscribe(office: Office, receiver: Receiver, *types: str, **options: Any) -> Any:
    body = {"url": receiver.url, "event_types": types or ("credit.granted",)}
    return await office.post("/v1/webhook-endpoints", body, **options)


async def grant(office: Office, *users: str, **options: Any) -> list[str]:
    """Give each of *users* something, one after the other; the blocks."""
    blocks = []
    for user in users:
        made = await office.post("/v1/topup/grant", {"customer_id": user, "credits": 1000}, **options)
        blocks.append(made["ledger_id"])
    return blocks


def sequences(receiver: Receiver, user: str) -> list[int]:
    """The numbers of a customer's events, as they came."""
    return [each.event["sequence"] for each in receiver.received if each.customer == user]


def later(office: Office, seconds: int) -> None:
    """Let time pass, and the dispatcher know of it."""
    office.clock.pass_s(seconds)
    office.gateway.services.webhooks.wake()


async def delivery(office: Office, endpoint: Any, event_id: str) -> Any:
    page = await office.get(f"/v1/webhook-endpoints/{endpoint['id']}/deliveries")
    return next(each for each in page["data"] if each["event_id"] == event_id)


async def becomes(office: Office, endpoint: Any, event_id: str, state: str) -> Any:
    """Wait until a delivery is in this state."""
    deadline = asyncio.get_running_loop().time() + 20
    while (found := await delivery(office, endpoint, event_id))["state"] != state:
        assert asyncio.get_running_loop().time() < deadline, found
    return found


async def attempted(office: Office, endpoint: Any, event_id: str, times: int) -> Any:
    """Wait until a delivery was attempted so often, and that is written down."""
    deadline = asyncio.get_running_loop().time() + 20
    while (found := await delivery(office, endpoint, event_id))["attempts"] < times:
        assert asyncio.get_running_loop().time() < deadline, found
    return found


async def pending(office: Office) -> int:
    """How many events nobody has worked off yet."""
    async with office.gateway.services.database.read(of(office.tenant, "live", "test")) as connection:
        query = select(func.count()).where(
            col(LedgerEventRow.tenant) == office.tenant, col(LedgerEventRow.delivered_at_us).is_(None)
        )
        found = await connection.scalar(query)
    assert found is not None
    return found


async def worked_off(office: Office) -> None:
    """Wait until the outbox has been through every event."""
    deadline = asyncio.get_running_loop().time() + 20
    while await pending(office):
        assert asyncio.get_running_loop().time() < deadline


# What is sent.


async def test_a_webhook_is_signed_and_has_the_whole_block_and_customer(office: Office, receiver: Receiver):
    endpoint = await subscribe(office, receiver, "credit.expired")
    await office.post("/v1/customers", {"external_id": "alice", "metadata": {"plan": "free"}})
    block = await office.post("/v1/topup/grant", {**PLAN, "expires_at": "2096-01-01T00:00:00Z"})
    office.clock.pass_s(100 * 365 * 86_400)
    await office.gateway.services.ledger.sweep(office.clock.now_us())
    await comes(lambda: receiver.received)
    (sent,) = receiver.received

    with pytest.raises(WebhookVerificationError, match="too new"):
        sent.verified(endpoint["secret"])  # It is a hundred years ahead, by this office's clock.
    event = sent.event
    customer = await office.get("/v1/customers/alice")
    assert event["type"] == "credit.expired"
    assert event["customer"] == customer
    assert event["customer_id"] == event["credit_block"]["customer_id"] == customer["id"]
    assert event["credit_block"]["id"] == block["ledger_id"]
    assert event["credit_block"]["priority"] == 10
    assert event["credit_block"]["metadata"] == PLAN["metadata"]
    assert event["credit_block"]["granted_amount"] == 200_000
    assert event["credit_block"]["remaining_amount"] == 0
    assert event["data"] == {"amount": 200_000, "amount_decimal": "200"}
    assert await office.get(f"/v1/events/{sent.id}") == event
    assert sent.path == "/hooks?of=test"
    assert sent.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert sent.headers["content-type"] == "application/json"


async def test_the_library_of_standard_webhooks_verifies_it(office: Office, receiver: Receiver):
    endpoint = await subscribe(office, receiver)
    await grant(office, "alice")
    await comes(lambda: receiver.received)
    (sent,) = receiver.received
    assert endpoint["secret"].startswith("whsec_")
    assert sent.verified(endpoint["secret"])["id"] == sent.id
    with pytest.raises(WebhookVerificationError):
        sent.verified("whsec_" + "A" * 43 + "=")


async def test_what_a_charge_cost_the_provider_is_told_to_nobody(office: Office, receiver: Receiver):
    await subscribe(office, receiver, "usage.recorded")
    await grant(office, "alice")
    answer = await office.chat()
    await comes(lambda: receiver.received)
    data = receiver.received[0].event["data"]
    assert data.keys() == {"reservation_id", "request_id", "model", "charged", "charged_decimal"}
    assert data["model"] == "gpt-4o-mini"
    assert data["request_id"] == answer.headers["x-request-id"]
    assert data["charged_decimal"] == answer.json()["usage"]["cost"]


async def test_an_endpoint_is_told_of_its_types_and_its_mode_from_when_it_was_made(office: Office, receiver: Receiver):
    await grant(office, "before")
    await worked_off(office)
    await subscribe(office, receiver)
    await grant(office, "sandboxed", key="test")
    await grant(office, "theirs", key="other")
    await grant(office, "alice")
    await office.chat("alice")
    await grant(office, "bob")
    await comes(lambda: len(receiver.received) == 2)
    await worked_off(office)
    assert sorted(str(each.customer) for each in receiver.received) == ["alice", "bob"]


async def test_rotation_signs_with_both_secrets_for_a_while(office: Office, receiver: Receiver):
    first = await subscribe(office, receiver)
    path = f"/v1/webhook-endpoints/{first['id']}/rotate-secret"
    second = await office.post(path, {"expire_current_after_seconds": 60})
    assert second["secret"] != first["secret"]
    await grant(office, "alice")
    await comes(lambda: len(receiver.received) == 1)
    for secret in (first["secret"], second["secret"]):
        receiver.received[0].verified(secret)
    office.clock.pass_s(61)
    await grant(office, "alice")
    await comes(lambda: len(receiver.received) == 2)
    receiver.received[1].verified(second["secret"])
    with pytest.raises(WebhookVerificationError):
        receiver.received[1].verified(first["secret"])


# Receivers that do not do as they should.


async def test_one_that_fails_is_asked_again_with_the_same_id(office: Office, receiver: Receiver):
    receiver.behave = lambda received: Reply(status=500 if len(receiver.received) == 1 else 200)
    endpoint = await subscribe(office, receiver)
    await grant(office, "alice")
    await comes(lambda: receiver.received)
    found = await attempted(office, endpoint, receiver.ids[0], 1)
    assert (found["state"], found["last_status"], found["last_error"]) == ("pending", 500, "answered 500")
    later(office, 7)
    await comes(lambda: len(receiver.received) == 2)
    assert receiver.ids[0] == receiver.ids[1]
    assert (await becomes(office, endpoint, receiver.ids[0], "delivered"))["attempts"] == 2


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(cut=True), "the connection broke off"),
        (Reply(status=302, headers=(("Location", "/elsewhere"),)), "302: redirects are not followed"),
        (Reply(status=404), "answered 404"),
    ],
    ids=["cuts", "redirects", "refuses"],
)
async def test_what_is_not_2xx_is_a_failure_and_no_redirect_is_followed(
    office: Office, receiver: Receiver, reply: Reply, error: str
):
    receiver.behave = lambda received: reply
    endpoint = await subscribe(office, receiver)
    await grant(office, "alice")
    await comes(lambda: receiver.received)
    assert (await attempted(office, endpoint, receiver.ids[0], 1))["last_error"] == error
    receiver.behave = accept
    later(office, 7)
    await comes(lambda: len(receiver.received) == 2)
    assert {each.path for each in receiver.received} == {"/hooks?of=test"}


async def test_one_that_restarts_gets_everything_in_order(office: Office, receiver: Receiver):
    endpoint = await subscribe(office, receiver)
    await grant(office, "alice")
    await comes(lambda: receiver.received)
    await receiver.stop()
    await grant(office, *["alice"] * 5)
    await worked_off(office)
    oldest = (await office.get(f"/v1/webhook-endpoints/{endpoint['id']}/deliveries"))["data"][-2]["event_id"]
    found = await attempted(office, endpoint, oldest, 1)
    assert found["last_error"] == "no connection, or no TLS that can be trusted"
    await receiver.start()
    later(office, 7)
    await comes(lambda: len(receiver.received) == 6)
    assert [each.event["sequence"] for each in receiver.received] == [1, 2, 3, 4, 5, 6]


async def test_one_that_answers_410_is_told_no_more_until_it_is_enabled_again(office: Office, receiver: Receiver):
    receiver.behave = lambda received: Reply(status=410)
    endpoint = await subscribe(office, receiver)
    await grant(office, "alice", "alice")
    await comes(lambda: receiver.received)
    path = f"/v1/webhook-endpoints/{endpoint['id']}"
    await becomes(office, endpoint, receiver.ids[0], "failed")
    shown = await office.get(path)
    assert (shown["status"], shown["disabled_reason"]) == ("disabled", "The receiver answered 410 Gone.")
    waiting = (await office.get(f"{path}/deliveries"))["data"][0]
    later(office, 10)
    assert (await becomes(office, endpoint, waiting["event_id"], "failed"))["last_error"] == "the endpoint is disabled"
    await grant(office, "alice")
    await worked_off(office)
    assert len(receiver.received) == 1

    receiver.behave = accept
    again = await office.ask("PATCH", path, {"status": "enabled"}, headers={"If-Match": f'"{shown["version"]}"'})
    assert (again.json()["status"], again.json()["disabled_reason"]) == ("enabled", None)
    await grant(office, "alice")
    await comes(lambda: len(receiver.received) == 2)
    assert receiver.received[1].event["sequence"] == 4


# Order.


async def test_a_failing_event_holds_up_its_own_customer_for_an_hour_and_nobody_else(
    office: Office, receiver: Receiver
):
    receiver.behave = lambda received: Reply(
        status=500 if (received.customer, received.event["sequence"]) == ("alice", 1) else 200
    )
    endpoint = await subscribe(office, receiver)
    await grant(office, "alice", "alice", "alice", "bob", "bob")
    await comes(lambda: Counter(each.customer for each in receiver.received)["bob"] == 2)
    stuck = next(each.id for each in receiver.received if each.customer == "alice")
    for times, pause_s in ((1, 7), (2, 6 * 60 + 5)):
        await attempted(office, endpoint, stuck, times)
        later(office, pause_s)
    found = await attempted(office, endpoint, stuck, 3)
    assert found["state"] == "pending"
    assert {each.id for each in receiver.received if each.customer == "alice"} == {stuck}
    later(office, 37 * 60)
    assert (await becomes(office, endpoint, stuck, "parked"))["attempts"] == 4
    await comes(lambda: sequences(receiver, "alice")[-2:] == [2, 3])

    receiver.behave = accept
    later(office, 3 * 3600)
    assert (await becomes(office, endpoint, stuck, "delivered"))["attempts"] == 5


async def test_after_ten_attempts_it_has_failed_and_can_be_asked_for_again(office: Office, receiver: Receiver):
    receiver.behave = lambda received: Reply(status=503)
    endpoint = await subscribe(office, receiver)
    await grant(office, "alice")
    await comes(lambda: receiver.received)
    event = receiver.ids[0]
    for times in range(1, ATTEMPTS_MAX):
        await attempted(office, endpoint, event, times)
        later(office, 30 * 3600)
    found = await becomes(office, endpoint, event, "failed")
    assert (found["attempts"], found["next_attempt_at"]) == (ATTEMPTS_MAX, None)

    receiver.behave = accept
    asked = await office.ask("POST", f"/v1/events/{event}/redeliver", {}, once="again")
    assert (asked.status_code, asked.json()) == (202, {"event_id": event, "endpoints": [endpoint["id"]]})
    assert (await becomes(office, endpoint, event, "delivered"))["attempts"] == 1
    await office.ask("POST", f"/v1/events/{event}/redeliver", {}, once="again")
    assert len(receiver.received) == ATTEMPTS_MAX + 1


async def test_an_endpoint_gets_one_event_of_a_customer_at_a_time(office: Office, receiver: Receiver):
    await subscribe(office, receiver)
    await asyncio.gather(*(grant(office, "alice") for _ in range(30)))
    await comes(lambda: len(receiver.received) == 30)
    assert [each.event["sequence"] for each in receiver.received] == list(range(1, 31))
    assert receiver.at_once_max == 1


# Dispatchers of a test's own.


class Beside:
    """Dispatchers as those of other processes on the same database; the office's own stands still."""

    def __init__(self, office: Office) -> None:
        self._office = office
        self.made: list[Webhooks] = []

    async def start(
        self, *, resolve: Resolve | None = None, total_s: float = 15, reactions: tuple[Reaction, ...] = ()
    ) -> Webhooks:
        services = self._office.gateway.services
        await services.webhooks.stop()
        webhooks = Webhooks(
            services.database,
            counters=services.metrics,
            allow_private=resolve is None,
            now_us=self._office.clock.now_us,
            new_id=new_id,
            resolve=resolve,
            total_s=total_s,
        )

        async def text(event: StoredEvent) -> str:
            return msgspec.json.encode(await services.event_view(event)).decode()

        webhooks.start(render=text, reactions=reactions)
        self.made.append(webhooks)
        return webhooks


@pytest.fixture
async def beside(office: Office) -> AsyncIterator[Beside]:
    beside = Beside(office)
    yield beside
    for webhooks in beside.made:
        await webhooks.stop()


async def test_one_that_hangs_is_hung_up_on_and_others_go_on(office: Office, receiver: Receiver, beside: Beside):
    async with receiving(lambda received: Reply(hang=True)) as hanging:
        webhooks = await beside.start(total_s=0.3)
        slow = await subscribe(office, hanging)
        await subscribe(office, receiver)
        await grant(office, *(f"user-{number}" for number in range(20)))
        await comes(lambda: len(receiver.received) == 20)
        await comes(lambda: len(hanging.received) == 20)
        found = await attempted(office, slow, hanging.ids[0], 1)
        assert found["last_error"] == "no answer within 0.3 s"
        hanging.behave = accept
        office.clock.pass_s(7)
        webhooks.wake()
        await comes(lambda: Counter(hanging.ids).total() == 40)
        assert set(hanging.ids) == set(receiver.ids)


async def test_an_answer_without_end_is_read_to_a_bound(office: Office, receiver: Receiver):
    receiver.behave = lambda received: Reply(endless=True)
    endpoint = await subscribe(office, receiver)
    await grant(office, "alice")
    await comes(lambda: receiver.received)
    await becomes(office, endpoint, receiver.ids[0], "delivered")
    await comes(lambda: not receiver.at_once, "end of the connection")
    assert receiver.sent_bytes < ANSWER_BYTES_MAX + 8 * 2**20  # The kernel's buffers on both sides are full then.


async def test_many_dispatchers_at_once_deliver_each_event_once_and_in_order(
    office: Office, receiver: Receiver, beside: Beside
):
    for _ in range(3):
        await beside.start()
    await subscribe(office, receiver)
    users = [f"user-{number}" for number in range(10)]
    await asyncio.gather(*(grant(office, *[user] * 12) for user in users))
    await comes(lambda: len(receiver.received) == 120)
    for user in users:
        assert sequences(receiver, user) == list(range(1, 13))
    assert len(set(receiver.ids)) == 120


async def test_what_a_dispatcher_had_when_it_died_comes_again_when_its_lease_ends(
    office: Office, receiver: Receiver, beside: Beside
):
    receiver.behave = lambda received: Reply(hang=len(receiver.received) == 1)
    first = await beside.start()
    await subscribe(office, receiver)
    await grant(office, "alice", "alice")
    await comes(lambda: receiver.received)
    for loop in asyncio.all_tasks():
        if loop.get_name() == "webhook-visit":
            loop.cancel()
    await first.stop()
    second = await beside.start()
    office.clock.pass_s(LEASE_S + 1)
    second.wake()
    await comes(lambda: len(receiver.received) == 3)
    assert [each.event["sequence"] for each in receiver.received] == [1, 1, 2]


async def test_when_all_is_delivered_no_lane_is_left(office: Office, receiver: Receiver):
    endpoint = await subscribe(office, receiver)
    await grant(office, "alice", "bob")
    await comes(lambda: len(receiver.received) == 2)
    for event in receiver.ids:
        await becomes(office, endpoint, event, "delivered")

    async def lanes() -> int | None:
        async with office.gateway.services.database.read(of(office.tenant, "live")) as connection:
            return await connection.scalar(select(func.count()).select_from(WebhookLane))

    assert await lanes() == 0


async def test_a_name_that_leads_inside_is_not_called_however_it_changes(
    office: Office, receiver: Receiver, beside: Beside
):
    """DNS rebinding: public when it is looked at, private when it is connected to, is not possible: one look-up."""
    answers = iter([["93.184.216.34", "127.0.0.1"], ["::ffff:127.0.0.1"], ["169.254.169.254"]])
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return next(answers)

    webhooks = await beside.start(resolve=resolve)
    url = f"https://rebind.example:{receiver.port}/hooks"
    endpoint = await office.post("/v1/webhook-endpoints", {"url": url, "event_types": ["credit.granted"]})
    await grant(office, "alice")
    await worked_off(office)
    event = (await office.get(f"/v1/webhook-endpoints/{endpoint['id']}/deliveries"))["data"][0]["event_id"]
    for times, pause_s in ((1, 7), (2, 400), (3, 0)):
        found = await attempted(office, endpoint, event, times)
        assert found["last_error"] == "it leads to an address that is not on the public internet"
        office.clock.pass_s(pause_s)
        webhooks.wake()
    assert asked == ["rebind.example"] * 3
    assert receiver.received == []


# Reactions of our own.


async def test_a_reaction_that_fails_comes_again_and_holds_up_its_own_customer_only(
    office: Office, receiver: Receiver, beside: Beside
):
    seen: Counter[tuple[str, int]] = Counter()

    async def react(event: StoredEvent) -> None:
        view = await office.gateway.services.event_view(event)
        seen[view["customer"]["external_id"], event.sequence] += 1
        if view["customer"]["external_id"] == "alice" and seen["alice", 1] < 3:
            raise ValueError("the test wants it to fail")

    await beside.start(reactions=(Reaction(frozenset({"credit.granted"}), react),))
    await subscribe(office, receiver)
    await grant(office, "alice", "bob", "alice")
    await comes(lambda: receiver.received)
    assert receiver.received[0].customer == "bob"
    for times in (1, 2):
        await comes(lambda times=times: seen["alice", 1] >= times, "reaction")
        office.clock.pass_s(5)
    await comes(lambda: len(receiver.received) == 3)
    assert sequences(receiver, "alice") == [1, 2]
    assert seen["alice", 1] >= 3
    assert seen["bob", 1] >= 1


async def test_while_the_ledger_is_away_no_reaction_is_given_up(office: Office, beside: Beside):
    away, done = [True], asyncio.Event()

    async def react(event: StoredEvent) -> None:
        if away[0]:
            raise LedgerUnavailable("the test took it away")
        done.set()

    await beside.start(reactions=(Reaction(frozenset({"credit.granted"}), react),))
    await grant(office, "alice")
    assert await pending(office) == 1
    away[0] = False
    await asyncio.wait_for(done.wait(), 20)
    await worked_off(office)


# Each block expires once.


async def test_a_block_tells_once_that_it_has_expired_also_where_a_part_of_it_was_held(
    office: Office, receiver: Receiver
):
    """What was held when the block expired lapses later, without a second event."""
    await subscribe(office, receiver, "credit.expired")
    soon = time_text(office.clock.now_us() + 3600 * 1_000_000)
    made = await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 1000, "expires_at": soon})
    ledger, scope = office.gateway.services.ledger, Scope(office.tenant, "live")
    held = ReservationRef(office.tenant, "live", new_id("rsv"))
    wallet = customer_wallet(office.tenant, "live", made["customer_id"])
    four = CREDIT.parse("0.4")
    leg = ReserveLeg(wallets=(wallet,), amount=four, minimum=four)
    await ledger.execute(
        Reserve(
            id=new_id("cmd"), scope=scope, reservation=held, asset=CREDIT.code, legs=(leg,), ttl_us=7200 * 1_000_000
        )
    )
    office.clock.pass_s(3601)
    await ledger.sweep(office.clock.now_us())
    await comes(lambda: receiver.received)
    assert receiver.received[0].event["data"]["amount"] == 600
    assert receiver.received[0].event["credit_block"]["reserved_amount"] == 400
    await ledger.execute(Release(id=new_id("cmd"), scope=scope, reservation=held))
    await ledger.sweep(office.clock.now_us())
    assert (await office.get("/v1/customers/alice/credits"))["balance"] == 0
    assert len((await office.get("/v1/events?type=credit.expired"))["data"]) == 1


async def test_received_is_what_the_list_has(office: Office, receiver: Receiver):
    await subscribe(office, receiver, "*")
    await grant(office, "alice", "bob")
    await office.chat("alice")
    await comes(lambda: len(receiver.received) == 3)
    listed = (await office.get("/v1/events"))["data"]
    assert [event["id"] for event in listed] == sorted(receiver.ids, reverse=True)
    assert {event["id"]: event for event in listed} == {each.id: each.event for each in receiver.received}
