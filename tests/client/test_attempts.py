"""A call is sent again when that may help, with the key that it had; and what is final is not."""

import asyncio
import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx
import pytest
import respx

import farebox
from farebox import AsyncClient, Client, Retries
from farebox.call import Again, Answer, Exchange
from farebox.calls import get_customer

URL = "https://farebox.example/v1"
AT_ONCE = Retries(first_s=0)
USAGE = {
    "id": "req_1",
    "customer_id": "cus_1",
    "billable_metric_key": "image",
    "units": 1,
    "credits_used": 500,
    "credits_used_decimal": "0.5",
    "balance": 9500,
    "balance_decimal": "9.5",
    "status": "accepted",
}


@pytest.fixture
def api() -> Iterator[respx.MockRouter]:
    with respx.mock(base_url=URL, assert_all_called=False) as router:
        yield router


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(URL, "fb_test_x", retries=AT_ONCE) as client:
        yield client


def refusal(status: int, code: str, **facts: Any) -> httpx.Response:
    error = {"message": "No.", "type": "…", "code": code, "param": None, "request_id": "req_9", **facts}
    return httpx.Response(status, json={"error": error})


def keys(route: respx.Route) -> list[str]:
    return [call.request.headers["Idempotency-Key"] for call in route.calls]


@pytest.mark.parametrize(
    "first",
    [
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("nothing came"),
        httpx.RemoteProtocolError("broken off"),
        httpx.Response(429, headers={"Retry-After": "0"}),
        refusal(429, "rate_limit_exceeded"),
        httpx.Response(502, text="<html>Bad gateway"),
        refusal(503, "ledger_unavailable"),
        httpx.Response(504),
        refusal(409, "request_in_progress"),
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again_with_the_same_key(api: respx.MockRouter, client: Client, first: Any):
    route = api.post("/usage")
    route.side_effect = [first, first, httpx.Response(202, json=USAGE)]
    assert client.record_usage("alice", "image").credits_used == Decimal("0.5")
    sent = keys(route)
    assert len(sent) == 3
    assert len(set(sent)) == 1
    assert len({call.request.content for call in route.calls}) == 1


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "invalid_request"),
        (401, "invalid_api_key"),
        (402, "insufficient_credits"),
        (402, "budget_exceeded"),
        (403, "permission_denied"),
        (404, "not_found"),
        (409, "reservation_settled"),
        (412, "version_mismatch"),
        (422, "idempotency_key_reused"),
        (500, "internal_error"),
    ],
)
def test_what_is_final_is_sent_once(api: respx.MockRouter, client: Client, status: int, code: str):
    route = api.post("/usage").mock(return_value=refusal(status, code))
    with pytest.raises(farebox.FareboxError) as refused:
        client.record_usage("alice", "image")
    assert (refused.value.status, refused.value.code, route.call_count) == (status, code, 1)


def test_attempts_are_bounded(api: respx.MockRouter, client: Client):
    route = api.post("/usage").mock(side_effect=httpx.ConnectError("refused"))
    with pytest.raises(farebox.ConnectionFailed, match="tried 4 times and not answered: ConnectError: refused"):
        client.record_usage("alice", "image")
    assert route.call_count == AT_ONCE.attempts_max


def test_the_last_refusal_is_told(api: respx.MockRouter, client: Client):
    route = api.get("/customers/alice").mock(return_value=refusal(503, "ledger_unavailable"))
    with pytest.raises(farebox.ServerError) as refused:
        client.get_customer("alice")
    assert (refused.value.code, refused.value.request_id) == ("ledger_unavailable", "req_9")
    assert route.call_count == AT_ONCE.attempts_max


def test_a_client_that_never_repeats(api: respx.MockRouter):
    route = api.get("/customers/alice").mock(return_value=httpx.Response(503))
    with Client(URL, "k", retries=Retries(attempts_max=1)) as client, pytest.raises(farebox.ServerError):
        client.get_customer("alice")
    assert route.call_count == 1


def test_what_the_caller_got_wrong_is_not_sent_again(api: respx.MockRouter, client: Client):
    route = api.post("/usage").mock(side_effect=httpx.LocalProtocolError("Illegal header value"))
    with pytest.raises(farebox.ConnectionFailed, match="tried once"):
        client.record_usage("alice", "image", idempotency_key="a key\n")
    assert route.call_count == 1


def test_each_call_has_a_key_of_its_own_unless_one_is_given(api: respx.MockRouter, client: Client):
    route = api.post("/usage").mock(return_value=httpx.Response(202, json=USAGE))
    client.record_usage("alice", "image")
    client.record_usage("alice", "image")
    client.record_usage("alice", "image", idempotency_key="message:1")
    first, second, third = keys(route)
    assert first != second
    assert third == "message:1"


def answered_with(status: int, **headers: str) -> Answer:
    return Answer(status, httpx.Headers({name.replace("_", "-"): value for name, value in headers.items()}), b"")


def test_pauses_double_up_to_a_limit_and_are_shorter_by_chance():
    retries = Retries(first_s=0.5, pause_max_s=3)
    assert [retries.pause_s(attempts, chance=0) for attempts in (1, 2, 3, 4, 5)] == [0.5, 1, 2, 3, 3]
    assert retries.pause_s(2, chance=1) == 0.5


def test_retry_after_is_waited_for():
    exchange = Exchange(get_customer("alice"), Retries(first_s=0.5), chance=lambda: 0)
    assert exchange.heard(answered_with(429, retry_after="7")) == Again(7.5)


def test_retry_after_may_be_a_date():
    exchange = Exchange(get_customer("alice"), Retries(first_s=0))
    assert exchange.heard(answered_with(503, retry_after="Wed, 21 Oct 2015 07:28:00 GMT")) == Again(0)
    exchange = Exchange(get_customer("alice"), Retries())
    with pytest.raises(farebox.ServerError):  # A long time ahead.
        exchange.heard(answered_with(503, retry_after="Wed, 21 Oct 2999 07:28:00 GMT"))


def test_a_retry_after_that_says_nothing_is_passed_over():
    for written in ("soon", "NaN", "-3"):
        exchange = Exchange(get_customer("alice"), Retries(first_s=0))
        assert exchange.heard(answered_with(429, retry_after=written)) == Again(0)


def test_a_long_retry_after_is_the_callers_to_wait_for():
    exchange = Exchange(get_customer("alice"), Retries())
    answer = Answer(429, {"retry-after": "3600"}, refusal(429, "rate_limit_exceeded", limit=100).content)
    with pytest.raises(farebox.RateLimited) as refused:
        exchange.heard(answer)
    assert refused.value.retry_after == 3600
    assert refused.value.facts == {"limit": 100}


def test_an_erasure_whose_answer_was_lost_is_done(api: respx.MockRouter, client: Client):
    route = api.delete("/customers/alice")
    route.side_effect = [httpx.ReadTimeout("lost"), refusal(404, "not_found")]
    client.delete_customer("alice")
    route.side_effect = [refusal(404, "not_found")]
    with pytest.raises(farebox.NotFound):
        client.delete_customer("alice")


def test_an_answer_of_somebody_else_is_told_as_such(api: respx.MockRouter, client: Client):
    for body in ("<html>Welcome to the proxy", '{"id": 7}', "[]", "null", ""):
        api.get("/customers/alice").mock(return_value=httpx.Response(200, text=body))
        with pytest.raises(farebox.UnexpectedAnswer, match="ending in /v1"):
            client.get_customer("alice")
    api.get("/customers/alice").mock(return_value=httpx.Response(302, headers={"Location": "/login"}))
    with pytest.raises(farebox.FareboxError, match="status 302"):
        client.get_customer("alice")


def test_an_answer_without_end_is_not_read(api: respx.MockRouter, client: Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("farebox.connection.BODY_BYTES_MAX", 10)
    api.get("/customers/alice").mock(return_value=httpx.Response(200, text="x" * 11))
    with pytest.raises(farebox.UnexpectedAnswer, match="more than 10 bytes"):
        client.get_customer("alice")


def test_a_closed_client_says_so(api: respx.MockRouter):
    client = Client(URL, "k")
    client.close()
    with pytest.raises(RuntimeError, match="This client is closed"):
        client.get_customer("alice")


def test_an_address_and_a_key_come_from_the_environment(api: respx.MockRouter, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="set FAREBOX_BASE_URL"):
        Client()
    with pytest.raises(ValueError, match="begins with https://"):
        Client("farebox.example/v1", "k")
    monkeypatch.setenv("FAREBOX_BASE_URL", f"{URL}/")
    with pytest.raises(ValueError, match="set FAREBOX_API_KEY"):
        Client()
    monkeypatch.setenv("FAREBOX_API_KEY", "fb_live_secret")
    route = api.post("/usage").mock(return_value=httpx.Response(202, json=USAGE))
    with Client() as client:
        client.record_usage("alice", "image")
        assert "secret" not in repr(client) + repr(vars(client)["_access"])
    assert route.calls.last.request.headers["Authorization"] == "Bearer fb_live_secret"


def test_a_name_is_one_part_of_the_path(api: respx.MockRouter, client: Client):
    route = api.get(url__startswith=URL).mock(return_value=refusal(404, "not_found"))
    with pytest.raises(farebox.NotFound):
        client.credits("a/b?c%2F ü")
    assert route.calls.last.request.url.raw_path.startswith(b"/v1/customers/a%2Fb%3Fc%252F%20%C3%BC/credits?")
    for nothing in ("", ".", ".."):
        with pytest.raises(ValueError, match="names nothing"):
            client.get_customer(nothing)


async def test_the_async_client_tries_again_with_the_same_key(api: respx.MockRouter):
    route = api.post("/usage")
    route.side_effect = [httpx.ConnectError("refused"), httpx.Response(503), httpx.Response(202, json=USAGE)]
    async with AsyncClient(URL, "k", retries=AT_ONCE) as client:
        assert (await client.record_usage("alice", "image")).balance == Decimal("9.5")
    assert len(keys(route)) == 3
    assert len(set(keys(route))) == 1
    with pytest.raises(RuntimeError, match="closed"):
        await client.record_usage("alice", "image")


async def test_a_cancelled_call_is_not_sent_again(api: respx.MockRouter):
    begun = asyncio.Event()
    sent = []

    async def hang(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    api.post("/usage").mock(side_effect=hang)
    async with AsyncClient(URL, "k", retries=AT_ONCE) as client:
        call = asyncio.create_task(client.record_usage("alice", "image"))
        await begun.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert len(sent) == 1


RESERVED = {
    "id": "rsv_1",
    "status": "active",
    "customer_id": "cus_1",
    "billable_metric_key": "image",
    "estimated_units": 2,
    "reserved_amount_decimal": "1",
    "charged_amount_decimal": "0",
    "uncovered_amount_decimal": "0",
    "request_id": "req_1",
    "created_at": "2026-04-13T11:00:00Z",
    "expires_at": "2026-04-13T11:15:00Z",
    "settled_at": None,
    "metadata": {},
}


def test_an_error_in_a_task_is_not_hidden_by_one_of_its_release(api: respx.MockRouter, client: Client):
    api.post("/reservations").mock(return_value=httpx.Response(201, json=RESERVED))
    release = api.post("/reservations/rsv_1/release").mock(return_value=refusal(500, "internal_error"))
    with pytest.raises(ZeroDivisionError) as failed, client.reserve("alice", "image", 2):
        1 / 0  # noqa: B018
    assert "could not be released" in failed.value.__notes__[0]
    with pytest.raises(farebox.ServerError), client.reserve("alice", "image", 2):
        pass
    assert release.call_count == 2


def test_a_task_that_somebody_else_has_settled_is_left_alone(api: respx.MockRouter, client: Client):
    api.post("/reservations").mock(return_value=httpx.Response(201, json=RESERVED))
    release = api.post("/reservations/rsv_1/release")
    release.mock(return_value=refusal(409, "reservation_settled", state="committed"))
    with client.reserve("alice", "image", 2):
        pass
    assert release.call_count == 1


async def test_a_cancelled_task_is_released(api: respx.MockRouter):
    api.post("/reservations").mock(return_value=httpx.Response(201, json=RESERVED))
    release = api.post("/reservations/rsv_1/release")
    release.mock(return_value=refusal(409, "reservation_settled", state="released"))
    begun = asyncio.Event()

    async def work() -> None:
        async with client.reserve("alice", "image", 2):
            begun.set()
            await asyncio.Event().wait()

    async with AsyncClient(URL, "k") as client:
        task = asyncio.create_task(work())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert release.call_count == 1


def test_pages_are_read_when_they_are_reached(api: respx.MockRouter, client: Client):
    line = {"id": "txn_1", "type": "charge", "amount_decimal": "-0.5", "reference": None, "request_id": None}
    line |= {"metric": None, "action": None, "model": None, "parts": [], "created_at": "2026-04-13T11:00:00Z"}
    route = api.get("/customers/alice/transactions")
    route.side_effect = [
        httpx.Response(200, json={"data": [line, line], "has_more": True, "next_cursor": "c=1"}),
        httpx.Response(200, json={"data": [line], "has_more": False, "next_cursor": None}),
    ]
    lines = client.transactions("alice", page_size=2)
    assert route.call_count == 0
    next(lines)
    assert route.call_count == 1
    assert len(list(lines)) == 2
    assert dict(route.calls.last.request.url.params) == {"limit": "2", "cursor": "c=1"}


def test_what_is_left_out_is_not_sent(api: respx.MockRouter, client: Client):
    route = api.post("/topup/grant").mock(return_value=refusal(400, "invalid_request"))
    with pytest.raises(farebox.InvalidRequest):
        client.grant("alice", credits="0.5")
    assert json.loads(route.calls.last.request.content) == {"customer_id": "alice", "credits": 500}
