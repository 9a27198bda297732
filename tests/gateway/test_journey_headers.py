"""What the X-Quota headers ask for and tell: actions, a most cost, clamping; and the rate limit."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gateway.proxy.simulated import SimulatedUpstream
from gateway.settings import ActionSettings, ModelSettings, PriceSettings, Settings, UpstreamSettings
from ledger.commands import Reserve
from tests.gateway.rig import GatedUpstream, running

USAGE = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
COST = Decimal("0.0045")
PROMPT_MAX = 8 + 1 + 8
"""Our count of «Hi», 1 % of it and 8 tokens."""


def body(**fields: Any) -> dict[str, Any]:
    sent = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}
    return {**sent, "simulate": {"usage": USAGE, "echo": True}, **fields}


def settings(tmp_path: Path, **more: Any) -> Settings:
    shared = {"default_upstream": "simulated", "rate_limit_per_minute": 0, "journal_dir": tmp_path / "kept"}
    return Settings(**{**shared, **more})


def worth(prompt_tokens: int, output_tokens: int) -> Decimal:
    return (prompt_tokens * Decimal("0.15") + output_tokens * Decimal("0.60")) / 10**6 / Decimal("0.01")


# Product actions.

ACTIONS = (
    ActionSettings(key="summary", credits="2.5"),
    ActionSettings(key="hint", credits="0.001"),
    ActionSettings(key="gift", credits="0"),
)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_action_costs_its_price_whatever_its_tokens(tmp_path: Path, stream: bool) -> None:
    async with running(tmp_path, settings=settings(tmp_path, actions=ACTIONS), markup_bps=2_000) as rig:
        await rig.grant("10")
        await rig.fund_developer("1")
        answer = await rig.chat(body(stream=stream, max_tokens=100), X_Quota_Action="summary")
        assert answer.status_code == 200
        assert answer.headers["X-Quota-Reserved"] == "2.5"
        assert await rig.balance() == "7.5"
        assert await rig.balance(None) == "1"
        (part,) = (await rig.newest_receipt()).usage
        assert part.record.action == "summary"
        assert part.record.provider_cost_nanos == 45_000  # 100 x $0.15 and 50 x $0.60 a million tokens.
        assert (part.charges[0].base, part.charges[0].markup) == (4_500_000, 2_500_000_000 - 4_500_000)
        if not stream:
            assert answer.json()["usage"]["cost"] == answer.headers["X-Quota-Cost"] == "2.5"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("action", "price"), [("hint", Decimal("0.001")), ("gift", Decimal(0))])
async def test_what_an_actions_price_does_not_cover_the_developer_bears(
    tmp_path: Path, stream: bool, action: str, price: Decimal
) -> None:
    async with running(tmp_path, settings=settings(tmp_path, actions=ACTIONS), markup_bps=2_000) as rig:
        await rig.grant("1")
        await rig.fund_developer("1")
        answer = await rig.chat(body(stream=stream, max_tokens=100), X_Quota_Action=action)
        assert answer.status_code == 200
        assert Decimal(1) - Decimal(await rig.balance()) == price
        assert Decimal(1) - Decimal(await rig.balance(None)) == COST - price
        assert (await rig.wallet(None)).reserved == 0
        if not stream:
            assert Decimal(answer.headers["X-Quota-Cost"]) == price
            assert Decimal(answer.headers["X-Quota-Balance"]) == 1 - price


async def test_a_developer_who_cannot_bear_it_is_refused_for_and_the_user_keeps_the_price(tmp_path: Path) -> None:
    async with running(tmp_path, settings=settings(tmp_path, actions=ACTIONS)) as rig:
        await rig.grant("1")
        refused = await rig.chat(body(max_tokens=100), X_Quota_Action="hint")
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (402, "insufficient_credits")
        assert not {"needed", "available", "needed_decimal", "available_decimal"} & error.keys()  # The developer's own.
        assert (await rig.balance(), (await rig.wallet()).reserved) == ("1", 0)


async def test_a_user_who_cannot_pay_the_price_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, settings=settings(tmp_path, actions=ACTIONS)) as rig:
        await rig.grant("2.499999999")
        await rig.fund_developer("100")
        refused = await rig.chat(body(), X_Quota_Action="summary")
        error = refused.json()["error"]
        assert (refused.status_code, error["needed_decimal"]) == (402, "2.5")
        assert (await rig.wallet(None)).reserved == 0


async def test_an_action_without_a_user_is_paid_by_the_developer(tmp_path: Path) -> None:
    async with running(tmp_path, settings=settings(tmp_path, actions=ACTIONS)) as rig:
        await rig.fund_developer("1")
        answer = await rig.chat(body(max_tokens=100), user=None, X_Quota_Action="hint")
        assert answer.status_code == 200
        assert Decimal(1) - Decimal(await rig.balance(None)) == COST


async def test_an_action_of_which_nothing_came_costs_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, settings=settings(tmp_path, actions=ACTIONS)) as rig:
        await rig.grant("10")
        await rig.fund_developer("1")
        assert (await rig.chat(body(simulate={"status": 500}), X_Quota_Action="summary")).status_code == 502
        assert (await rig.balance(), await rig.balance(None)) == ("10", "1")


async def test_a_stream_of_an_action_is_not_cut_however_long_it_is(tmp_path: Path) -> None:
    async with running(tmp_path, settings=settings(tmp_path, actions=ACTIONS)) as rig:
        await rig.grant("2.5")
        await rig.fund_developer("1")
        sent = body(max_tokens=3_000, simulate={"tokens": 2_000, "usage": None})
        got = await rig.stream(sent, X_Quota_Action="summary")
        assert got.finish_reasons == ["stop"]
        assert await rig.balance() == "0"


# X-Quota-Max-Cost.


@pytest.mark.parametrize("stream", [False, True])
async def test_what_could_cost_more_than_the_client_allows_is_refused(tmp_path: Path, stream: bool) -> None:
    worst = worth(PROMPT_MAX, 1_000)
    async with running(tmp_path) as rig:
        await rig.grant("100")
        sent = body(stream=stream, max_tokens=1_000)
        just_below = f"{worst - Decimal('0.000000001'):f}"
        refused = await rig.chat(sent, X_Quota_Max_Cost=just_below)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "invalid_request", "X-Quota-Max-Cost")
        assert Decimal(error["needed_decimal"]) == worst
        assert rig.store.count(Reserve) == 0
        assert (await rig.chat(sent, X_Quota_Max_Cost=f"{worst:f}")).status_code == 200


async def test_the_most_cost_of_an_action_is_its_price(tmp_path: Path) -> None:
    async with running(tmp_path, settings=settings(tmp_path, actions=ACTIONS)) as rig:
        await rig.grant("10")
        await rig.fund_developer("100")
        assert (await rig.chat(body(), X_Quota_Action="summary", X_Quota_Max_Cost="2.499")).status_code == 400
        assert (await rig.chat(body(), X_Quota_Action="summary", X_Quota_Max_Cost="2.5")).status_code == 200


# Clamping.


def limit_of(echo: dict[str, Any]) -> dict[str, int]:
    return {name: echo[name] for name in ("max_tokens", "max_completion_tokens") if echo.get(name) is not None}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, "max_tokens"),
        ({"max_tokens": 5_000}, "max_tokens"),
        ({"max_completion_tokens": 5_000}, "max_completion_tokens"),
    ],
)
async def test_the_limit_is_lowered_to_what_the_wallet_affords(
    tmp_path: Path, given: dict[str, int], field: str
) -> None:
    async with running(tmp_path) as rig:
        balance = worth(PROMPT_MAX, 333) + worth(0, 1) / 2
        await rig.grant(f"{balance:f}")
        answer = await rig.chat(body(**given))
        assert answer.headers["X-Quota-Clamped-Max-Tokens"] == "333"
        assert limit_of(answer.json()["echo"]) == {field: 333}
        assert Decimal(answer.headers["X-Quota-Reserved"]) == balance


async def test_the_limit_is_of_each_choice(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant(f"{worth(PROMPT_MAX, 100):f}")
        answer = await rig.chat(body(n=3))
        assert answer.headers["X-Quota-Clamped-Max-Tokens"] == "33"
        assert limit_of(answer.json()["echo"]) == {"max_tokens": 33}


async def test_both_limits_are_lowered_where_a_client_sent_both(tmp_path: Path) -> None:
    """Which of the two an upstream obeys is not known."""
    gate = GatedUpstream()
    gate.allow()
    async with running(tmp_path, settings=settings(tmp_path), upstreams={"simulated": gate}) as rig:
        await rig.grant(f"{worth(PROMPT_MAX, 40):f}")
        await rig.chat(body(max_tokens=5_000, max_completion_tokens=4_000))
        assert limit_of(json.loads(gate.requests[0].body)) == {"max_tokens": 40, "max_completion_tokens": 40}


async def test_a_limit_that_is_affordable_stays(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant(f"{worth(PROMPT_MAX, 100):f}")
        answer = await rig.chat(body(max_tokens=100))
        assert "X-Quota-Clamped-Max-Tokens" not in answer.headers
        assert limit_of(answer.json()["echo"]) == {"max_tokens": 100}


async def test_the_upstream_names_the_field_where_the_client_does_not(tmp_path: Path) -> None:
    upstream = UpstreamSettings(name="up", base_url="http://127.0.0.1:9/v1", max_tokens_field="max_completion_tokens")
    chosen = settings(tmp_path, default_upstream=None, upstreams=(upstream,))
    async with running(tmp_path, settings=chosen, upstreams={"up": SimulatedUpstream()}) as rig:
        await rig.grant(f"{worth(PROMPT_MAX, 50):f}")
        answer = await rig.chat(body())
        assert limit_of(answer.json()["echo"]) == {"max_completion_tokens": 50}


async def test_sixteen_tokens_are_the_least(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant(f"{worth(PROMPT_MAX, 16) - Decimal('0.000000001'):f}")
        refused = await rig.chat(body(max_tokens=5_000))
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (402, "insufficient_credits")
        assert Decimal(error["needed_decimal"]) == worth(PROMPT_MAX, 16)
        await rig.grant("0.000000001")
        answer = await rig.chat(body(max_tokens=5_000))
        assert answer.headers["X-Quota-Clamped-Max-Tokens"] == "16"


async def test_a_request_for_less_than_sixteen_tokens_is_served_with_less(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant(f"{worth(PROMPT_MAX, 3):f}")
        answer = await rig.chat(body(max_tokens=3))
        assert answer.status_code == 200
        assert limit_of(answer.json()["echo"]) == {"max_tokens": 3}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_may_rather_be_refused(tmp_path: Path, stream: bool) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("0.1")
        sent = body(stream=stream, max_tokens=5_000)
        refused = await rig.chat(sent, X_Quota_Clamping="off")
        error = refused.json()["error"]
        assert (refused.status_code, error["needed_decimal"]) == (402, f"{worth(PROMPT_MAX, 5_000):f}")
        await rig.grant("0.4")
        answer = await rig.chat(sent, X_Quota_Clamping="off")
        assert answer.status_code == 200
        assert Decimal(answer.headers["X-Quota-Reserved"]) == worth(PROMPT_MAX, 5_000)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_reasons_out_of_sight_is_clamped_in_a_stream_too(tmp_path: Path, stream: bool) -> None:
    model = ModelSettings(
        name="thinker", upstream="simulated", hidden_reasoning=True, price=PriceSettings(input="0.15", output="0.60")
    )
    async with running(tmp_path, settings=settings(tmp_path, models=(model,))) as rig:
        await rig.grant(f"{worth(PROMPT_MAX, 400):f}")
        simulate = {"hidden_reasoning_tokens": 390, "tokens": 50, "echo": True}
        answer = await rig.chat(body(model="thinker", stream=stream, simulate=simulate))
        assert answer.headers["X-Quota-Clamped-Max-Tokens"] == "400"
        (part,) = (await rig.newest_receipt()).usage
        assert (part.record.units["reasoning"], part.record.units["output"]) == (390, 10)
        assert part.shortfall == 0


async def test_a_stream_of_text_reserves_a_first_slice_only_and_is_not_clamped(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        got = await rig.stream(body())
        assert Decimal(got.headers["X-Quota-Reserved"]) == worth(PROMPT_MAX, 256)
        assert "X-Quota-Clamped-Max-Tokens" not in got.headers
        assert limit_of(got.chunks[0]["echo"]) == {}
        assert "X-Quota-Cost" not in got.headers


# The rate limit.


async def test_the_rate_limit_counts_down_and_then_refuses(tmp_path: Path) -> None:
    async with running(tmp_path, settings=settings(tmp_path, rate_limit_per_minute=3)) as rig:
        await rig.grant("1")
        for remaining in (2, 1, 0):
            answer = await rig.chat(body())
            assert answer.status_code == 200
            assert (answer.headers["X-RateLimit-Limit"], answer.headers["X-RateLimit-Remaining"]) == (
                "3",
                str(remaining),
            )
            assert 0 < int(answer.headers["X-RateLimit-Reset"]) <= 60
        spent = await rig.balance()
        refused = await rig.chat(body(stream=True))
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
        assert 0 < int(refused.headers["Retry-After"]) <= 60
        assert refused.headers["X-RateLimit-Remaining"] == "0"
        assert await rig.balance() == spent
        await rig.grant("1", mode="test")
        assert (await rig.chat(body(), mode="test")).status_code == 200  # Another key has its own count.


async def test_without_a_rate_limit_nothing_is_said_of_one(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        assert not any(name.startswith("x-ratelimit") for name in (await rig.chat(body())).headers)
