"""The ledger is away and the tenant chose to be served all the same: bounded, written down, charged once."""

import asyncio
import errno
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gateway.api.requests import receipt_view
from gateway.billing.budget_book import Subject
from gateway.identity.principals import Principal
from gateway.ids import new_id
from gateway.proxy.journal_file import SUFFIX, JournalFile
from gateway.proxy.open_serving import Allowance, OpenServing
from gateway.proxy.simulated import SimulatedUpstream
from gateway.settings import Settings
from ledger.commands import Commit, Debit, Extend, Release, Reserve
from ledger.model import ReservationState, Scope
from ledger.store.protocol import StoreUnavailable
from pricing.encodings import count_text
from pricing.money import CREDIT
from pricing.periods import Recurrence
from tests.gateway.rig import GatedUpstream, Rig, has, nothing, running
from tests.gateway.test_journey_ledger_away import COST, TEXT, back, body


def serving(rig: Rig) -> OpenServing:
    return rig.proxy._reserving.open


def used(rig: Rig) -> int:
    return serving(rig).allowance.used(Scope(rig.tenant, "live"))


async def principal_of(rig: Rig) -> Principal:
    return await rig.proxy._principals.authenticate(rig.keys["live"].encode())


async def opened(rig: Rig, allowance: str = "5", *, users: tuple[str, ...] = ("alice",)) -> None:
    """The tenant has chosen, its users are known to this process, and the ledger goes away."""
    await rig.tenants.change_tenant(rig.tenant, when_ledger_is_down="open", open_allowance=CREDIT.parse(allowance))
    rig.proxy._principals.invalidate()
    for user in users:
        await rig.customers.resolve(rig.tenant, "live", user)
    rig.store.away = lambda command: True


def upstream_settings(tmp_path: Path, **settings: Any) -> Settings:
    return Settings(default_upstream="simulated", rate_limit_per_minute=0, journal_dir=tmp_path / "kept", **settings)


async def test_what_is_served_without_the_ledger_is_charged_under_its_budgets(tmp_path: Path) -> None:
    """The budget is known though the ledger is away; work that is done is not refused for it, only counted."""
    async with running(tmp_path) as rig:
        await rig.grant("1")
        budgets = rig.proxy._reserving._charging._budgets
        scope = Scope(rig.tenant, "live")
        made = await budgets._book.create(
            scope,
            Subject("app", rig.app),
            amount=CREDIT.parse(str(COST)) - 1,
            recurrence=Recurrence(unit="month"),
            thresholds_bps=(),
            name="",
        )
        await opened(rig)
        assert (await rig.chat(body())).status_code == 200
        await back(rig)
        await rig.upkeep.replay()
        assert Decimal(1) - Decimal(await rig.balance()) == COST
        assert (await budgets.state(made)).remaining == 0
        refused = await rig.chat(body())
        assert (refused.status_code, refused.json()["error"]["budget"]) == (402, made.id)


# Served, and charged once.


async def test_a_whole_answer_is_served_and_charged_when_the_ledger_is_back(tmp_path: Path) -> None:
    async with running(tmp_path, markup_bps=1_000) as rig:
        await rig.grant("1")
        await opened(rig)
        answer = await rig.chat(body())
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"] == TEXT
        cost = COST * Decimal("1.1")
        assert Decimal(answer.json()["usage"]["cost"]) == Decimal(answer.headers["X-Quota-Cost"]) == cost
        assert "balance" not in answer.json()["usage"]
        assert "X-Quota-Balance" not in answer.headers
        assert answer.headers["X-Quota-Ledger"] == "away"
        assert used(rig) == CREDIT.parse(str(cost))
        await back(rig)
        await rig.upkeep.replay()
        assert Decimal(1) - Decimal(await rig.balance()) == cost
        assert used(rig) == 0
        receipt = await rig.receipt(answer)
        (part,) = receipt.usage
        assert receipt.reservation.state is ReservationState.COMMITTED
        assert (part.record.source, part.record.ending) == ("provider", "finished")
        assert part.record.metadata == {"ledger": "away"}
        shown = receipt_view(receipt, answer.headers["X-Request-Id"], await principal_of(rig))
        assert (shown.status, shown.ledger_away, Decimal(shown.charged_decimal)) == ("charged", True, cost)
        assert (await rig.chat(body())).headers["X-Quota-Balance"] == await rig.balance()


async def test_a_stream_is_served_to_its_end_and_charged_when_the_ledger_is_back(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        await opened(rig)
        got = await rig.stream(body(stream_options={"include_usage": True}))
        assert (got.done, got.text()) == (True, TEXT)
        assert Decimal(got.usage["cost"]) == COST
        assert "balance" not in got.usage
        await back(rig)
        assert Decimal(1) - Decimal(await rig.balance()) == COST
        assert (await rig.receipt(got)).usage[0].record.metadata == {"ledger": "away"}


async def test_what_the_blocks_do_not_cover_is_owed(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("0.003")
        await opened(rig)
        assert (await rig.chat(body())).status_code == 200
        await back(rig)
        wallet = await rig.wallet()
        assert Decimal(CREDIT.format(wallet.receivable)) == COST - Decimal("0.003")
        assert Decimal(CREDIT.format(wallet.balance)) == Decimal("0.003") - COST
        refused = await rig.chat(body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (402, "insufficient_credits")
        await rig.grant("1")
        assert (await rig.chat(body())).status_code == 200


async def test_a_refused_request_costs_nothing_and_gives_its_share_back(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        await opened(rig)
        assert (await rig.chat(body(simulate={"status": 500}))).status_code == 502
        assert used(rig) == 0
        await back(rig)
        assert await rig.balance() == "1"


async def test_closed_is_the_default_and_a_choice(tmp_path: Path) -> None:
    upstream = SimulatedUpstream()
    async with running(tmp_path, settings=upstream_settings(tmp_path), upstreams={"simulated": upstream}) as rig:
        await rig.grant("1")
        await opened(rig)
        await rig.tenants.change_tenant(rig.tenant, when_ledger_is_down="closed")
        refused = await rig.chat(body())
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert upstream.requests_count == 0


async def test_a_customer_whom_this_process_does_not_know_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gateway.database import Database, DatabaseUnavailable  # noqa: PLC0415

    async with running(tmp_path) as rig:
        await rig.grant("1")
        await opened(rig)
        assert (await rig.chat(body())).status_code == 200

        def away(self: Database, *_: object) -> Any:
            raise DatabaseUnavailable("the test took the database away")

        monkeypatch.setattr(Database, "read", away)
        known, unknown = await rig.chat(body()), await rig.chat(body(), user="bob")
        monkeypatch.undo()
        assert (known.status_code, unknown.status_code) == (200, 503)
        await back(rig)


# The allowance.


async def test_nothing_is_served_beyond_the_allowance(tmp_path: Path) -> None:
    gate = GatedUpstream()
    async with running(tmp_path, settings=upstream_settings(tmp_path), upstreams={"simulated": gate}) as rig:
        await rig.grant("5")
        await opened(rig, "0.02")
        asked = [asyncio.create_task(rig.chat(body(max_tokens=50))) for _ in range(20)]
        await gate.reached.wait()
        gate.allow()
        answers = await asyncio.gather(*asked)
        served = [answer for answer in answers if answer.status_code == 200]
        refused = [answer for answer in answers if answer.status_code == 503]
        assert 1 <= len(served) < 20
        assert len(served) + len(refused) == 20
        assert len(gate.requests) == len(served)
        assert {answer.json()["error"]["code"] for answer in refused} == {"ledger_unavailable"}
        while (await rig.chat(body(max_tokens=50))).status_code == 200:
            served.append(served[0])
        assert Decimal(CREDIT.format(used(rig))) == COST * len(served)  # What is spent stays spent.
        await back(rig)
        assert Decimal(5) - Decimal(await rig.balance()) == COST * len(served)
        rig.store.away = lambda command: True
        assert (await rig.chat(body(max_tokens=50))).status_code == 200  # And is there again when it is reconciled.
        await back(rig)


async def test_a_stream_that_uses_the_allowance_up_ends_well_formed(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("5")
        await opened(rig, "0.03")
        got = await rig.stream(body(simulate={"tokens": 2_000, "usage": None}))
        assert (got.done, got.finish_reasons) == (True, ["length"])
        assert [chunk["quota"]["code"] for chunk in got.chunks if "quota" in chunk] == ["ledger_unavailable"]
        assert used(rig) <= CREDIT.parse("0.03")
        await back(rig)
        charged = Decimal(5) - Decimal(await rig.balance())
        assert Decimal("0.0295") < charged <= Decimal("0.03")


async def test_what_costs_nothing_leaves_the_allowance_in_order(tmp_path: Path) -> None:
    free = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    async with running(tmp_path) as rig:
        await rig.grant("1")
        await opened(rig)
        answers = [await rig.chat(body(simulate={"text": TEXT, "usage": free}), Idempotency_Key="k") for _ in range(2)]
        assert [answer.headers["X-Quota-Cost"] for answer in answers] == ["0", "0"]
        assert used(rig) == 0
        rig.store.away = lambda command: False
        await rig.journal.replay(rig.ledger)
        await back(rig)
        assert (used(rig), serving(rig)._answers) == (0, {})
        assert await rig.balance() == "1"


def test_requests_that_set_nothing_aside_do_not_disturb_each_other() -> None:
    scope = Scope("ten", "live")
    allowance = Allowance(lambda scope: 0)
    assert [allowance.take(scope, 0, minimum=0, limit=1) for _ in range(2)] == [0, 0]
    for _ in range(2):
        allowance.settle(scope, aside=0, spent=0)
        allowance.reconciled(scope, 0)
    assert allowance.used(scope) == 0


async def test_a_whole_answer_is_clamped_to_what_is_left(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("5")
        await opened(rig, "0.01")
        answer = await rig.chat(body(max_tokens=4_000, simulate={"text": TEXT}))
        assert answer.status_code == 200
        assert 16 <= int(answer.headers["X-Quota-Clamped-Max-Tokens"]) < 4_000
        await back(rig)


# The idempotency key.


async def test_a_key_is_charged_once_within_the_outage_and_after_it(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        await opened(rig)
        first = await rig.chat(body(), Idempotency_Key="k")
        again = await rig.chat(body(), Idempotency_Key="k")
        assert (again.status_code, again.headers["X-Idempotent-Replayed"]) == (200, "true")
        assert again.headers["X-Request-Id"] == first.headers["X-Request-Id"]
        assert again.json() == first.json()
        other = await rig.chat(body(max_tokens=7), Idempotency_Key="k")
        assert other.status_code == 422
        await back(rig)
        after = await rig.chat(body(), Idempotency_Key="k")
        assert (after.status_code, after.headers["X-Idempotent-Replayed"]) == (200, "true")
        assert after.json()["choices"] == first.json()["choices"]
        assert (await rig.chat(body(max_tokens=7), Idempotency_Key="k")).status_code == 422
        assert Decimal(1) - Decimal(await rig.balance()) == COST


async def test_a_key_under_way_and_a_streams_key_answer_as_ever(tmp_path: Path) -> None:
    gate = GatedUpstream()
    async with running(tmp_path, settings=upstream_settings(tmp_path), upstreams={"simulated": gate}) as rig:
        await rig.grant("1")
        await opened(rig)
        streaming = asyncio.create_task(rig.stream(body(), Idempotency_Key="k"))
        await gate.reached.wait()
        early = await rig.chat(body(stream=True), Idempotency_Key="k")
        assert (early.status_code, early.json()["error"]["code"]) == (409, "request_in_progress")
        gate.allow()
        got = await streaming
        late = await rig.chat(body(stream=True), Idempotency_Key="k")
        assert (late.status_code, late.json()["error"]["code"]) == (409, "request_already_completed")
        assert late.json()["error"]["receipt"] == got.headers["X-Request-Id"]
        await back(rig)
        late = await rig.chat(body(stream=True), Idempotency_Key="k")
        assert (late.status_code, late.json()["error"]["code"]) == (409, "request_already_completed")


async def test_a_key_whose_request_failed_is_free_again(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        await opened(rig)
        sent = body(simulate={"status": 500})
        assert (await rig.chat(sent, Idempotency_Key="k")).status_code == 502
        assert (await rig.chat(sent, Idempotency_Key="k")).status_code == 502
        await back(rig)
        assert await rig.balance() == "1"


async def test_a_key_that_another_process_served_meanwhile_is_charged_once(tmp_path: Path) -> None:
    """Each process serves it, since neither knows of the other; the ledger knows of both and charges the first."""
    async with running(tmp_path) as rig:
        await rig.grant("1")
        await opened(rig)
        first = await rig.chat(body(), Idempotency_Key="k")
        serving(rig)._answers.clear()
        second = await rig.chat(body(), Idempotency_Key="k")
        assert first.headers["X-Request-Id"] != second.headers["X-Request-Id"]
        await back(rig)
        assert Decimal(1) - Decimal(await rig.balance()) == COST


async def test_a_key_that_stood_for_another_request_all_along_does_not_make_work_free(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        assert (await rig.chat(body(max_tokens=77), Idempotency_Key="k")).status_code == 200
        await opened(rig)
        assert (await rig.chat(body(), Idempotency_Key="k")).status_code == 200
        await back(rig)
        assert Decimal(1) - Decimal(await rig.balance()) == 2 * COST


async def test_a_key_is_answered_again_before_the_ledger_has_been_told(tmp_path: Path) -> None:
    """The ledger is back and knows nothing of the key yet: it would have the work done, and charged, once more."""
    upstream = SimulatedUpstream()
    async with running(tmp_path, settings=upstream_settings(tmp_path), upstreams={"simulated": upstream}) as rig:
        await rig.grant("1")
        await rig.upkeep.stop()
        await opened(rig)
        first = await rig.chat(body(), Idempotency_Key="k")
        rig.store.away = lambda command: False
        again = await rig.chat(body(), Idempotency_Key="k")
        assert (again.status_code, again.headers["X-Idempotent-Replayed"]) == (200, "true")
        assert again.headers["X-Request-Id"] == first.headers["X-Request-Id"]
        assert upstream.requests_count == 1
        await back(rig)
        assert Decimal(1) - Decimal(await rig.balance()) == COST


@pytest.mark.parametrize("fails", [False, True])
async def test_a_key_whose_other_request_is_under_way_waits_for_its_end(tmp_path: Path, fails: bool) -> None:
    """Another process reserved under the key after the outage. If that one fails, ours is charged: work was done."""
    gate = GatedUpstream()
    async with running(tmp_path, settings=upstream_settings(tmp_path), upstreams={"simulated": gate}) as rig:
        await rig.grant("1")
        await rig.upkeep.stop()  # What it tells would share its batches with what is asked here.
        await opened(rig)
        sent = body(stream=True)
        gate.allow()
        assert (await rig.stream(sent, Idempotency_Key="k")).done
        gate.permits = asyncio.Semaphore(0)
        gate.reached.clear()
        rig.store.away = lambda command: False
        serving(rig)._answers.clear()
        other = asyncio.create_task(rig.stream(sent, Idempotency_Key="k"))
        await gate.reached.wait()
        await rig.upkeep.replay()
        assert (rig.journal.waiting, rig.store.count(Debit)) == (1, 1)
        if fails:
            other.cancel()
            await rig.proxy._reserving._ledger.execute(released(rig))
        gate.allow()
        await asyncio.gather(other, return_exceptions=True)
        await rig.settled()
        await back(rig)
        assert Decimal(1) - Decimal(await rig.balance()) == COST


def released(rig: Rig) -> Release:
    """What gives back what was reserved last."""
    reserved = [command for command in rig.store.seen if isinstance(command, Reserve)]
    return Release(id=new_id("cmd"), scope=reserved[-1].scope, reservation=reserved[-1].reservation)


# A ledger that goes away in the middle.


LONG: dict[str, Any] = {"tokens": 2_000, "usage": None}


async def test_a_stream_that_was_reserved_goes_on_from_the_allowance(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        await opened(rig)
        rig.store.away = lambda command: isinstance(command, Extend | Commit | Debit)
        got = await rig.stream(body(simulate=LONG, stream_options={"include_usage": True}), Idempotency_Key="k")
        assert (got.done, got.finish_reasons) == (True, ["stop"])
        reserved = CREDIT.parse(got.headers["X-Quota-Reserved"])
        cost = CREDIT.parse(got.usage["cost"])
        assert used(rig) == cost - reserved > 0, "what the reservation holds is not taken from the allowance"
        again = await rig.chat(body(simulate=LONG, stream_options={"include_usage": True}, stream=True))
        assert again.status_code == 200
        await back(rig)
        receipt = await rig.receipt(got)
        assert receipt.reservation.state is ReservationState.COMMITTED
        assert receipt.usage[0].record.metadata == {"ledger": "away"}
        assert CREDIT.parse("1") - CREDIT.parse(await rig.balance()) == 2 * cost
        assert (used(rig), serving(rig)._answers) == (0, {})


async def test_what_a_reserved_stream_costs_beyond_the_wallet_is_owed(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("0.03")
        await opened(rig)
        rig.store.away = lambda command: isinstance(command, Extend)
        got = await rig.stream(body(simulate=LONG, stream_options={"include_usage": True}))
        assert (got.done, got.finish_reasons) == (True, ["stop"])
        await back(rig)
        wallet = await rig.wallet()
        assert Decimal(CREDIT.format(wallet.receivable)) == Decimal(got.usage["cost"]) - Decimal("0.03") > 0


async def test_a_reserved_stream_ends_well_formed_when_the_allowance_is_used_up(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        await opened(rig, "0.01")
        rig.store.away = lambda command: isinstance(command, Extend)
        got = await rig.stream(body(simulate=LONG))
        assert (got.done, got.finish_reasons) == (True, ["length"])
        assert [chunk["quota"]["code"] for chunk in got.chunks if "quota" in chunk] == ["ledger_unavailable"]
        most = CREDIT.parse(got.headers["X-Quota-Reserved"]) + CREDIT.parse("0.01")
        await back(rig)
        charged = CREDIT.parse("1") - CREDIT.parse(await rig.balance())
        assert most - CREDIT.parse("0.0005") < charged <= most


async def test_a_reserved_stream_whose_process_dies_on_the_allowance_is_charged_its_mark(tmp_path: Path) -> None:
    gate = GatedUpstream()
    async with running(tmp_path, settings=upstream_settings(tmp_path), upstreams={"simulated": gate}) as rig:
        await rig.grant("1")
        await opened(rig)
        rig.store.away = lambda command: isinstance(command, Extend | Commit | Debit)
        streaming = asyncio.create_task(rig.stream(body(simulate={"tokens": 1_000, "usage": None})))
        gate.allow(600)
        while gate.permits._value:  # noqa: ASYNC110 - until all that was allowed has passed
            await asyncio.sleep(0.001)
        await rig.live.heartbeat()
        (kept,) = (tmp_path / "kept").glob(f"*{SUFFIX}")
        left = kept.with_name(f"dead{SUFFIX}")
        left.write_bytes(kept.read_bytes())
        rig.clock.pass_s(200)
        rig.store.away = lambda command: False
        await rig.upkeep.sweep()  # The reservation runs out first, for an earlier mark.
        while left.exists():
            await rig.upkeep.replay()
        parts = (await rig.ledger.receipt(rig.tenant, "live", _request_of(rig))).usage  # type: ignore[union-attr]
        assert {part.record.ending for part in parts} == {"died"}
        assert 500 < sum(part.record.units.get("output", 0) for part in parts) <= 600
        charged = Decimal(1) - Decimal(await rig.balance())
        gate.allow()
        assert (await streaming).done  # It was not dead after all: it charges nothing twice.
        await back(rig)
        assert Decimal(1) - Decimal(await rig.balance()) == charged


async def test_a_reserved_stream_that_cannot_be_written_down_ends_and_is_charged(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        await opened(rig)
        disk = with_disk(rig, tmp_path)
        disk.full = True
        rig.store.away = lambda command: isinstance(command, Extend | Commit | Debit | Release)
        got = await rig.stream(body(simulate=LONG))
        assert got.error is not None
        assert got.error["code"] == "ledger_unavailable"
        assert [type(command).__name__ for command in rig.journal._waiting.values()] == ["Debit"]
        await back(rig)
        assert (await rig.receipt(got)).usage[0].record.units["output"] == count_text(got.text(), "o200k_base") > 0
        assert (rig.store.count(Release), used(rig)) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_reserved_before_the_ledger_went_away_is_answered(tmp_path: Path, stream: bool) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        await opened(rig)
        rig.store.away = lambda command: isinstance(command, Commit)
        sent = body(stream=stream, stream_options={"include_usage": True} if stream else None)
        got = await rig.stream(sent, Idempotency_Key="k")
        assert got.status == 200
        assert got.done is stream
        again = await rig.chat(sent, Idempotency_Key="k")
        assert again.status_code == (409 if stream else 200)
        assert again.json().get("error", {}).get("code") == ("request_already_completed" if stream else None)
        await back(rig)
        assert Decimal(1) - Decimal(await rig.balance()) == COST
        assert (await rig.chat(sent, Idempotency_Key="k")).status_code == again.status_code
        assert serving(rig)._answers == {}


# Reservations in doubt.


async def test_a_reservation_that_was_made_though_nobody_could_tell_is_settled_with_the_request(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        await opened(rig)
        rig.store.away = lambda command: False

        async def answer_lost(commands: Any) -> None:
            if has(commands, Reserve):
                raise StoreUnavailable("the answer was lost")

        rig.store.after = answer_lost
        answer = await rig.chat(body(), Idempotency_Key="k")
        rig.store.after = nothing
        assert (answer.status_code, answer.headers["X-Quota-Ledger"]) == (200, "away")
        await back(rig)
        assert Decimal(1) - Decimal(await rig.balance()) == COST
        assert (await rig.wallet()).reserved == 0
        again = await rig.chat(body(), Idempotency_Key="k")
        assert (again.status_code, again.headers["X-Idempotent-Replayed"]) == (200, "true")


async def test_a_refused_requests_reservation_in_doubt_is_given_back(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")

        async def answer_lost(commands: Any) -> None:
            if has(commands, Reserve):
                raise StoreUnavailable("the answer was lost")

        rig.store.after = answer_lost
        assert (await rig.chat(body())).status_code == 503
        rig.store.after = nothing
        await back(rig)
        assert (await rig.balance(), (await rig.wallet()).reserved) == ("1", 0)


# The disk.


class Disk:
    """Writes as the disk does, until a test lets it fail."""

    def __init__(self) -> None:
        self.full = False

    def write(self, descriptor: int, data: bytes) -> int:
        if self.full:
            os.write(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(descriptor, data)


def with_disk(rig: Rig, tmp_path: Path) -> Disk:
    disk = Disk()
    rig.journal._file = JournalFile(tmp_path / "kept", name="failing", write=disk.write)
    return disk


async def test_nothing_is_forwarded_when_the_intent_cannot_be_written(tmp_path: Path) -> None:
    upstream = SimulatedUpstream()
    async with running(tmp_path, settings=upstream_settings(tmp_path), upstreams={"simulated": upstream}) as rig:
        await rig.grant("1")
        await opened(rig)
        disk = with_disk(rig, tmp_path)
        disk.full = True
        for stream in (False, True):
            refused = await rig.chat(body(stream=stream))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "ledger_unavailable")
        assert (upstream.requests_count, used(rig)) == (0, 0)
        disk.full = False
        assert (await rig.chat(body())).status_code == 200
        await back(rig)
        assert Decimal(1) - Decimal(await rig.balance()) == COST


@pytest.mark.parametrize("stream", [False, True])
async def test_a_settlement_that_cannot_be_written_withholds_the_end(tmp_path: Path, stream: bool) -> None:
    gate = GatedUpstream()
    async with running(tmp_path, settings=upstream_settings(tmp_path), upstreams={"simulated": gate}) as rig:
        await rig.grant("1")
        await opened(rig)
        disk = with_disk(rig, tmp_path)
        asked = asyncio.create_task(rig.stream(body(stream=stream)))
        await gate.reached.wait()
        disk.full = True
        gate.allow()
        got = await asked
        assert b"[DONE]" not in got.raw
        assert b"ledger_unavailable" in got.raw
        if not stream:
            assert got.status == 503
        (kept,) = (tmp_path / "kept").glob(f"failing*{SUFFIX}")
        assert kept.read_bytes().count(b"\n") == 1  # The intent; no half of a line behind it.
        await back(rig)  # This process lives, so it knows better than the intent.
        assert Decimal(1) - Decimal(await rig.balance()) == COST


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reserved_request_that_can_be_neither_charged_nor_journalled_is_charged_its_mark(
    tmp_path: Path, stream: bool
) -> None:
    gate = GatedUpstream()
    async with running(tmp_path, settings=upstream_settings(tmp_path), upstreams={"simulated": gate}) as rig:
        await rig.grant("1")
        disk = with_disk(rig, tmp_path)
        asked = asyncio.create_task(rig.stream(body(stream=stream, max_tokens=80)))
        await gate.reached.wait()
        rig.store.away = lambda command: isinstance(command, Commit)
        disk.full = True
        gate.allow()
        got = await asked
        assert b"[DONE]" not in got.raw
        assert b"ledger_unavailable" in got.raw
        if not stream:
            assert got.status == 503
        rig.journal._waiting.clear()  # As if this process had died now.
        rig.store.away = lambda command: False
        rig.clock.pass_s(200)
        await rig.upkeep.sweep()
        receipt = await rig.newest_receipt()
        assert receipt.reservation.state is ReservationState.EXPIRED
        assert receipt.usage[0].record.ending == "died"
        assert Decimal(1) - Decimal(await rig.balance()) > 0


# Crashes.


async def test_a_crash_in_the_middle_charges_the_last_mark(tmp_path: Path) -> None:
    gate = GatedUpstream()
    async with running(tmp_path, settings=upstream_settings(tmp_path), upstreams={"simulated": gate}) as rig:
        await rig.grant("1")
        await opened(rig)
        streaming = asyncio.create_task(rig.stream(body(simulate={"tokens": 1_000, "usage": None})))
        gate.allow(600)
        while gate.permits._value:  # noqa: ASYNC110 - until all that was allowed has passed
            await asyncio.sleep(0.001)
        await rig.live.heartbeat()
        (kept,) = (tmp_path / "kept").glob(f"*{SUFFIX}")
        left = kept.with_name(f"dead{SUFFIX}")
        left.write_bytes(kept.read_bytes())
        assert left.read_bytes().count(b"\n") >= 3  # Each extension is another intent, and the heartbeat too.
        rig.store.away = lambda command: False
        while left.exists():
            await rig.upkeep.replay()
        (part,) = (await rig.ledger.receipt(rig.tenant, "live", _request_of(rig))).usage  # type: ignore[union-attr]
        assert (part.record.ending, part.record.source) == ("died", "partial")
        assert 500 < part.record.units["output"] <= 600
        charged = Decimal(1) - Decimal(await rig.balance())
        gate.allow()
        assert (await streaming).done  # It was not dead after all: it charges nothing twice.
        await back(rig)
        assert Decimal(1) - Decimal(await rig.balance()) == charged


def _request_of(rig: Rig) -> str:
    reserved = [command for command in rig.store.seen if isinstance(command, Reserve)]
    assert reserved[-1].request_id is not None
    return reserved[-1].request_id


async def test_a_crash_after_the_end_charges_what_it_cost(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        await opened(rig)
        answer = await rig.chat(body())
        await rig.chat(body(simulate={"status": 500}))  # Released: nothing is charged of it.
        (kept,) = (tmp_path / "kept").glob(f"*{SUFFIX}")
        kept.with_name(f"dead{SUFFIX}").write_bytes(kept.read_bytes())
        rig.journal._waiting.clear()
        await back(rig)
        await rig.upkeep.replay()
        assert Decimal(1) - Decimal(await rig.balance()) == COST
        assert (await rig.receipt(answer)).reservation.commits == 1


async def test_what_a_dead_process_has_spent_is_spent_for_the_one_that_adopts_it(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        await opened(rig, "0.02")
        assert (await rig.chat(body())).status_code == 200
        (kept,) = (tmp_path / "kept").glob(f"*{SUFFIX}")
        kept.with_name(f"dead{SUFFIX}").write_bytes(kept.read_bytes())
        await rig.upkeep.replay()
        assert used(rig) == 2 * CREDIT.parse(str(COST))
        await back(rig)
        await rig.upkeep.replay()
        assert used(rig) == 0
        assert Decimal(1) - Decimal(await rig.balance()) == COST


async def test_the_ledger_is_told_of_many_at_once_and_of_each_once(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("5")
        await opened(rig, "5")
        answers = await asyncio.gather(*(rig.chat(body(max_tokens=60)) for _ in range(150)))
        assert {answer.status_code for answer in answers} == {200}
        assert rig.journal.waiting == 150
        await back(rig)
        assert Decimal(5) - Decimal(await rig.balance()) == COST * 150
        assert rig.store.count(Extend) == 0
        debits = {command.id for command in rig.store.seen if isinstance(command, Debit)}
        assert len(debits) == 150
