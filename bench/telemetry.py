"""What it costs to see: counting one proxied request, writing its line in the access log, tracing it.

`python -m bench.telemetry` prints microseconds of CPU a request; `--workers` counts as several processes do.
"""

import argparse
import asyncio
import io
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Final

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from gateway.multiprocess import MULTIPROCESS_DIR

ROUNDS: Final = 20_000
REPEATS: Final = 5


def microseconds(work: Callable[[], object], *, rounds: int = ROUNDS) -> float:
    """CPU a round: the best of some repeats."""
    best = float("inf")
    for _ in range(REPEATS):
        began_s = time.process_time()
        for _ in range(rounds):
            work()
        best = min(best, (time.process_time() - began_s) / rounds)
    return best * 1e6


def main() -> None:
    # After the variable is set: Prometheus's client looks at it when it is imported.
    from gateway.logs import AccessLog  # noqa: PLC0415
    from gateway.proxy.journey import Attempt, Journey, Kind, Outcome  # noqa: PLC0415
    from gateway.telemetry import Metrics  # noqa: PLC0415
    from gateway.tracing import Tracing  # noqa: PLC0415
    from ledger.writer import BatchRun  # noqa: PLC0415
    from pricing.usage import Usage  # noqa: PLC0415

    def journey() -> Journey:
        seen = Journey()
        attempt = Attempt("openai", "gpt-4o-mini", "openai", Kind.FIRST, 0.0, Outcome.OK, 0.1)
        seen.attempts.append(attempt)
        seen.model = "gpt-4o-mini"
        seen.begun(200)
        seen.settled("finished", Usage(input=10, output=20))
        return seen

    metrics = Metrics()
    hit = metrics.cache("principals")
    batch = BatchRun((), (), 0.0001, 0.001)

    def counted() -> None:
        seen = journey()
        metrics.open_requests.inc()
        hit(True)
        metrics.count_batch(batch)
        metrics.count_batch(batch)
        seen.end()
        metrics.open_requests.dec()
        metrics.count(seen)

    class Encoder(SpanExporter):
        """Does all the work of sending but the sending."""

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            encode_spans(spans).SerializeToString()
            return SpanExportResult.SUCCESS

    tracing = Tracing(Encoder())

    def traced() -> None:
        trace = tracing.begin({"headers": []})
        seen = journey()
        seen.trace = trace
        with trace.step("reserve"):
            pass
        trace.sending(seen.attempts[0])
        trace.ended(seen.attempts[0])
        with trace.step("settle"):
            pass
        seen.end()

    seen, access_log = journey(), AccessLog(io.BytesIO())
    print(f"journey   {microseconds(journey):6.1f} us")
    print(f"counting  {microseconds(counted) - microseconds(journey):6.1f} us, two batches of one command included")
    print(f"log line  {microseconds(lambda: access_log.write(seen, '/v1/chat/completions')):6.1f} us")
    print(f"trace     {microseconds(traced, rounds=1000) - microseconds(journey):6.1f} us")
    asyncio.run(tracing.close())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", action="store_true")
    if parser.parse_args().workers:
        with tempfile.TemporaryDirectory() as folder:
            os.environ[MULTIPROCESS_DIR] = folder
            main()
    else:
        main()
