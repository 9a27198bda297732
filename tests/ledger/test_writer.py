"""Group commit: what waits is one batch, answers come after its commit, and one bad command fails alone."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from ledger.commands import AnyCommand
from ledger.errors import LedgerUnavailable
from ledger.outcomes import Applied, Changed, Outcome, Reason, Rejected
from ledger.store.protocol import StoreUnavailable
from ledger.writer import PROBE_S, RETRY_WAITS_S, SHARED_MIN, Writer
from tests.ledger.rig import Say

DONE = Applied(result=Changed())


class FakeStore:
    """Answers when the test lets it. *trouble* decides for each batch whether it fails."""

    def __init__(self) -> None:
        self.batches: list[list[AnyCommand]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.trouble: Callable[[Sequence[AnyCommand]], Exception | None] = lambda commands: None
        self.outcome: Callable[[AnyCommand], Outcome] = lambda command: DONE

    async def run_batch(self, commands: Sequence[AnyCommand]) -> list[Outcome]:
        self.batches.append(list(commands))
        await self.open.wait()
        problem = self.trouble(commands)
        if problem is not None:
            raise problem
        return [self.outcome(command) for command in commands]

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


class Naps:
    """Stands in for sleeping."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.taken.append(seconds)


@pytest.fixture
async def store() -> FakeStore:
    return FakeStore()


async def settled(*tasks: Awaitable[Outcome]) -> list[Outcome | BaseException]:
    return await asyncio.gather(*tasks, return_exceptions=True)


def start(writer: Writer, *commands: AnyCommand) -> list["asyncio.Task[Outcome]"]:
    return [asyncio.create_task(writer.submit(command)) for command in commands]


async def turns(count: int = 10) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_what_waits_while_a_batch_commits_is_the_next_batch(store: FakeStore, say: Say) -> None:
    writer = Writer(store.run_batch)
    store.open.clear()
    first = start(writer, say.release("1"))
    await turns()
    rest = start(writer, *(say.release(f"{number}") for number in range(2, 7)))
    await turns()
    store.open.set()
    await settled(*first, *rest)
    assert store.sizes == [1, 5]


async def test_commands_that_are_submitted_together_are_one_batch_in_their_order(store: FakeStore, say: Say) -> None:
    commands = [say.release(f"{number}") for number in range(6)]
    await settled(*start(Writer(store.run_batch), *commands))
    assert store.batches == [commands]


async def test_a_batch_has_a_limit(store: FakeStore, say: Say) -> None:
    await settled(*start(Writer(store.run_batch, batch_max=4), *(say.release(f"{number}") for number in range(10))))
    assert store.sizes == [4, 4, 2]


async def test_a_store_that_takes_two_batches_at_once_gets_what_waits_in_halves(store: FakeStore, say: Say) -> None:
    writer = Writer(store.run_batch, at_once=2)
    store.open.clear()
    together = start(writer, *(say.release(f"{number}") for number in range(2 * SHARED_MIN)))
    await turns()
    assert store.sizes == [SHARED_MIN, SHARED_MIN]
    later = start(writer, say.release("later"))
    await turns()
    assert store.sizes == [SHARED_MIN, SHARED_MIN], "not more than two"
    store.open.set()
    assert await settled(*together, *later) == [DONE] * (2 * SHARED_MIN + 1)
    few = start(writer, *(say.release(f"few {number}") for number in range(SHARED_MIN - 1)))
    await settled(*few)
    assert store.sizes[2:] == [1, SHARED_MIN - 1], "a few are not worth two commits"
    await writer.close()


async def test_nobody_is_answered_before_the_commit(store: FakeStore, say: Say) -> None:
    store.open.clear()
    tasks = start(Writer(store.run_batch), say.release("1"), say.release("2"))
    await turns(50)
    assert store.sizes == [2]
    assert not any(task.done() for task in tasks)
    store.open.set()
    assert await settled(*tasks) == [DONE, DONE]


async def test_a_refusal_is_an_answer_like_any_other(store: FakeStore, say: Say) -> None:
    refused, applied = say.release("1"), say.release("2")
    no = Rejected(Reason.NOT_FOUND)
    store.outcome = lambda command: no if command == refused else DONE
    assert await settled(*start(Writer(store.run_batch), refused, applied)) == [no, DONE]
    assert store.sizes == [2]


# Failures.


async def test_a_command_that_cannot_be_written_fails_alone(store: FakeStore, say: Say) -> None:
    commands = [say.release(f"{number}") for number in range(16)]
    store.trouble = lambda batch: ValueError("cannot be written") if commands[11] in batch else None
    outcomes = await settled(*start(Writer(store.run_batch), *commands))
    assert isinstance(outcomes.pop(11), ValueError)
    assert outcomes == [DONE] * 15
    assert store.sizes == [16, 8, 8, 4, 4, 2, 2, 1, 1], "halves: no other command ran twice with success"
    answered = [command for batch in store.batches if commands[11] not in batch for command in batch]
    assert sorted(command.id for command in answered) == [command.id for command in commands if command != commands[11]]


async def test_a_store_that_is_unavailable_for_a_moment_is_tried_again(store: FakeStore, say: Say) -> None:
    naps = Naps()
    troubles = [StoreUnavailable("busy"), StoreUnavailable("busy"), None]
    store.trouble = lambda batch: troubles.pop(0)
    outcomes = await settled(*start(Writer(store.run_batch, sleep=naps), say.release("1"), say.release("2")))
    assert outcomes == [DONE, DONE]
    assert store.sizes == [2, 2, 2]
    assert all(wait / 2 <= nap <= wait for nap, wait in zip(naps.taken, RETRY_WAITS_S, strict=False))


async def test_an_outage_fails_all_after_a_bounded_number_of_tries(store: FakeStore, say: Say) -> None:
    store.trouble = lambda batch: StoreUnavailable("gone")
    writer = Writer(store.run_batch, sleep=Naps())
    outcomes = await settled(*start(writer, *(say.release(f"{number}") for number in range(64))))
    assert all(isinstance(outcome, LedgerUnavailable) for outcome in outcomes)
    assert store.sizes == [64] * (len(RETRY_WAITS_S) + 1) + [32, 32]
    store.trouble = lambda batch: None
    assert await writer.submit(say.release("later")) == DONE


async def test_a_command_that_always_finds_the_store_unavailable_fails_alone(store: FakeStore, say: Say) -> None:
    commands = [say.release(f"{number}") for number in range(8)]
    store.trouble = lambda batch: StoreUnavailable("too big") if commands[3] in batch else None
    outcomes = await settled(*start(Writer(store.run_batch, sleep=Naps()), *commands))
    assert isinstance(outcomes.pop(3), LedgerUnavailable)
    assert outcomes == [DONE] * 7


async def test_during_an_outage_single_attempts_find_out_whether_it_is_over(store: FakeStore, say: Say) -> None:
    naps = Naps()
    store.trouble = lambda batch: StoreUnavailable("gone")
    writer = Writer(store.run_batch, sleep=naps, batch_max=2)
    await settled(*start(writer, say.release("first")))
    assert writer.away
    store.batches.clear()
    naps.taken.clear()
    outcomes = await settled(*start(writer, *(say.release(f"{number}") for number in range(5))))
    assert all(isinstance(outcome, LedgerUnavailable) for outcome in outcomes)
    assert [outcome.in_doubt for outcome in outcomes] == [True, True, False, False, False]  # type: ignore[union-attr]
    assert (store.sizes, naps.taken) == ([2], [PROBE_S]), "nobody waits for a second attempt"
    store.trouble = lambda batch: None
    assert await settled(*start(writer, *(say.release(f"{number}") for number in range(5, 9)))) == [DONE] * 4
    assert not writer.away
    assert naps.taken == [PROBE_S] * 2, "after the first success there is no pause any more"


async def test_a_command_that_breaks_the_probe_is_found_like_any_other(store: FakeStore, say: Say) -> None:
    store.trouble = lambda batch: StoreUnavailable("gone")
    writer = Writer(store.run_batch, sleep=Naps())
    await settled(*start(writer, say.release("first")))
    commands = [say.release(f"{number}") for number in range(4)]
    store.trouble = lambda batch: ValueError("cannot be written") if commands[1] in batch else None
    outcomes = await settled(*start(writer, *commands))
    assert isinstance(outcomes.pop(1), ValueError)
    assert outcomes == [DONE] * 3
    assert not writer.away


async def test_a_store_that_hangs_turns_callers_away_at_once_when_others_have_waited_enough(
    store: FakeStore, say: Say
) -> None:
    store.open.clear()
    writer = Writer(store.run_batch, wait_s=0.01)
    (hung,) = await settled(*start(writer, say.release("hung")))
    assert isinstance(hung, LedgerUnavailable)
    assert hung.in_doubt
    with pytest.raises(LedgerUnavailable, match="has not answered") as turned_away:
        await writer.submit(say.release("late"))
    assert not turned_away.value.in_doubt
    assert writer.queue_length == 0
    store.open.set()
    while await settled(*start(writer, say.release("again"))) != [DONE]:  # noqa: ASYNC110 - until the batch has landed
        await asyncio.sleep(0)
    await writer.close()


# Bounds.


async def test_the_queue_has_a_bound(store: FakeStore, say: Say) -> None:
    store.open.clear()
    writer = Writer(store.run_batch, queue_max=3)
    taken = start(writer, say.release("0"))
    await turns()
    waiting = start(writer, *(say.release(f"{number}") for number in range(1, 4)))
    await turns()
    assert writer.queue_length == 3
    with pytest.raises(LedgerUnavailable, match="3 commands wait"):
        await writer.submit(say.release("4"))
    store.open.set()
    assert await settled(*taken, *waiting) == [DONE] * 4


async def test_a_caller_that_gave_up_waiting_withdraws_its_command(store: FakeStore, say: Say) -> None:
    store.open.clear()
    writer = Writer(store.run_batch)
    first = start(writer, say.release("first"))
    await turns()
    gone, stays = start(writer, say.release("gone"), say.release("stays"))
    await turns()
    gone.cancel()
    await turns()
    assert writer.queue_length == 1
    store.open.set()
    assert await settled(*first, stays) == [DONE, DONE]
    assert [command.reservation.reservation for command in store.batches[1]] == ["rsv_stays"]  # type: ignore[union-attr]


async def test_the_outcome_of_an_abandoned_command_goes_to_the_callback(store: FakeStore, say: Say) -> None:
    abandoned: list[tuple[AnyCommand, Outcome]] = []
    store.open.clear()
    writer = Writer(store.run_batch, abandoned=lambda command, outcome: abandoned.append((command, outcome)))
    gone, stays = say.release("gone"), say.release("stays")
    tasks = start(writer, gone, stays)
    await turns()
    tasks[0].cancel()
    await turns()
    store.open.set()
    await settled(*tasks)
    assert tasks[0].cancelled()
    assert tasks[1].result() == DONE
    assert abandoned == [(gone, DONE)]


async def test_a_cancel_that_falls_together_with_the_answer_is_abandoned_too(store: FakeStore, say: Say) -> None:
    abandoned: list[AnyCommand] = []
    store.open.clear()
    writer = Writer(store.run_batch, abandoned=lambda command, outcome: abandoned.append(command))
    command = say.release("1")
    (task,) = start(writer, command)
    await turns()
    store.open.set()
    while not task.done():
        waiter = task._fut_waiter  # type: ignore[attr-defined]
        if waiter is not None and waiter.done():
            task.cancel()  # The answer is there, and the caller has not run since.
        await asyncio.sleep(0)
    assert task.cancelled()
    assert abandoned == [command]


async def test_a_wait_has_an_end(store: FakeStore, say: Say) -> None:
    abandoned: list[AnyCommand] = []
    store.open.clear()
    writer = Writer(store.run_batch, wait_s=0.01, abandoned=lambda command, outcome: abandoned.append(command))
    taken, queued = say.release("taken"), say.release("queued")
    first = start(writer, taken)
    await turns()
    outcomes = await settled(*first, *start(writer, queued))
    assert all(isinstance(outcome, LedgerUnavailable) for outcome in outcomes)
    store.open.set()
    await writer.close()
    assert abandoned == [taken]
    assert store.sizes == [1], "what was queued has been withdrawn"


# The end.


async def test_closing_answers_everybody_first_and_takes_no_more(store: FakeStore, say: Say) -> None:
    store.open.clear()
    writer = Writer(store.run_batch, batch_max=2)
    tasks = start(writer, *(say.release(f"{number}") for number in range(5)))
    await turns()
    closing = asyncio.create_task(writer.close())
    await turns()
    assert not closing.done()
    with pytest.raises(LedgerUnavailable, match="shut down"):
        await writer.submit(say.release("late"))
    store.open.set()
    await closing
    assert await settled(*tasks) == [DONE] * 5
