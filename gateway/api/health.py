"""Whether this process lives, whether it can serve, and what it has counted."""

from fastapi import APIRouter, Response
from pydantic import Field

from gateway.api.services import Here
from gateway.api.wire import View

router = APIRouter(tags=["operations"])


class LiveView(View):
    status: str = Field(examples=["ok"])


class ReadyView(View):
    status: str = Field(description="ok, degraded, or unavailable.", examples=["ok"])
    checks: dict[str, str] = Field(description="What was checked, and what is wrong with it.")
    degraded: dict[str, str] = Field(description="What works worse than it should. Requests are served all the same.")


@router.get("/health/live")
async def live() -> LiveView:
    """The process runs and answers."""
    return LiveView(status="ok")


@router.get("/health/ready", responses={503: {"model": ReadyView, "description": "Something is wrong"}})
async def ready(response: Response, services: Here) -> ReadyView:
    """The process can serve: it is not shutting down, its database answers and its journal can be written."""
    report = await services.readiness.report()
    response.status_code = 200 if report.ready else 503
    status = "unavailable" if not report.ready else "degraded" if report.degraded else "ok"
    return ReadyView(status=status, checks=dict(report.checks), degraded=dict(report.degraded))


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(services: Here) -> Response:
    """Everything that is counted, for Prometheus."""
    return Response(services.metrics.exposition(), media_type=services.metrics.content_type)
