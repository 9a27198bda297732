"""A wallet that runs dry in the middle of a stream: well-formed to the end, charged for what was delivered, never below
zero, and at least 95 % of the output that the balance affords has been delivered.
"""

import asyncio
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk

from gateway.settings import ModelSettings, PriceSettings, Settings
from ledger.commands import Extend
from pricing.encodings import count_text
from tests.gateway.rig import Rig, Streamed, running

NANO = Decimal("0.000000001")
PRICES = {"gpt-4o-mini": ("0.15", "0.60"), "odd": ("0.333333", "7.777777"), "dear": ("75", "600")}
LONG_PROMPT = "All the words of a long prompt are paid before the first word of the answer. " * 300

ENGLISH = "The meter counts every token as it passes, and the wallet pays for what was used. "
CHINESE = "计价器对经过的每个词元计数，钱包按实际用量付费；不多也不少。"
THAI = "มิเตอร์นับโทเค็นทุกตัวที่ผ่านไปและกระเป๋าเงินจ่ายตามที่ใช้จริง "
EMOJI = "🎉👩‍👩‍👧🚀🇪🇺"
CHARACTER_TOKENS_MAX = 4
"""Half a character cannot be delivered, and an emoji may have so many tokens."""

CODE = "def f(x):\n\treturn {'a': [1, 2.5, None], \"b\\n\": x}  # done\n\n"


def tokens(text: str) -> int:
    return count_text(text, "o200k_base")


def settings(tmp_path: Path, **more: Any) -> Settings:
    models = tuple(
        ModelSettings(name=name, upstream="simulated", price=PriceSettings(input=price[0], output=price[1]))
        for name, price in PRICES.items()
    )
    return Settings(rate_limit_per_minute=0, journal_dir=tmp_path / "kept", models=models, **more)


def body(model: str = "gpt-4o-mini", prompt: str = "Hi", **more: Any) -> dict[str, Any]:
    sent = {"model": model, "messages": [{"role": "user", "content": prompt}], **more}
    sent["simulate"] = {"usage": None, **more.get("simulate", {})}
    return sent


def worth(model: str, prompt_tokens: int, output_tokens: int) -> Decimal:
    """Decimal credits that so many tokens cost, not rounded."""
    rate_in, rate_out = map(Decimal, PRICES[model])
    return (prompt_tokens * rate_in + output_tokens * rate_out) / 1_000_000 / Decimal("0.01")


async def run_dry(rig: Rig, sent: dict[str, Any], balance: str, choices: int = 1) -> Streamed:
    """Stream until the wallet is dry, and check all that must hold of it; or the stream, whole."""
    await rig.grant(balance)
    got = await rig.stream({**sent, "stream_options": {"include_usage": True}})
    assert got.status == 200, got.raw
    assert got.done, got.raw[-500:]
    for chunk in got.data[:-1]:
        ChatCompletionChunk.model_validate_json(chunk)
    ended = {choice["index"]: choice["finish_reason"] for choice in got.choices if choice["finish_reason"]}
    assert len(got.finish_reasons) == len(ended) == choices

    (part,) = (await rig.receipt(got)).usage
    delivered = sum(tokens(got.text(index)) + tokens(got.arguments(index)) for index in range(choices))
    prompt = part.record.units["input"]
    assert part.record.units.get("output", 0) == delivered
    assert (got.usage["prompt_tokens"], got.usage["completion_tokens"]) == (prompt, delivered)

    wallet = await rig.wallet()
    assert (wallet.reserved, part.shortfall) == (0, 0)
    left = Decimal(got.usage["balance"])
    assert left == Decimal(await rig.balance()) >= 0
    assert Decimal(balance) - left == Decimal(got.usage["cost"])
    assert 0 <= Decimal(got.usage["cost"]) - worth(sent["model"], prompt, delivered) < NANO
    return got


def check_dry(got: Streamed, sent: dict[str, Any], balance: str) -> None:
    """It ended because of the wallet, and not before."""
    reasons = {json.dumps(chunk["quota"]) for chunk in got.chunks if "quota" in chunk}
    assert len(reasons) == 1
    assert json.loads(reasons.pop())["code"] == "insufficient_credits"
    assert set(got.finish_reasons) <= {"length", "stop", "tool_calls"}
    assert "length" in got.finish_reasons
    prompt, delivered = got.usage["prompt_tokens"], got.usage["completion_tokens"]
    spare = Decimal(balance) - worth(sent["model"], prompt, 0)
    affords = int(spare / worth(sent["model"], 0, 1))
    assert delivered <= affords
    assert affords - delivered <= max(affords * Decimal("0.05"), CHARACTER_TOKENS_MAX - 1)


@pytest.mark.parametrize(
    "text",
    [ENGLISH, CHINESE, " ".join(CHINESE), THAI, EMOJI, " ".join(EMOJI), CODE],
    ids=["english", "chinese", "chinese in pieces", "thai", "emoji", "emoji in pieces", "code"],
)
@pytest.mark.parametrize(
    ("model", "balance"),
    [
        ("gpt-4o-mini", "0.0013"),
        ("gpt-4o-mini", "0.02"),
        ("gpt-4o-mini", "0.123456789"),
        ("odd", "0.777777777"),
        ("dear", "15.000000001"),
    ],
)
async def test_the_last_credits_are_spent_to_the_token(tmp_path: Path, model: str, balance: str, text: str) -> None:
    sent = body(model, simulate={"text": text * (6_000 // len(text))})
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        got = await run_dry(rig, sent, balance)
        if got.finish_reasons == ["stop"]:
            assert got.text() == sent["simulate"]["text"]
        else:
            check_dry(got, sent, balance)
            assert sent["simulate"]["text"].startswith(got.text())


@pytest.mark.parametrize("balance", ["0.005", "0.05"])
async def test_two_choices_at_once(tmp_path: Path, balance: str) -> None:
    sent = body(n=2, simulate={"tokens": 3_000})
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        got = await run_dry(rig, sent, balance, choices=2)
        check_dry(got, sent, balance)
        assert got.finish_reasons == ["length", "length"]


@pytest.mark.parametrize("balance", ["0.0033", "0.009"])
async def test_in_the_middle_of_a_tool_call(tmp_path: Path, balance: str) -> None:
    properties = {f"argument_number_{number}": {"type": "string"} for number in range(120)}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    tool = {"type": "function", "function": {"name": "write", "parameters": parameters}}
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        sent = body(tools=[tool])
        await rig.grant("1", user="other")
        whole = await rig.stream(sent, user="other")
        prompt = (await rig.receipt(whole)).usage[0].record.units["input"]
        spent = worth("gpt-4o-mini", prompt, 0) + Decimal(balance)
        got = await run_dry(rig, sent, f"{spent:f}")
        check_dry(got, sent, f"{spent:f}")
        assert whole.arguments().startswith(got.arguments())
        assert whole.finish_reasons == ["tool_calls"]


async def test_after_a_long_prompt(tmp_path: Path) -> None:
    sent = body(prompt=LONG_PROMPT, simulate={"tokens": 3_000})
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        check_dry(await run_dry(rig, sent, "0.12"), sent, "0.12")


@pytest.mark.parametrize("chunk_bytes", [300, 5_000, 100_000, 5_000_000])
async def test_a_chunk_larger_than_the_wallet_is_cut(tmp_path: Path, chunk_bytes: int) -> None:
    sent = body("odd", simulate={"chunk_bytes": chunk_bytes})
    balance = "0.04" if chunk_bytes == 300 else "0.4"
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        got = await run_dry(rig, sent, balance)
        check_dry(got, sent, balance)


async def test_a_five_megabyte_chunk_passes_whole_where_the_wallet_affords_it(tmp_path: Path) -> None:
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        got = await run_dry(rig, body(simulate={"chunk_bytes": 5_000_000}), "100")
        assert got.finish_reasons == ["stop"]
        assert len(got.text()) == 5_000_000


async def test_sixteen_tokens_are_the_least_that_is_begun(tmp_path: Path) -> None:
    """Below that it is refused, and the client is told how much is missing."""
    least = worth("gpt-4o-mini", 8, 16)
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        await rig.grant(f"{least - NANO:f}")
        refused = await rig.stream(body(simulate={"tokens": 500}))
        assert refused.status == 402
        error = json.loads(refused.raw)["error"]
        assert (error["code"], error["type"]) == ("insufficient_credits", "insufficient_quota")
        assert Decimal(error["needed_decimal"]) == least
        assert Decimal(error["available_decimal"]) == least - NANO
        await rig.grant(f"{NANO:f}")
        got = await rig.stream(body(simulate={"tokens": 500}))
        assert got.status == 200
        assert tokens(got.text()) == 16
        assert await rig.balance() == "0"


async def test_a_top_up_in_the_middle_lets_the_stream_go_on(tmp_path: Path) -> None:
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        await rig.grant("0.02")
        streaming = asyncio.create_task(rig.stream(body(simulate={"tokens": 400, "chunk_delay_ms": 1})))
        while rig.store.count(Extend) == 0:  # noqa: ASYNC110 - until the first slice is used up
            await asyncio.sleep(0.001)
        await rig.grant("1")
        got = await streaming
        assert got.finish_reasons == ["stop"]


async def test_the_number_of_extensions_is_logarithmic(tmp_path: Path) -> None:
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        await rig.grant("100")
        before = 0
        for count in (200, 2_000, 20_000):
            got = await rig.stream(body("odd", simulate={"tokens": count}))
            assert got.finish_reasons == ["stop"]
            extensions = rig.store.count(Extend) - before
            before += extensions
            assert extensions <= max(0, (count // 256).bit_length() + 1), (count, extensions)


async def test_a_dry_wallet_is_asked_only_a_few_times(tmp_path: Path) -> None:
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        sent = body(simulate={"tokens": 5_000})
        check_dry(await run_dry(rig, sent, "0.2"), sent, "0.2")
        assert rig.store.count(Extend) <= 10


@pytest.mark.parametrize("streams", [2, 16, 64])
async def test_many_streams_on_one_wallet_never_overspend_it(tmp_path: Path, streams: int) -> None:
    """Each ends well-formed, whether it was served to its end, cut short or refused."""
    balance = Decimal("0.3")
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        await rig.grant(f"{balance}")
        sent = [body(simulate={"tokens": 100 + 17 * number}, n=1 + number % 2) for number in range(streams)]
        got = await asyncio.gather(*(rig.stream(each) for each in sent))
        cost = Decimal(0)
        for stream in got:
            if stream.status == 402:
                continue
            assert stream.done
            receipt = await rig.receipt(stream)
            cost += receipt.reservation.charged[0].total * NANO
            delivered = sum(tokens(stream.text(index)) for index in (0, 1))
            assert receipt.usage[0].record.units.get("output", 0) == delivered
            assert receipt.reservation.shortfall == 0
        wallet = await rig.wallet()
        assert wallet.reserved == 0
        assert Decimal(await rig.balance()) == balance - cost >= 0
        # What they left behind can be spent: nobody is refused what the balance affords.
        if wallet.balance * NANO > worth("gpt-4o-mini", 8, 17):
            assert (await rig.stream(body(simulate={"tokens": 2}))).status == 200
