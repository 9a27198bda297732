"""To the last digit: the wallet's change is the usage's cost, the receipt, and the journal.

The expected charge is computed here, with Decimal, from the published price and the usage that the test dictates.
"""

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import ModelSettings, PriceSettings, Settings
from tests.gateway.rig import Rig, running

ODD = {"input": "0.000001", "output": "7.777777", "cached_input": "0.333333", "reasoning": "9.999999"}
PRICES: dict[str, dict[str, str]] = {
    # $ a million tokens, as published by OpenAI on its price list.
    "gpt-4o-mini": {"input": "0.15", "cached_input": "0.075", "output": "0.60"},
    "gpt-4o": {"input": "2.50", "cached_input": "1.25", "output": "10.00"},
    "o4-mini": {"input": "1.10", "cached_input": "0.275", "output": "4.40"},
    "odd": ODD,
    "free": {"input": "0", "output": "0"},
}
CREDIT_USD = Decimal("0.01")
NANO = Decimal("0.000000001")


def usage(prompt: int, completion: int, *, cached: int = 0, reasoning: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


USAGES = [
    usage(7, 11),
    usage(1, 0),
    usage(0, 0),
    usage(0, 3),
    usage(1000, 1, cached=999),
    usage(129, 333, cached=128, reasoning=320),
    usage(3, 5, reasoning=5),
    usage(12_345, 6_789, cached=1, reasoning=1),
    {"prompt_tokens": 9, "completion_tokens": 4},
]


def expected(model: str, used: dict[str, Any], markup_bps: int) -> Decimal:
    """Decimal credits, rounded up once."""
    price = {name: Decimal(value) for name, value in PRICES[model].items()}
    cached = used.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    reasoning = used.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
    millionths = (
        (used["prompt_tokens"] - cached) * price["input"]
        + cached * price.get("cached_input", price["input"])
        + (used["completion_tokens"] - reasoning) * price["output"]
        + reasoning * price.get("reasoning", price["output"])
    )
    credits = millionths / 1_000_000 * (10_000 + markup_bps) / 10_000 / CREDIT_USD
    return Decimal(math.ceil(credits / NANO)) * NANO


def models() -> tuple[ModelSettings, ...]:
    ours = {name: PriceSettings(**price) for name, price in PRICES.items() if name in ("odd", "free")}
    return tuple(ModelSettings(name=name, upstream="simulated", price=ours.get(name)) for name in PRICES)


async def check(rig: Rig, model: str, used: dict[str, Any], markup_bps: int, **simulate: Any) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40_000}
    body["simulate"] = {"usage": used, "text": "Hello there", **simulate}
    cost = expected(model, used, markup_bps)

    before = Decimal(await rig.balance())
    whole = await rig.chat(body)
    assert whole.status_code == 200, whole.text
    after = Decimal(await rig.balance())
    told = whole.json()["usage"]
    assert used.items() <= told.items()
    await _same(rig, whole, told, before=before, after=after, cost=cost)
    assert (whole.headers["X-Quota-Cost"], whole.headers["X-Quota-Balance"]) == (told["cost"], told["balance"])

    silent = await rig.stream(body)
    assert silent.done
    assert not any(chunk.get("usage") for chunk in silent.chunks)
    unasked = Decimal(await rig.balance())
    assert after - unasked == cost

    streamed = await rig.stream({**body, "stream_options": {"include_usage": True}})
    assert streamed.done
    assert [bool(chunk.get("usage")) for chunk in streamed.chunks].count(True) == 1
    assert used.items() <= streamed.usage.items()
    await _same(rig, streamed, streamed.usage, before=unasked, after=Decimal(await rig.balance()), cost=cost)


async def _same(
    rig: Rig, response: Any, told: dict[str, Any], *, before: Decimal, after: Decimal, cost: Decimal
) -> None:
    """The wallet's change == usage.cost == the receipt == the journal."""
    assert before - after == cost
    assert Decimal(told["cost"]) == cost
    assert Decimal(told["balance"]) == after
    receipt = await rig.receipt(response)
    (charged,) = receipt.reservation.charged
    assert charged.total * NANO == cost
    assert sum(leg.total for part in receipt.usage for leg in part.charges) * NANO == cost
    assert sum(payment.base + payment.markup for payment in receipt.reservation.payments) * NANO == cost
    lines = [line for line in await rig.statement() if line.reference == receipt.reservation.ref.reservation]
    assert -sum(line.amount for line in lines) * NANO == cost
    assert {part.record.source for part in receipt.usage} == {"provider"}


@pytest.mark.parametrize("markup_bps", [0, 1, 2_000, 12_345])
async def test_every_figure_of_a_charge_is_the_same(tmp_path: Path, markup_bps: int) -> None:
    settings = Settings(rate_limit_per_minute=0, journal_dir=tmp_path / "kept", models=models())
    async with running(tmp_path, settings=settings, markup_bps=markup_bps) as rig:
        await rig.grant("5000")
        for model in PRICES:
            for used in USAGES if markup_bps in (0, 12_345) else USAGES[:3]:
                await check(rig, model, used, markup_bps)


async def test_usage_in_a_chunk_with_choices_is_charged_like_any_other(tmp_path: Path) -> None:
    async with running(tmp_path, markup_bps=2_000) as rig:
        await rig.grant("100")
        await check(rig, "gpt-4o-mini", usage(1000, 77, cached=512, reasoning=13), 2_000, in_choice_chunk=True)


async def test_a_reported_zero_is_charged_as_zero(tmp_path: Path) -> None:
    async with running(tmp_path, markup_bps=2_000) as rig:
        await rig.grant("1")
        await check(rig, "gpt-4o", usage(0, 0), 2_000)
        assert await rig.balance() == "1"


async def test_usage_that_no_upstream_reports_is_counted(tmp_path: Path) -> None:
    """Then the upstream's text is what is charged: 7 prompt tokens for «Hi» as OpenAI counts, 2 for «Hello there»."""
    used = usage(8, 2)
    async with running(tmp_path) as rig:
        await rig.grant("1")
        body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hi"}]}
        body["simulate"] = {"usage": None, "text": "Hello there"}
        whole = await rig.chat(body)
        assert {
            name: whole.json()["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        } == {
            "prompt_tokens": 8,
            "completion_tokens": 2,
            "total_tokens": 10,
        }
        streamed = await rig.stream({**body, "stream_options": {"include_usage": True}})
        assert streamed.usage["completion_tokens"] == 2
        cost = expected("gpt-4o", used, 0)
        assert Decimal(1) - Decimal(await rig.balance()) == 2 * cost
        for response in (whole, streamed):
            (part,) = (await rig.receipt(response)).usage
            assert (part.record.source, part.record.units) == ("counted", {"input": 8, "output": 2})
