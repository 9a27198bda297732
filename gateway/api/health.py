"""Whether this process lives, whether it can serve, and what it has counted."""

import asyncio
from typing import Final

from fastapi import APIRouter, Response
from pydantic import Field

from gateway.api.services import Here
from gateway.api.wire import View
from gateway.database import DatabaseUnavailable
from ledger.errors import LedgerUnavailable
from ledger.model import WalletRef

router = APIRouter(tags=["operations"])

READY_TIMEOUT_S: Final = 2.0

NO_WALLET: Final = WalletRef("nobody", "live", "nobody")
"""Asking for it reads the ledger's database, and finds nothing."""


class LiveView(View):
    status: str = Field(examples=["ok"])


class ReadyView(View):
    status: str = Field(description="ok, or unavailable.", examples=["ok"])
    checks: dict[str, str] = Field(description="What was checked, and what is wrong with it.")


@router.get("/health/live")
async def live() -> LiveView:
    """The process runs and answers."""
    return LiveView(status="ok")


@router.get("/health/ready", responses={503: {"model": ReadyView, "description": "Something is wrong"}})
async def ready(response: Response, services: Here) -> ReadyView:
    """The process can serve: it is not shutting down, and its database answers."""
    checks = {"database": await _database(services), "process": "shutting down" if services.draining() else "ok"}
    healthy = all(found == "ok" for found in checks.values())
    if services.redis is not None:
        checks["redis"] = (
            services.redis()
        )  # Without it the process serves on: it is told, and is no reason to turn away.
    response.status_code = 200 if healthy else 503
    return ReadyView(status="ok" if healthy else "unavailable", checks=checks)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(services: Here) -> Response:
    """Everything that is counted, for Prometheus."""
    return Response(services.metrics.exposition(), media_type=services.metrics.content_type)


async def _database(services: Here) -> str:
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            await services.database.check()
            await services.ledger.wallet_view(NO_WALLET)
    except TimeoutError:
        return f"no answer within {READY_TIMEOUT_S:g} s"
    except DatabaseUnavailable as error:
        return f"not usable: {error}"
    except LedgerUnavailable as error:
        return f"the ledger is not usable: {error}"
    return "ok"
