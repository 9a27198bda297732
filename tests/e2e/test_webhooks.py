"""A gateway that is killed between the commit of an event and its delivery loses none."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gateway.events.lanes import LEASE_S
from tests.e2e.conftest import FreshStore, Install
from tests.e2e.farebox import until

USERS = 12
ROUNDS = 3
TOLD_S = LEASE_S + 30.0
"""What a dead process had waits for its lease; and two busy cores."""


@contextmanager
def receiver() -> Iterator[tuple[str, list[dict[str, Any]], threading.Event]]:
    """A URL, what came, and a switch: until it is set, nobody is answered."""
    came: list[dict[str, Any]] = []
    answering = threading.Event()

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if answering.wait(20):
                came.append(json.loads(body))
                self.send_response(204)
                self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is logged."""

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:  # The gateway was killed meanwhile.
                return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", came, answering
    finally:
        answering.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("fresh_store", ["sqlite"], indirect=True)
def test_what_was_committed_is_told_though_the_gateway_is_killed(install: Install, fresh_store: FreshStore):
    farebox = install(webhooks_allow_private=True, **fresh_store())
    with receiver() as (url, came, answering):
        blocks: set[str] = set()
        for number in range(ROUNDS):
            gateway = farebox.serve()
            if number == 0:
                hook = {"url": url, "event_types": ["credit.granted"]}
                assert gateway.post("/webhook-endpoints", farebox.live_key, hook).status_code == 201
            for user in range(USERS):
                body = {"customer_id": f"user-{user}", "credits": 1000}
                granted = gateway.post("/topup/grant", farebox.live_key, body)
                blocks.add(granted.json()["ledger_id"])
            gateway.kill()
        answering.set()
        farebox.serve()
        until(lambda: {event["credit_block"]["id"] for event in list(came)} == blocks, within_s=TOLD_S, what="webhook")
    first: dict[str, list[int]] = {}
    for event in came:
        seen = first.setdefault(event["customer"]["external_id"], [])
        if event["sequence"] not in seen:
            seen.append(event["sequence"])
    assert set(map(tuple, first.values())) == {(1, 2, 3)}
