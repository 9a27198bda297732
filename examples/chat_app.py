"""A companion chat app over Farebox: a wallet, plans that are bought from it, and a credit for each message.

Run it with the FAREBOX_URL and FAREBOX_KEY of a gateway in the environment; `docs/api/chat-app.md` tells the story.
"""

import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import httpx
from standardwebhooks import Webhook, WebhookVerificationError

PLAN_SOURCES = ("plan_1hr", "plan_weekly")
BODY_BYTES_MAX = 2**20
WAIT_S = 60.0


class Companion(NamedTuple):
    """What a plan with this companion costs and brings, in credits."""

    default_plan_cost: int
    default_plan_credits: int
    default_plan_duration: timedelta


COMPANIONS = {"companion_42": Companion(100, 200, timedelta(hours=1))}


class Credits:
    """The calls that the app makes."""

    def __init__(self, base_url: str, key: str) -> None:
        self.http = httpx.Client(base_url=base_url, headers={"Authorization": f"Bearer {key}"}, timeout=30)

    def get(self, path: str, **query: Any) -> Any:
        return self.http.get(path, params=query).raise_for_status().json()

    def post(self, path: str, body: dict[str, Any], *, idempotency_key: str | None = None) -> Any:
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        return self.http.post(path, json=body, headers=headers).raise_for_status().json()

    def allowed(self, customer_id: str, metric: str, units: int) -> bool:
        return bool(self.get(f"customers/{customer_id}/entitlements/{metric}", units=units)["allowed"])


def handle_send_message(
    credits: Credits, customer_id: str, companion_id: str, conversation_id: str, message_id: str
) -> str:
    """Charge a message, on a new plan if need be, and answer it."""
    if not credits.allowed(customer_id, "chat_message", 1):
        if not try_auto_buy_plan(credits, customer_id, companion_id, purchase_id=f"msg-{message_id}"):
            return "Insufficient credits. Please recharge your wallet."
        if not credits.allowed(customer_id, "chat_message", 1):
            return "Insufficient credits after plan purchase."
    credits.post(
        "usage",
        {
            "customer_id": customer_id,
            "billable_metric_key": "chat_message",
            "units": 1,
            "metadata": {"conversation_id": conversation_id, "companion_id": companion_id},
        },
        idempotency_key=f"usage:msg-{message_id}",
    )
    return f"{companion_id} answers."


def try_auto_buy_plan(credits: Credits, customer_id: str, companion_id: str, *, purchase_id: str) -> bool:
    """Buy the customer's plan out of their wallet, in two calls; whether there was enough.

    Both keys derive from *purchase_id*, and that from what made us buy: whatever fails in between, repeat it.
    """
    companion = COMPANIONS[companion_id]
    if not credits.allowed(customer_id, "plan_purchase_1hr", companion.default_plan_cost):
        return False
    blocks = credits.get(f"customers/{customer_id}/credits", include_blocks=True)["blocks"]
    ends = [datetime.fromisoformat(b["expires_at"]) for b in blocks if b["priority"] == 10 and b["expires_at"]]
    expires_at = max(ends, default=datetime.now(UTC)) + companion.default_plan_duration
    paid = {
        "customer_id": customer_id,
        "billable_metric_key": "plan_purchase_1hr",
        "units": companion.default_plan_cost,
        "metadata": {"companion_id": companion_id, "auto_buy": True},
    }
    credits.post("usage", paid, idempotency_key=f"usage:plan-buy-{purchase_id}")
    plan = {
        "customer_id": customer_id,
        "credits": companion.default_plan_credits * 1000,
        "expires_at": expires_at.isoformat(),
        "metadata": {"source": "plan_1hr", "companion_id": companion_id, "priority": 10, "auto_buy": True},
    }
    credits.post("topup/grant", plan, idempotency_key=f"topup:plan-grant-{purchase_id}")
    return True


def handle_webhook(credits: Credits, event: dict[str, Any]) -> bool:
    """Buy the next plan of a customer who wants that, when one has run out of time; whether we did."""
    if event["type"] != "credit.expired":
        return False
    block = event["credit_block"]
    if block["priority"] != 10 or block["metadata"].get("source") not in PLAN_SOURCES:
        return False
    customer = credits.get(f"customers/{block['customer_id']}")
    if not customer["settings"]["auto_buy_enabled"]:
        return False
    companion_id = block["metadata"]["companion_id"]
    return try_auto_buy_plan(credits, block["customer_id"], companion_id, purchase_id=f"after-{block['id']}")


@contextmanager
def receiver(secret: Callable[[], str], handle: Callable[[dict[str, Any]], None]) -> Iterator[str]:
    """The URL of a webhook receiver on this machine, while the block lasts."""

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(min(int(self.headers["content-length"]), BODY_BYTES_MAX))
            try:
                event = Webhook(secret()).verify(body, dict(self.headers))
            except WebhookVerificationError:
                self.send_response(400)
            else:
                handle(event)
                self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is logged."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    credits = Credits(os.environ["FAREBOX_URL"], os.environ["FAREBOX_KEY"])
    user = f"user_{uuid.uuid4().hex}"
    customer = credits.post("customers", {"external_id": user, "settings": {"auto_buy_enabled": True}})["id"]
    wallet = {"customer_id": customer, "credits": 250_000, "metadata": {"source": "wallet_recharge"}}
    credits.post("topup/grant", wallet)

    secret, bought = "", threading.Event()

    def handle(event: dict[str, Any]) -> None:
        if event["customer_id"] == customer and handle_webhook(credits, event):
            bought.set()

    with receiver(lambda: secret, handle) as url:
        hook = credits.post("webhook-endpoints", {"url": url, "event_types": ["credit.expired"]})
        secret = hook["secret"]
        soon = (datetime.now(UTC) + timedelta(seconds=2)).isoformat()
        metadata = {"source": "plan_1hr", "companion_id": "companion_42", "priority": 10}
        plan = {"customer_id": customer, "credits": 5_000, "expires_at": soon, "metadata": metadata}
        credits.post("topup/grant", plan)
        print(handle_send_message(credits, customer, "companion_42", "conv_789", f"{user}-first"))
        assert bought.wait(WAIT_S), "no webhook came"
        credits.http.delete(f"webhook-endpoints/{hook['id']}").raise_for_status()
    print(json.dumps(views(credits, customer)))
    print(handle_send_message(credits, customer, "companion_42", "conv_789", f"{user}-second"))
    print(json.dumps(views(credits, customer)))


def views(credits: Credits, customer_id: str) -> dict[str, int]:
    """What the app shows to its user, in credits."""
    blocks = credits.get(f"customers/{customer_id}/credits", include_blocks=True)["blocks"]
    wallet = [b for b in blocks if b["expires_at"] is None and b["source"] == "wallet_recharge"]
    plan = [b for b in blocks if b["priority"] == 10]
    return {
        "wallet": sum(b["remaining_amount"] for b in wallet) // 1000,
        "plan": sum(b["remaining_amount"] for b in plan) // 1000,
    }


if __name__ == "__main__":
    main()
