"""What is counted, for Prometheus. `docs/metrics.md` says what each metric means and what to alert on.

No label names a tenant, a user, a key or a model: whoever sends requests cannot make the list longer. The values that a
label can take are ours, or stand in the settings. A metric with labels keeps its children at hand, because finding one
through the client library costs as much as counting three times.
"""

import os
import platform
from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, TypeVar

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from gateway import __version__
from gateway.multiprocess import MULTIPROCESS_DIR
from gateway.proxy.journey import Journey, Kind
from ledger.commands import Reserve
from ledger.ledger import Swept
from ledger.outcomes import Applied, Rejected, Reserved, UsageRecorded
from ledger.writer import BatchRun

PROXIED: Final = "/v1/chat/completions"
LATENCY_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
OWN_BUCKETS_S: Final = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)

AnyMetric = TypeVar("AnyMetric", Counter, Gauge, Histogram)


class Children(Generic[AnyMetric]):
    """A metric's children by their labels' values, each looked up once."""

    def __init__(self, metric: AnyMetric) -> None:
        self._metric: AnyMetric = metric
        self._children: dict[tuple[str, ...], AnyMetric] = {}

    def __call__(self, *values: str) -> AnyMetric:
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = self._metric.labels(*values)
        return child


class Metrics:
    """Everything that is counted. Prometheus counts in floats: this is for graphs, the journal is for accounts."""

    content_type: str = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests_of_gateway()
        self._ledger()
        self._surroundings()
        build = self._gauge("build_info", "Always 1; the labels say what runs.", ["version", "python"], mode="max")
        build.labels(__version__, platform.python_version()).set(1)

    def _requests_of_gateway(self) -> None:
        self.requests = Children(self._counter("requests", "Requests answered.", ["route", "method", "status"]))
        self.request_seconds = Children(
            self._histogram(
                "request_seconds", "From a request's beginning to the end of its answer.", LATENCY_BUCKETS_S, ["route"]
            )
        )
        self.open_requests = self._gauge("open_requests", "Proxied requests under way.")
        self.first_byte_seconds = self._histogram(
            "first_byte_seconds",
            "From a proxied request's beginning to the first byte of its answer.",
            LATENCY_BUCKETS_S,
        )
        self.overhead_seconds = self._histogram(
            "overhead_seconds",
            "What a proxied request took of us and our ledger: not the waiting for upstream and client.",
            OWN_BUCKETS_S,
        )
        self.refusals = Children(self._counter("refusals", "Requests refused, by the code in the answer.", ["code"]))
        self.settlements = Children(
            self._counter(
                "settlements",
                "Proxied requests charged, by how they ended and how their usage is known.",
                ["ending", "source"],
            )
        )
        self.upstream_requests = Children(
            self._counter("upstream_requests", "Calls of an upstream, by how they ended.", ["upstream", "outcome"])
        )
        self.upstream_first_byte_seconds = Children(
            self._histogram(
                "upstream_first_byte_seconds",
                "From a call of an upstream to the first byte of its answer's body.",
                LATENCY_BUCKETS_S,
                ["upstream"],
            )
        )
        self.upstream_repeats = Children(
            self._counter(
                "upstream_repeats", "Calls of an upstream that were not a request's first.", ["upstream", "kind"]
            )
        )

    def _ledger(self) -> None:
        self.reserved = self._counter("reserved", "Reserved by new requests, in the assets' smallest units.")
        self.held = self._gauge("held", "Held now for requests under way, in the assets' smallest units.")
        self.charged = self._counter("charged", "Charged, in the assets' smallest units.")
        self.shortfall = self._counter(
            "shortfall",
            "What the operator bore because an upstream used more than was quoted, in the assets' smallest units.",
        )
        self.ledger_queue = self._gauge("ledger_queue_length", "Commands that wait for the ledger.")
        self.ledger_wait_seconds = self._histogram(
            "ledger_wait_seconds", "How long the first command of a batch had waited for it.", OWN_BUCKETS_S
        )
        self.ledger_commit_seconds = self._histogram(
            "ledger_commit_seconds", "From taking a batch to its being durable.", OWN_BUCKETS_S
        )
        self.ledger_batch_commands = self._histogram("ledger_batch_commands", "Commands in a batch.", BATCH_BUCKETS)
        self.ledger_failures = self._counter("ledger_failures", "Batches that could not be written.")
        self.ledger_rejections = Children(
            self._counter("ledger_rejections", "Commands that the ledger refused, by its reason.", ["reason"])
        )
        self.swept = Children(self._counter("swept", "What sweeps settled because its time had run out.", ["what"]))
        self.sweep_failures = self._counter("sweep_failures", "What a sweep could not settle, and tries again.")
        self.journal_waiting = self._gauge(
            "journal_waiting", "Settlements kept on local disk until the ledger is back."
        )

    def _surroundings(self) -> None:
        self.database_up = self._gauge("database_up", "1 while the database answers in time.", mode="livemin")
        self.redis_up = self._gauge(
            "redis_up", "0 when a process does without the Redis that the settings name.", mode="livemin"
        )
        self.redis_up.set(1)
        self.redis_failures = self._counter(
            "redis_failures", "What Redis was asked, or would have been, and did not answer in time.", ["use"]
        )
        self.outbox_lag_seconds = self._gauge(
            "outbox_lag_seconds", "How old the oldest event was that a process last found untold.", mode="livemax"
        )
        self.webhook_attempts = Children(
            self._counter("webhook_attempts", "Attempts to deliver a webhook, by how they ended.", ["outcome"])
        )
        self.cache_looks = self._counter(
            "cache_looks", "Looks into a cache: hit, or miss when the database was read.", ["cache", "result"]
        )

        self.stripe_differences = Children(
            self._gauge(
                "stripe_differences",
                "What the journal and Stripe differed in when they were last compared.",
                ["kind"],
                mode="mostrecent",
            )
        )
        self.stripe_reconciled_at_seconds = self._gauge(
            "stripe_reconciled_at_seconds",
            "When the journal was last compared with Stripe: a Unix time.",
            mode="mostrecent",
        )

    # One proxied request, when it has ended.

    def count(self, journey: Journey) -> None:
        """Count a proxied request that has ended."""
        self.requests(PROXIED, "POST", str(journey.status)).inc()
        self.request_seconds(PROXIED).observe(journey.took_s)
        self.overhead_seconds.observe(journey.overhead_s)
        if journey.first_byte_s is not None:
            self.first_byte_seconds.observe(journey.first_byte_s)
        if journey.code is not None:
            self.refusals(journey.code).inc()
        for attempt in journey.attempts:
            self.upstream_requests(attempt.upstream, attempt.outcome).inc()
            if attempt.kind is not Kind.FIRST:
                self.upstream_repeats(attempt.upstream, attempt.kind).inc()
            if attempt.first_byte_s is not None:
                self.upstream_first_byte_seconds(attempt.upstream).observe(attempt.first_byte_s)

    # What the ledger tells.

    def count_applied(self, applied: Applied) -> None:
        """Count what a command of the ledger charged."""
        for fact in applied.facts:
            if isinstance(fact, UsageRecorded):
                self.settlements(fact.record.ending, fact.record.source).inc()
                self.charged.inc(sum(charge.total for charge in fact.charges))
                if fact.shortfall:
                    self.shortfall.inc(fact.shortfall)

    def count_batch(self, run: BatchRun) -> None:
        """Count one attempt to write a batch."""
        self.ledger_wait_seconds.observe(run.waited_s)
        if run.outcomes is None:
            self.ledger_failures.inc()
            return
        self.ledger_commit_seconds.observe(run.took_s)
        self.ledger_batch_commands.observe(len(run.commands))
        reserved = 0
        for command, outcome in zip(run.commands, run.outcomes, strict=True):
            if isinstance(outcome, Rejected):
                self.ledger_rejections(outcome.reason).inc()
            elif isinstance(command, Reserve) and outcome.facts and isinstance(outcome.result, Reserved):
                reserved += sum(outcome.result.held)
        if reserved:
            self.reserved.inc(reserved)

    def count_swept(self, swept: Swept) -> None:
        """Count what a sweep did."""
        for what, count in (
            ("reservations", swept.reservations),
            ("wallets", swept.wallets),
            ("responses", swept.responses),
        ):
            if count:
                self.swept(what).inc(count)
        if swept.failures:
            self.sweep_failures.inc(len(swept.failures))

    def count_delivery(self, outcome: str) -> None:
        """Count one attempt to deliver a webhook."""
        self.webhook_attempts(outcome).inc()

    def note_outbox_lag(self, age_us: int) -> None:
        """Note how old the oldest event was that a round of the outbox found; 0 when there was none."""
        self.outbox_lag_seconds.set(age_us / 1_000_000)

    def note_reconciled(self, differences: Mapping[str, int], at_s: int) -> None:
        """Note what differed of each kind when the journal was compared with the payment processor."""
        for kind, count in differences.items():
            self.stripe_differences(kind).set(count)
        self.stripe_reconciled_at_seconds.set(at_s)

    def cache(self, name: str) -> Callable[[bool], None]:
        """What a cache of that name calls with each look-up: whether it had the answer."""
        hits, misses = self.cache_looks.labels(name, "hit"), self.cache_looks.labels(name, "miss")
        return lambda hit: hits.inc() if hit else misses.inc()

    # What Prometheus reads.

    def exposition(self) -> bytes:
        """What Prometheus reads: this process's counters, or those of all workers."""
        if MULTIPROCESS_DIR not in os.environ:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)

    def described(self) -> Mapping[str, tuple[str, ...]]:
        """The name of every metric, as a query names it, and its labels."""
        metrics: Any = self._registry._collector_to_names
        return {_queried(metric): tuple(metric._labelnames) for metric in metrics}

    def _counter(self, name: str, documentation: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"farebox_{name}_total", documentation, labels or [], registry=self._registry)

    def _histogram(
        self, name: str, documentation: str, buckets: tuple[float, ...], labels: list[str] | None = None
    ) -> Histogram:
        return Histogram(f"farebox_{name}", documentation, labels or [], buckets=buckets, registry=self._registry)

    def _gauge(self, name: str, documentation: str, labels: list[str] | None = None, *, mode: Any = "livesum") -> Gauge:
        return Gauge(f"farebox_{name}", documentation, labels or [], registry=self._registry, multiprocess_mode=mode)


def _queried(metric: Any) -> str:
    return f"{metric._name}_total" if isinstance(metric, Counter) else str(metric._name)
