"""Signatures by Standard Webhooks, and the secrets behind them.

Whoever rotates has two live secrets for a while: each attempt is signed with all that are, so that a receiver can
change over at any moment in between.

Source: https://www.standardwebhooks.com
"""

import base64
import secrets as randomness
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec
from standardwebhooks import Webhook

SECRET_BYTES: Final = 32
SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - the form, not a secret
SECRETS_MAX: Final = 5
"""Live at once. Who rotates more often than that loses the oldest."""

ROTATION_S_MAX: Final = 7 * 24 * 3600
SECOND_US: Final = 1_000_000


class Secret(msgspec.Struct, frozen=True):
    """*expires_at_us* is None for the current one; from then on an older one signs no more."""

    secret: str
    expires_at_us: int | None = None

    def live_at(self, now_us: int) -> bool:
        return self.expires_at_us is None or now_us < self.expires_at_us


def new_secret() -> str:
    """`whsec_` and base64, as the libraries of Standard Webhooks take it."""
    return SECRET_PREFIX + base64.b64encode(randomness.token_bytes(SECRET_BYTES)).decode()


def rotated(secrets: Sequence[Secret], new: str, *, now_us: int, expire_current_us: int) -> tuple[Secret, ...]:
    """*new* signs from now on; what signed before goes on for *expire_current_us*, or as long as it still had."""
    ends_us = now_us + expire_current_us
    older = [
        Secret(old.secret, ends_us if old.expires_at_us is None else min(old.expires_at_us, ends_us)) for old in secrets
    ]
    return (Secret(new), *[old for old in older if old.live_at(now_us)][: SECRETS_MAX - 1])


def signed_headers(event_id: str, body: str, secrets: Sequence[Secret], *, now_us: int) -> dict[str, str]:
    """The headers of one attempt: the id is the event's on every one, the time is now."""
    at = datetime.fromtimestamp(now_us // SECOND_US, UTC)
    live = [Webhook(each.secret) for each in secrets if each.live_at(now_us)]
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(now_us // SECOND_US),
        "webhook-signature": " ".join(webhook.sign(event_id, at, body) for webhook in live),
    }
