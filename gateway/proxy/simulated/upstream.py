"""The simulated upstream in this process: scripts are played without a socket."""

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Final, Self

from gateway.proxy.simulated.respond import respond
from gateway.proxy.simulated.script import Cut, Script, Send, Step, Wait
from gateway.proxy.upstream import (
    FIRST_BYTE_TIMEOUT_S,
    IDLE_TIMEOUT_S,
    Phase,
    UpstreamBodyTooLarge,
    UpstreamBroken,
    UpstreamRequest,
    UpstreamTimeout,
    passable_headers,
)

_SENDS_IN_A_ROW_MAX: Final = 16
"""So many chunks are handed out before other tasks get their turn, as waiting for a socket would give it to them."""


class SimulatedUpstream:
    """An `Upstream` that answers as the request's `simulate` object says (see `Directive`), else plainly."""

    def __init__(
        self,
        *,
        name: str = "simulated",
        first_byte_timeout_s: float = FIRST_BYTE_TIMEOUT_S,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> None:
        self._name = name
        self._first_byte_timeout_s = first_byte_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self.requests_count = 0

    @property
    def name(self) -> str:
        return self._name

    async def send(self, request: UpstreamRequest) -> "SimulatedResponse":
        """See `Upstream.send`."""
        self.requests_count += 1
        script = respond(request.method, request.path, request.body)
        response = SimulatedResponse(script, idle_timeout_s=self._idle_timeout_s)
        await response.begin(timeout_s=self._first_byte_timeout_s)
        return response

    async def close(self) -> None:
        """There is nothing to close."""


class SimulatedResponse:
    """An `UpstreamResponse` from a script."""

    __slots__ = (
        "_bytes_received",
        "_done_at_s",
        "_first",
        "_idle_timeout_s",
        "_sends_in_a_row",
        "_step",
        "_steps",
        "headers",
        "status",
    )

    def __init__(self, script: Script, *, idle_timeout_s: float) -> None:
        self.status = script.status
        self.headers = passable_headers(script.headers)
        self._steps = iter(script.steps)
        self._step: Step | None = None  # Not done yet: waiting may be cancelled, and is then taken up again.
        self._done_at_s = 0.0
        self._first: bytes | None = None
        self._idle_timeout_s = idle_timeout_s
        self._bytes_received = 0
        self._sends_in_a_row = 0

    async def begin(self, *, timeout_s: float) -> None:
        """Play up to the first byte of the body."""
        self._first = await self._next_chunk(timeout_s=timeout_s, phase=Phase.FIRST_BYTE)

    async def read(self, bytes_max: int) -> bytes:
        """See `UpstreamResponse.read`."""
        parts: list[bytes] = []
        size = 0
        async for chunk in self:
            size += len(chunk)
            if size > bytes_max:
                await self.close()
                raise UpstreamBodyTooLarge(bytes_max)
            parts.append(chunk)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def chunks(self) -> AsyncIterator[bytes]:
        """See `UpstreamResponse.chunks`."""
        return self

    async def close(self) -> None:
        """See `UpstreamResponse.close`."""
        self._first = None
        self._step = Cut()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        chunk = self._first
        if chunk is None:
            chunk = await self._next_chunk(timeout_s=self._idle_timeout_s, phase=Phase.IDLE)
        else:
            self._first = None
        if chunk is None:
            raise StopAsyncIteration
        self._bytes_received += len(chunk)
        return chunk

    async def _next_chunk(self, *, timeout_s: float, phase: Phase) -> bytes | None:
        now_s = asyncio.get_running_loop().time
        timeout_at_s = now_s() + timeout_s
        while True:
            step = self._step
            if step is None:
                self._step = step = next(self._steps, None)
                self._done_at_s = now_s() + (step.seconds if isinstance(step, Wait) else math.inf)
            if step is None:
                return None
            if isinstance(step, Cut):
                raise UpstreamBroken(bytes_received=self._bytes_received, reason="the connection was cut")
            if not isinstance(step, Send):
                await asyncio.sleep(min(self._done_at_s, timeout_at_s) - now_s())
                if self._done_at_s > timeout_at_s:
                    raise UpstreamTimeout(phase=phase, bytes_received=self._bytes_received)
                self._sends_in_a_row = 0
            elif self._sends_in_a_row == _SENDS_IN_A_ROW_MAX:
                self._sends_in_a_row = 0
                await asyncio.sleep(0)
            self._step = None
            if isinstance(step, Send):
                self._sends_in_a_row += 1
                return step.data
