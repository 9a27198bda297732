"""Work that is cancelled wherever it waits, as whoever asked for it goes away or the process stops."""

import asyncio
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any, Literal

Moment = Literal["at once", "as the answer comes", "again and again"]
"""Of a wait, when it is cancelled: before what is waited for is done, or just after; or with all waits that follow."""

WAITS_MAX = 1_000
"""More than there are: a test must end."""


class Dying:
    """*work*, of which nothing goes on after it has waited for the *at*-th time."""

    def __init__(self, work: Coroutine[Any, Any, Any], *, at: int, moment: Moment = "at once") -> None:
        self._work = work
        self._at = at
        self._moment = moment
        self.waits = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        waiting = self._work.__await__()
        task = asyncio.current_task()
        assert task is not None
        go_on: Callable[[], Any] = partial(waiting.send, None)
        while True:
            try:
                awaited = go_on()
            except StopIteration as end:
                return end.value
            self.waits += 1
            if self.waits == self._at or (self.waits > self._at and self._moment == "again and again"):
                self._end(task, awaited)
            try:
                go_on = partial(waiting.send, (yield awaited))
            except BaseException as error:
                go_on = partial(waiting.throw, error)

    def _end(self, task: asyncio.Task[Any], awaited: Any) -> None:
        if self._moment == "as the answer comes" and awaited is not None:
            awaited.add_done_callback(lambda _: task.cancel())
        else:
            task.cancel()


async def dies(work: Coroutine[Any, Any, Any], *, at: int, moment: Moment = "at once") -> bool:
    """Do *work* up to its *at*-th wait; False when it was done before."""

    async def dying() -> Any:
        return await Dying(work, at=at, moment=moment)

    task = asyncio.create_task(dying())
    await asyncio.wait((task,))
    if not task.cancelled():
        task.result()
    return task.cancelled()
