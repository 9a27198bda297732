"""The step of the journey that asks upstreams: one after the other, until one has done the work."""

import asyncio
import random
from typing import Final

import msgspec

from gateway.errors import ApiError, upstream_error, upstream_timeout
from gateway.proxy.exchange import Exchange
from gateway.proxy.hold import Hold
from gateway.proxy.quoting import Plan
from gateway.proxy.routing import Candidate
from gateway.proxy.upstream import (
    Phase,
    UpstreamError,
    UpstreamRequest,
    UpstreamResponse,
    UpstreamTimeout,
    UpstreamUnreachable,
)

RETRY_WAIT_S: Final = 0.05
TRIED_AGAIN: Final = frozenset({502, 503, 504})
"""Statuses with which an upstream says that it did not do the work, and may do it soon."""

TRIED_ELSEWHERE: Final = TRIED_AGAIN | {408, 409, 425, 429, 500, 529}
"""Statuses with which the next candidate is asked."""


async def forward(exchange: Exchange, plan: Plan, hold: Hold) -> UpstreamResponse:
    """Send the request to the candidates in their order, until one answers with more than a fault of its own.

    Raises:
        ApiError: 502, 504. Nothing of an answer has come, and nothing is charged.
    """
    clamped = plan.clamped(sum(hold.held))
    if clamped is not None:
        exchange.add("X-Quota-Clamped-Max-Tokens", str(clamped))
    failure: UpstreamError | None = None
    last = plan.route.candidates[-1]
    for candidate in plan.route.candidates:
        response, failure = await _try(candidate, plan, exchange, clamped)
        if response is None:
            continue
        if response.status in TRIED_ELSEWHERE and candidate is not last:
            await response.close()
            continue
        hold.serve(msgspec.structs.replace(plan.tariff, card=candidate.card))
        hold.record = msgspec.structs.replace(hold.record, upstream=candidate.upstream.name)
        return response
    assert failure is not None
    raise unanswered(failure)


async def _try(
    candidate: Candidate, plan: Plan, exchange: Exchange, clamped: int | None
) -> tuple[UpstreamResponse | None, UpstreamError | None]:
    """One candidate's answer, or its failure; it is asked again only where it cannot have done the work."""
    request = plan.request
    body = request.body(
        model=candidate.model,
        ask_usage=candidate.stream_usage,
        output_tokens_max=clamped,
        limit_field=candidate.limit_field,
    )
    sent = UpstreamRequest(path="/chat/completions", body=body, stream=request.stream, request_id=exchange.request_id)
    for attempt in range(candidate.retries + 1):
        final = attempt == candidate.retries
        try:
            response = await exchange.journey.send(candidate, sent)
        except UpstreamError as error:
            if final or not _not_sent(error):
                return None, error
        else:
            if final or response.status not in TRIED_AGAIN:
                return response, None
            await response.close()
        pause_s = RETRY_WAIT_S * 2**attempt * random.uniform(0.5, 1)  # noqa: S311 - spreads retries
        exchange.journey.upstream_s += pause_s
        await asyncio.sleep(pause_s)
    raise AssertionError("the last attempt returns")


def _not_sent(error: UpstreamError) -> bool:
    """Whether the upstream cannot have done the work."""
    unconnected = isinstance(error, UpstreamTimeout) and error.phase is Phase.CONNECT
    return unconnected or isinstance(error, UpstreamUnreachable)


def unanswered(error: UpstreamError) -> ApiError:
    """What to tell of an upstream that gave no answer: nothing is charged for it."""
    return upstream_timeout() if isinstance(error, UpstreamTimeout) else upstream_error()
