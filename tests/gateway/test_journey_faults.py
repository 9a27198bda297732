"""Every fault of an upstream, in this process and over a real socket: what the client is told, and what is charged."""

import contextlib
import json
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gateway.ids import new_id
from gateway.proxy.simulated import SimulatedUpstream
from gateway.settings import Fallback, ModelSettings, PriceSettings, Settings, UpstreamSettings
from ledger.commands import Commit, Reserve
from ledger.model import ReservationState
from pricing.encodings import count_text
from tests.gateway.rig import Rig, Streamed, running, simulated_server

TEXT = "Nothing is charged for an answer that never came, and no more than what came."
WORDS = TEXT.split()
USAGE = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
SHORT = {"connect_timeout_s": 0.5, "first_byte_timeout_s": 0.3, "idle_timeout_s": 0.3}


def tokens(text: str) -> int:
    return count_text(text, "o200k_base")


def body(**simulate: Any) -> dict[str, Any]:
    sent = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}
    return {**sent, "simulate": {"text": TEXT, "usage": USAGE, **simulate}}


@contextlib.asynccontextmanager
async def gateway(tmp_path: Path, transport: str, **settings: Any) -> AsyncIterator[Rig]:
    """A gateway whose upstream is the simulated one, behind *transport*."""
    shared = {"rate_limit_per_minute": 0, "journal_dir": tmp_path / "kept", **settings}
    if transport == "process":
        upstream = SimulatedUpstream(first_byte_timeout_s=0.3, idle_timeout_s=0.3)
        chosen = Settings(default_upstream="simulated", **shared)
        async with running(tmp_path, settings=chosen, upstreams={"simulated": upstream}) as rig:
            await rig.grant("1")
            yield rig
        return
    async with simulated_server() as server:
        upstreams = (UpstreamSettings(name="socket", base_url=server.url, retries=0, **SHORT),)
        async with running(tmp_path, settings=Settings(upstreams=upstreams, **shared)) as rig:
            await rig.grant("1")
            yield rig


both_ways = pytest.mark.parametrize("transport", ["process", "socket"])


async def somebody(rig: Rig) -> str:
    """A new user with one credit."""
    user = f"user-{new_id('evt')}"
    await rig.grant("1", user=user)
    return user


async def check_free(rig: Rig) -> None:
    """Nothing was charged and nothing is held."""
    assert await rig.balance() == "1"
    receipt = await rig.newest_receipt()
    assert receipt.reservation.state is ReservationState.RELEASED
    assert receipt.usage == ()


async def check_charged(rig: Rig, units: dict[str, int], source: str, ending: str, user: str = "alice") -> None:
    receipt = await rig.newest_receipt()
    (part,) = receipt.usage
    assert (part.record.units, part.record.source, part.record.ending) == (units, source, ending)
    cost = units.get("input", 0) * 15_000 + units.get("output", 0) * 60_000
    assert [charge.total for charge in receipt.reservation.charged] == [cost]
    assert Decimal(1) - Decimal(await rig.balance(user)) == Decimal(cost) / 10**9


# Refused before the first byte: the client gets an error, and nothing is charged.

REFUSALS = [
    ({"refuse": True}, 502, "upstream_error"),
    ({"cut_after_chunks": 0}, 502, "upstream_error"),
    ({"hang_after_chunks": 0}, 504, "upstream_timeout"),
    ({"first_byte_delay_ms": 60_000}, 504, "upstream_timeout"),
    ({"status": 500}, 502, "upstream_error"),
    ({"status": 503}, 502, "upstream_error"),
    ({"status": 599}, 502, "upstream_error"),
    ({"status": 500, "cut_after_chunks": 1}, 502, "upstream_error"),
    ({"status": 500, "hang_after_chunks": 1}, 504, "upstream_timeout"),
    ({"status": 429, "cut_after_chunks": 1}, 502, "upstream_error"),
]


@both_ways
@pytest.mark.parametrize("stream", [False, True])
async def test_refused(tmp_path: Path, transport: str, stream: bool) -> None:
    async with gateway(tmp_path, transport) as rig:
        for fault, status, code in REFUSALS:
            refused = await rig.chat({**body(**fault), "stream": stream})
            error = refused.json()["error"]
            assert (refused.status_code, error["code"], error["type"]) == (status, code, "api_error"), fault
            assert error["request_id"] == refused.headers["X-Request-Id"]
            assert "Nothing was charged" in error["message"]
            await check_free(rig)


@both_ways
@pytest.mark.parametrize("stream", [False, True])
async def test_an_upstreams_own_refusal_passes_as_it_came(tmp_path: Path, transport: str, stream: bool) -> None:
    async with gateway(tmp_path, transport) as rig:
        for status in (400, 401, 403, 404, 418, 429):
            refused = await rig.chat({**body(status=status, retry_after=7), "stream": stream})
            assert refused.status_code == status
            assert refused.headers["Retry-After"] == "7"
            assert refused.headers["Content-Type"] == "application/json"
            assert "request_id" not in refused.json()["error"]
            await check_free(rig)


async def test_an_upstream_that_nobody_runs_is_unreachable(tmp_path: Path) -> None:
    async with simulated_server() as server:
        url = server.url
    upstreams = (UpstreamSettings(name="gone", base_url=url, retries=0, **SHORT),)
    settings = Settings(upstreams=upstreams, rate_limit_per_minute=0, journal_dir=tmp_path / "kept")
    async with running(tmp_path, settings=settings) as rig:
        await rig.grant("1")
        for stream in (False, True):
            refused = await rig.chat({**body(), "stream": stream})
            assert (refused.status_code, refused.json()["error"]["code"]) == (502, "upstream_error")
            await check_free(rig)


# A whole answer that breaks off is no answer.


@both_ways
@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ({"cut_after_chunks": 1}, 502, "upstream_error"),
        ({"hang_after_chunks": 1}, 504, "upstream_timeout"),
    ],
)
async def test_a_whole_answer_that_breaks_off_is_free(
    tmp_path: Path, transport: str, fault: dict[str, Any], status: int, code: str
) -> None:
    async with gateway(tmp_path, transport) as rig:
        refused = await rig.chat(body(**fault))
        assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
        await check_free(rig)


@both_ways
@pytest.mark.parametrize("fault", [{"split_bytes": True}, {"gzip": True}, {"in_choice_chunk": True}, {"no_done": True}])
async def test_a_whole_answer_that_comes_in_an_odd_way_is_whole(
    tmp_path: Path, transport: str, fault: dict[str, Any]
) -> None:
    async with gateway(tmp_path, transport) as rig:
        answer = await rig.chat(body(**fault))
        assert answer.json()["choices"][0]["message"]["content"] == TEXT
        assert "Content-Encoding" not in answer.headers
        await check_charged(rig, {"input": 100, "output": 50}, "provider", "finished")


# Streams.

ODD_BUT_WHOLE = [
    {},
    {"split_bytes": True},
    {"gzip": True},
    {"gzip": True, "split_bytes": True},
    {"in_choice_chunk": True},
    {"chunk_delay_ms": 5},
    {"first_byte_delay_ms": 20},
]


@both_ways
@pytest.mark.parametrize("asked", [False, True])
async def test_a_stream_that_comes_in_an_odd_way_is_whole(tmp_path: Path, transport: str, asked: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if asked else {}
    async with gateway(tmp_path, transport) as rig:
        for fault in ODD_BUT_WHOLE:
            user = await somebody(rig)
            got = await rig.stream({**body(**fault), **options}, user=user)
            assert (got.done, got.text(), got.finish_reasons) == (True, TEXT, ["stop"]), fault
            assert [bool(chunk.get("usage")) for chunk in got.chunks].count(True) == asked
            await check_charged(rig, {"input": 100, "output": 50}, "provider", "finished", user)


@both_ways
async def test_malformed_events_pass_and_the_stream_is_charged_as_reported(tmp_path: Path, transport: str) -> None:
    async with gateway(tmp_path, transport) as rig:
        got = await rig.stream(body(malformed_sse=True))
        assert got.done
        assert b'data: {"choices":[{"delta":{"content":\n\ngarbage\ndata\n\nevent: nonsense\ndata: 7\n\n' in got.raw
        await check_charged(rig, {"input": 100, "output": 50}, "provider", "finished")


@both_ways
async def test_a_stream_without_usage_is_counted(tmp_path: Path, transport: str) -> None:
    async with gateway(tmp_path, transport) as rig:
        got = await rig.stream(body(usage=None))
        assert got.done
        await check_charged(rig, {"input": 8, "output": tokens(TEXT)}, "counted", "finished")


@both_ways
async def test_a_stream_that_reports_zero_is_charged_zero(tmp_path: Path, transport: str) -> None:
    zero = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    async with gateway(tmp_path, transport) as rig:
        assert (await rig.stream(body(usage=zero))).done
        await check_charged(rig, {}, "provider", "finished")


@both_ways
async def test_a_chunk_of_five_megabytes(tmp_path: Path, transport: str) -> None:
    async with gateway(tmp_path, transport) as rig:
        await rig.grant("99")
        sent = body(chunk_bytes=5_000_000, usage=None)
        del sent["simulate"]["text"]
        got = await rig.stream(sent)
        assert (got.done, len(got.text())) == (True, 5_000_000)
        receipt = await rig.newest_receipt()
        assert receipt.usage[0].record.units["output"] == pytest.approx(tokens(got.text()), rel=0.001)


@both_ways
@pytest.mark.parametrize("fault", ["cut_after_chunks", "hang_after_chunks"])
async def test_a_stream_that_breaks_is_charged_for_what_was_delivered(
    tmp_path: Path, transport: str, fault: str
) -> None:
    cut = fault == "cut_after_chunks"
    async with gateway(tmp_path, transport) as rig:
        for chunks in range(1, len(WORDS) + 2, 1 if cut else 5):
            user = await somebody(rig)
            got = await rig.stream(body(**{fault: chunks}), user=user)
            assert got.status == 200
            assert got.whole
            assert b"[DONE]" not in got.raw
            assert got.error is not None
            assert got.error["code"] == ("upstream_error" if cut else "upstream_timeout")
            assert got.error["request_id"] == got.headers["X-Request-Id"]
            assert "has been charged" in got.error["message"]
            delivered = got.text()
            assert delivered == " ".join(WORDS[: chunks - 1])
            output = {"output": tokens(delivered)} if delivered else {}
            await check_charged(rig, {"input": 8, **output}, "partial", "broken", user)


@both_ways
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("fault", [{"no_done": True}, {"cut_after_chunks": len(WORDS) + 3}])
async def test_a_stream_that_breaks_after_its_usage_is_charged_as_reported(
    tmp_path: Path, transport: str, asked: bool, fault: dict[str, Any]
) -> None:
    """It ends cleanly, or is cut, between the usage and [DONE]: that is no end, but all is known."""
    options = {"stream_options": {"include_usage": True}} if asked else {}
    async with gateway(tmp_path, transport) as rig:
        got = await rig.stream({**body(**fault), **options})
        assert got.text() == TEXT
        assert got.error is not None
        assert b"[DONE]" not in got.raw
        await check_charged(rig, {"input": 100, "output": 50}, "partial", "broken")


@both_ways
async def test_a_stream_that_only_ends_early_is_no_finished_one(tmp_path: Path, transport: str) -> None:
    async with gateway(tmp_path, transport) as rig:
        got = await rig.stream(body(usage=None, no_done=True))
        assert got.error is not None
        await check_charged(rig, {"input": 8, "output": tokens(TEXT)}, "partial", "broken")


# Retries and fallbacks.


class Scripted(SimulatedUpstream):
    """Answers each request by the next directive; the last one holds for all others."""

    def __init__(self, name: str, *directives: dict[str, Any]) -> None:
        super().__init__(name=name, first_byte_timeout_s=0.3, idle_timeout_s=0.3)
        self._directives = directives
        self.bodies: list[dict[str, Any]] = []

    async def send(self, request: Any) -> Any:
        received = json.loads(request.body)
        self.bodies.append(received)
        directive = self._directives[min(len(self.bodies), len(self._directives)) - 1]
        merged = {**received, "simulate": {**received.get("simulate", {}), **directive}}
        return await super().send(type(request)(**{**_fields(request), "body": json.dumps(merged).encode()}))


def _fields(request: Any) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__struct_fields__}


@contextlib.asynccontextmanager
async def with_fallback(tmp_path: Path, *upstreams: Scripted, retries: int = 1) -> AsyncIterator[Rig]:
    """The model `chat` at three upstreams, the second at a higher, the third at a lower price."""
    prices = {
        "first-model": ("1", "2"),
        "second-model": ("10", "20"),
        "third-model": ("0.1", "0.2"),
        "chat": ("1", "2"),
    }
    names = ["first", "second", "third"]
    settings = Settings(
        rate_limit_per_minute=0,
        journal_dir=tmp_path / "kept",
        upstreams=tuple(
            UpstreamSettings(name=name, base_url="http://127.0.0.1:9/v1", retries=retries) for name in names
        ),
        models=(
            ModelSettings(
                name="chat",
                upstream="first",
                upstream_model="first-model",
                fallbacks=(
                    Fallback(upstream="second", model="second-model"),
                    Fallback(upstream="third", model="third-model"),
                ),
                price=PriceSettings(input="1", output="2"),
            ),
            *(
                ModelSettings(name=name, upstream="first", price=PriceSettings(input=price[0], output=price[1]))
                for name, price in prices.items()
                if name != "chat"
            ),
        ),
    )
    async with running(tmp_path, settings=settings, upstreams={each.name: each for each in upstreams}) as rig:
        await rig.grant("1000")
        yield rig


FAILURES = [{"status": 500}, {"status": 429}, {"status": 503}, {"refuse": True}, {"hang_after_chunks": 0}]
SERVES: dict[str, Any] = {}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(("serving", "rates"), [(1, (10, 20)), (2, (Decimal("0.1"), Decimal("0.2")))])
async def test_a_fallback_is_charged_once_at_the_price_of_who_served(
    tmp_path: Path, stream: bool, failure: dict[str, Any], serving: int, rates: tuple[Decimal, Decimal]
) -> None:
    names = ("first", "second", "third")
    upstreams = [Scripted(name, failure if place < serving else SERVES) for place, name in enumerate(names)]
    async with with_fallback(tmp_path, *upstreams) as rig:
        sent = {**body(), "model": "chat", "stream": stream, "max_tokens": 1_000}
        answer = await rig.chat(sent)
        assert answer.status_code == 200
        assert upstreams[serving].bodies[0]["model"] == f"{names[serving]}-model"
        assert all(each.bodies == [] for each in upstreams[serving + 1 :])
        cost = (100 * Decimal(rates[0]) + 50 * Decimal(rates[1])) / 10**6 / Decimal("0.01")
        assert Decimal(1000) - Decimal(await rig.balance()) == cost
        receipt = await rig.newest_receipt()
        assert receipt.reservation.commits == 1
        assert receipt.usage[0].record.upstream == names[serving]
        assert rig.store.count(Commit) == rig.store.count(Reserve) == 1


async def test_the_dearest_candidate_is_what_is_reserved(tmp_path: Path) -> None:
    upstreams = [Scripted(name, SERVES) for name in ("first", "second", "third")]
    async with with_fallback(tmp_path, *upstreams) as rig:
        answer = await rig.chat({**body(), "model": "chat", "max_tokens": 1_000})
        prompt_max = 8 + 1 + 8  # Our count, 1 % and 8 tokens.
        dearest = (prompt_max * Decimal(10) + 1_000 * Decimal(20)) / 10**6 / Decimal("0.01")
        assert Decimal(answer.headers["X-Quota-Reserved"]) == dearest


async def test_when_all_candidates_fail_the_last_one_is_told_of_and_nothing_is_charged(tmp_path: Path) -> None:
    upstreams = [Scripted(name, {"status": 500}) for name in ("first", "second")] + [Scripted("third", {"status": 429})]
    async with with_fallback(tmp_path, *upstreams) as rig:
        answer = await rig.chat({**body(), "model": "chat"})
        assert answer.status_code == 429
        assert await rig.balance() == "1000"
        assert (await rig.wallet()).reserved == 0


async def test_an_upstream_that_did_not_do_the_work_is_asked_again(tmp_path: Path) -> None:
    first = Scripted("first", {"status": 503}, SERVES)
    async with with_fallback(tmp_path, first, Scripted("second", SERVES), Scripted("third", SERVES)) as rig:
        assert (await rig.chat({**body(), "model": "chat"})).status_code == 200
        assert (await rig.newest_receipt()).usage[0].record.upstream == "first"
        assert len(first.bodies) == 2
        assert rig.store.count(Commit) == 1


@pytest.mark.parametrize("failure", [{"refuse": True}, {"hang_after_chunks": 0}, {"status": 500}])
async def test_an_upstream_that_may_have_done_the_work_is_not_asked_again(
    tmp_path: Path, failure: dict[str, Any]
) -> None:
    first = Scripted("first", failure)
    async with with_fallback(tmp_path, first, Scripted("second", SERVES), Scripted("third", SERVES), retries=5) as rig:
        assert (await rig.chat({**body(), "model": "chat"})).status_code == 200
        assert len(first.bodies) == 1


@pytest.mark.parametrize("failure", [{"status": 400}, {"status": 401}, {"status": 404}])
async def test_the_clients_fault_is_not_tried_elsewhere(tmp_path: Path, failure: dict[str, Any]) -> None:
    second = Scripted("second", SERVES)
    async with with_fallback(tmp_path, Scripted("first", failure), second, Scripted("third", SERVES)) as rig:
        assert (await rig.chat({**body(), "model": "chat"})).status_code == failure["status"]
        assert second.bodies == []


async def test_after_the_first_byte_there_is_no_fallback(tmp_path: Path) -> None:
    second = Scripted("second", SERVES)
    first = Scripted("first", {"cut_after_chunks": 3})
    async with with_fallback(tmp_path, first, second, Scripted("third", SERVES)) as rig:
        got: Streamed = await rig.stream({**body(), "model": "chat"})
        assert got.error is not None
        assert second.bodies == []
        assert rig.store.count(Commit) == 1


# What is no answer, whatever its status says.


class Fixed(SimulatedUpstream):
    """Answers with the same bytes, whatever is asked."""

    def __init__(self, status: int, content: bytes, content_type: bytes = b"application/json") -> None:
        super().__init__()
        self._answer = (status, content, content_type)

    async def send(self, request: Any) -> Any:
        response = await super().send(request)
        response.status, content, content_type = self._answer
        response.headers = [(b"content-type", content_type)]
        response._first = content
        response._steps = iter(())
        response._step = None
        return response


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "content"),
    [
        (200, b""),
        (200, b"not JSON"),
        (200, b"[]"),
        (200, b'{"error": {"message": "no"}}'),
        (200, b"[" * 100_000),
        (204, b""),
        (301, b'{"choices": []}'),
        (307, b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}'),
        (100, b""),
    ],
)
async def test_what_is_no_answer_is_free(tmp_path: Path, stream: bool, status: int, content: bytes) -> None:
    settings = Settings(default_upstream="simulated", rate_limit_per_minute=0, journal_dir=tmp_path / "kept")
    async with running(tmp_path, settings=settings, upstreams={"simulated": Fixed(status, content)}) as rig:
        await rig.grant("1")
        refused = await rig.chat({**body(), "stream": stream})
        assert (refused.status_code, refused.json()["error"]["code"]) == (502, "upstream_error")
        await check_free(rig)


async def test_a_stream_that_is_answered_in_one_piece_is_charged_like_one(tmp_path: Path) -> None:
    answer = {"id": "x", "choices": [{"index": 0, "message": {"content": TEXT}}], "usage": USAGE}
    settings = Settings(default_upstream="simulated", rate_limit_per_minute=0, journal_dir=tmp_path / "kept")
    upstream = Fixed(200, json.dumps(answer).encode())
    async with running(tmp_path, settings=settings, upstreams={"simulated": upstream}) as rig:
        await rig.grant("1")
        got = await rig.chat({**body(), "stream": True})
        assert got.json()["usage"]["completion_tokens"] == 50
        await check_charged(rig, {"input": 100, "output": 50}, "provider", "finished")


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": -5, "completion_tokens": 5}, {"prompt_tokens": "7"}, [1], "x", {"total_tokens": 9}]
)
async def test_a_report_that_cannot_be_charged_is_counted_instead(tmp_path: Path, usage: Any) -> None:
    answer = {"id": "x", "choices": [{"index": 0, "message": {"content": TEXT}}], "usage": usage}
    settings = Settings(default_upstream="simulated", rate_limit_per_minute=0, journal_dir=tmp_path / "kept")
    upstream = Fixed(200, json.dumps(answer).encode())
    async with running(tmp_path, settings=settings, upstreams={"simulated": upstream}) as rig:
        await rig.grant("1")
        got = await rig.chat(body())
        assert got.json()["usage"]["completion_tokens"] == tokens(TEXT)
        await check_charged(rig, {"input": 8, "output": tokens(TEXT)}, "counted", "finished")
