"""What we ask of Stripe, and nothing else of its API. Its objects come back as plain dictionaries.

How it works. Every POST carries an idempotency key that derives from our ids, `farebox:WHAT:ID`, so that it can be
repeated: by the SDK after a broken connection, by us after a crash, by several processes at once. Objects of Stripe
carry the order that they are for as metadata, and no personal data. Errors keep Stripe's codes; its messages, which
quote what was sent, end here.

Source: https://docs.stripe.com/api, idempotent requests, errors, `Stripe-Signature`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, Final, TypeVar

import msgspec
import stripe

from gateway.payments.orders import Order
from gateway.payments.processor import (
    PaymentDeclined,
    ProcessorNotFound,
    ProcessorRefused,
    ProcessorUnavailable,
    Session,
    SignatureInvalid,
    StripeMode,
)
from gateway.payments.stripe_http import StripeHTTP
from gateway.settings import moves_money
from ledger.model import Scope

API_VERSION: Final = "2026-10-28.endive"
"""Objects and events look as this version says, until we say otherwise."""

RETRIES: Final = 2
TIMEOUT_S: Final = 25.0
"""Of one call, with its retries."""

PAGE: Final = 100
LISTED_MAX: Final = 1_000
"""Payments of a customer, or refunds and disputes of a payment, that are read at most."""

SIGNATURE_LIFE_S: Final = 300
TOO_OLD: Final = "too old"
_UNREADABLE: Final = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)

T = TypeVar("T")
_Page = Callable[[Any], Awaitable[stripe.StripeObject]]

_REFUSALS: Final[Mapping[type[stripe.StripeError], str]] = {
    stripe.InvalidRequestError: "invalid_request",
    stripe.IdempotencyError: "idempotency_error",
    stripe.AuthenticationError: "authentication_error",
    stripe.PermissionError: "permission_error",
}
"""What asking again does not help against, and its code where the error has none."""


class StripeAPI:
    """Stripe, for one account.

    Args:
        webhook_secret: several, with commas between them, while one is replaced by another.
        api_base: instead of Stripe's own address, as for a stand-in.

    Raises:
        ProcessorUnavailable, ProcessorRefused: every method that asks.
    """

    def __init__(self, *, secret_key: str, webhook_secret: str, api_base: str | None = None) -> None:
        # It would tell Stripe about this machine, and keep an id in the home directory for that.
        stripe.enable_telemetry = False
        self.mode: StripeMode = "live" if moves_money(secret_key) else "test"
        self._webhook_secrets = [secret.strip() for secret in webhook_secret.split(",")]
        self._http = StripeHTTP()
        self._client = stripe.StripeClient(
            secret_key,
            stripe_version=API_VERSION,
            base_addresses={} if api_base is None else {"api": api_base},
            max_network_retries=RETRIES,
            http_client=self._http,
        )

    async def close(self) -> None:
        await self._http.close_async()

    # Customers.

    async def create_customer(self, scope: Scope, customer_id: str, *, instead_of: str | None = None) -> str:
        """Stripe's id of our customer: the same one whoever asks, within a day.

        Args:
            instead_of: one of Stripe's that is there no more, so that another is made.
        """
        name = ":".join((scope.tenant, scope.mode, customer_id, *([instead_of] if instead_of else [])))
        created = await self._answer(
            self._client.v1.customers.create_async(
                {
                    "metadata": {
                        "farebox_customer": customer_id,
                        "farebox_tenant": scope.tenant,
                        "farebox_mode": scope.mode,
                    }
                },
                {"idempotency_key": f"farebox:customer:{name}"},
            )
        )
        return created.id

    async def delete_customer(self, processor_id: str) -> None:
        """Forget the customer with all cards. Repeatable: of one who is gone there is nothing to do."""
        try:
            await self._answer(self._client.v1.customers.delete_async(processor_id))
        except ProcessorNotFound:
            return

    # Checkout.

    async def create_session(
        self, order: Order, *, processor_id: str, success_url: str, cancel_url: str, title: str, expires_at_s: int
    ) -> Session:
        """The page on which *order* is paid. Repeated with the same arguments within a day, it is the same page.

        Args:
            title: what the customer reads that they buy.
            expires_at_s: half an hour to a day from now.
        """
        metadata = _metadata(order)
        payment: dict[str, Any] = {"metadata": metadata}
        if order.save_payment_method:
            payment["setup_future_usage"] = "off_session"
        asked: Any = {
            "mode": "payment",
            "customer": processor_id,
            "client_reference_id": order.id,
            "metadata": metadata,
            "payment_intent_data": payment,
            "line_items": [
                {
                    "quantity": 1,
                    "price_data": {
                        "currency": order.currency,
                        "unit_amount": order.price_minor,
                        "product_data": {"name": title},
                    },
                }
            ],
            "success_url": success_url,
            "cancel_url": cancel_url,
            "expires_at": expires_at_s,
        }
        # Asked for with another customer of Stripe's it is another request, which the answer of the first is not for.
        key = f"farebox:session:{order.id}:{processor_id}"
        made = await self._answer(self._client.v1.checkout.sessions.create_async(asked, {"idempotency_key": key}))
        return Session(made.id, made.url)

    async def session(self, session_id: str) -> Mapping[str, Any]:
        """The Checkout Session, with its payment intent in it."""
        return await self._object(
            self._client.v1.checkout.sessions.retrieve_async(session_id, {"expand": ["payment_intent"]})
        )

    async def expire_session(self, session_id: str) -> None:
        """Nobody can pay on that page any more.

        Raises:
            ProcessorRefused: it is paid, is being paid, or has expired.
        """
        await self._answer(
            self._client.v1.checkout.sessions.expire_async(
                session_id, options={"idempotency_key": f"farebox:expire:{session_id}"}
            )
        )

    # Payments.

    async def charge_off_session(self, order: Order, *, processor_id: str, payment_method: str) -> Mapping[str, Any]:
        """Take the order's price from a kept payment method; the payment intent, which may yet be `processing`.

        Repeated for the same order within a day, it is the same payment, declined or not.

        Raises:
            PaymentDeclined
        """
        return await self._object(
            self._client.v1.payment_intents.create_async(
                {
                    "amount": order.price_minor,
                    "currency": order.currency,
                    "customer": processor_id,
                    "payment_method": payment_method,
                    "off_session": True,
                    "confirm": True,
                    # Nobody is there to be sent to another page.
                    "automatic_payment_methods": {"enabled": True, "allow_redirects": "never"},
                    "metadata": _metadata(order),
                },
                {"idempotency_key": f"farebox:charge:{order.id}"},
            )
        )

    async def payment_intent(self, payment_intent_id: str) -> Mapping[str, Any]:
        return await self._object(self._client.v1.payment_intents.retrieve_async(payment_intent_id))

    async def cancel_payment_intent(self, payment_intent_id: str) -> Mapping[str, Any]:
        """Raises ProcessorRefused for one that is paid, is being paid, or was cancelled."""
        return await self._object(
            self._client.v1.payment_intents.cancel_async(
                payment_intent_id, options={"idempotency_key": f"farebox:cancel:{payment_intent_id}"}
            )
        )

    async def payment_intents_of(self, processor_id: str, since_s: int) -> list[Mapping[str, Any]]:
        """Payments of a customer that were begun since then, newest first; LISTED_MAX at most."""
        return await self._list(
            self._client.v1.payment_intents.list_async, {"customer": processor_id, "created": {"gte": since_s}}
        )

    async def refunds_of(self, payment_intent_id: str) -> list[Mapping[str, Any]]:
        return await self._list(self._client.v1.refunds.list_async, {"payment_intent": payment_intent_id})

    async def disputes_of(self, payment_intent_id: str) -> list[Mapping[str, Any]]:
        """Each with the movements of the balance that it caused."""
        return await self._list(self._client.v1.disputes.list_async, {"payment_intent": payment_intent_id})

    async def balance_transactions(self, since_s: int, until_s: int) -> AsyncIterator[Mapping[str, Any]]:
        """All movements of the balance made from *since_s* on and before *until_s*, each with its source in it."""
        wanted = {"created": {"gte": since_s, "lt": until_s}, "expand": ["data.source"]}
        async for transaction in self._paged(self._client.v1.balance_transactions.list_async, wanted):
            yield transaction

    # Events.

    def verified(self, body: bytes, signature: str) -> Mapping[str, Any]:
        """The event in *body*, which Stripe signed within the last SIGNATURE_LIFE_S.

        Raises:
            SignatureInvalid
        """
        problems = {_problem(body, signature, secret) for secret in self._webhook_secrets}
        if None not in problems:
            raise SignatureInvalid(TOO_OLD if TOO_OLD in problems else "not signed with our secret")
        try:
            event = msgspec.json.decode(body)
        except _UNREADABLE:
            raise SignatureInvalid("not JSON") from None
        if not isinstance(event, dict):
            raise SignatureInvalid("not an object")
        return event

    # Below.

    async def _object(self, asked: Awaitable[stripe.StripeObject]) -> Mapping[str, Any]:
        return (await self._answer(asked)).to_dict()

    async def _list(self, page: _Page, wanted: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        async for each in self._paged(page, wanted):
            found.append(each)
            if len(found) == LISTED_MAX:
                break
        return found

    async def _paged(self, page: _Page, wanted: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
        asked = {**wanted, "limit": PAGE}
        while True:
            listed = await self._object(page(asked))
            found = listed["data"]
            for each in found:
                yield each
            if not listed["has_more"] or not found:
                return
            asked["starting_after"] = found[-1]["id"]

    async def _answer(self, asked: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await asked
        except TimeoutError:
            raise ProcessorUnavailable(f"no answer within {TIMEOUT_S:g} s") from None
        except stripe.StripeError as error:
            raise _translated(error) from None


def _problem(body: bytes, signature: str, secret: str) -> str | None:
    """What is wrong with *signature*; None when it is *secret*'s, and fresh."""
    if not signature.isascii():  # What compares signatures would fail on it.
        return "not text"
    try:
        stripe.WebhookSignature.verify_header(body, signature, secret, SIGNATURE_LIFE_S)
    except stripe.SignatureVerificationError as error:
        return TOO_OLD if "tolerance" in str(error.user_message) else "another's"
    except UnicodeDecodeError:
        return "not text"
    return None


def _metadata(order: Order) -> dict[str, str]:
    """By which whoever meets the object finds the order."""
    return {"farebox_order": order.id, "farebox_tenant": order.tenant, "farebox_mode": order.mode}


def _translated(error: stripe.StripeError) -> Exception:
    """*error* in our words, without what it quotes. Its request id finds it in Stripe's own log."""
    status, code = error.http_status, error.code
    if isinstance(error, stripe.CardError):
        told = error.json_body.get("error", {}) if isinstance(error.json_body, dict) else {}
        return PaymentDeclined(code, told.get("decline_code"), told.get("payment_intent"))
    param = getattr(error, "param", None)
    if status == HTTPStatus.NOT_FOUND:
        return ProcessorNotFound(status, code, param)
    if isinstance(error, tuple(_REFUSALS)):
        return ProcessorRefused(status, code or _REFUSALS.get(type(error)), param)
    return ProcessorUnavailable(f"no useful answer ({type(error).__name__}, {status}, request {error.request_id})")
