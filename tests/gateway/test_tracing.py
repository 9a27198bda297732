"""Traces in the words of the GenAI conventions, sent to a collector that the test runs; nothing where there is none."""

import itertools
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.gateway.office import Office, open_office

PROMPT = "the prompt nobody may read"
ANSWER = "the answer nobody may read"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


class Collector:
    """An OTLP/HTTP receiver."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.raw = b""
        self.resource: dict[str, Any] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.take(self.path, body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def take(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        self.raw += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource = attributes(resource.resource)
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


def attributes(of: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value") for each in of.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
async def office(tmp_path: Path, collector: Collector) -> AsyncIterator[Office]:
    """A traced one. What it sends is complete once it has been stopped."""
    async with open_office(tmp_path, otlp_endpoint=collector.url) as office:
        await office.post("/v1/topup/grant", {"customer_id": "alice@example.com", "credits": 100_000})
        yield office


async def ask(office: Office, **fields: Any) -> Any:
    body = {
        "model": "gpt-4o-mini",
        "messages": [{"role": "user", "content": PROMPT}],
        "simulate": {"text": ANSWER},
        **fields,
    }
    headers = {
        "Authorization": f"Bearer {office.keys['live']}",
        "X-Quota-User": "alice@example.com",
        "traceparent": PARENT,
        "tracestate": "vendor=1",
    }
    return await office.client.post("/v1/chat/completions", json=body, headers=headers)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_completion_is_a_trace(office: Office, collector: Collector, stream: bool):
    answer = await ask(office, stream=stream)
    assert answer.status_code == 200
    await office.gateway.stop()
    (chat,) = collector.named("chat gpt-4o-mini")
    found = attributes(chat)
    assert chat.kind == Span.SPAN_KIND_SERVER
    assert chat.status.code == Status.STATUS_CODE_UNSET
    assert {name: found[name] for name in found if name not in ("farebox.overhead_ms", "farebox.request_id")} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4o-mini",
        "gen_ai.request.stream": stream,
        "gen_ai.response.model": "gpt-4o-mini",
        "gen_ai.usage.input_tokens": found["gen_ai.usage.input_tokens"],
        "gen_ai.usage.output_tokens": found["gen_ai.usage.output_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "http.response.status_code": 200,
        "farebox.upstream": "simulated",
        "farebox.attempts": 1,
        "farebox.ending": "finished",
        **({"gen_ai.response.time_to_first_chunk": found["gen_ai.response.time_to_first_chunk"]} if stream else {}),
    }
    assert found["farebox.request_id"] == answer.headers["x-request-id"]
    if not stream:
        usage = answer.json()["usage"]
        assert found["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        assert found["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert collector.resource["service.name"] == "farebox"


async def test_reserve_upstream_and_settle_are_its_children_in_this_order(office: Office, collector: Collector):
    await ask(office)
    await office.gateway.stop()
    (chat,) = collector.named("chat gpt-4o-mini")
    children = sorted(
        (span for span in collector.spans if span is not chat), key=lambda span: span.start_time_unix_nano
    )
    assert [span.name for span in children] == ["reserve", "upstream", "settle"]
    assert {span.parent_span_id for span in children} == {chat.span_id}
    assert children[1].kind == Span.SPAN_KIND_CLIENT
    assert attributes(children[1])["farebox.outcome"] == "ok"
    for before, after in itertools.pairwise(children):
        assert before.end_time_unix_nano <= after.start_time_unix_nano


async def test_the_callers_trace_goes_on_to_the_upstream(office: Office, collector: Collector):
    services = office.gateway.services
    upstream = services.router.route("gpt-4o-mini", mode="live", at_us=services.now_us()).candidates[0].upstream
    sent = []
    send = upstream.send
    upstream.send = lambda request: sent.append(request.headers) or send(request)  # type: ignore[method-assign]
    await ask(office)
    await office.gateway.stop()
    (chat,) = collector.named("chat gpt-4o-mini")
    (call,) = collector.named("upstream")
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    assert chat.parent_span_id.hex() == PARENT.split("-")[2]
    assert sent == [{"traceparent": f"00-{TRACE_ID}-{call.span_id.hex()}-01", "tracestate": "vendor=1"}]


@pytest.mark.parametrize(
    ("fields", "chat_error", "upstream_error"),
    [
        ({"simulate": {"refuse": True}}, "upstream_error", "broken"),
        ({"simulate": {"status": 500}}, "upstream_error", "failed"),
        ({"simulate": {"text": ANSWER, "cut_after_chunks": 2}, "stream": True}, "broken", "broken"),
    ],
)
async def test_what_fails_is_an_error(
    office: Office, collector: Collector, fields: dict, chat_error: str, upstream_error: str
):
    await ask(office, **fields)
    await office.gateway.stop()
    (chat,) = collector.named("chat gpt-4o-mini")
    (call,) = collector.named("upstream")
    for span, error in ((chat, chat_error), (call, upstream_error)):
        assert (span.status.code, attributes(span)["error.type"]) == (Status.STATUS_CODE_ERROR, error)


async def test_a_refused_request_is_no_error_of_ours(office: Office, collector: Collector):
    await ask(office, model="no-such-model")
    await office.gateway.stop()
    (chat,) = collector.spans
    assert (chat.name, chat.status.code) == ("chat", Status.STATUS_CODE_UNSET)
    assert attributes(chat)["error.type"] == "model_not_priced"


async def test_no_span_holds_a_prompt_an_answer_a_user_or_a_key(office: Office, collector: Collector):
    for fields in (
        {},
        {"stream": True},
        {"model": "no-such-model"},
        {"simulate": {"refuse": True}},
        {"messages": PROMPT},
    ):
        await ask(office, **fields)
    await office.gateway.stop()
    assert len(collector.spans) > 5
    secret = office.keys["live"].rpartition("_")[2]
    for hidden in (PROMPT, ANSWER, "alice", secret, "nobody may read"):
        assert hidden.encode() not in collector.raw


async def test_a_collector_that_is_away_holds_up_nothing(tmp_path: Path):
    async with open_office(tmp_path, otlp_endpoint="http://127.0.0.1:1") as office:
        await office.post("/v1/topup/grant", {"customer_id": "alice@example.com", "credits": 100_000})
        assert (await ask(office)).status_code == 200


LATE = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "gateway.tracing", "requests")
"""FastAPI and redis-py import other parts of OpenTelemetry by themselves, which do nothing without these."""


def test_nothing_of_it_is_imported_where_nobody_collects(tmp_path: Path):
    program = f"""
import asyncio, sys
from pathlib import Path
from tests.gateway.office import open_office

async def main():
    async with open_office(Path({str(tmp_path)!r})) as office:
        await office.post("/v1/topup/grant", {{"customer_id": "alice", "credits": 100_000}})
        assert (await office.chat()).status_code == 200

asyncio.run(main())
print([name for name in sys.modules if name.startswith({LATE})])
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
