"""How a request's body is read: bounded, strict JSON, and decimal numbers as they stand in the text.

A binary float would turn an amount of 0.1 dollars into 0.1000000000000000055 before anybody sees it, so every
fraction arrives as `Decimal`.
"""

from collections.abc import Callable, Coroutine
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute

from gateway.api.access import token_of
from gateway.api.services import services_of
from gateway.errors import invalid_request, request_too_large

BODY_BYTES_MAX: Final = 2**20
"""Of a management request. What is proxied has its own, larger limit."""

_JSON: Final = msgspec.json.Decoder(float_hook=Decimal)

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


async def read_body(request: Request, bytes_max: int) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413 as soon as it is known to be longer than *bytes_max*.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > bytes_max:
        raise request_too_large(bytes_max)
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > bytes_max:
            raise request_too_large(bytes_max)
        parts.append(part)
    return b"".join(parts)


def parse_json(body: bytes) -> Any:
    """*body* as JSON, its fractions as `Decimal`.

    Raises:
        ApiError: 400 for what is not JSON in UTF-8, is nested too deep, or has an exponent that no decimal can have.
    """
    try:
        return _JSON.decode(body)
    except RecursionError:
        raise invalid_request("The body is nested deeper than any request needs.") from None
    except InvalidOperation:
        raise invalid_request("The body has a number that is larger or smaller than any request needs.") from None
    except (msgspec.DecodeError, ValueError):
        raise invalid_request("The body is not valid JSON in UTF-8.") from None


class ExactRequest(Request):
    """A request whose body was read and parsed before."""

    def __init__(self, request: Request, body: bytes) -> None:
        # curl calls a body a form unless told otherwise; here everything is JSON.
        headers = [header for header in request.scope["headers"] if header[0] != b"content-type"]
        headers.append((b"content-type", b"application/json"))
        super().__init__({**request.scope, "headers": headers}, request.receive)
        self._body = body
        self._parsed = parse_json(body) if body else None

    async def json(self) -> Any:
        return self._parsed


class ExactRoute(APIRoute):
    """A route whose body arrives as `ExactRequest` reads it, once the key is known to be good."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def exact(request: Request) -> Response:
            if self.body_field is None:
                return await handle(request)
            # FastAPI would read the body first, of whoever sends one.
            await services_of(request).principals.authenticate(token_of(request))
            return await handle(ExactRequest(request, await read_body(request, BODY_BYTES_MAX)))

        return exact
