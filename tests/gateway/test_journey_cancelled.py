"""A request whose task is cancelled, as when the server shuts down, or whose client stalls: it is settled too."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.proxy import exchange
from gateway.settings import Settings
from ledger.commands import Commit
from ledger.model import ReservationState
from pricing.encodings import count_text
from tests.gateway.rig import GatedUpstream, Rig, has, running, simulated_server

TEXT = "Whatever becomes of the task, what was delivered is charged."
USAGE = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}


class Call:
    """One request to the proxy as an ASGI server makes it; the test is the server."""

    def __init__(self, rig: Rig, *, stream: bool = True, **simulate: Any) -> None:
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
        self._body = json.dumps({**body, "simulate": {"text": TEXT, "usage": USAGE, **simulate}}).encode()
        self._headers = [(name.lower().encode(), value.encode()) for name, value in rig.headers().items()]
        self._sent_body = False
        self.left = asyncio.Event()
        self.written = b""
        self.stalls = False
        self.broken = False
        self.finished = False
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": self._headers}
        self.task = asyncio.create_task(rig.proxy(scope, self.receive, self.send))

    async def receive(self) -> dict[str, Any]:
        if not self._sent_body:
            self._sent_body = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.broken:
            raise OSError("the client is not there any more")
        if self.stalls:
            await asyncio.Event().wait()
        self.written += message.get("body", b"")
        self.finished = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def events(self, count: int) -> None:
        while self.written.count(b"\n\n") < count:  # noqa: ASYNC110 - until so many have been written
            await asyncio.sleep(0.001)

    @property
    def text(self) -> str:
        data = [part.removeprefix(b"data: ") for part in self.written.split(b"\n\n") if part]
        chunks = [json.loads(part) for part in data if part != b"[DONE]"]
        return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk.get("choices", ()))


@contextlib.asynccontextmanager
async def gated(tmp_path: Path, gate: GatedUpstream, **settings: Any) -> AsyncIterator[Rig]:
    chosen = Settings(default_upstream="simulated", rate_limit_per_minute=0, journal_dir=tmp_path / "kept", **settings)
    async with running(tmp_path, settings=chosen, upstreams={"simulated": gate}) as rig:
        await rig.grant("1")
        yield rig


async def check_partial(rig: Rig, text: str, ending: str) -> None:
    receipt = await rig.newest_receipt()
    (part,) = receipt.usage
    assert part.record.units == {"input": 8, "output": count_text(text, "o200k_base")}
    assert (part.record.source, part.record.ending) == ("partial", ending)
    assert (await rig.wallet()).reserved == 0


async def test_a_stream_that_is_cancelled_is_charged_for_what_was_delivered(tmp_path: Path) -> None:
    gate = GatedUpstream()
    async with gated(tmp_path, gate) as rig:
        call = Call(rig)
        gate.allow(4)
        await call.events(4)
        call.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.task
        await check_partial(rig, call.text, "broken")
        assert gate.closed == 1


async def test_a_request_that_is_cancelled_before_its_answer_is_free(tmp_path: Path) -> None:
    gate = GatedUpstream()
    async with gated(tmp_path, gate) as rig:
        call = Call(rig, stream=False)
        await gate.reached.wait()
        call.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.task
        receipt = await rig.newest_receipt()
        assert receipt.reservation.state is ReservationState.RELEASED
        assert await rig.balance() == "1"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_settlement_under_way_is_finished_when_its_request_is_cancelled(tmp_path: Path, stream: bool) -> None:
    gate = GatedUpstream()
    gate.allow()
    async with gated(tmp_path, gate) as rig:
        settling, go_on = asyncio.Event(), asyncio.Event()

        async def slow(commands: Any) -> None:
            if has(commands, Commit):
                settling.set()
                await go_on.wait()

        rig.store.before = slow
        call = Call(rig, stream=stream)
        await settling.wait()
        call.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.task
        assert not call.finished
        go_on.set()
        while (await rig.wallet()).reserved:  # noqa: ASYNC110 - until the settlement has ended
            await asyncio.sleep(0.001)
        (part,) = (await rig.newest_receipt()).usage
        assert part.record.units == {"input": 100, "output": 50}


async def test_a_client_that_leaves_during_the_settlement_disturbs_nothing(tmp_path: Path) -> None:
    gate = GatedUpstream()
    gate.allow()
    async with gated(tmp_path, gate) as rig:
        calls: list[Call] = []

        async def leaving(commands: Any) -> None:
            if has(commands, Commit):
                calls[0].left.set()
                await asyncio.sleep(0)

        rig.store.before = leaving
        calls.append(Call(rig))
        await calls[0].task
        (part,) = (await rig.newest_receipt()).usage
        assert (part.record.source, part.record.ending) == ("provider", "finished")


async def test_a_server_that_says_that_the_client_is_not_there_is_believed(tmp_path: Path) -> None:
    gate = GatedUpstream()
    async with gated(tmp_path, gate) as rig:
        call = Call(rig)
        gate.allow(4)
        await call.events(4)
        call.broken = True
        gate.allow(1)
        while gate.permits._value:  # noqa: ASYNC110 - until it has been tried to be written
            await asyncio.sleep(0.001)
        call.left.set()
        await call.task
        assert (await rig.newest_receipt()).usage[0].record.ending == "client_left"


async def test_a_client_that_takes_nothing_for_long_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "STALLED_S", 0.02)
    monkeypatch.setattr(exchange, "LOOK_EVERY_S", 0.01)
    gate = GatedUpstream()
    async with gated(tmp_path, gate) as rig:
        call = Call(rig)
        gate.allow(4)
        await call.events(4)
        text = call.text
        call.stalls = True
        gate.allow(1)
        await call.task
        receipt = await rig.newest_receipt()
        assert receipt.usage[0].record.ending == "client_left"
        one_more = " ".join(TEXT.split()[: len(text.split()) + 1])
        assert receipt.usage[0].record.units["output"] == count_text(one_more, "o200k_base")


async def test_a_client_that_waits_for_a_slow_upstream_is_not_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "STALLED_S", 0.0)
    monkeypatch.setattr(exchange, "LOOK_EVERY_S", 0.001)
    gate = GatedUpstream()
    async with gated(tmp_path, gate) as rig:
        for delay_ms in (0, 20):
            call = Call(rig, chunk_delay_ms=delay_ms)
            gate.allow()
            await call.task
            assert call.text == TEXT


async def test_an_upstream_that_is_left_is_let_go_at_once(tmp_path: Path) -> None:
    """Over a socket: what nobody waits for is not generated on."""
    async with simulated_server() as server:
        upstream = {"name": "up", "base_url": server.url}
        settings = Settings(upstreams=(upstream,), rate_limit_per_minute=0, journal_dir=tmp_path / "kept")  # type: ignore[arg-type]
        async with running(tmp_path, settings=settings) as rig:
            await rig.grant("1")
            body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}
            await rig.leave_after({**body, "simulate": {"text": TEXT, "hang_after_chunks": 3}}, 3)
            await rig.settled()
            while not server.unfinished_count:  # noqa: ASYNC110 - until it has noticed
                await asyncio.sleep(0.001)
