"""How Stripe's SDK reaches Stripe: over httpx, with our own limits on connections, waits and answers.

The SDK's own client over httpx sends a body in a way that httpx warns of, and knows no limits but one timeout.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import httpx
import stripe

CONNECTIONS_MAX: Final = 50
"""Open connections of one process. One more request waits for a free one, within CONNECT_TIMEOUT_S."""

CONNECT_TIMEOUT_S: Final = 3.0
ATTEMPT_TIMEOUT_S: Final = 10.0
"""From asking to the whole answer, of one attempt."""

ANSWER_BYTES_MAX: Final = 8 * 2**20
"""A page of a hundred objects has some 300 kB."""


class StripeHTTP(stripe.HTTPClient):
    """The SDK tries again what fails with `APIConnectionError`, as often as it was told to."""

    name = "httpx"

    def __init__(self) -> None:
        super().__init__()
        self._client = httpx.AsyncClient(
            limits=httpx.Limits(max_connections=CONNECTIONS_MAX),
            timeout=httpx.Timeout(ATTEMPT_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, pool=CONNECT_TIMEOUT_S),
        )

    async def request_async(
        self, method: str, url: str, headers: Mapping[str, str], post_data: Any = None
    ) -> tuple[bytes, int, Mapping[str, str]]:
        """Raises `stripe.APIConnectionError` where there is no whole answer in time."""
        try:
            async with (
                asyncio.timeout(ATTEMPT_TIMEOUT_S),
                self._client.stream(method, url, headers=dict(headers), content=post_data) as response,
            ):
                return await _whole(response), response.status_code, response.headers
        except (httpx.HTTPError, TimeoutError) as error:
            raise _broken(error) from None  # Its own text may have the address in it, with ids of customers.

    async def sleep_async(self, secs: float) -> None:
        await asyncio.sleep(secs)

    async def close_async(self) -> None:
        await self._client.aclose()


def _broken(error: Exception) -> stripe.APIConnectionError:
    broken: stripe.APIConnectionError = stripe.APIConnectionError(  # type: ignore[no-untyped-call]
        type(error).__name__, should_retry=True
    )
    return broken


async def _whole(response: httpx.Response) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > ANSWER_BYTES_MAX:
            raise httpx.ReadError("the answer is too long")
        parts.append(part)
    return b"".join(parts)
