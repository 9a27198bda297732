"""What the operator sees: logs as one JSON object a line, and counters for Prometheus.

Neither ever holds a secret, a prompt or an answer. Logs are written that way; beyond that, whatever looks like a key is
masked in the last step, because an exception's text may quote one. Metrics have no label that names a tenant or a user.
"""

import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Final

import structlog
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from gateway.multiprocess import MULTIPROCESS_DIR
from ledger.outcomes import Applied, UsageRecorded

SECRETS: Final = re.compile(
    r"\b(fb_(?:live|test|admin)_[0-9a-z]{4})[0-9a-z_]+|\b((?:sk|rk|whsec)[-_][A-Za-z0-9]{2})[A-Za-z0-9_-]{8,}"
    r"|((?:postgresql|rediss?)://[^:/@\s]+:)[^@\s]+(?=@)|(?i:(bearer\s+\S{4}))\S+"
)
PROXIED: Final = "/v1/chat/completions"
CLIENT_LEFT: Final = 499
LATENCY_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


def masked(text: str) -> str:
    """*text* without the secret part of anything that looks like a key or a password."""
    return SECRETS.sub(lambda match: next(part for part in match.groups() if part) + "…", text)


def configure_logging(level: str, *, stream: IO[str] | None = None) -> None:
    """Send structlog's and the standard library's records to *stream* (stderr) as JSON."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.ExtraAdder(["websocket"]), *shared],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _render],
    )
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for chatty in ("uvicorn.error", "uvicorn", "asyncio", "alembic", "aiosqlite", "sqlalchemy"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


def _render(_logger: object, _name: str, event: Any) -> str:
    event.pop("color_message", None)
    written = structlog.processors.JSONRenderer(ensure_ascii=False)(_logger, _name, event)
    assert isinstance(written, str)
    return masked(written)


@dataclass(slots=True)
class Seen:
    """The status of a response that has been sent; 499 while there is none: the client may leave first."""

    status: int = CLIENT_LEFT


class Metrics:
    """Everything that is counted. Prometheus counts in floats: this is for graphs, the journal is for accounts."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.requests = Counter(
            "farebox_requests_total", "Requests answered.", ["route", "method", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "farebox_request_seconds",
            "From a request's first byte to the last of its answer.",
            ["route"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.open_requests = Gauge(
            "farebox_open_requests", "Proxied requests under way.", registry=registry, multiprocess_mode="livesum"
        )
        self.settlements = Counter(
            "farebox_settlements_total",
            "Proxied requests charged, by how they ended and how their usage is known.",
            ["ending", "source"],
            registry=registry,
        )
        self.charged = Counter("farebox_charged_total", "Charged, in the assets' smallest units.", registry=registry)
        self.shortfall = Counter(
            "farebox_shortfall_total",
            "What the operator bore because an upstream used more than was quoted, in the assets' smallest units.",
            registry=registry,
        )
        self.ledger_queue = Gauge(
            "farebox_ledger_queue_length",
            "Commands that wait for the ledger.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.journal_waiting = Gauge(
            "farebox_journal_waiting",
            "Settlements kept on local disk until the ledger is back.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.redis_up = Gauge(
            "farebox_redis_up",
            "Whether Redis answers: 1, or 0 when a process does without.",
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.redis_failures = Counter(
            "farebox_redis_failures_total",
            "What Redis was asked, or would have been, and did not answer in time.",
            ["use"],
            registry=registry,
        )
        self.cache_looks = Counter(
            "farebox_cache_looks_total",
            "Looks into a cache: hit, or miss when the database was read.",
            ["cache", "result"],
            registry=registry,
        )
        self._proxied_seconds = self.request_seconds.labels(PROXIED)
        self._proxied_statuses: dict[int, Counter] = {}

    @contextmanager
    def proxied(self) -> Iterator[Seen]:
        """Count one proxied request, whose status is told in what this gives."""
        seen = Seen()
        began_s = time.perf_counter()
        self.open_requests.inc()
        try:
            yield seen
        finally:
            self.open_requests.dec()
            self._proxied_seconds.observe(time.perf_counter() - began_s)
            counter = self._proxied_statuses.get(seen.status)
            if counter is None:
                counter = self._proxied_statuses[seen.status] = self.requests.labels(PROXIED, "POST", str(seen.status))
            counter.inc()

    def count_applied(self, applied: Applied) -> None:
        """Count what a command of the ledger charged."""
        for fact in applied.facts:
            if isinstance(fact, UsageRecorded):
                self.settlements.labels(fact.record.ending, fact.record.source).inc()
                self.charged.inc(sum(charge.total for charge in fact.charges))
                if fact.shortfall:
                    self.shortfall.inc(fact.shortfall)

    content_type: str = CONTENT_TYPE_LATEST

    def exposition(self) -> bytes:
        """What Prometheus reads: this process's counters, or those of all workers."""
        if MULTIPROCESS_DIR not in os.environ:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)
