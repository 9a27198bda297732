"""API keys: `fb_live_<id>_<secret>`, `fb_test_…` and `fb_admin_…`; what they look like, and what is kept of them.

Only the sha256 of the whole key is stored. A slow hash protects passwords, which people choose and attackers guess;
the secret here is 256 random bits, which nobody can guess at any speed, and a slow hash would only make every request
slow. The hash covers kind and id too, so that neither can be exchanged.
"""

import base64
import hashlib
import hmac
import re
import secrets
from enum import StrEnum
from typing import Final, Literal, NamedTuple

KeyKind = Literal["live", "test", "admin"]

SECRET_BYTES: Final = 32
TOKEN_LENGTH_MAX: Final = 128
LAST_LENGTH: Final = 4
_TOKEN: Final = re.compile(rb"fb_(live|test|admin)_([0-9a-hjkmnp-tv-z]{26})_[a-z2-7]{52}")


class KeyScope(StrEnum):
    """What a key may do. `ADMIN` reaches the tenant's keys, apps and margins."""

    PROXY = "proxy"
    CREDITS_READ = "credits:read"
    CREDITS_WRITE = "credits:write"
    CATALOG_WRITE = "catalog:write"
    ADMIN = "admin"


APP_SCOPES: Final = (KeyScope.PROXY, KeyScope.CREDITS_READ, KeyScope.CREDITS_WRITE, KeyScope.CATALOG_WRITE)
"""What an app's key may do unless told otherwise."""

INSTALLATION_SCOPES: Final = (
    KeyScope.CREDITS_READ,
    KeyScope.CREDITS_WRITE,
    KeyScope.CATALOG_WRITE,
    KeyScope.ADMIN,
)
"""What the installation's key may do. It never proxies."""


class GeneratedKey(NamedTuple):
    """A new key. The token is shown once and never stored."""

    token: str
    secret_hash: bytes
    last4: str


class ParsedKey(NamedTuple):
    kind: KeyKind
    key_id: str


def generate(kind: KeyKind, key_id: str) -> GeneratedKey:
    """A new key with a random secret for the id `key_…`."""
    secret = base64.b32encode(secrets.token_bytes(SECRET_BYTES)).decode().rstrip("=").lower()
    token = f"fb_{kind}_{key_id.removeprefix('key_')}_{secret}"
    return GeneratedKey(token, digest(token.encode()), secret[-LAST_LENGTH:])


def parse(token: bytes) -> ParsedKey | None:
    """Kind and id of a key, or None for whatever else a client may send."""
    if len(token) > TOKEN_LENGTH_MAX or not (match := _TOKEN.fullmatch(token)):
        return None
    kind: KeyKind = "live" if match[1] == b"live" else "test" if match[1] == b"test" else "admin"
    return ParsedKey(kind, f"key_{match[2].decode()}")


def digest(token: bytes) -> bytes:
    """What is stored of a key."""
    return hashlib.sha256(token).digest()


def same(left: bytes, right: bytes) -> bool:
    """Compare two digests in a time that tells nothing of where they differ."""
    return hmac.compare_digest(left, right)
