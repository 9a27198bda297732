"""Product actions priced by the tenant's own metering rules: the charge, what the usage row says, and outages."""

from pathlib import Path
from typing import Any

import pytest

from gateway.billing.catalog import LEASE_S, OUTAGE_LEASE_S, Catalog
from gateway.billing.metrics import MetricChange
from gateway.database import Database, DatabaseUnavailable
from gateway.settings import ActionSettings, Settings
from ledger.model import Restriction
from pricing.metering import PICOS_PER_CREDIT, FlatRule, PerUnitRule
from tests.gateway.rig import Rig, running

ACTIONS = (ActionSettings(key="chat.reply", credits="2.5"), ActionSettings(key="hint", credits="1"))


def body(**fields: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
    sent = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100}
    return {**sent, "simulate": {"usage": usage}, **fields}


def settings(tmp_path: Path, **more: Any) -> Settings:
    shared = {"default_upstream": "simulated", "rate_limit_per_minute": 0, "journal_dir": tmp_path / "kept"}
    return Settings(**{**shared, "actions": ACTIONS, **more})


async def price(rig: Rig, credits: int, key: str = "chat.reply", mode: str = "live") -> str:
    """Give the action a price of its own; the id of the rule."""
    await rig.billables.create(rig.tenant, mode, key=key, name=key)
    return (await rig.billables.price(rig.tenant, mode, key, PerUnitRule(credits * PICOS_PER_CREDIT))).id


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reply_is_four_credits_whatever_its_tokens(tmp_path: Path, stream: bool) -> None:
    async with running(tmp_path, settings=settings(tmp_path), markup_bps=2_000) as rig:
        await rig.grant("10")
        await rig.fund_developer("1")
        rule = await price(rig, 4)
        answer = await rig.chat(body(stream=stream), X_Quota_Action="chat.reply")
        assert answer.status_code == 200
        assert answer.headers["X-Quota-Reserved"] == "4"
        assert await rig.balance() == "6"
        (part,) = (await rig.newest_receipt()).usage
        assert (part.record.action, part.record.metric) == ("chat.reply", "chat.reply")
        assert part.record.price_version == rule
        assert part.record.provider_cost_nanos == 45_000  # 100 x $0.15 and 50 x $0.60 a million tokens.
        assert (part.charges[0].base, part.charges[0].total) == (4_500_000, 4_000_000_000)
        if not stream:
            assert answer.json()["usage"]["cost"] == answer.headers["X-Quota-Cost"] == "4"


async def test_the_settings_price_what_the_tenant_has_no_metric_for(tmp_path: Path) -> None:
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        await rig.grant("10")
        await rig.fund_developer("1")
        await price(rig, 4)
        assert (await rig.chat(body(), X_Quota_Action="hint")).headers["X-Quota-Cost"] == "1"
        (part,) = (await rig.newest_receipt()).usage
        assert (part.record.action, part.record.metric) == ("hint", None)
        # The price is live data's: the sandbox has none, and falls back.
        await rig.grant("10", mode="test")
        await rig.fund_developer("1", mode="test")
        tried = await rig.chat(body(), mode="test", X_Quota_Action="chat.reply")
        assert tried.headers["X-Quota-Cost"] == "2.5"


async def test_a_metric_without_a_price_is_no_action(tmp_path: Path) -> None:
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        await rig.grant("10")
        await rig.billables.create(rig.tenant, "live", key="chat.reply", name="Reply")
        refused = await rig.chat(body(), X_Quota_Action="chat.reply")
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "invalid_request", "X-Quota-Action")
        assert "metering rule" in error["message"]


async def test_an_archived_metric_leaves_the_action_to_the_settings(tmp_path: Path) -> None:
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        await rig.grant("10")
        await rig.fund_developer("1")
        await price(rig, 4)
        await rig.billables.change(rig.tenant, "live", "chat.reply", MetricChange(archived=True))
        assert (await rig.chat(body(), X_Quota_Action="chat.reply")).headers["X-Quota-Cost"] == "2.5"


async def test_blocks_for_the_metric_pay_its_action_and_others_do_not(tmp_path: Path) -> None:
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        await rig.grant("10", restriction=Restriction(metrics=("chat.reply",)))
        await rig.fund_developer("1")
        await price(rig, 4)
        assert (await rig.chat(body(), X_Quota_Action="hint")).status_code == 402
        assert (await rig.chat(body())).status_code == 402
        assert (await rig.chat(body(), X_Quota_Action="chat.reply")).status_code == 200
        assert await rig.balance() == "6"


async def test_who_cannot_pay_the_rules_price_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        await rig.grant("3.999999999")
        await rig.fund_developer("1")
        await price(rig, 4)
        refused = await rig.chat(body(), X_Quota_Action="chat.reply")
        assert (refused.status_code, refused.json()["error"]["needed_decimal"]) == (402, "4")


async def test_a_scheduled_price_holds_from_its_time(tmp_path: Path) -> None:
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        await rig.grant("100")
        await rig.fund_developer("1")
        first, later_us = await price(rig, 4), rig.clock.now_us() + 3600 * 1_000_000
        raised = FlatRule(9 * PICOS_PER_CREDIT)
        await rig.billables.revise(rig.tenant, "live", first, raised, effective_from_us=later_us)
        assert (await rig.chat(body(), X_Quota_Action="chat.reply")).headers["X-Quota-Cost"] == "4"
        rig.clock.pass_s(3600)
        # What was looked up a moment ago is known to end then.
        assert (await rig.chat(body(), X_Quota_Action="chat.reply")).headers["X-Quota-Cost"] == "9"


async def test_in_an_outage_the_last_known_price_serves_who_chose_to_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: Database, *_: object) -> Any:
        raise DatabaseUnavailable("the test took the database away")

    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        await price(rig, 4)
        now_s = [0.0]
        catalog = Catalog(rig.billables._database, monotonic_s=lambda: now_s[0])

        async def asked(key: str, *, through_outage: bool) -> str:
            found = await catalog.priced(
                rig.tenant, "live", key, at_us=rig.clock.now_us(), through_outage=through_outage
            )
            return found.price_version

        known = await asked("chat.reply", through_outage=False)
        now_s[0] = LEASE_S
        monkeypatch.setattr(Database, "read", away)
        assert await asked("chat.reply", through_outage=True) == known
        for key, through_outage in (("chat.reply", False), ("hint", True)):
            with pytest.raises(DatabaseUnavailable):
                await asked(key, through_outage=through_outage)
        now_s[0] = LEASE_S + OUTAGE_LEASE_S
        with pytest.raises(DatabaseUnavailable):
            await asked("chat.reply", through_outage=True)
        monkeypatch.undo()


@pytest.mark.sqlite
async def test_a_request_without_an_action_asks_for_no_price(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    priced = Catalog.priced

    async def counted(self: Catalog, tenant: str, mode: str, key: str, **options: Any) -> Any:
        asked.append(key)
        return await priced(self, tenant, mode, key, **options)

    monkeypatch.setattr(Catalog, "priced", counted)
    async with running(tmp_path, settings=settings(tmp_path)) as rig:
        await rig.grant("10")
        assert (await rig.chat(body())).status_code == 200
        assert asked == []
        await rig.fund_developer("1")
        assert (await rig.chat(body(), X_Quota_Action="hint")).status_code == 200
        assert asked == ["hint"]
