"""Schemathesis over the whole document: its examples, its edges, random requests, and walks along its links.

Nothing that it sends may be a fault of ours, and every answer must be as the document says.
"""

import asyncio
import collections
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import pytest
import schemathesis
import uvicorn
from schemathesis.config import (
    CoveragePhaseConfig,
    ExamplesPhaseConfig,
    FuzzingPhaseConfig,
    GenerationConfig,
    PhasesConfig,
    SchemathesisConfig,
)
from schemathesis.config._phases import StatefulPhaseConfig
from schemathesis.core.failures import Failure
from schemathesis.core.transport import Response
from schemathesis.engine import events, from_schema
from schemathesis.generation.case import Case
from schemathesis.hooks import HookContext
from schemathesis.openapi.checks import AllowHeaderMismatch, UnsupportedMethodResponse
from schemathesis.schemas import BaseSchema

from gateway.clock import now_us
from gateway.server import Connection, State
from gateway.stores import open_store
from ledger.verify import verify
from tests.conftest import Campaign
from tests.gateway.office import Office

METHODS: Final = (UnsupportedMethodResponse, AllowHeaderMismatch)
NAMED_WITH_SLASHES: Final = ("/v1/customers/{", "/v1/customer-by-external-id/{", "/v1/billable-metrics/{")

HEALTHY_PERCENT: Final = 10
"""So many answers at least must be no refusals: a run that was locked out would prove nothing."""

UNCHECKED: Final = ("positive_data_acceptance", "missing_required_header")
"""What is valid by the document may be refused all the same: the customer is not there, or cannot pay."""


@dataclass
class Run:
    """What a run has sent and seen."""

    operations: int
    cases: int = 0
    labels: set[str] = field(default_factory=set)
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    phases: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def tried(self) -> int:
        return len(self.labels)

    def take(self, event: events.EngineEvent) -> None:
        if isinstance(event, events.NonFatalError):
            self.failures[f"{event.label}: {event.info}"] = str(event.value)
        if isinstance(event, events.FatalError):
            raise event.exception
        if not isinstance(event, events.ScenarioFinished):
            return
        for case_id, interaction in event.recorder.interactions.items():
            self.cases += 1
            self.labels.add(event.recorder.cases[case_id].value.operation.label)
            self.phases[event.phase.name] += 1
            if interaction.response is not None:
                self.statuses[interaction.response.status_code] += 1
            for check in event.recorder.checks.get(case_id, ()):
                if check.failure_info is not None:
                    failure = check.failure_info.failure
                    what = f"{event.recorder.cases[case_id].value.operation.label}: {check.name}: {failure.title}"
                    shown = f"{failure.message}\n{check.failure_info.code_sample}"
                    self.failures.setdefault(what, shown[:3000])


@contextlib.asynccontextmanager
async def served(office: Office) -> AsyncIterator[str]:
    """The office on a socket, behind the product's own connection."""
    config = uvicorn.Config(
        office.gateway, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False
    )
    config.load()
    state = State(office.gateway.answer_at_once)
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(config=config, server_state=state, app_state={}), sock=listener
    )
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        await server.wait_closed()
        async with asyncio.timeout(20):
            while state.tasks:  # noqa: ASYNC110 - nobody tells of it
                await asyncio.sleep(0.001)


def keep_the_keys(own: frozenset[str]) -> Callable[[HookContext, Case], bool]:
    """No request may end the key that the run asks with, or archive its app."""

    def filter_case(context: HookContext, case: Case) -> bool:
        named = {str(value) for value in (case.path_parameters or {}).values()}
        return not (case.operation.path.startswith(("/v1/apps/", "/v1/keys/")) and named & own)

    return filter_case


def filter_failure(context: HookContext, failure: Failure, case: Case, response: Response) -> bool:
    """A customer's own id, and a metric's key, may have a slash: below them every method has its meaning."""
    return not (isinstance(failure, METHODS) and case.operation.path.startswith(NAMED_WITH_SLASHES))


class Plan(NamedTuple):
    """How much is tried: random requests of each operation, walks, and the edges of every so many-th operation."""

    requests: int
    walks: int
    every: int


SHORT: Final = Plan(requests=1, walks=12, every=16)
LONG: Final = Plan(requests=60, walks=400, every=1)


def schema_at(base_url: str, key: str, plan: Plan, *phases: str, seed: int) -> BaseSchema:
    """The document at *base_url*, to be tried in these ways."""

    def some(examples: int) -> GenerationConfig:
        return GenerationConfig(max_examples=examples, no_shrink=True, database="none")

    config = SchemathesisConfig(seed=seed)
    project = config.projects.default
    project.update(base_url=base_url, headers={"Authorization": f"Bearer {key}"}, continue_on_failure=True)
    project.checks.update(excluded_check_names=list(UNCHECKED))
    project.phases = PhasesConfig(
        examples=ExamplesPhaseConfig(enabled="examples" in phases),
        coverage=CoveragePhaseConfig(enabled="coverage" in phases),
        fuzzing=FuzzingPhaseConfig(enabled="fuzzing" in phases, generation=some(plan.requests)),
        stateful=StatefulPhaseConfig(enabled="stateful" in phases, generation=some(plan.walks)),
    )
    return schemathesis.openapi.from_url(f"{base_url}/openapi.json", config=config)


def walk(base_url: str, key: str, own: frozenset[str], plan: Plan, *, seed: int) -> Run:
    """All phases of schemathesis over the document that is at *base_url*. Walks know nothing of what was sent before:
    else they would begin with that."""
    single, edges, walks = (
        schema_at(base_url, key, plan, *phases, seed=seed)
        for phases in (("examples", "fuzzing"), ("coverage",), ("stateful",))
    )
    labels = sorted(each.ok().label for each in single.get_all_operations())
    run = Run(operations=len(labels))
    for schema in (single, edges.include(name=labels[seed % plan.every :: plan.every]), walks):
        schema.hook("filter_case")(keep_the_keys(own))
        schema.hook("filter_failure")(filter_failure)
        for event in from_schema(schema).execute():
            run.take(event)
    return run


async def campaign_of(office: Office, plan: Plan, *, seed: int) -> Run:
    await office.fund_developer("100000")
    await office.post("/v1/topup/grant", {"customer_id": "user_12345", "credits": 50_000_000})
    await office.gateway.services.webhooks.stop()
    keys = (await office.get("/v1/keys", key="admin"))["data"]
    own = frozenset({office.app, *(each["id"] for each in keys)})
    async with served(office) as base_url:
        return await asyncio.to_thread(walk, base_url, office.keys["owner"], own, plan, seed=seed)


@pytest.mark.campaign
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
async def test_every_answer_is_as_the_document_says(office: Office, campaign: Campaign):
    run = await campaign_of(office, LONG if campaign.long else SHORT, seed=campaign.seed)
    print(f"{run.cases} cases: {dict(run.phases)}; {dict(run.statuses)}")

    assert not run.failures, "\n\n".join(f"{what}\n{shown}" for what, shown in run.failures.items())
    fine = sum(count for status, count in run.statuses.items() if status < 300)
    assert 100 * fine >= HEALTHY_PERCENT * run.cases
    assert run.tried == run.operations
    assert run.cases >= (10_000 if campaign.long else 400)
    assert (await office.get("/v1/apps", key="owner"))["data"], "the run ended its own key"
    await the_books_hold(office)


async def the_books_hold(office: Office) -> None:
    store = await open_store(office.gateway.services.settings.database_url, clock=now_us)
    try:
        assert not (await verify(store, operator=office.tenant)).violations
    finally:
        await store.close()
