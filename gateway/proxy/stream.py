"""A streamed answer: passed on as it comes, covered before it is delivered, charged before its last bytes leave."""

import asyncio
from collections.abc import Callable

from gateway.errors import ApiError, charge_waits, ledger_unavailable, upstream_error, upstream_timeout
from gateway.proxy.answer import quota_of
from gateway.proxy.exchange import Exchange
from gateway.proxy.hold import Charged, Hold
from gateway.proxy.meter import StreamMeter
from gateway.proxy.quoting import Plan
from gateway.proxy.settlement import Ending
from gateway.proxy.sse import SSETooLarge
from gateway.proxy.upstream import UpstreamError, UpstreamResponse, UpstreamTimeout
from ledger.errors import LedgerUnavailable
from pricing.usage import Usage


class StreamedAnswer:
    """One stream between its upstream and its client."""

    def __init__(
        self, exchange: Exchange, plan: Plan, hold: Hold, response: UpstreamResponse, meter: StreamMeter
    ) -> None:
        self._exchange = exchange
        self._plan = plan
        self._hold = hold
        self._response = response
        self._meter = meter
        self._failure: Exception | None = None

    async def pass_on(self, *, grace_s: float) -> None:
        """Pass the stream on to its end, whichever it is.

        Args:
            grace_s: how long to read on, to learn the usage, when the client has gone.

        Raises:
            ApiError: 502 or 504 when it broke before anything was delivered; nothing is charged then.
        """
        self._hold.progress = lambda: self._usage(*self._meter.passed)
        ending = Ending.BROKEN
        try:
            ending = await self._read(grace_s)
        finally:
            # Also when this task is cancelled: what has been delivered is charged.
            charged = await self._settle(ending)
        if ending is not Ending.CLIENT_LEFT:
            await self._end(ending, charged)

    async def _read(self, grace_s: float) -> Ending:
        """Read, meter and write until the stream ends in one way or another."""
        exchange, meter = self._exchange, self._meter
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:
                exchange.watch(lambda: limit.reschedule(loop.time() + grace_s))
                try:
                    async for chunk in self._response.chunks():
                        meter.feed(chunk)
                        if not await self._deliver():
                            return Ending.DRY
                        if meter.finished:
                            break
                    else:
                        meter.close()
                        if not await self._deliver():
                            return Ending.DRY
                finally:
                    exchange.unwatch()
        except TimeoutError:
            return Ending.CLIENT_LEFT
        except (UpstreamError, SSETooLarge, LedgerUnavailable) as error:
            self._failure = error
        if exchange.gone:
            return Ending.CLIENT_LEFT
        return Ending.FINISHED if meter.finished else Ending.BROKEN

    async def _deliver(self) -> bool:
        """Write what has come, extending the hold as it needs; False when the wallet is dry.

        A stream that is read on after its client has gone is covered like any other: what it is written to is nothing.
        """
        meter, hold = self._meter, self._hold
        while True:
            # An answer that is covered up to its own limit can cost no more than its texts' tokens: these are counted.
            meter.exact = meter.exact or hold.covered >= self._plan.ceiling
            await self._write(await self._counting(meter.take))
            if not meter.waiting:
                return True
            meter.measure()
            await hold.extend(meter.needed, ceiling=self._plan.ceiling)
            if meter.needed <= self._covered:
                continue
            if meter.exact:
                await self._write(await self._counting(meter.cut))
                return False
            # The last stretch of the wallet: from here on every token counts, and the prompt's margin is spent.
            meter.exact = True

    @property
    def _covered(self) -> int:
        return self._hold.covered_exactly if self._meter.exact else self._hold.covered

    async def _counting(self, count: Callable[[int], bytes]) -> bytes:
        """Let the meter count, in a thread when there is much to count."""
        if not self._meter.heavy:
            return count(self._covered)
        thread = asyncio.ensure_future(asyncio.to_thread(count, self._covered))
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            await asyncio.wait((thread,))  # Until then the meter is the thread's.
            raise

    async def _write(self, data: bytes) -> None:
        if data and not self._exchange.gone:
            await self._start()
            await self._exchange.write(data)

    async def _start(self) -> None:
        if not self._exchange.started:
            await self._exchange.start(self._response.status, self._response.headers)

    async def _settle(self, ending: Ending) -> Charged:
        meter = self._meter
        reported = meter.reported if ending is Ending.FINISHED or not meter.stale else None
        if ending is not Ending.FINISHED or reported is None:  # Else our own count is not asked for.
            meter.measure()
        journey = self._exchange.journey
        with journey.trace.step("settle"):
            charged = await self._hold.settle(
                ending, reported=reported, counted=self._usage(*meter.passed), delivered=meter.delivered
            )
        journey.settled(ending, charged.usage)
        return charged

    def _usage(self, output: int, reasoning: int) -> Usage:
        return Usage(input=self._plan.prompt_tokens, output=output, reasoning=reasoning)

    async def _end(self, ending: Ending, charged: Charged) -> None:
        """Write the last bytes, which say what the stream cost, or why it ends here."""
        if ending is Ending.BROKEN and not self._exchange.started:
            raise self._refusal()
        await self._start()
        if ending is Ending.BROKEN:
            await self._exchange.finish(self._error_event(self._refusal()))
            return
        if charged.cost is None:
            await self._exchange.finish(self._error_event(charge_waits()))
            return
        quota = quota_of(self._plan.tariff.asset, cost=charged.cost, balance=charged.balance)
        if ending is Ending.FINISHED:
            await self._exchange.finish(self._meter.ending(charged.usage, quota))
        else:
            await self._exchange.finish(self._meter.cut_short(charged.usage, quota, self._hold.why_dry()))

    def _refusal(self) -> ApiError:
        """What to tell of a stream that broke; *delivered* parts have been charged."""
        if isinstance(self._failure, LedgerUnavailable):
            return ledger_unavailable()
        what = "What was delivered has been charged." if self._meter.delivered else "Nothing was charged."
        if isinstance(self._failure, UpstreamTimeout):
            return upstream_timeout(f"The upstream fell silent. {what}")
        return upstream_error(f"The upstream broke off. {what}")

    def _error_event(self, error: ApiError) -> bytes:
        """How a stream that has begun tells of its failure: the envelope as an event, and no ``[DONE]``."""
        return b"data: " + error.to_body(self._exchange.request_id) + b"\n\n"
