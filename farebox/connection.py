"""What both clients are told, and what they ask of httpx."""

import os
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from farebox.errors import UnexpectedAnswer

BASE_URL_VARIABLE: Final = "FAREBOX_BASE_URL"
API_KEY_VARIABLE: Final = "FAREBOX_API_KEY"

TIMEOUT_S: Final = 30.0
CONNECT_TIMEOUT_S: Final = 5.0
CONNECTIONS_MAX: Final = 100
BODY_BYTES_MAX: Final = 32 * 1024 * 1024
"""Of an answer: a page of 200 customers whose metadata are as large as can be has a tenth."""

CLOSED: Final = "This client is closed."


@dataclass(frozen=True, slots=True)
class Access:
    """Where Farebox is, and the key."""

    base_url: str
    api_key: str = field(repr=False)

    @classmethod
    def of(cls, base_url: str | None, api_key: str | None) -> "Access":
        """What was given, else what the environment has.

        Raises:
            ValueError: where neither says it, or the address is none.
        """
        address = _said(base_url, "base_url", BASE_URL_VARIABLE).rstrip("/")
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"Farebox's base_url is {address!r}, but begins with https:// or http://.")
        return cls(address, _said(api_key, "api_key", API_KEY_VARIABLE))

    def options(self, timeout_s: float) -> dict[str, Any]:
        """Arguments for a client of httpx."""
        return {
            "headers": {
                "Authorization": f"Bearer {self.api_key}",
                "Accept": "application/json",
                "User-Agent": "farebox-python",
            },
            "timeout": httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
            "limits": httpx.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=CONNECTIONS_MAX),
        }


class Body:
    """An answer's body as it comes, bounded."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0

    def add(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size > BODY_BYTES_MAX:
            raise UnexpectedAnswer(f"The answer has more than {BODY_BYTES_MAX} bytes.")
        self._chunks.append(chunk)

    def whole(self) -> bytes:
        return b"".join(self._chunks)


def repeatable(error: httpx.RequestError) -> bool:
    """Whether another attempt may do better: it was the network's fault, or the other side's."""
    ours = (httpx.LocalProtocolError, httpx.UnsupportedProtocol)
    return isinstance(error, httpx.TransportError) and not isinstance(error, ours)


def _said(given: str | None, name: str, variable: str) -> str:
    said = os.environ.get(variable) if given is None else given
    if not said:
        raise ValueError(f"Farebox's {name} is missing: give {name}=…, or set {variable}.")
    return said
