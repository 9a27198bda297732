"""The proxied endpoints, as far as the management API knows them: their place in `/openapi.json`.

`gateway/app.py` hands these requests to the proxy before they come here; a route that nevertheless gets one does the
same.
"""

from typing import Any, Final

from fastapi import APIRouter, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api.services import Here

router = APIRouter(prefix="/v1", tags=["proxy"])

HEADERS: Final[dict[str, dict[str, Any]]] = {
    name: {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": description}
    for name, description in (
        ("X-Quota-User", "Whose wallet pays; the customer is created on first sight."),
        ("X-Quota-Action", "A product action, which has a fixed price."),
        ("X-Quota-Max-Cost", "Refuse what could cost more, in decimal credits."),
        ("X-Quota-Clamping", "`off`: refuse rather than lower `max_tokens`."),
    )
}

ERROR: Final = {"$ref": "#/components/schemas/ErrorEnvelope"}

CHAT: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model", "messages"],
                    "properties": {
                        "model": {"type": "string"},
                        "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}},
                        "stream": {"type": ["boolean", "null"]},
                    },
                    "additionalProperties": True,
                },
                "example": {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}]},
            }
        },
    },
    "parameters": list(HEADERS.values()),
    "responses": {
        "200": {
            "description": "The upstream's answer, with `stream` its events. `usage` has our `cost` and `balance`.",
            "content": {
                "application/json": {"schema": {"type": "object"}},
                "text/event-stream": {"schema": {"type": "string"}},
            },
        },
        **{
            status: {"description": description, "content": {"application/json": {"schema": ERROR}}}
            for status, description in (
                ("502", "The upstream failed; nothing was charged"),
                ("504", "The upstream did not answer in time; nothing was charged"),
            )
        },
    },
}
"""OpenAI's contract, of which only what the meter needs is named here: everything else passes untouched."""


class Proxied(Response):
    """A response that the proxy writes itself."""

    def __init__(self, proxy: ASGIApp, request: Request) -> None:
        self._proxy = proxy
        self._request = request
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._proxy(scope, self._request.receive, send)


@router.post("/chat/completions", openapi_extra=CHAT, response_class=Response)
async def chat_completions(request: Request, services: Here) -> Response:
    """OpenAI's chat completions, metered: reserved before it is sent, charged when it has finished."""
    return Proxied(services.proxy, request)


@router.post("/users/{user}/chat/completions", openapi_extra=CHAT, response_class=Response)
async def chat_completions_of_user(user: str, request: Request, services: Here) -> Response:
    """The same, with the user whose wallet pays in the path."""
    return Proxied(services.proxy, request)
