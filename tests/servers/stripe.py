"""A stand-in for Stripe on the loopback: its API over HTTP, a page to pay on, signed events, and faults on demand.

    with fake_stripe() as stripe:            # or: async with
        settings = {
            "stripe_secret_key": stripe.secret_key,
            "stripe_webhook_secret": stripe.webhook_secret,
            "stripe_api_base": stripe.url,
        }
        ...                                  # the gateway makes a Checkout Session
        for event in stripe.pay(session_id):
            body, signature = stripe.signed(event)

It runs in its own threads: synchronous and asynchronous tests, and other processes, can ask it. What it makes up and
what it leaves out is said in `docs/payments.md`; the real SDK judges it in `test_stripe.py`.
"""

import asyncio
import contextlib
import hashlib
import hmac
import html
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Literal, Self
from urllib.parse import parse_qs, urlsplit

import httpx

from tests.servers.stripe_account import StripeAccount
from tests.servers.stripe_api import StripeAPI
from tests.servers.stripe_objects import API_VERSION, PERSON, Object
from tests.servers.stripe_requests import Answer, Asked, read_form, request_id

HANG_S_MAX: Final = 60.0
IDLE_S_MAX: Final = 60.0
STOP_S: Final = 10.0
BODY_BYTES_MAX: Final = 1_000_000
DELIVER_S: Final = 30.0

FaultKind = int | Literal["hang", "reset", "reset-after-effect"]


@dataclass
class Fault:
    path_prefix: str
    kind: FaultKind
    times: int
    method: str | None


class FakeStripe(StripeAccount):
    """An account that is served at `url` from `start` to `close`.

    Attributes:
        requests: what was asked, in order, whether or not it was answered.
    """

    def __init__(self, *, live: bool = False, now_s: Callable[[], int] = lambda: int(time.time())) -> None:
        super().__init__(live=live, now_s=now_s)
        mode = "live" if live else "test"
        self.secret_key = f"sk_{mode}_51FakeFareboxSecretKey"
        self.webhook_secret = "whsec_FakeFareboxWebhookSecret"
        self.requests: list[Asked] = []
        self.problems: list[BaseException] = []
        self._faults: list[Fault] = []
        self._released = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.stripe = self
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.api = StripeAPI(self, secret_key=self.secret_key, base_url=self.url)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def start(self) -> Self:
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop, and end every connection.

        Raises:
            BaseException: a request was answered by a defect of the fake.
        """
        self._released.set()
        self._server.shutdown()
        self._server.end_connections()
        self._server.server_close()
        self._thread.join(STOP_S)
        if self.problems:
            raise self.problems[0]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self.start()

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    # Faults

    def fail_next(self, path_prefix: str, kind: FaultKind, times: int = 1, *, method: str | None = None) -> None:
        """The next requests to paths that begin so go wrong.

        Args:
            kind: a status answers so and does nothing; `hang` does not answer until `release`; `reset` breaks the
                connection; `reset-after-effect` does what is asked, then breaks it.
        """
        with self.lock:
            self._faults.append(Fault(path_prefix, kind, times, method))

    def heal(self) -> None:
        """Nothing goes wrong any more; what hangs is answered."""
        with self.lock:
            self._faults.clear()
        self.release()

    def release(self) -> None:
        """Let what hangs at this moment go on."""
        released, self._released = self._released, threading.Event()
        released.set()

    # Events

    def signed(self, event: Object, *, at: int | None = None, secret: str | None = None) -> tuple[bytes, str]:
        """The body of an event as Stripe sends it, and its header Stripe-Signature. *at*: seconds, now by default."""
        body = json.dumps(event, indent=2).encode()
        sent_at = self.now_s() if at is None else at
        key = (self.webhook_secret if secret is None else secret).encode()
        signature = hmac.new(key, f"{sent_at}.".encode() + body, hashlib.sha256).hexdigest()
        return body, f"t={sent_at},v1={signature}"

    async def deliver(self, event: Object, url: str, **options: Any) -> httpx.Response:
        """Send one event to *url*, once."""
        body, signature = self.signed(event, **options)
        headers = {"Stripe-Signature": signature, "Content-Type": "application/json; charset=utf-8"}
        async with httpx.AsyncClient(timeout=DELIVER_S, trust_env=False) as client:
            return await client.post(url, content=body, headers=headers)

    # Below: the server's side

    def taken(self, asked: Asked) -> FaultKind | None:
        """Note the request; what is to go wrong with it."""
        with self.lock:
            self.requests.append(asked)
            for fault in self._faults:
                if asked.path.startswith(fault.path_prefix) and fault.method in (None, asked.method):
                    fault.times -= 1
                    if fault.times == 0:
                        self._faults.remove(fault)
                    return fault.kind
        return None

    def hang(self) -> None:
        self._released.wait(HANG_S_MAX)


fake_stripe = FakeStripe
"""`with fake_stripe() as stripe`, or `async with`: served inside."""


def only(events: list[Object], type: str) -> Object:
    """The one event of that type."""
    (found,) = [event for event in events if event["type"] == type]
    return found


class _Server(ThreadingHTTPServer):
    """Waits for its threads when it is closed, so that nothing of one test reaches into another."""

    daemon_threads = False
    block_on_close = True
    request_queue_size = 256
    stripe: FakeStripe

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        # Here, and not in its thread, so that none is missed that begins while the server is closed.
        with self._connections_lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._connections_lock:
                self._connections.discard(request)

    def end_connections(self) -> None:
        with self._connections_lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no defect; all else is told by `close`."""
        problem = sys.exc_info()[1]
        if problem is not None and not isinstance(problem, OSError):
            self.stripe.problems.append(problem)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = IDLE_S_MAX
    server: _Server

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        assert length <= BODY_BYTES_MAX, "nobody sends Stripe as much as that"
        body = self.rfile.read(length).decode()
        target = urlsplit(self.path)
        if target.path.startswith("/c/pay/"):
            self._page(target.path.removeprefix("/c/pay/"), parse_qs(body))
            return
        asked = Asked(
            self.command,
            target.path,
            read_form(body if self.command == "POST" else target.query),
            self.headers.get("Idempotency-Key"),
            self.headers.get("Stripe-Version"),
            self.headers.get("Authorization"),
        )
        stripe = self.server.stripe
        fault = stripe.taken(asked)
        if isinstance(fault, int):
            self._answer(Answer(fault, {"error": _FAULTS.get(fault, _FAULTS[500])}), asked)
            return
        if fault == "hang":
            stripe.hang()
        if fault == "reset":
            self._reset()
            return
        answer = stripe.api.answer(asked)
        if fault == "reset-after-effect":
            self._reset()
        else:
            self._answer(answer, asked)

    def _answer(self, answer: Answer, asked: Asked) -> None:
        headers = {"Request-Id": request_id(), "Stripe-Version": asked.version or API_VERSION}
        if asked.idempotency_key is not None:
            headers["Idempotency-Key"] = asked.idempotency_key
        if answer.replayed:
            headers["Idempotent-Replayed"] = "true"
        self._send(answer.status, json.dumps(answer.body, indent=2).encode(), "application/json", headers)

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _reset(self) -> None:
        """Break the connection, as a cable that is pulled does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _page(self, session_id: str, form: dict[str, list[str]]) -> None:
        """Checkout's page, much reduced: a button that pays, and the way back."""
        stripe = self.server.stripe
        session = stripe.get(session_id)
        if self.command == "POST":
            if session["status"] == "open":
                stripe.pay(session_id, payment_method=form.get("card", ["pm_card_visa"])[0])
            back = session["success_url"].replace("{CHECKOUT_SESSION_ID}", session_id)
            self._send(HTTPStatus.SEE_OTHER, b"", "text/plain", {"Location": back})
            return
        amount = f"{session['amount_total']} {session['currency']}"
        page = _PAGE.format(amount=html.escape(amount), cancel=html.escape(session["cancel_url"] or "", quote=True))
        self._send(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8", {})


_PAGE: Final = """<!doctype html><html lang="en"><title>Checkout</title>
<h1>Pay {amount}</h1><form method="post"><button>Pay</button></form><a href="{cancel}">Back</a></html>"""

_QUOTED: Final = f"It was asked for {PERSON['name']}, {PERSON['email']}."
"""Stripe's messages quote what was sent: nobody may repeat them."""

_FAULTS: Final[dict[int, Object]] = {
    400: {"message": f"Invalid request. {_QUOTED}", "type": "invalid_request_error", "code": "parameter_invalid_empty"},
    409: {"message": f"Another request with this key is in progress. {_QUOTED}", "type": "idempotency_error"},
    429: {"message": f"Request rate limit exceeded. {_QUOTED}", "type": "invalid_request_error", "code": "rate_limit"},
    500: {"message": f"An unknown error occurred. {_QUOTED}", "type": "api_error"},
}
