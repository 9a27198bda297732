"""A client that leaves: it is charged for what was used, never for nothing and never for everything.

The upstream sends one event at a time, when the test allows it; so what the client got when it left is exactly known.
"""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gateway.proxy.settlement import Ending
from gateway.settings import Settings
from ledger.commands import Extend
from ledger.ledger import Receipt
from pricing.encodings import count_text
from tests.gateway.rig import GatedUpstream, Rig, running

WORDS = "Tokens that passed are charged, 中文 too and 🎉 of course, until the client goes."
EVENTS = len(WORDS.split()) + 1
"""The role, then each word; after these the finish, the usage and [DONE]."""

USAGE = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}


def body(**simulate: Any) -> dict[str, Any]:
    content = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}
    return {**content, "simulate": {"text": WORDS, "usage": USAGE, **simulate}}


def gated(tmp_path: Path, gate: GatedUpstream, on_disconnect: str | None = None, **settings: Any) -> Any:
    chosen = Settings(default_upstream="simulated", rate_limit_per_minute=0, journal_dir=tmp_path / "kept", **settings)
    return running(tmp_path, settings=chosen, upstreams={"simulated": gate}, on_disconnect=on_disconnect)


async def leave(rig: Rig, gate: GatedUpstream, events: int, sent: dict[str, Any]) -> str:
    """Get so many events, then close the connection; the text that had come by then."""
    gate.allow(events)
    got = await rig.leave_after(sent, events, gate=gate)
    return got.text()


async def part_of(rig: Rig) -> tuple[Receipt, Any]:
    receipt = await rig.newest_receipt()
    (part,) = receipt.usage
    return receipt, part.record


@pytest.mark.parametrize("events", range(EVENTS + 1))
async def test_cancel_charges_the_text_that_was_received(tmp_path: Path, events: int) -> None:
    gate = GatedUpstream()
    async with gated(tmp_path, gate) as rig:
        await rig.grant("1")
        received = await leave(rig, gate, events, body())
        await rig.settled()
        assert gate.closed == 1
        receipt, record = await part_of(rig)
        output = count_text(received, "o200k_base")
        assert (record.units["input"], record.units.get("output", 0)) == (8, output)
        assert (record.source, record.ending) == ("partial", Ending.CLIENT_LEFT)
        assert receipt.reservation.charged[0].total == 8 * 15_000 + output * 60_000


@pytest.mark.parametrize("events", range(EVENTS + 1))
async def test_drain_charges_what_the_upstream_reports(tmp_path: Path, events: int) -> None:
    gate = GatedUpstream()
    async with gated(tmp_path, gate, on_disconnect="drain") as rig:
        await rig.grant("1")
        await leave(rig, gate, events, body())
        gate.allow()
        await rig.settled()
        receipt, record = await part_of(rig)
        assert record.units == {"input": 100, "output": 50}
        assert record.source == "provider"
        assert receipt.reservation.charged[0].total == 100 * 15_000 + 50 * 60_000


async def test_drain_reads_on_for_a_bounded_time(tmp_path: Path) -> None:
    gate = GatedUpstream()
    async with gated(tmp_path, gate, on_disconnect="drain", drain_timeout_s=0.05) as rig:
        await rig.grant("1")
        received = await leave(rig, gate, 4, body())
        await rig.settled()  # Nothing more was allowed.
        assert gate.closed == 1
        _, record = await part_of(rig)
        assert record.units == {"input": 8, "output": count_text(received, "o200k_base")}
        assert record.source == "partial"


async def test_what_is_read_on_is_covered_like_any_other_text(tmp_path: Path) -> None:
    """Else an empty wallet could have an upstream work for a minute, again and again, at the operator's cost."""
    gate = GatedUpstream()
    async with gated(tmp_path, gate, on_disconnect="drain") as rig:
        await rig.grant("0.01")
        sent = body(tokens=5_000, usage=None)
        del sent["simulate"]["text"]
        await leave(rig, gate, 3, sent)
        gate.allow()
        await rig.settled()
        receipt, record = await part_of(rig)
        assert record.ending == Ending.DRY
        assert receipt.reservation.shortfall == 0
        assert Decimal(0) <= Decimal(await rig.balance()) < Decimal("0.0001")
        assert gate.closed == 1


@pytest.mark.parametrize(("on_disconnect", "source"), [(None, "provider"), ("cancel", "partial")])
async def test_a_model_that_reasons_out_of_sight_is_read_on_unless_the_app_says_otherwise(
    tmp_path: Path, on_disconnect: str | None, source: str
) -> None:
    gate = GatedUpstream()
    async with gated(tmp_path, gate, on_disconnect=on_disconnect) as rig:
        await rig.grant("100")
        used = {**USAGE, "completion_tokens_details": {"reasoning_tokens": 45}}
        await leave(rig, gate, 2, {**body(usage=used), "model": "o4-mini"})
        if source == "provider":
            gate.allow()
        await rig.settled()
        _, record = await part_of(rig)
        assert record.source == source
        assert record.units.get("reasoning", 0) == (45 if source == "provider" else 0)


@pytest.mark.parametrize("settings", [{"on_disconnect": "drain"}, {"on_disconnect_hidden_reasoning": "cancel"}])
async def test_the_settings_choose_where_the_app_does_not(tmp_path: Path, settings: dict[str, Any]) -> None:
    gate = GatedUpstream()
    drains = "on_disconnect" in settings
    async with gated(tmp_path, gate, **settings) as rig:
        await rig.grant("100")
        await leave(rig, gate, 2, {**body(), "model": "gpt-4o-mini" if drains else "o4-mini"})
        if drains:
            gate.allow()
        await rig.settled()
        assert (await part_of(rig))[1].source == ("provider" if drains else "partial")


async def test_leaving_after_the_last_event_is_leaving_a_finished_stream(tmp_path: Path) -> None:
    gate = GatedUpstream()
    async with gated(tmp_path, gate) as rig:
        await rig.grant("1")
        gate.allow()
        await rig.leave_after(body(), EVENTS + 2)
        await rig.settled()
        _, record = await part_of(rig)
        assert (record.units, record.source) == ({"input": 100, "output": 50}, "provider")


async def test_a_client_that_does_not_wait_for_a_whole_answer_is_charged_for_it(tmp_path: Path) -> None:
    gate = GatedUpstream()
    async with gated(tmp_path, gate) as rig:
        await rig.grant("1")
        await rig.leave_after({**body(), "stream": False}, 0, gate=gate)
        gate.allow()
        await rig.settled()
        _, record = await part_of(rig)
        assert (record.units, record.source, record.ending) == (
            {"input": 100, "output": 50},
            "provider",
            Ending.FINISHED,
        )


async def test_paced_streams_that_are_left_at_any_time_are_within_one_chunk(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        words = WORDS.split()
        for events in range(1, len(words)):
            got = await rig.leave_after(body(chunk_delay_ms=3), events)
            await rig.settled()
            _, record = await part_of(rig)
            received = got.text()
            charged = record.units.get("output", 0)
            one_more = " ".join(words[: len(received.split()) + 1])
            assert count_text(received, "o200k_base") <= charged <= count_text(one_more, "o200k_base")
        assert rig.store.count(Extend, amount=0) == 0
