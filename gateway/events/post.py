"""One attempt: a signed POST to an address that was checked, bounded in time and in what is read."""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import StrEnum
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import httpx

from gateway import __version__
from gateway.events.target import Resolve, Target, TargetRefused, addresses_of, target_of

CONNECT_S: Final = 5.0
TOTAL_S: Final = 15.0
"""For the whole attempt: the name's look-up, the connection, the request and the answer."""

ANSWER_BYTES_MAX: Final = 64 * 1024
"""What is read of an answer's body before we hang up. It is not kept."""

ANSWER_S: Final = 2.0
"""How long an answer's body may take, of the time that is left. It is not needed: the status has come before it."""

USER_AGENT: Final = f"Farebox/{__version__} (webhooks)"


class Outcome(StrEnum):
    """How an attempt ended."""

    DELIVERED = "delivered"
    GONE = "gone"
    REDIRECTED = "redirected"
    REFUSED = "refused"
    FAILED = "failed"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    BROKEN = "broken"
    FORBIDDEN = "forbidden"
    UNRENDERED = "unrendered"


class Answer(NamedTuple):
    """*status* is None where no answer came; *error* says in words what went wrong."""

    outcome: Outcome
    status: int | None = None
    error: str | None = None


class Poster:
    """Sends webhooks. Every attempt has a connection of its own, to an address that was checked for it.

    Args:
        resolve: a host's addresses; raises OSError where it has none.
        allow_private: private addresses and plain HTTP are fine. For development, and for networks of one's own.
    """

    def __init__(
        self,
        resolve: Resolve,
        *,
        allow_private: bool,
        total_s: float = TOTAL_S,
        new_context: Callable[[], ssl.SSLContext] = httpx.create_ssl_context,
    ) -> None:
        self._resolve = resolve
        self._allow_private = allow_private
        self._total_s = total_s
        self._client = httpx.AsyncClient(
            verify=new_context(),
            follow_redirects=False,
            trust_env=False,
            timeout=httpx.Timeout(total_s, connect=CONNECT_S),
            # Two names can share an address: a connection that was made for one is not for the other.
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Send it once. It raises nothing but what is our own mistake."""
        try:
            async with asyncio.timeout(self._total_s):
                return await self._post(url, body, headers)
        except TargetRefused as refused:
            return Answer(Outcome.FORBIDDEN, error=str(refused))
        except (TimeoutError, httpx.TimeoutException):
            return Answer(Outcome.TIMEOUT, error=f"no answer within {self._total_s:g} s")
        except httpx.ConnectError:
            return Answer(Outcome.UNREACHABLE, error="no connection, or no TLS that can be trusted")
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError):
            return Answer(Outcome.BROKEN, error="the connection broke off")

    async def _post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        target = target_of(url, allow_private=self._allow_private)
        *others, last = await addresses_of(target, self._resolve, allow_private=self._allow_private)
        for address in others:
            try:
                return await self._post_to(address, target, url, body, headers)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await self._post_to(last, target, url, body, headers)

    async def _post_to(self, address: str, target: Target, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        parts = urlsplit(url)
        host = f"[{address}]" if ":" in address else address
        named = f"[{target.host}]" if ":" in target.host else target.host
        request = self._client.build_request(
            "POST",
            httpx.URL(
                scheme=target.scheme,
                host=host,
                port=target.port,
                raw_path=((parts.path or "/") + (f"?{parts.query}" if parts.query else "")).encode(),
            ),
            content=body,
            headers={
                **headers,
                "Host": named if parts.port is None else f"{named}:{parts.port}",
                "Content-Type": "application/json",
                "User-Agent": USER_AGENT,
                "Accept-Encoding": "identity",
                "Connection": "close",
            },
            # The certificate has to be that of the name, not that of the address.
            extensions={"sni_hostname": target.host},
        )
        response = await self._client.send(request, stream=True)
        try:
            await _read_some(response)
        finally:
            await response.aclose()
        return answer_of(response.status_code)


async def _read_some(response: httpx.Response) -> None:
    """Let the receiver finish what it says, within bounds. The status counts, however the rest ends."""
    size = 0
    with suppress(httpx.HTTPError, TimeoutError):
        async with asyncio.timeout(ANSWER_S):
            async for part in response.aiter_raw():
                size += len(part)
                if size > ANSWER_BYTES_MAX:
                    return


def answer_of(status: int) -> Answer:
    """What a status means: 2xx is delivered, 410 is the end, all others fail."""
    if 200 <= status < 300:
        return Answer(Outcome.DELIVERED, status)
    if status == 410:
        return Answer(Outcome.GONE, status, "410 Gone")
    if 300 <= status < 400:
        return Answer(Outcome.REDIRECTED, status, f"{status}: redirects are not followed")
    if 400 <= status < 500:
        return Answer(Outcome.REFUSED, status, f"answered {status}")
    return Answer(Outcome.FAILED, status, f"answered {status}")
