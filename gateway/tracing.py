"""Traces of proxied requests, sent to an OpenTelemetry collector over OTLP/HTTP.

Only imported where a collector is named. The names are those of the GenAI semantic conventions
(https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/), our own begin with `farebox.`. No span holds a
prompt, an answer, a user or a key. Spans are sent from a thread of the SDK; when the collector is away they are
dropped, never waited for. The SDK's own variables (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS,
OTEL_BSP_…) have their usual effect.
"""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import msgspec
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.types import Scope

from gateway import __version__
from gateway.proxy.journey import Attempt, Journey, Outcome

TRACES_PATH: Final = "/v1/traces"
EXPORT_TIMEOUT_S: Final = 5
CLOSE_S: Final = 2.0
"""How long spans that wait may take to be sent when the process ends."""

OPERATION: Final = "chat"

PROPAGATOR: Final = TraceContextTextMapPropagator()
PROPAGATED: Final = frozenset({b"traceparent", b"tracestate"})

_EVENT: Final = b"data:"


class _Named(msgspec.Struct):
    model: str = ""


_NAMED: Final = msgspec.json.Decoder(_Named)


class Tracing:
    """The way to a collector, or to wherever *exporter* sends spans."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "farebox", "service.version": __version__}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("farebox", __version__)

    def begin(self, scope: Scope) -> "ChatTrace":
        """The trace of a request: a new one, or the one that its `traceparent` names."""
        carrier = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in PROPAGATED}
        parent = PROPAGATOR.extract(carrier) if carrier else Context()
        return ChatTrace(self._tracer, parent)

    async def close(self) -> None:
        """Send what waits, for a bounded time, and end."""
        closing = asyncio.ensure_future(asyncio.to_thread(self._provider.shutdown))
        try:
            await asyncio.wait_for(asyncio.shield(closing), CLOSE_S)
        except TimeoutError:
            self._exporter.shutdown()  # It stops trying again: the collector is away, and a restart must not wait.
            await closing


def open_tracing(endpoint: str) -> Tracing:
    """Spans go to *endpoint*, the collector's base URL."""
    return Tracing(OTLPSpanExporter(endpoint=endpoint + TRACES_PATH, timeout=EXPORT_TIMEOUT_S))


class ChatTrace:
    """The spans of one chat completion; see `gateway.proxy.journey.Trace`."""

    def __init__(self, tracer: Tracer, parent: Context) -> None:
        self._tracer = tracer
        self._span = tracer.start_span(OPERATION, parent, SpanKind.SERVER)
        self._context = set_span_in_context(self._span, parent)
        self._calls: dict[Attempt, Span] = {}
        self._answered_by: str | None = None

    @property
    def trace_id(self) -> str:
        return format_trace_id(self._span.get_span_context().trace_id)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        span = self._tracer.start_span(name, self._context)
        try:
            yield
        except BaseException as error:
            # Its type alone: a message may quote what was sent.
            _failed(span, type(error).__name__)
            raise
        finally:
            span.end()

    def sending(self, attempt: Attempt) -> Mapping[str, str]:
        attributes = {**_asked(attempt.model, attempt.provider), "farebox.upstream": attempt.upstream}
        span = self._tracer.start_span("upstream", self._context, SpanKind.CLIENT, attributes)
        span.set_attribute("farebox.attempt", attempt.kind.value)
        self._calls[attempt] = span
        headers: dict[str, str] = {}
        PROPAGATOR.inject(headers, set_span_in_context(span, self._context))
        return headers

    def answered(self, head: bytes) -> None:
        self._answered_by = self._answered_by or _model_in(head)

    def ended(self, attempt: Attempt) -> None:
        span = self._calls.pop(attempt, None)
        if span is None:
            return
        span.set_attribute("farebox.outcome", attempt.outcome.value)
        if attempt.outcome is not Outcome.OK:
            _failed(span, attempt.outcome.value)
        span.end()

    def end(self, journey: Journey) -> None:
        for attempt in tuple(self._calls):
            self.ended(attempt)
        span = self._span
        for name, value in _facts(journey, self._answered_by).items():
            if value is not None:
                span.set_attribute(name, value)
        if journey.model is not None:
            span.update_name(f"{OPERATION} {journey.model}")
        if journey.status >= 500 or journey.ending == "broken":
            _failed(span, journey.code or journey.ending or str(journey.status))
        elif journey.code is not None:
            span.set_attribute("error.type", journey.code)
        span.end()


def _facts(journey: Journey, answered_by: str | None) -> Mapping[str, AttributeValue | None]:
    """What is known of a request at its end."""
    last = journey.attempts[-1] if journey.attempts else None
    usage = journey.usage
    return {
        **_asked(journey.model, None if last is None else last.provider),
        "gen_ai.request.stream": journey.stream,
        "gen_ai.response.model": answered_by,
        "gen_ai.usage.input_tokens": None if usage is None else usage.input_total,
        "gen_ai.usage.output_tokens": None if usage is None else usage.output_total,
        "gen_ai.usage.cache_read.input_tokens": None if usage is None else usage.cached_input,
        "gen_ai.response.time_to_first_chunk": journey.first_byte_s if journey.stream else None,
        "http.response.status_code": journey.status,
        "farebox.request_id": journey.request_id,
        "farebox.upstream": None if last is None else last.upstream,
        "farebox.attempts": len(journey.attempts),
        "farebox.ending": journey.ending,
        "farebox.overhead_ms": round(journey.overhead_s * 1000, 3),
    }


def _asked(model: str | None, provider: str | None) -> dict[str, AttributeValue]:
    asked: dict[str, AttributeValue] = {"gen_ai.operation.name": OPERATION}
    if model is not None:
        asked["gen_ai.request.model"] = model
    if provider is not None:
        asked["gen_ai.provider.name"] = provider
    return asked


def _failed(span: Span, kind: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))


def _model_in(head: bytes) -> str | None:
    """The model that an answer, or the first event of a stream, says that it comes from."""
    if head.lstrip().startswith(_EVENT):
        head = head.lstrip().removeprefix(_EVENT).split(b"\n", 1)[0]
    try:
        return _NAMED.decode(head).model[:256] or None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
