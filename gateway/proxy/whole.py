"""A whole answer on its way to the client: read, charged, and passed on; or given once more."""

import asyncio
from collections.abc import Callable
from typing import Final

from gateway.errors import charge_waits, upstream_error
from gateway.proxy.answer import Answer, NoAnswer, quota_of
from gateway.proxy.exchange import Exchange
from gateway.proxy.forwarding import unanswered
from gateway.proxy.hold import Hold
from gateway.proxy.quoting import Plan
from gateway.proxy.settlement import Ending
from gateway.proxy.tally import Counter
from gateway.proxy.upstream import UpstreamBodyTooLarge, UpstreamError, UpstreamResponse
from ledger.commands import StoredResponse
from pricing.usage import Usage

ANSWER_BYTES_MAX: Final = 64 * 2**20


async def pass_whole(
    exchange: Exchange,
    plan: Plan,
    hold: Hold,
    response: UpstreamResponse,
    *,
    new_counter: Callable[[], Counter],
    keep: bool,
) -> None:
    """Read the answer, charge it, and pass it on. A client that has gone is charged all the same.

    Args:
        keep: the answer is stored with its charge, to be given again.

    Raises:
        ApiError: 502, 504: there is no answer, and nothing was charged. 503: the charge waits, and the answer with it.
    """
    try:
        body = await response.read(ANSWER_BYTES_MAX)
        answer = Answer(body, hidden_reasoning=hold.tariff.card.hidden_reasoning)
    except UpstreamBodyTooLarge:
        raise upstream_error("The upstream's answer is too large. Nothing was charged.") from None
    except UpstreamError as error:
        raise unanswered(error) from None
    except NoAnswer:
        raise upstream_error("What the upstream sent is not an answer. Nothing was charged.") from None
    counted = Usage(input=plan.prompt_tokens)
    if answer.reported is None:
        output, reasoning = await asyncio.to_thread(answer.counted, new_counter)
        counted = Usage(input=plan.prompt_tokens, output=output, reasoning=reasoning)
        answer.report(counted)
    headers = [header for header in response.headers if header[0] != b"x-request-id"]
    stored = None
    if keep:
        shown = tuple((name.decode(), value.decode()) for name, value in headers)
        stored = StoredResponse(status=response.status, headers=shown, body=answer.body({}))
    with exchange.journey.trace.step("settle"):
        charged = await hold.settle(Ending.FINISHED, reported=answer.reported, counted=counted, response=stored)
    exchange.journey.settled(Ending.FINISHED, charged.usage)
    if charged.cost is None:
        raise charge_waits()
    quota = quota_of(plan.tariff.asset, cost=charged.cost, balance=charged.balance)
    _show(exchange, quota)
    await exchange.respond(response.status, answer.body(quota), headers)


async def replay(exchange: Exchange, stored: StoredResponse, quota: dict[str, str]) -> None:
    """Give a stored answer once more, with what it cost."""
    exchange.add("X-Idempotent-Replayed", "true")
    _show(exchange, quota)
    headers = [(name.encode(), value.encode()) for name, value in stored.headers]
    await exchange.respond(stored.status, Answer(stored.body).body(quota), headers)


def _show(exchange: Exchange, quota: dict[str, str]) -> None:
    """What a whole answer cost, in its headers."""
    for name, value in quota.items():
        exchange.add(f"X-Quota-{name.title()}", value)
