"""Group commit: one writer a process takes all commands that wait, as one batch, and answers after its commit.

How it works. There is no timer: while a batch commits, the next one gathers. A store may take more than one batch at
once: what waits is shared out then, so that one is decided while the other is written. A refusal is a value in its
batch. When the store is unavailable the batch is tried again, a few times with growing waits; then, and at once when
the failure is not the store's, it is cut in halves, so that one command that cannot be written fails alone. Two halves
that find the store unavailable tell of an outage: then all fail, and nobody waits for more of it. During an outage one
batch every ``PROBE_S`` finds out, with a single attempt, whether it is over; whoever waits by then fails with it. A
store that answers nothing at all for longer than a caller waits turns further callers away at once.
"""

import asyncio
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from ledger.commands import AnyCommand
from ledger.errors import LedgerUnavailable
from ledger.outcomes import Outcome
from ledger.store.protocol import StoreUnavailable

BATCH_MAX = 256
"""Most commands in one batch."""

SHARED_MIN = 16
"""From how many commands on two batches at once are worth the second commit."""

QUEUE_MAX = 10_000
"""Most commands that wait. More are turned away: an outage must not fill the memory."""

WAIT_S = 10.0
"""How long a caller waits for its answer."""

RETRY_WAITS_S = (0.02, 0.1, 0.5)
"""The waits before trying a batch again; each is drawn from half of it to all of it."""

PROBE_S = 0.25
"""During an outage, the pause before another batch tries whether it is over."""


@dataclass(frozen=True, slots=True)
class BatchRun:
    """One attempt to write a batch, for those who watch the ledger.

    Attributes:
        outcomes: None when it failed as a whole.
        waited_s: how long the command that came first had waited.
        took_s: until it was durable, or had failed.
    """

    commands: Sequence[AnyCommand]
    outcomes: Sequence[Outcome] | None
    waited_s: float
    took_s: float


RunBatch = Callable[[Sequence[AnyCommand]], Awaitable[list[Outcome]]]
Abandoned = Callable[[AnyCommand, Outcome], None]
Observed = Callable[[BatchRun], None]


@dataclass(eq=False, slots=True)
class _Waiting:
    command: AnyCommand
    answer: asyncio.Future[Outcome]
    since_s: float


class Writer:
    """Hands commands to *run_batch* in batches, in the order in which they came.

    Args:
        at_once: how many batches may be under way; what waits goes into the next one that begins.
        abandoned: gets the outcome of a command whose caller had stopped waiting when its batch was under way already.
        observed: is told of each attempt to write a batch; it must not fail.
    """

    def __init__(
        self,
        run_batch: RunBatch,
        *,
        at_once: int = 1,
        abandoned: Abandoned | None = None,
        observed: Observed | None = None,
        batch_max: int = BATCH_MAX,
        queue_max: int = QUEUE_MAX,
        wait_s: float = WAIT_S,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._run_batch = run_batch
        self._abandoned = abandoned
        self._observed = observed
        self._batch_max = batch_max
        self._queue_max = queue_max
        self._wait_s = wait_s
        self._sleep = sleep
        self._queue: OrderedDict[_Waiting, None] = OrderedDict()
        self._at_once = at_once
        self._working: set[asyncio.Task[None]] = set()
        self._gathering = False
        self._closed = False
        self._away = False
        self._running_since_s: list[float] = []

    @property
    def away(self) -> bool:
        """Whether the last batch found no store."""
        return self._away

    @property
    def queue_length(self) -> int:
        return len(self._queue)

    async def submit(self, command: AnyCommand) -> Outcome:
        """The command's outcome, after it is durable.

        A caller that gives up before its command was taken withdraws it. Later, the command still happens.

        Raises:
            LedgerUnavailable: the queue is full, the writer closed, the wait too long, or the store failed. After too
                long a wait it is not known whether the command will happen; trying it again as it is is safe.
        """
        if self._closed:
            raise LedgerUnavailable("the ledger is shut down")
        if self._stalled:
            raise LedgerUnavailable(f"the store has not answered for {self._wait_s} s")
        if len(self._queue) >= self._queue_max:
            raise LedgerUnavailable(f"{self._queue_max} commands wait already")
        waiting = _Waiting(command, asyncio.get_running_loop().create_future(), monotonic())
        self._queue[waiting] = None
        self._begin()
        try:
            async with asyncio.timeout(self._wait_s):
                return await waiting.answer
        except TimeoutError:
            if waiting.answer.cancelled():
                taken = waiting not in self._queue
                raise LedgerUnavailable(f"no answer within {self._wait_s} s", in_doubt=taken) from None
            return waiting.answer.result()  # The answer and the end of the wait fell together.
        except asyncio.CancelledError:
            if not waiting.answer.cancelled() and waiting.answer.exception() is None:
                self._abandon([(command, waiting.answer.result())])
            raise
        finally:
            self._queue.pop(waiting, None)

    @property
    def _stalled(self) -> bool:
        """Whether even the batch that began last is answered nothing."""
        since_s = max(self._running_since_s, default=None)
        return since_s is not None and asyncio.get_running_loop().time() - since_s > self._wait_s

    async def close(self) -> None:
        """Take no more, and wait until everything that waits has its answer."""
        self._closed = True
        while self._working:
            await asyncio.wait(self._working)

    def _begin(self) -> None:
        """Begin another batch with what waits, if one may begin and none is about to. One alone probes an outage."""
        at_once = 1 if self._away else self._at_once
        if self._queue and not self._gathering and len(self._working) < at_once:
            self._gathering = True
            self._working.add(asyncio.create_task(self._work(), name="ledger-writer"))

    async def _work(self) -> None:
        """Run batches until nothing waits."""
        try:
            while self._queue:
                self._gathering = True
                if self._away:
                    await self._sleep(PROBE_S)
                else:
                    await asyncio.sleep(0)  # Let whoever is ready to submit join this batch.
                self._gathering = False
                taken = [self._queue.popitem(last=False)[0] for _ in range(self._share())]
                if self._away:
                    await self._probe(taken)
                else:
                    self._begin()
                    await self._run_with_retries(taken)
        finally:
            # At once: whoever submits next must not count on a task that has ended.
            self._working = {task for task in self._working if task is not asyncio.current_task()}

    def _share(self) -> int:
        """How many of those that wait go into one batch.

        Callers that are answered together come back together. Where another batch may begin as well, half is left to
        it, or the two would never be under way at the same time.
        """
        waiting = len(self._queue)
        if waiting >= SHARED_MIN and not self._away:
            waiting = -(-waiting // (self._at_once - len(self._working) + 1))
        return min(waiting, self._batch_max)

    async def _probe(self, batch: list[_Waiting]) -> None:
        """Find out whether an outage is over; if it is not, nobody waits for the next attempt."""
        failure = await self._run(batch)
        if isinstance(failure, StoreUnavailable):
            self._fail(batch, failure)
            waiting = list(self._queue)
            self._queue.clear()
            self._fail(waiting, failure, tried=False)
        elif failure is not None:
            await self._bisect(batch, failure)

    async def _run_with_retries(self, batch: list[_Waiting]) -> None:
        for wait_s in RETRY_WAITS_S:
            failure = await self._run(batch)
            if failure is None:
                return
            if not isinstance(failure, StoreUnavailable):
                break
            await self._sleep(wait_s * random.uniform(0.5, 1.0))  # noqa: S311  (spreads the load, hides nothing)
        else:
            failure = await self._run(batch)
        if failure is not None:
            self._away = isinstance(failure, StoreUnavailable)
            await self._bisect(batch, failure)

    async def _bisect(self, batch: list[_Waiting], failure: Exception) -> None:
        """Run the halves of a batch that failed with *failure*, each on its own."""
        if len(batch) == 1:
            self._fail(batch, failure)
            return
        middle = len(batch) // 2
        halves = (batch[:middle], batch[middle:])
        failures = [await self._run(half) for half in halves]
        if all(isinstance(each, StoreUnavailable) for each in failures):
            self._fail(batch, failure)
            return
        for half, its_failure in zip(halves, failures, strict=True):
            if its_failure is not None:
                await self._bisect(half, its_failure)

    async def _run(self, batch: list[_Waiting]) -> Exception | None:
        """Run *batch* and answer everybody in it; or the failure, and nobody has an answer."""
        if not batch:
            return None
        since_s = asyncio.get_running_loop().time()
        self._running_since_s.append(since_s)
        commands = [waiting.command for waiting in batch]
        began_s = monotonic()
        try:
            outcomes = await self._run_batch(commands)
        except Exception as failure:
            self._observe(batch, commands, None, began_s)
            return failure
        finally:
            self._running_since_s.remove(since_s)
        self._away = False
        self._observe(batch, commands, outcomes, began_s)
        abandoned = []
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if waiting.answer.done():
                abandoned.append((waiting.command, outcome))
            else:
                waiting.answer.set_result(outcome)
        self._abandon(abandoned)
        return None

    def _observe(
        self, batch: list[_Waiting], commands: list[AnyCommand], outcomes: list[Outcome] | None, began_s: float
    ) -> None:
        if self._observed is not None:
            self._observed(BatchRun(commands, outcomes, began_s - batch[0].since_s, monotonic() - began_s))

    def _abandon(self, outcomes: list[tuple[AnyCommand, Outcome]]) -> None:
        if self._abandoned is not None:
            for command, outcome in outcomes:
                self._abandoned(command, outcome)

    def _fail(self, batch: list[_Waiting], failure: Exception, *, tried: bool = True) -> None:
        """Tell the callers. A failure that is not the store's is a bug of ours, and is shown as it is.

        A commit whose answer is lost looks like one that failed, so whatever was *tried* is in doubt.
        """
        for waiting in batch:
            if waiting.answer.done():
                continue
            if isinstance(failure, StoreUnavailable):
                unavailable = LedgerUnavailable(str(failure), in_doubt=tried)
                unavailable.__cause__ = failure
                waiting.answer.set_exception(unavailable)
            else:
                waiting.answer.set_exception(failure)
