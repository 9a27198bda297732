"""Where a webhook may go: an address on the public internet, unless the operator allows private ones.

How it works. A tenant names a URL, and we call it from inside the operator's network: a name that leads to a private
address would let a tenant reach what only we can. A name is resolved once for each attempt, every address that it has
is checked, and the connection is made to one of those very addresses: a name that leads elsewhere a moment later makes
no difference. Host header and TLS keep the name.

Source: OWASP, Server-Side Request Forgery Prevention.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple
from urllib.parse import urlsplit

URL_LENGTH_MAX: Final = 2048
HOST_LENGTH_MAX: Final = 253
RESOLVE_S: Final = 5.0
RESOLVERS_MAX: Final = 4
"""Look-ups at once. They have threads of their own: a name server that hangs must hold up nothing else."""

ADDRESSES_MAX: Final = 3
"""How many addresses of a name are tried in turn."""

PORTS_BELOW_1024: Final = (80, 443)
"""The others belong to protocols that are not HTTP."""

DEFAULT_PORTS: Final = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

# Beyond what `ipaddress` knows not to be global (in its older versions): relays that carry a packet on to an address
# inside of it, and public addresses at which clouds answer their own machines alone.
_PUBLIC_IPV6: Final = ipaddress.IPv6Network("2000::/3")
_CARRIES_IPV4: Final = (ipaddress.IPv6Network("2001::/32"), ipaddress.IPv6Network("2002::/16"))
_WITHIN_IPV4: Final = (
    ipaddress.IPv4Network("192.88.99.0/24"),
    ipaddress.IPv4Network("192.0.0.0/24"),  # IETF protocols; Oracle's metadata
    ipaddress.IPv4Network("168.63.129.16/32"),  # Azure's host
)


class TargetRefused(Exception):
    """The URL cannot be called; the message says why, for the tenant."""


class Target(NamedTuple):
    scheme: str
    host: str
    port: int


class ThreadedResolver:
    """The system's resolver, in threads of its own."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(RESOLVERS_MAX, thread_name_prefix="webhook-dns")

    async def __call__(self, host: str, port: int) -> list[str]:
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, _look_up, host, port)
        return list(dict.fromkeys(str(address[4][0]) for address in found))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _look_up(host: str, port: int) -> list[tuple[int, int, int, str, tuple[str | int, ...]]]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)  # type: ignore[return-value]


def target_of(url: str, *, allow_private: bool) -> Target:
    """What *url* names, as far as it can be judged without looking the name up.

    Raises:
        TargetRefused
    """
    if len(url) > URL_LENGTH_MAX or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise TargetRefused(f"it must be a URL of at most {URL_LENGTH_MAX} printable ASCII characters")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise TargetRefused("it is not a URL") from None
    if parts.scheme not in ("http", "https") or (parts.scheme == "http" and not allow_private):
        raise TargetRefused("it must begin with https://")
    if not host or len(host) > HOST_LENGTH_MAX:
        raise TargetRefused("it must name a host")
    if parts.username is not None or parts.password is not None:
        raise TargetRefused("it must have no user or password: verify the signature instead")
    if parts.fragment:
        raise TargetRefused("it must have no fragment")
    port = DEFAULT_PORTS[parts.scheme] if port is None else port
    if not allow_private:
        if not 1024 <= port <= 65_535 and port not in PORTS_BELOW_1024:
            raise TargetRefused("its port must be 443, 80, or 1024 and higher")
        if (literal := _address(host)) is not None and not is_public(literal):
            raise TargetRefused("it leads to an address that is not on the public internet")
    return Target(parts.scheme, host, port)


async def addresses_of(target: Target, resolve: Resolve, *, allow_private: bool) -> list[str]:
    """The addresses to connect to, in turn.

    Raises:
        TargetRefused: one of the name's addresses is not public, or it has none.
    """
    try:
        async with asyncio.timeout(RESOLVE_S):
            found = await resolve(target.host, target.port)
    except (OSError, UnicodeError):
        raise TargetRefused("its host has no address") from None
    if not found:
        raise TargetRefused("its host has no address")
    if not allow_private:
        for text in found:
            address = _address(text)
            if address is None or not is_public(address):
                raise TargetRefused("it leads to an address that is not on the public internet")
    return list(found[:ADDRESSES_MAX])


def is_public(address: Address) -> bool:
    """Whether anybody on the internet could reach the address, and by no detour another one."""
    if isinstance(address, ipaddress.IPv6Address):
        return (
            address in _PUBLIC_IPV6
            and address.is_global
            and not address.is_multicast
            and not any(address in network for network in _CARRIES_IPV4)
        )
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not any(address in network for network in _WITHIN_IPV4)
    )


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
