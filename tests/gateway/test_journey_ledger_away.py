"""The ledger is away, or this process is late: every charge happens once, later if need be, and none is lost."""

import asyncio
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.ids import new_id
from gateway.proxy.journal import SUFFIX, SettlementJournal
from gateway.proxy.simulated import SimulatedUpstream
from gateway.settings import Settings
from ledger.commands import AnyCommand, Commit, Extend, Refund, Release, Reserve
from ledger.model import ReservationRef, ReservationState, Scope
from ledger.store.protocol import StoreUnavailable
from pricing.encodings import count_text
from pricing.usage import Usage
from tests.gateway.rig import GatedUpstream, Rig, has, nothing, running

USAGE = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
COST = Decimal("0.0045")
TEXT = "A charge that cannot be written now is written later, once."


def body(**fields: Any) -> dict[str, Any]:
    sent = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}
    return {**sent, "simulate": {"text": TEXT, "usage": USAGE}, **fields}


def gated(tmp_path: Path, gate: GatedUpstream, **settings: Any) -> Any:
    chosen = Settings(default_upstream="simulated", rate_limit_per_minute=0, journal_dir=tmp_path / "kept", **settings)
    return running(tmp_path, settings=chosen, upstreams={"simulated": gate})


def kinds(*away: type[AnyCommand]) -> Any:
    return lambda command: isinstance(command, away)


async def back(rig: Rig) -> None:
    """The ledger is back, and is told what it missed: by the periodic work, or here."""
    rig.store.away = lambda command: False
    await rig.upkeep.replay()
    while rig.journal.waiting:  # noqa: ASYNC110 - the periodic work was faster, and is at it
        await asyncio.sleep(0.001)


# At the reservation.


@pytest.mark.parametrize("stream", [False, True])
async def test_without_a_ledger_nothing_is_served(tmp_path: Path, stream: bool) -> None:
    upstream = SimulatedUpstream()
    settings = Settings(default_upstream="simulated", rate_limit_per_minute=0, journal_dir=tmp_path / "kept")
    async with running(tmp_path, settings=settings, upstreams={"simulated": upstream}) as rig:
        await rig.grant("1")
        rig.store.away = kinds(Reserve)
        refused = await rig.chat(body(stream=stream))
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["type"]) == (503, "ledger_unavailable", "api_error")
        assert refused.headers["Retry-After"] == "1"
        assert upstream.requests_count == 0
        rig.store.away = lambda command: False
        assert (await rig.chat(body(stream=stream))).status_code == 200
        assert Decimal(1) - Decimal(await rig.balance()) == COST


async def test_a_reservation_that_comes_after_its_request_gave_up_is_given_back(tmp_path: Path) -> None:
    async with running(
        tmp_path,
        settings=Settings(
            default_upstream="simulated",
            rate_limit_per_minute=0,
            journal_dir=tmp_path / "kept",
            ledger_timeout_s=0.5,
        ),
    ) as rig:
        await rig.grant("1")
        slow = asyncio.Event()

        async def later(commands: Any) -> None:
            await slow.wait()

        rig.store.before = later
        assert (await rig.chat(body())).status_code == 503
        slow.set()
        while rig.store.count(Release) == 0:
            await asyncio.sleep(0.001)
            await rig.upkeep.replay()
        assert (await rig.balance(), (await rig.wallet()).reserved) == ("1", 0)
        assert (await rig.newest_receipt()).reservation.state is ReservationState.RELEASED


# At the commit.


async def test_a_whole_answer_that_cannot_be_charged_is_withheld_and_charged_later(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        await rig.upkeep.stop()  # What it tells would share its batches, and their fate, with what is asked here.
        rig.store.away = kinds(Commit)
        refused = await rig.chat(body(), Idempotency_Key="k")
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (503, "ledger_unavailable")
        assert TEXT not in refused.text
        assert "charged" in error["message"]
        assert (await rig.wallet()).reserved > 0
        assert rig.journal.waiting == 1
        early = await rig.chat(body(), Idempotency_Key="k")
        assert (early.status_code, early.json()["error"]["code"]) == (409, "request_in_progress")

        await back(rig)
        assert Decimal(1) - Decimal(await rig.balance()) == COST
        assert (await rig.wallet()).reserved == 0
        answer = await rig.chat(body(), Idempotency_Key="k")  # What was paid for can be had.
        assert (answer.status_code, answer.headers["X-Idempotent-Replayed"]) == (200, "true")
        assert answer.json()["choices"][0]["message"]["content"] == TEXT
        assert Decimal(1) - Decimal(await rig.balance()) == COST


async def test_a_stream_that_cannot_be_charged_ends_without_done_and_is_charged_later(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        rig.store.away = kinds(Commit)
        got = await rig.stream(body())
        assert b"[DONE]" not in got.raw
        assert got.error is not None
        assert (got.error["code"], got.text()) == ("ledger_unavailable", TEXT)
        await back(rig)
        await rig.upkeep.replay()  # As often as one likes.
        assert Decimal(1) - Decimal(await rig.balance()) == COST
        assert (await rig.receipt(got)).reservation.commits == 1


async def test_a_commit_whose_answer_was_lost_is_not_charged_again(tmp_path: Path) -> None:
    """The database did it, and broke before it could say so."""
    async with running(tmp_path) as rig:
        await rig.grant("1")

        async def answer_lost(commands: Any) -> None:
            if has(commands, Commit):
                raise StoreUnavailable("the answer was lost")

        rig.store.after = answer_lost
        got = await rig.stream(body())
        assert got.error is not None
        rig.store.after = nothing
        await back(rig)
        assert Decimal(1) - Decimal(await rig.balance()) == COST
        assert (await rig.receipt(got)).reservation.commits == 1


async def test_a_release_is_kept_too(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        rig.store.away = kinds(Release)
        refused = await rig.chat(body(simulate={"status": 500}))
        assert refused.status_code == 502
        assert (await rig.wallet()).reserved > 0
        await back(rig)
        assert (await rig.balance(), (await rig.wallet()).reserved) == ("1", 0)


async def test_a_stream_that_cannot_be_extended_ends_and_what_was_delivered_is_charged(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        rig.store.away = kinds(Extend)
        got = await rig.stream(body(simulate={"tokens": 2_000, "usage": None}))
        assert got.error is not None
        assert got.error["code"] == "ledger_unavailable"
        receipt = await rig.receipt(got)
        assert receipt.usage[0].record.units["output"] == count_text(got.text(), "o200k_base") > 0


async def test_a_stream_that_cannot_be_extended_before_its_first_byte_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("100")
        rig.store.away = kinds(Extend)
        refused = await rig.chat(body(stream=True, simulate={"chunk_bytes": 40_000, "usage": None}))
        assert refused.status_code == 200  # The role has been delivered by then.
        assert (await rig.newest_receipt()).usage[0].record.units == {"input": 8}


# The journal of a process that died.


async def test_the_journal_of_a_dead_process_is_adopted(tmp_path: Path) -> None:
    gate = GatedUpstream()
    async with gated(tmp_path, gate) as rig:
        await rig.grant("1")
        rig.store.away = kinds(Commit)
        gate.allow()
        got = await rig.stream(body())
        (kept,) = (tmp_path / "kept").glob(f"*{SUFFIX}")
        left = kept.read_bytes()
        assert left.count(b"\n") == 1
        other = kept.with_name(f"dead{SUFFIX}")
        other.write_bytes(left + left + left[: len(left) // 2])  # It died while it wrote.
        rig.journal._waiting.clear()
        await back(rig)
        assert not other.exists()
        assert Decimal(1) - Decimal(await rig.balance()) == COST
        assert (await rig.receipt(got)).reservation.commits == 1


async def test_while_the_ledger_is_away_no_journal_is_lost(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        rig.store.away = kinds(Commit)
        await rig.stream(body())
        await rig.upkeep.replay()
        assert rig.journal.waiting == 1
        await back(rig)


class Told:
    """A ledger that only listens."""

    def __init__(self) -> None:
        self.names: list[str] = []

    async def execute(self, command: Any) -> None:
        await asyncio.sleep(0)
        self.names.append(command.reservation.reservation)


def release(name: str) -> Release:
    return Release(id=new_id("cmd"), scope=Scope("ten", "live"), reservation=ReservationRef("ten", "live", name))


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def journal(folder: Path, name: str = "1") -> SettlementJournal:
    return SettlementJournal(folder, name=name, report=lambda message: None)


@pytest.mark.sqlite
async def test_processes_of_one_name_lose_nothing_of_each_other(tmp_path: Path) -> None:
    """As in containers, where each is process 1: the second finds what the first left behind."""
    dead, living, told = journal(tmp_path), journal(tmp_path), Told()
    await dead.keep(release("a"))
    dead.close()
    await living.keep(release("b"))
    await living.replay(told)  # type: ignore[arg-type]
    await living.adopt(told)  # type: ignore[arg-type]
    living.close()
    assert told.names == ["b", "a"]
    assert files(tmp_path) == []


@pytest.mark.sqlite
async def test_what_is_replayed_twice_at_once_is_told_once(tmp_path: Path) -> None:
    kept, told = journal(tmp_path), Told()
    for name in "abc":
        await kept.keep(release(name))
    counts = await asyncio.gather(kept.replay(told), kept.replay(told))  # type: ignore[arg-type]
    assert (told.names, sum(counts)) == (["a", "b", "c"], 3)
    await kept.keep(release("d"))
    kept.close()
    assert (await journal(tmp_path, "2").adopt(told), told.names[3:]) == (1, ["d"])  # type: ignore[arg-type]


@pytest.mark.sqlite
async def test_processes_that_adopt_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    dead, told = journal(tmp_path, "dead"), Told()
    await dead.keep(release("a"))
    dead.close()
    await asyncio.gather(*(journal(tmp_path, name).adopt(told) for name in "1234"))  # type: ignore[arg-type]
    assert told.names == ["a"]
    assert files(tmp_path) == []


@pytest.mark.sqlite
async def test_the_journal_of_a_living_process_is_its_own(tmp_path: Path) -> None:
    living, told = journal(tmp_path), Told()
    await living.keep(release("a"))
    assert await journal(tmp_path, "2").adopt(told) == 0  # type: ignore[arg-type]
    assert await living.adopt(told) == 0  # type: ignore[arg-type]
    living.close()


# Heartbeats, orphans, and late commits.


async def test_a_heartbeat_keeps_a_long_request_alive(tmp_path: Path) -> None:
    gate = GatedUpstream()
    async with gated(tmp_path, gate) as rig:
        await rig.grant("1")
        streaming = asyncio.create_task(rig.stream(body()))
        await gate.reached.wait()
        for _ in range(5):
            rig.clock.pass_s(100)
            await rig.live.heartbeat()
            await rig.upkeep.sweep()
        gate.allow()
        got = await streaming
        assert got.done
        receipt = await rig.receipt(got)
        assert receipt.reservation.state is ReservationState.COMMITTED
        assert [part.record.source for part in receipt.usage] == ["provider"]


@pytest.mark.parametrize("fault", ["the ledger's", "ours"])
async def test_a_heartbeat_is_not_stopped_by_one_hold_that_fails(tmp_path: Path, fault: str) -> None:
    gate = GatedUpstream()
    async with gated(tmp_path, gate) as rig:
        await rig.grant("1")
        streams = [asyncio.create_task(rig.stream(body())) for _ in range(3)]
        while len(rig.live) < 3:  # noqa: ASYNC110 - until all have begun
            await asyncio.sleep(0.001)
        first = next(iter(rig.live._holds.values()))
        if fault == "ours":
            first.progress = lambda: Usage(input=-1)
        else:
            rig.store.away = lambda command: isinstance(command, Extend) and command.reservation == first.reservation
        rig.clock.pass_s(100)
        await rig.live.heartbeat()
        rig.store.away = lambda command: False
        rig.clock.pass_s(50)
        await rig.upkeep.sweep()
        gate.allow()
        states = [(await rig.receipt(await stream)).reservation.commits for stream in streams]
        assert sorted(states) == [1, 1, 2]  # Only the first one's was settled without it.


@pytest.mark.parametrize("stream", [False, True])
async def test_an_orphan_is_settled_for_what_is_known_and_a_late_commit_adds_what_is_missing(
    tmp_path: Path, stream: bool
) -> None:
    """As when this process was stopped, and goes on after its reservation has run out."""
    gate = GatedUpstream()
    async with gated(tmp_path, gate) as rig:
        await rig.grant("1")
        asking = asyncio.create_task(rig.chat(body(stream=stream, max_tokens=80)))
        await gate.reached.wait()
        while rig.store.count(Reserve) == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        rig.clock.pass_s(200)
        await rig.upkeep.sweep()
        receipt = await rig.newest_receipt()
        assert receipt.reservation.state is ReservationState.EXPIRED
        (part,) = receipt.usage
        assert (part.record.source, part.record.ending) == ("partial", "died")
        assert part.record.units == ({"input": 8} if stream else {"input": 8, "output": 20})
        assert Decimal(1) - Decimal(await rig.balance()) > 0

        gate.allow()
        answer = await asking
        assert answer.status_code == 200
        assert Decimal(1) - Decimal(await rig.balance()) == COST
        receipt = await rig.newest_receipt()
        assert receipt.reservation.state is ReservationState.COMMITTED
        if not stream:
            assert Decimal(answer.json()["usage"]["cost"]) == COST


CHEAP = {"prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 1}


async def orphaned(rig: Rig, gate: GatedUpstream, *, simulate: dict[str, Any]) -> asyncio.Task[httpx.Response]:
    """A request under way, for which the sweeper has charged the mark because it took its process for dead."""
    asking = asyncio.create_task(rig.chat(body(max_tokens=80, simulate=simulate)))
    await gate.reached.wait()
    rig.clock.pass_s(200)
    await rig.upkeep.sweep()
    return asking


async def test_a_late_commit_gives_nothing_back(tmp_path: Path) -> None:
    gate = GatedUpstream()
    async with gated(tmp_path, gate) as rig:
        await rig.grant("1")
        asking = await orphaned(rig, gate, simulate={"usage": CHEAP})
        orphan = await rig.balance()
        gate.allow()
        assert (await asking).status_code == 200
        assert await rig.balance() == orphan


async def test_a_settlement_that_waited_gives_back_what_the_mark_took_beyond_it(tmp_path: Path) -> None:
    """The sweeper had charged the mark before the ledger could be told what the work cost, which was less."""
    gate = GatedUpstream()
    async with gated(tmp_path, gate) as rig:
        await rig.grant("1")
        asking = await orphaned(rig, gate, simulate={"usage": CHEAP})
        orphan = Decimal(await rig.balance())
        rig.store.away = kinds(Commit)
        gate.allow()
        assert (await asking).status_code == 503
        await back(rig)
        await rig.upkeep.replay()
        reservation = (await rig.newest_receipt()).reservation
        paid = sum(leg.total for leg in reservation.charged) - sum(reservation.refunded)
        assert Decimal(1) - Decimal(await rig.balance()) == Decimal(paid) / 10**9 == Decimal("0.000015")
        assert Decimal(await rig.balance()) > orphan
        assert rig.store.count(Refund) == 1


async def test_an_orphan_that_was_charged_and_comes_to_nothing_is_refunded(tmp_path: Path) -> None:
    """The sweeper took this process for dead, and charged the mark; then the upstream turned out to have refused."""
    gate = GatedUpstream()
    async with gated(tmp_path, gate) as rig:
        await rig.grant("1")
        asking = await orphaned(rig, gate, simulate={"status": 500})
        assert Decimal(await rig.balance()) < 1
        gate.allow()
        refused = await asking
        assert refused.status_code == 502
        assert "Nothing was charged" in refused.json()["error"]["message"]
        assert await rig.balance() == "1"
        reservation = (await rig.newest_receipt()).reservation
        assert reservation.state is ReservationState.EXPIRED
        assert sum(reservation.refunded) == sum(leg.total for leg in reservation.charged) > 0


async def test_the_refund_of_an_orphan_waits_for_the_ledger_too(tmp_path: Path) -> None:
    gate = GatedUpstream()
    async with gated(tmp_path, gate) as rig:
        await rig.grant("1")
        asking = await orphaned(rig, gate, simulate={"status": 500})
        rig.store.away = kinds(Refund)
        gate.allow()
        assert (await asking).status_code == 502
        assert Decimal(await rig.balance()) < 1
        await back(rig)
        await rig.upkeep.replay()
        assert await rig.balance() == "1"


# A long outage.


async def test_a_ledger_that_hangs_under_load_answers_callers_in_time_and_recovers_by_itself(tmp_path: Path) -> None:
    settings = Settings(
        default_upstream="simulated", rate_limit_per_minute=0, journal_dir=tmp_path / "kept", ledger_timeout_s=0.5
    )
    async with running(tmp_path, settings=settings) as rig:
        await rig.grant("5")
        assert (await rig.chat(body())).status_code == 200
        loop, goes_on = asyncio.get_running_loop(), asyncio.Event()

        async def hang(commands: Any) -> None:
            await goes_on.wait()

        rig.store.before = hang
        tasks_before = len(asyncio.all_tasks())
        took: list[float] = []

        async def ask() -> int:
            began_s = loop.time()
            status = (await rig.chat(body())).status_code
            took.append(loop.time() - began_s)
            return status

        waited = await asyncio.gather(*(ask() for _ in range(90)))
        assert set(waited) == {503}
        assert max(took) < 5
        took.clear()
        for _ in range(20):
            assert await ask() == 503
        assert sum(took) < 20 * 0.25, "whoever comes later is told at once"
        assert rig.ledger.queue_length == 0
        assert len(asyncio.all_tasks()) <= tasks_before + 110  # One for each connection that the client keeps open.
        rig.store.before = nothing
        goes_on.set()
        began_s = loop.time()
        while (await rig.chat(body())).status_code != 200:
            assert loop.time() - began_s < 10
        await back(rig)
        assert Decimal(5) - Decimal(await rig.balance()) == 2 * COST
        assert (await rig.wallet()).reserved == 0


async def test_a_database_that_is_gone_under_load_keeps_nobody_waiting(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("5")
        rig.store.away = lambda command: True
        loop = asyncio.get_running_loop()
        assert (await rig.chat(body())).status_code == 503  # It was tried again, with growing waits.
        longest: list[float] = []
        for _ in range(3):
            began_s = loop.time()
            answers = await asyncio.gather(*(rig.chat(body()) for _ in range(60)))
            longest.append(loop.time() - began_s)
            assert {answer.status_code for answer in answers} == {503}
        assert max(longest) < 3, longest
        assert rig.ledger.queue_length == 0
        rig.store.away = lambda command: False
        assert (await rig.chat(body())).status_code == 200
        await back(rig)
        assert Decimal(5) - Decimal(await rig.balance()) == COST


async def test_bodies_that_wait_for_the_ledger_are_bounded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.proxy.reserving.WAITING_BYTES_MAX", 250)
    async with running(tmp_path) as rig:
        await rig.grant("5")
        goes_on = asyncio.Event()

        async def hang(commands: Any) -> None:
            await goes_on.wait()

        rig.store.before = hang
        first = asyncio.create_task(rig.chat(body()))
        while rig.store.count(Reserve) == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert (await rig.chat(body())).status_code == 503
        goes_on.set()
        assert (await first).status_code == 200
        assert (await rig.chat(body())).status_code == 200


async def test_a_streams_orphan_is_settled_for_its_last_mark(tmp_path: Path) -> None:
    gate = GatedUpstream()
    async with gated(tmp_path, gate) as rig:
        await rig.grant("1")
        streaming = asyncio.create_task(rig.stream(body(simulate={"tokens": 1_000, "usage": None})))
        gate.allow(600)
        while rig.store.count(Extend) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        while gate.permits._value:  # noqa: ASYNC110 - until all that was allowed has passed
            await asyncio.sleep(0.001)
        extended = [command for command in rig.store.seen if isinstance(command, Extend)][-1]
        assert extended.mark is not None
        assert extended.mark.usage is not None
        marked = extended.mark.usage.units["output"]
        assert 500 < marked < 600

        await rig.live.heartbeat()  # It also marks how far the stream has come.
        beat = [command for command in rig.store.seen if isinstance(command, Extend)][-1]
        assert beat.mark is not None
        assert beat.mark.usage is not None
        assert marked < beat.mark.usage.units["output"] <= 600
        rig.clock.pass_s(200)
        await rig.upkeep.sweep()
        (part,) = (await rig.newest_receipt()).usage
        assert part.record.units["output"] == beat.mark.usage.units["output"]
        gate.allow()
        got = await streaming
        total = sum(each.total for each in (await rig.receipt(got)).reservation.charged)
        assert total == 8 * 15_000 + count_text(got.text(), "o200k_base") * 60_000
