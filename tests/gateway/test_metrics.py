"""What is counted: the list in the docs is the list in the code, and nobody can make it longer."""

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.telemetry import Metrics
from tests.gateway.office import Office, open_office

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(farebox_\w+)` \|([^|]*)\|", re.MULTILINE)
HELLO = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}]}


def listed() -> dict[str, tuple[str, ...]]:
    return {name: tuple(re.findall(r"`(\w+)`", labels)) for name, labels in ROW.findall(DOCS.read_text())}


def test_the_docs_list_every_metric_with_its_labels():
    assert listed() == dict(Metrics().described())


def test_alerts_name_only_what_there_is():
    alerts = DOCS.read_text().partition("### Alerts")[2].partition("### What it costs")[0]
    for name in set(re.findall(r"farebox_\w+", alerts)):
        assert name.removesuffix("_bucket") in listed(), name


class Page:
    """`/metrics`, read by series."""

    def __init__(self, text: str) -> None:
        self.text = text

    def value(self, series: str) -> float:
        found = re.search(rf"^{re.escape(series)} (\S+)$", self.text, re.MULTILINE)
        return 0.0 if found is None else float(found[1])


async def page(office: Office) -> Page:
    return Page((await office.ask_plain("/metrics")).text)


async def grown(office: Office, ask: Callable[[], Awaitable[Any]]) -> Callable[[str], float]:
    """How much each series grew while *ask* ran."""
    before = await page(office)
    await ask()
    after = await page(office)
    return lambda series: after.value(series) - before.value(series)


@pytest.fixture
async def funded(office: Office) -> Office:
    await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 100_000})
    return office


async def test_one_request_is_counted_once_everywhere(funded: Office):
    by = await grown(funded, funded.chat)
    for series in (
        'farebox_requests_total{method="POST",route="/v1/chat/completions",status="200"}',
        'farebox_request_seconds_count{route="/v1/chat/completions"}',
        "farebox_overhead_seconds_count",
        "farebox_first_byte_seconds_count",
        'farebox_upstream_requests_total{outcome="ok",upstream="simulated"}',
        'farebox_upstream_first_byte_seconds_count{upstream="simulated"}',
        'farebox_settlements_total{ending="finished",source="provider"}',
    ):
        assert by(series) == 1, series
    looks = 'farebox_cache_looks_total{cache="principals",result="%s"}'
    assert by(looks % "hit") + by(looks % "miss") == 1
    assert by("farebox_ledger_batch_commands_sum") == 2, "one to reserve, one to commit"
    assert by("farebox_ledger_commit_seconds_count") == by("farebox_ledger_wait_seconds_count") == 2
    assert by("farebox_reserved_total") >= by("farebox_charged_total") > 0
    assert by("farebox_refusals_total") == by("farebox_ledger_failures_total") == 0


async def test_waiting_for_the_upstream_is_not_our_overhead(funded: Office):
    by = await grown(funded, lambda: funded.chat(simulate={"first_byte_delay_ms": 700}))
    assert by('farebox_request_seconds_sum{route="/v1/chat/completions"}') > 0.7
    assert by("farebox_overhead_seconds_sum") < 0.5
    assert by('farebox_upstream_first_byte_seconds_sum{upstream="simulated"}') >= 0.7


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"user": "poor"}, "insufficient_credits"),
        ({"model": "nobody-sells-this"}, "model_not_priced"),
        ({"messages": 1}, "invalid_request"),
        ({"key": "none"}, "invalid_api_key"),
        ({"simulate": {"refuse": True}}, "upstream_error"),
    ],
)
async def test_refusals_are_counted_by_their_code(funded: Office, asked: dict, code: str):
    by = await grown(funded, lambda: funded.chat(**asked))
    assert by(f'farebox_refusals_total{{code="{code}"}}') == 1


async def test_the_management_apis_refusals_are_counted_too(funded: Office):
    by = await grown(funded, lambda: funded.ask("GET", "/v1/customers/nobody"))
    assert by('farebox_refusals_total{code="not_found"}') == 1


async def test_what_the_ledger_refuses_is_counted_by_its_reason(funded: Office):
    by = await grown(funded, lambda: funded.chat(user="poor"))
    assert by('farebox_ledger_rejections_total{reason="insufficient_credits"}') == 1


async def test_a_rate_limit_is_a_refusal(tmp_path: Path):
    async with open_office(tmp_path, rate_limit_per_minute=1) as office:
        await office.chat(user=None)
        by = await grown(office, lambda: office.chat(user=None))
        assert by('farebox_refusals_total{code="rate_limit_exceeded"}') == 1


@pytest.mark.parametrize(
    ("simulate", "outcome"),
    [
        ({"status": 400}, "refused"),
        ({"status": 429}, "rate_limited"),
        ({"status": 500}, "failed"),
        ({"refuse": True}, "broken"),
        ({"cut_after_chunks": 0}, "broken"),
    ],
)
async def test_upstream_calls_are_counted_by_how_they_ended(funded: Office, simulate: dict, outcome: str):
    headers = {"Authorization": f"Bearer {funded.keys['live']}", "X-Quota-User": "alice"}
    body = {**HELLO, "simulate": simulate, "stream": "cut_after_chunks" in simulate}
    by = await grown(funded, lambda: funded.client.post("/v1/chat/completions", json=body, headers=headers))
    assert by(f'farebox_upstream_requests_total{{outcome="{outcome}",upstream="simulated"}}') == 1


async def test_retries_and_fallbacks_are_counted_where_they_go(tmp_path: Path):
    models = [
        {
            "name": "m",
            "upstream": "gone",
            "fallbacks": ["simulated/gpt-4o-mini"],
            "price": {"input": "1", "output": "2"},
        }
    ]
    upstreams = [{"name": "gone", "base_url": "http://127.0.0.1:1/v1", "retries": 2}]
    async with open_office(tmp_path, models=models, upstreams=upstreams) as office:
        await office.post("/v1/topup/grant", {"customer_id": "alice", "credits": 100_000})
        by = await grown(office, lambda: office.chat(model="m"))
        assert by('farebox_upstream_requests_total{outcome="unreachable",upstream="gone"}') == 3
        assert by('farebox_upstream_repeats_total{kind="retry",upstream="gone"}') == 2
        assert by('farebox_upstream_repeats_total{kind="fallback",upstream="simulated"}') == 1


async def test_sweeps_are_counted(funded: Office):
    granted = {"customer_id": "alice", "credits": 1000, "expires_at": "2100-01-01T00:00:00Z"}
    await funded.post("/v1/topup/grant", granted)
    funded.clock.pass_s(80 * 365 * 24 * 3600)
    metrics = funded.gateway.services.metrics
    before = await page(funded)
    metrics.count_swept(await funded.gateway.services.ledger.sweep(funded.clock.now_us()))
    series = 'farebox_swept_total{what="wallets"}'
    assert (await page(funded)).value(series) == before.value(series) + 1


async def test_hostile_requests_do_not_make_the_list_longer(funded: Office):
    def series(text: str) -> set[str]:
        return {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}

    async def round_of(number: int) -> None:
        name = f"nasty-{number}"
        await funded.chat(user=name, model=name)
        await funded.chat(user=name)
        await funded.ask("GET", f"/v1/customers/{name}", key="live")
        await funded.ask("GET", f"/{name}")
        await funded.client.post(f"/v1/users/{name}/chat/completions", json=HELLO)

    await round_of(0)
    await page(funded)
    before = series((await page(funded)).text)
    for number in range(1, 4):
        await round_of(number)
    after = (await page(funded)).text
    assert series(after) == before
    assert not re.search("nasty|alice|cus_|ten_|app_|key_|gpt-4o", after)
