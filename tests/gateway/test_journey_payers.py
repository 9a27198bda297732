"""Who pays: the user, the developer, and grants that hold only in one app; live and test never meet."""

import asyncio
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gateway.ids import new_id
from gateway.proxy.simulated import SimulatedUpstream
from gateway.settings import Settings, UpstreamSettings
from ledger.commands import Freeze
from ledger.model import Funding, Restriction
from ledger.model import Scope as LedgerScope
from tests.gateway.rig import Rig, running

USAGE = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
COST = Decimal("0.0045")


def body(**fields: Any) -> dict[str, Any]:
    sent = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100}
    return {**sent, "simulate": {"usage": USAGE}, **fields}


async def other_app(rig: Rig, **options: Any) -> str:
    """A live key of another app of the same tenant."""
    app = await rig.tenants.create_app(rig.tenant, "Other", **options)
    return (await rig.tenants.create_key(rig.tenant, "live", app_id=app.id)).token


# User-pays.


@pytest.mark.parametrize("stream", [False, True])
async def test_a_user_who_is_named_pays_with_the_markup(tmp_path: Path, stream: bool) -> None:
    async with running(tmp_path, markup_bps=2_000) as rig:
        await rig.grant("1")
        await rig.fund_developer("1")
        assert (await rig.chat(body(stream=stream))).status_code == 200
        assert Decimal(1) - Decimal(await rig.balance()) == COST * Decimal("1.2")
        assert await rig.balance(None) == "1"
        (part,) = (await rig.newest_receipt()).usage
        assert part.record.customer_id is not None
        assert part.charges[0].markup == part.charges[0].base * 2 // 10


async def test_a_user_in_the_path_is_the_user_in_the_header(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1", user="zoë@example.com")
        by_path = await rig.chat(body(), user=None, path="/v1/users/zo%C3%AB@example.com/chat/completions")
        assert by_path.status_code == 200
        both = await rig.chat(body(), user=None, path="/v1/users/alice/chat/completions", X_Quota_User="alice")
        assert both.status_code == 402
        headers = [(b"X-Quota-User", "zoë@example.com".encode())]
        by_header = await rig.client.post(
            "/v1/chat/completions",
            json=body(),
            headers=[*((k.encode(), v.encode()) for k, v in rig.headers(None).items()), *headers],
        )
        assert by_header.status_code == 200
        assert Decimal(1) - Decimal(await rig.balance("zoë@example.com")) == 2 * COST


async def test_a_users_wallet_is_never_helped_out_by_the_developers(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.fund_developer("100")
        refused = await rig.chat(body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (402, "insufficient_credits")


async def test_users_of_one_key_have_their_own_wallets(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        users = [f"user-{number}" for number in range(10)]
        for user in users:
            await rig.grant("0.01", user=user)
        await asyncio.gather(*(rig.chat(body(), user=user) for user in users for _ in range(2)))
        for user in users:
            assert Decimal(await rig.balance(user)) == Decimal("0.01") - 2 * COST


# Developer-pays.


@pytest.mark.parametrize("stream", [False, True])
async def test_where_no_user_is_named_the_developer_pays_without_markup(tmp_path: Path, stream: bool) -> None:
    async with running(tmp_path, markup_bps=2_000) as rig:
        await rig.fund_developer("1")
        assert (await rig.chat(body(stream=stream), user=None)).status_code == 200
        assert Decimal(1) - Decimal(await rig.balance(None)) == COST
        (part,) = (await rig.newest_receipt()).usage
        assert (part.record.customer_id, part.charges[0].markup) == (None, 0)


async def test_in_a_developer_pays_app_the_user_is_recorded_and_pays_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, markup_bps=2_000, billing_mode="developer_pays") as rig:
        await rig.grant("1")
        await rig.fund_developer("1")
        assert (await rig.chat(body())).status_code == 200
        assert await rig.balance() == "1"
        assert Decimal(1) - Decimal(await rig.balance(None)) == COST
        (part,) = (await rig.newest_receipt()).usage
        assert part.record.customer_id is not None


async def test_a_developer_without_credits_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        refused = await rig.chat(body(), user=None)
        assert refused.status_code == 402


# Grants.


async def test_an_apps_grant_is_spent_before_the_users_own_credits_and_only_there(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        await rig.give("0.006")
        first = await rig.chat(body())
        assert first.status_code == 200
        (own,) = [block for block in (await rig.wallet()).blocks if block.funding is Funding.PAID]
        assert own.consumed == 0
        await rig.chat(body())  # The rest of the grant, then the user's own.
        blocks = {block.funding: block for block in (await rig.wallet()).blocks}
        assert blocks.keys() == {Funding.PAID}
        assert Decimal(blocks[Funding.PAID].consumed) / 10**9 == 2 * COST - Decimal("0.006")

        await rig.give("0.006")
        key = await other_app(rig)
        headers = {"Authorization": f"Bearer {key}", "X-Quota-User": "alice"}
        elsewhere = await rig.client.post("/v1/chat/completions", json=body(), headers=headers)
        assert elsewhere.status_code == 200
        blocks = {block.funding: block for block in (await rig.wallet()).blocks}
        assert blocks[Funding.DEVELOPER_GRANT].consumed == 0
        assert Decimal(blocks[Funding.PAID].consumed) / 10**9 == 3 * COST - Decimal("0.006")


async def test_in_another_app_a_grant_is_no_credit_at_all(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1", restriction=Restriction(apps=(rig.app,)))
        headers = {"Authorization": f"Bearer {await other_app(rig)}", "X-Quota-User": "alice"}
        refused = await rig.client.post("/v1/chat/completions", json=body(), headers=headers)
        assert (refused.status_code, refused.json()["error"]["available"]) == (402, 0)


async def test_a_grant_for_one_model_pays_for_no_other(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1", restriction=Restriction(models=("gpt-4o-mini",)))
        assert (await rig.chat(body())).status_code == 200
        assert (await rig.chat(body(model="gpt-4o"))).status_code == 402


# A wallet that may not pay.


async def test_a_frozen_wallet_pays_nothing_and_says_why(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        wallet = (await rig.wallet()).wallet.ref
        scope = LedgerScope(rig.tenant, "live")
        await rig.ledger.execute(Freeze(id=new_id("cmd"), scope=scope, wallet=wallet, frozen=True))
        refused = await rig.chat(body())
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["type"]) == (403, "permission_denied", "permission_error")
        assert "frozen" in error["message"]
        await rig.ledger.execute(Freeze(id=new_id("cmd"), scope=scope, wallet=wallet, frozen=False))
        assert (await rig.chat(body())).status_code == 200


async def test_a_wallet_that_freezes_in_the_middle_of_a_stream_is_extended_no_more(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        sent = body(max_tokens=None, simulate={"tokens": 2_000, "usage": None, "chunk_delay_ms": 1})
        streaming = asyncio.create_task(rig.stream(sent))
        while len(rig.live) == 0:  # noqa: ASYNC110 - until it has begun
            await asyncio.sleep(0.001)
        wallet = (await rig.wallet()).wallet.ref
        scope = LedgerScope(rig.tenant, "live")
        await rig.ledger.execute(Freeze(id=new_id("cmd"), scope=scope, wallet=wallet, frozen=True))
        got = await streaming
        assert (got.done, got.finish_reasons) == (True, ["length"])
        receipt = await rig.newest_receipt()
        assert receipt.usage[0].record.units["output"] < 600
        await rig.ledger.execute(Freeze(id=new_id("cmd"), scope=scope, wallet=wallet, frozen=False))


# Live and test.


async def test_test_keys_reach_the_test_upstream_and_test_credits_only(tmp_path: Path) -> None:
    live, test = SimulatedUpstream(name="real"), SimulatedUpstream()
    settings = Settings(
        upstreams=(UpstreamSettings(name="real", base_url="http://127.0.0.1:9/v1"),),
        rate_limit_per_minute=0,
        journal_dir=tmp_path / "kept",
    )
    async with running(tmp_path, settings=settings, upstreams={"real": live, "simulated": test}) as rig:
        await rig.grant("1")
        refused = await rig.chat(body(), mode="test")
        assert refused.status_code == 402
        await rig.grant("1", mode="test")
        answer = await rig.chat(body(), mode="test")
        assert answer.status_code == 200
        assert (live.requests_count, test.requests_count) == (0, 1)
        assert await rig.balance() == "1"
        assert Decimal(1) - Decimal(await rig.balance(mode="test")) == COST
        assert await rig.ledger.receipt(rig.tenant, "live", answer.headers["X-Request-Id"]) is None
        assert (await rig.chat(body())).status_code == 200
        assert (live.requests_count, test.requests_count) == (1, 1)
