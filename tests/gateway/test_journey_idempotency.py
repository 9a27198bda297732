"""The same `Idempotency-Key` and body charge once, whatever happens in between."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from gateway.proxy.simulated import SimulatedUpstream
from gateway.settings import ActionSettings, Settings
from ledger.commands import Commit, Reserve
from ledger.ledger import Receipt
from tests.gateway.rig import GatedUpstream, Rig, running

USAGE = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
COST = "0.0045"


def body(**fields: Any) -> dict[str, Any]:
    sent = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100}
    return {**sent, "simulate": {"usage": USAGE, "extra": {"theirs": [1, 2]}}, **fields}


def settings(tmp_path: Path, **more: Any) -> Settings:
    return Settings(default_upstream="simulated", rate_limit_per_minute=0, journal_dir=tmp_path / "kept", **more)


async def test_a_repetition_gets_the_same_answer_and_is_not_charged(tmp_path: Path) -> None:
    upstream = SimulatedUpstream()
    async with running(tmp_path, settings=settings(tmp_path), upstreams={"simulated": upstream}) as rig:
        await rig.grant("1")
        first = await rig.chat(body(), Idempotency_Key="k")
        await rig.grant("5")  # The answer tells the balance of its own time.
        again = await rig.chat(body(), Idempotency_Key="k")
        assert again.content == first.content
        assert again.json()["usage"]["cost"] == COST
        assert (again.status_code, again.headers["X-Idempotent-Replayed"]) == (200, "true")
        assert "X-Idempotent-Replayed" not in first.headers
        for name in ("X-Quota-Cost", "X-Quota-Balance", "X-Request-Id", "Content-Type", "OpenAI-Version"):
            assert again.headers[name] == first.headers[name], name
        assert "X-Quota-Reserved" not in again.headers  # Nothing is, this time.
        assert upstream.requests_count == rig.store.count(Commit) == 1
        assert await rig.balance() == "5.9955"
        receipt: Receipt = await rig.receipt(again)
        assert receipt.reservation.commits == 1


async def test_the_answer_does_not_depend_on_what_the_wallet_affords_later(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("0.02")
        sent = body(max_tokens=None, simulate={"usage": {"prompt_tokens": 0, "completion_tokens": 300}})
        first = await rig.chat(sent, Idempotency_Key="k")
        assert await rig.balance() == "0.002"
        again = await rig.chat(sent, Idempotency_Key="k")
        assert (again.status_code, again.content) == (200, first.content)


@pytest.mark.parametrize("stream", [False, True])
async def test_while_the_first_is_under_way_the_second_is_told_so(tmp_path: Path, stream: bool) -> None:
    gate = GatedUpstream()
    async with running(tmp_path, settings=settings(tmp_path), upstreams={"simulated": gate}) as rig:
        await rig.grant("1")
        first = asyncio.create_task(rig.chat(body(stream=stream), Idempotency_Key="k"))
        await gate.reached.wait()
        second = await rig.chat(body(stream=stream), Idempotency_Key="k")
        assert (second.status_code, second.json()["error"]["code"]) == (409, "request_in_progress")
        assert second.headers["Retry-After"] == "1"
        gate.allow()
        assert (await first).status_code == 200
        assert await rig.balance() == "0.9955"


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"max_tokens": 101}, {}),
        ({"messages": [{"role": "user", "content": "Ho"}]}, {}),
        ({}, {"user": "bob"}),
        ({}, {"X_Quota_Action": "summary"}),
    ],
)
async def test_the_same_key_for_another_request_is_refused(
    tmp_path: Path, fields: dict[str, Any], options: dict[str, str]
) -> None:
    actions = (ActionSettings(key="summary", credits="1"),)
    async with running(tmp_path, settings=settings(tmp_path, actions=actions)) as rig:
        await rig.grant("1")
        await rig.grant("1", user="bob")
        assert (await rig.chat(body(), Idempotency_Key="k")).status_code == 200
        other = await rig.chat(body(**fields), Idempotency_Key="k", **options)
        assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
        assert (await rig.balance(), await rig.balance("bob")) == ("0.9955", "1")


async def test_the_same_user_by_header_or_by_path_is_one_request(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        first = await rig.chat(body(), Idempotency_Key="k")
        path = "/v1/users/alice/chat/completions"
        again = await rig.chat(body(), user=None, path=path, Idempotency_Key="k")
        assert again.content == first.content
        assert await rig.balance() == "0.9955"


async def test_a_finished_stream_is_not_replayed(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        first = await rig.stream(body(), Idempotency_Key="k")
        assert first.done
        again = await rig.chat(body(stream=True), Idempotency_Key="k")
        error = again.json()["error"]
        assert (again.status_code, error["code"]) == (409, "request_already_completed")
        assert error["receipt"] == first.headers["X-Request-Id"]
        assert await rig.balance() == "0.9955"


async def test_a_stream_that_was_left_has_been_charged_and_is_not_begun_again(tmp_path: Path) -> None:
    gate = GatedUpstream()
    async with running(tmp_path, settings=settings(tmp_path), upstreams={"simulated": gate}) as rig:
        await rig.grant("1")
        gate.allow(3)
        await rig.leave_after(body(), 3, gate=gate, Idempotency_Key="k")
        await rig.settled()
        before = await rig.balance()
        again = await rig.chat(body(stream=True), Idempotency_Key="k")
        assert (again.status_code, again.json()["error"]["code"]) == (409, "request_already_completed")
        assert await rig.balance() == before != "1"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", [{"status": 500}, {"status": 429}, {"refuse": True}, {"cut_after_chunks": 0}])
async def test_an_upstreams_failure_frees_the_key(tmp_path: Path, failure: dict[str, Any], stream: bool) -> None:
    """The body stays the same; it is the upstream that is better the next time."""

    class Recovers(SimulatedUpstream):
        async def send(self, request: Any) -> Any:
            if self.requests_count == 0:
                broken = json.dumps({**json.loads(request.body), "simulate": failure}).encode()
                request = type(request)(
                    path=request.path, body=broken, stream=request.stream, request_id=request.request_id
                )
            return await super().send(request)

    async with running(tmp_path, settings=settings(tmp_path), upstreams={"simulated": Recovers()}) as rig:
        await rig.grant("1")
        assert (await rig.chat(body(stream=stream), Idempotency_Key="k")).status_code in (429, 502)
        assert await rig.balance() == "1"
        assert (await rig.chat(body(stream=stream), Idempotency_Key="k")).status_code == 200
        assert await rig.balance() == "0.9955"


async def test_a_refusal_for_lack_of_credits_does_not_take_the_key(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        assert (await rig.chat(body(), Idempotency_Key="k")).status_code == 402
        await rig.grant("1")
        assert (await rig.chat(body(), Idempotency_Key="k")).status_code == 200


async def test_twenty_at_once_with_one_key_are_one_charge(tmp_path: Path) -> None:
    upstream = SimulatedUpstream()
    async with running(tmp_path, settings=settings(tmp_path), upstreams={"simulated": upstream}) as rig:
        await rig.grant("1")
        sent = body(simulate={"usage": USAGE, "first_byte_delay_ms": 30})
        answers = await asyncio.gather(*(rig.chat(sent, Idempotency_Key="k") for _ in range(20)))
        assert {answer.status_code for answer in answers} <= {200, 409}
        served = [answer for answer in answers if answer.status_code == 200]
        assert len({answer.content for answer in served}) == 1
        assert len([answer for answer in served if "X-Idempotent-Replayed" not in answer.headers]) == 1
        assert upstream.requests_count == 1
        assert await rig.balance() == "0.9955"
        assert rig.store.count(Reserve) == 20


async def test_keys_of_live_and_test_do_not_meet(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        for mode in ("live", "test"):
            await rig.grant("1", mode=mode)
            answer = await rig.chat(body(), mode=mode, Idempotency_Key="k")
            assert "X-Idempotent-Replayed" not in answer.headers
            assert await rig.balance(mode=mode) == "0.9955"


async def test_an_answer_is_replayed_for_a_day_and_is_then_known_to_be_charged(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        first = await rig.chat(body(), Idempotency_Key="k")
        rig.clock.pass_s(24 * 3600 - 60)
        assert (await rig.chat(body(), Idempotency_Key="k")).content == first.content
        rig.clock.pass_s(120)
        await rig.upkeep.sweep()
        again = await rig.chat(body(), Idempotency_Key="k")
        assert (again.status_code, again.json()["error"]["code"]) == (409, "request_already_completed")
        assert await rig.balance() == "0.9955"


async def test_the_orphan_of_a_dead_process_is_charged_and_keeps_its_key(tmp_path: Path) -> None:
    """Here its request never ends, and nobody renews its reservation."""
    gate = GatedUpstream()
    async with running(tmp_path, settings=settings(tmp_path), upstreams={"simulated": gate}) as rig:
        await rig.grant("1")
        first = asyncio.create_task(rig.chat(body(), Idempotency_Key="k"))
        await gate.reached.wait()
        await _outlive(rig)
        again = await rig.chat(body(), Idempotency_Key="k")
        assert (again.status_code, again.json()["error"]["code"]) == (409, "request_already_completed")
        gate.allow()
        await first


async def _outlive(rig: Rig) -> None:
    rig.clock.pass_s(200)
    await rig.upkeep.sweep()
