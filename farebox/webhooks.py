"""Whether a webhook is Farebox's, by Standard Webhooks (https://www.standardwebhooks.com)."""

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from typing import Final

from farebox.errors import WebhookInvalid
from farebox.reading import reader
from farebox.values import Event

SECRET_PREFIX: Final = "whsec_"  # noqa: S105  (no secret, but what they begin with)
SCHEME: Final = "v1"
AGE_MAX_S: Final = 300
"""How far a webhook's time may lie from now: an older one may be a copy that somebody else sends."""


def verify_webhook(body: bytes | str, headers: Mapping[str, str], secret: str, *, now_s: int | None = None) -> Event:
    """The event of a webhook, once its signature has been checked.

    Args:
        body: the bytes as they came; JSON that was decoded and encoded again has another signature.
        headers: as they came, however their names are written.
        secret: `whsec_…`, as the answer that made the endpoint shows it.
        now_s: seconds since 1970; by default the time of day.

    Raises:
        WebhookInvalid: it is not Farebox's, or five minutes old. Answer 400.
        ValueError: *secret* is none.
    """
    sent = {name.lower(): value for name, value in headers.items()}
    message_id, signed_at = sent.get("webhook-id", ""), sent.get("webhook-timestamp", "")
    content = body.encode() if isinstance(body, str) else bytes(body)
    if not message_id or not (signed_at.isascii() and signed_at.isdigit()):
        raise WebhookInvalid("The headers webhook-id and webhook-timestamp are missing, or are not those of a webhook.")
    signed = b".".join((message_id.encode(), signed_at.encode(), content))
    expected = hmac.digest(_key(secret), signed, hashlib.sha256)
    if not any(_equal(each, expected) for each in sent.get("webhook-signature", "").split()):
        raise WebhookInvalid("No signature of this webhook is that of the secret.")
    # Only now, so that nobody learns from the answer what they could not have signed.
    age_s = (round(time.time()) if now_s is None else now_s) - int(signed_at)
    if abs(age_s) > AGE_MAX_S:
        raise WebhookInvalid(f"This webhook was signed {age_s} s ago; at most {AGE_MAX_S} s are allowed.")
    try:
        return reader(Event)(json.loads(content))
    except (ValueError, TypeError, KeyError) as error:
        raise WebhookInvalid(f"The webhook is signed, but not an event that this client can read: {error}") from error


def _key(secret: str) -> bytes:
    try:
        return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error:
        raise ValueError("the secret is not that of a webhook endpoint: whsec_…") from None


def _equal(signature: str, expected: bytes) -> bool:
    """Signatures of secrets that are being rotated stand side by side."""
    scheme, _, encoded = signature.partition(",")
    try:
        given = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return False
    return scheme == SCHEME and hmac.compare_digest(given, expected)
