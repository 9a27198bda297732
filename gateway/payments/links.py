"""Links to the page where a customer adds credits: signed, so that nobody logs in and nothing is stored.

How it works. A link's token says whose wallet it is for and until when, and carries an HMAC of that. The key is derived
from the payment processor's secret key: every process of the installation has it, and nobody else. So a new secret key
ends all links that are out.

A link lets its holder see one balance and pay for that customer; it can spend nothing.
"""

import base64
import binascii
import hmac
from collections.abc import Callable
from hashlib import sha256
from typing import Final
from urllib.parse import urlencode

import msgspec

from gateway.payments.processor import StripeMode, pays_for
from ledger.model import Scope

LIFE_S: Final = 7 * 24 * 3600
"""How long a link may be used: whoever ran out of credits on a Friday pays on the Monday after."""

VERSION: Final = b"1"
KEY_LABEL: Final = b"farebox: links to the top-up page, version " + VERSION
PATH: Final = "/topup/"
TOKEN_LENGTH_MAX: Final = 512

_MAC_BYTES: Final = 32
_SEPARATOR: Final = b"\x00"


TopUpURL = Callable[[Scope, str], str | None]
"""From a customer's id to the page where they add credits; None where there is none."""


def no_page(scope: Scope, customer_id: str) -> None:
    """The `TopUpURL` of an installation that takes no payments."""


class LinkInvalid(Exception):
    """The token is none of ours: cut off, changed, or signed with another key."""


class LinkExpired(Exception):
    """It was ours, and its time is over."""


class TopUpLink(msgspec.Struct, frozen=True):
    """Whose wallet a link is for. *package* is the one that it proposes."""

    scope: Scope
    customer_id: str
    expires_at_s: int
    package: str | None = None


class Links:
    """Makes and opens links. About 3 us each.

    Args:
        secret_key: the payment processor's.
        processor_mode: whether real money moves with it. Who cannot pay then has no link.
        public_url: where customers reach this installation; without it there are no links.
    """

    def __init__(
        self, *, secret_key: str, processor_mode: StripeMode, public_url: str | None, now_us: Callable[[], int]
    ) -> None:
        self._key = hmac.digest(secret_key.encode(), KEY_LABEL, sha256)
        self._processor_mode = processor_mode
        self._base = None if public_url is None else public_url + PATH
        self._now_us = now_us

    def url_of(self, scope: Scope, customer_id: str, *, package: str | None = None) -> str | None:
        """The page on which this customer adds credits; None where nobody could pay there."""
        if self._base is None or not pays_for(self._processor_mode, scope.mode):
            return None
        expires_at_s = self._now_us() // 1_000_000 + LIFE_S
        return self._base + self._token(TopUpLink(scope, customer_id, expires_at_s, package))

    def return_url_of(self, scope: Scope, customer_id: str, order_id: str) -> str | None:
        """Where the customer comes back to after paying: the page tells what has become of the order."""
        url = self.url_of(scope, customer_id)
        return None if url is None else f"{url}/return?{urlencode({'order': order_id})}"

    def cancel_url_of(self, scope: Scope, customer_id: str) -> str | None:
        """Where the customer comes back to without having paid."""
        url = self.url_of(scope, customer_id)
        return None if url is None else f"{url}?cancelled=1"

    def leads_back_here(self, url: str | None) -> bool:
        """Whether *url* is one of this page's, rather than an app's own."""
        return url is not None and self._base is not None and url.startswith(self._base)

    def opened(self, token: str) -> TopUpLink:
        """What a link says.

        Raises:
            LinkInvalid, LinkExpired
        """
        payload = self._checked(token)
        # What we have signed ourselves needs no further check.
        _, tenant, mode, customer_id, expires_at, package = payload.decode().split(_SEPARATOR.decode())
        link = TopUpLink(Scope(tenant, mode), customer_id, int(expires_at), package or None)
        if self._now_us() // 1_000_000 >= link.expires_at_s:
            raise LinkExpired
        return link

    def _token(self, link: TopUpLink) -> str:
        fields = (link.scope.tenant, link.scope.mode, link.customer_id, str(link.expires_at_s), link.package or "")
        payload = _SEPARATOR.join((VERSION, *map(str.encode, fields)))
        signed = payload + hmac.digest(self._key, payload, sha256)
        return base64.urlsafe_b64encode(signed).rstrip(b"=").decode()

    def _checked(self, token: str) -> bytes:
        """The payload of a token that we signed."""
        if len(token) > TOKEN_LENGTH_MAX or not token.isascii():
            raise LinkInvalid
        try:
            signed = base64.b64decode(token.encode() + b"=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except binascii.Error:
            raise LinkInvalid from None
        payload, mac = signed[:-_MAC_BYTES], signed[-_MAC_BYTES:]
        if not hmac.compare_digest(mac, hmac.digest(self._key, payload, sha256)):
            raise LinkInvalid
        return payload
