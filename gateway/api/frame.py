"""What every management response has: a request id, the headers that an endpoint left, and our envelope at the worst.

Pure ASGI: Starlette's BaseHTTPMiddleware costs several times what most endpoints do.
"""

import time
from collections.abc import Callable, MutableMapping
from typing import Any, Final

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api.access import EXTRA_HEADERS
from gateway.proxy.journey import CLIENT_LEFT
from gateway.telemetry import Metrics

REQUEST_ID: Final = "farebox.request_id"
REFUSAL: Final = "farebox.refusal"
"""Where in a request's scope the code of its refusal is."""

ERROR_BESIDE: Final = "farebox.error_beside"
"""Where in a request's scope it says that its client looks for an error's code beside the envelope."""

UNMATCHED: Final = "unmatched"

log = structlog.get_logger(__name__)


class Frame:
    """Around the management API's application.

    Args:
        new_id: makes the request's id.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, new_id: Callable[[str], str]) -> None:
        self._app = app
        self._metrics = metrics
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = self._new_id("req")
        extra: list[tuple[bytes, bytes]] = [(b"x-request-id", request_id.encode())]
        scope[REQUEST_ID] = request_id
        scope[EXTRA_HEADERS] = extra
        status = CLIENT_LEFT
        began_s = time.perf_counter()

        async def framed(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        try:
            await self._app(scope, receive, framed)
        except ClientDisconnect:
            pass
        except Exception:
            # The application has answered with our envelope already; this is for whoever reads the log.
            log.exception("request failed", request_id=request_id)
        finally:
            route = getattr(scope.get("route"), "path_format", UNMATCHED)
            self._metrics.requests(route, scope["method"], str(status)).inc()
            if (code := scope.get(REFUSAL)) is not None:
                self._metrics.refusals(code).inc()
            self._metrics.request_seconds(route).observe(time.perf_counter() - began_s)
