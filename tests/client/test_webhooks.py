"""A webhook is believed by its signature, as the reference library of Standard Webhooks makes it."""

import json
from datetime import UTC, datetime

import pytest
from standardwebhooks import Webhook

from farebox import WebhookInvalid, verify_webhook
from gateway.api.events import EXAMPLE
from gateway.events.signing import ROTATION_S_MAX

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
BODY = json.dumps(EXAMPLE)
NOW_S = 1_776_000_000


def signed(body: str = BODY, *, secret: str = SECRET, at_s: int = NOW_S) -> dict[str, str]:
    return {
        "Webhook-Id": "evt_1",
        "Webhook-Timestamp": str(at_s),
        "Webhook-Signature": Webhook(secret).sign("evt_1", datetime.fromtimestamp(at_s, UTC), body),
    }


@pytest.mark.parametrize("body", [BODY, BODY.encode()])
def test_a_signed_event_is_read(body: str | bytes):
    event = verify_webhook(body, signed(), SECRET, now_s=NOW_S)
    assert (event.type, event.sequence) == ("credit.expired", 7)
    assert event.timestamp == datetime(2026, 4, 13, 11, 0, 3, tzinfo=UTC)
    assert event.data["amount_decimal"] == "180"


def test_the_time_of_day_is_the_default():
    verify_webhook(BODY, signed(at_s=int(datetime.now(UTC).timestamp())), SECRET)
    with pytest.raises(WebhookInvalid, match="signed"):
        verify_webhook(BODY, signed(at_s=NOW_S - ROTATION_S_MAX), SECRET)


def test_while_secrets_rotate_either_is_enough():
    headers = signed()
    old = signed(secret=OTHER)["Webhook-Signature"]
    headers["Webhook-Signature"] = f"v1a,x {old} {headers['Webhook-Signature']}"
    for secret in (SECRET, OTHER):
        assert verify_webhook(BODY, headers, secret, now_s=NOW_S).id == EXAMPLE["id"]


@pytest.mark.parametrize(
    ("change", "body"),
    [
        ({}, BODY + " "),
        ({"Webhook-Id": "evt_2"}, BODY),
        ({"Webhook-Timestamp": str(NOW_S + 1)}, BODY),
        ({"Webhook-Timestamp": "²"}, BODY),
        ({"Webhook-Timestamp": "-1"}, BODY),
        ({"Webhook-Id": ""}, BODY),
        ({"Webhook-Signature": ""}, BODY),
        ({"Webhook-Signature": "v1"}, BODY),
        ({"Webhook-Signature": "v1,"}, BODY),
        ({"Webhook-Signature": "v1,é"}, BODY),
        ({"Webhook-Signature": signed()["Webhook-Signature"].replace("v1,", "v2,")}, BODY),
        ({"Webhook-Signature": signed(secret=OTHER)["Webhook-Signature"]}, BODY),
    ],
)
def test_what_was_not_signed_so_is_not_believed(change: dict[str, str], body: str):
    with pytest.raises(WebhookInvalid):
        verify_webhook(body, {**signed(), **change}, SECRET, now_s=NOW_S)


@pytest.mark.parametrize("off_s", [-300, 0, 300])
def test_clocks_may_differ_by_five_minutes(off_s: int):
    verify_webhook(BODY, signed(), SECRET, now_s=NOW_S + off_s)


@pytest.mark.parametrize("off_s", [-301, 301])
def test_an_old_webhook_may_be_a_copy(off_s: int):
    with pytest.raises(WebhookInvalid, match="at most 300 s"):
        verify_webhook(BODY, signed(), SECRET, now_s=NOW_S + off_s)


@pytest.mark.parametrize("body", ["", "[]", "{}", "ping"])
def test_a_signed_text_that_is_no_event(body: str):
    with pytest.raises(WebhookInvalid, match="not an event"):
        verify_webhook(body, signed(body), SECRET, now_s=NOW_S)


def test_a_secret_that_is_none():
    with pytest.raises(ValueError, match="whsec_"):
        verify_webhook(BODY, signed(), "fb_live_x", now_s=NOW_S)
