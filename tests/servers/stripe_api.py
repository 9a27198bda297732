"""Stripe's API as requests and answers: parameters, idempotency keys, pages, expansion. No socket here."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tests.servers.stripe_account import StripeAccount
from tests.servers.stripe_cards import TEST_CARDS
from tests.servers.stripe_objects import Object, listed
from tests.servers.stripe_payments import SESSION_LEAST_S, SESSION_S
from tests.servers.stripe_requests import Answer, Asked, known, required
from tests.servers.stripe_store import Refused

PAGE_DEFAULT: Final = 10
PAGE_MAX: Final = 100
EXPANSIONS_DEEP_MAX: Final = 4
KEY_LENGTH_MAX: Final = 255
KEYS_KEPT_S: Final = 24 * 3600


@dataclass(frozen=True)
class _Kept:
    asked: Asked
    answer: Answer
    at_s: int


class StripeAPI:
    """The API of one account, to whoever has *secret_key*; *base_url* is where Checkout's pages are."""

    def __init__(self, account: StripeAccount, *, secret_key: str, base_url: str) -> None:
        self._account = account
        self._authorization = f"Bearer {secret_key}"
        self._base_url = base_url
        self._kept: dict[str, _Kept] = {}

    def answer(self, asked: Asked) -> Answer:
        """Do what is asked, whole; the same key gives the first answer again."""
        with self._account.lock:
            try:
                return self._answer(asked)
            except Refused as refusal:
                return Answer(refusal.status, {"error": refusal.error})

    def _answer(self, asked: Asked) -> Answer:
        if asked.authorization != self._authorization:
            raise Refused(401, "Invalid API Key provided: sk_****")
        if asked.version is None:
            raise Refused(400, "Say which version of the API you speak, in Stripe-Version.")
        if asked.method == "GET" or asked.idempotency_key is None:
            return Answer(200, self._done(asked))
        return self._once(asked, asked.idempotency_key)

    def _once(self, asked: Asked, key: str) -> Answer:
        if len(key) > KEY_LENGTH_MAX:
            raise Refused(400, "Idempotency keys are at most 255 characters long.", type="idempotency_error")
        kept = self._kept.get(key)
        now = self._account.now_s()
        if kept is not None and kept.at_s + KEYS_KEPT_S > now:
            before = kept.asked
            if (before.method, before.path, before.params) != (asked.method, asked.path, asked.params):
                raise Refused(400, _OTHER_PARAMETERS.format(key), type="idempotency_error")
            return Answer(kept.answer.status, kept.answer.body, replayed=True)
        try:
            answer = Answer(200, self._done(asked))
        except Refused as refusal:
            # What never began is not kept: whoever mends the parameters may use the key again.
            if refusal.status != 402:
                raise
            answer = Answer(refusal.status, {"error": refusal.error})
        self._kept[key] = _Kept(asked, answer, now)
        return answer

    def _done(self, asked: Asked) -> Object:
        params = dict(asked.params)
        expansions = list(dict(params.pop("expand", {})).values())
        for method, pattern, handler in _ROUTES:
            match = pattern.fullmatch(asked.path)
            if match and method == asked.method:
                with self._account.asked_by(asked.idempotency_key):
                    found = handler(self, params, *match.groups())
                for path in expansions:
                    self._expand(found, path.split("."))
                return found
        raise Refused(404, f"Unrecognized request URL ({asked.method}: {asked.path}).")

    def _expand(self, found: Any, path: list[str]) -> None:
        if len(path) > EXPANSIONS_DEEP_MAX:
            raise Refused(400, "You cannot expand more than 4 levels of a property.")
        if isinstance(found, list):
            for each in found:
                self._expand(each, path)
            return
        name, *rest = path
        if not isinstance(found, dict):
            return
        if found.get("object") == "checkout.session" and name == "line_items":
            found[name] = listed(
                self._account.line_items(found["id"]), url=f"/v1/checkout/sessions/{found['id']}/line_items"
            )
        elif found.get("object") == "charge" and name == "refunds":
            refunds = self._account.all("refund", charge=found["id"])
            found[name] = listed(refunds, url=f"/v1/charges/{found['id']}/refunds")
        elif name not in found:
            raise Refused(400, f"This property cannot be expanded ({name}).")
        elif isinstance(found[name], str) and self._account.holds(found[name]):
            found[name] = self._account.get(found[name])
        if rest:
            self._expand(found[name], rest)

    # What each route does

    def find(self, object: str, id: str, *, param: str = "id") -> Object:
        if self._account.holds(id):
            found = self._account.get(id)
            if found["object"] == object:
                return found
        name = object.rsplit(".", maxsplit=1)[-1].replace("_", " ")
        message = f"No such {name}: '{id}'"
        raise Refused(404 if param == "id" else 400, message, code="resource_missing", param=param)

    def customer(self, params: Mapping[str, Any]) -> str | None:
        """Whose it is to be; one that was deleted is none."""
        id = params.get("customer")
        if id is not None and self.find("customer", id, param="customer").get("deleted"):
            raise Refused(400, f"No such customer: '{id}'", code="resource_missing", param="customer")
        return id

    def create_customer(self, params: Mapping[str, Any]) -> Object:
        known(params, "email", "name", "metadata", "description")
        return self._account.create_customer(params)

    def delete_customer(self, params: Mapping[str, Any], id: str) -> Object:
        if self.find("customer", id).get("deleted"):
            raise Refused(404, f"No such customer: '{id}'", code="resource_missing", param="id")
        self._account.delete_customer(id)
        return self._account.get(id)

    def create_session(self, params: Mapping[str, Any]) -> Object:
        known(params, *_SESSION_PARAMS)
        required(params, "mode", "line_items", "success_url")
        self.customer(params)
        if params["mode"] != "payment":
            raise Refused(400, "Only payments are known here.", param="mode")
        now = self._account.now_s()
        if not now + SESSION_LEAST_S <= int(params.get("expires_at", now + SESSION_S)) <= now + SESSION_S:
            message = (
                "The `expires_at` timestamp must be between 30 minutes and 24 hours from Checkout Session creation."
            )
            raise Refused(400, message, param="expires_at")
        return self._account.get(self._account.create_session(params, base_url=self._base_url)["id"])

    def expire_session(self, params: Mapping[str, Any], id: str) -> Object:
        status = self.find("checkout.session", id)["status"]
        if status != "open":
            message = (
                f'Only Checkout Sessions with a status in ["open"] can be expired. This one has a status of {status}.'
            )
            raise Refused(400, message)
        self._account.expire(id)
        return self._account.get(id)

    def create_payment(self, params: Mapping[str, Any]) -> Object:
        known(params, *_PAYMENT_PARAMS)
        required(params, "amount", "currency")
        customer, method = self.customer(params), params.get("payment_method")
        if not self.payment_method_is_of(method, customer):
            message = "The PaymentMethod does not belong to the Customer. Attach it first."
            raise Refused(400, message, param="payment_method", code="payment_method_unexpected_state")
        if int(params["amount"]) < 50:
            raise Refused(400, "Amount must be at least $0.50 usd", code="amount_too_small", param="amount")
        payment = self._account.create_payment(params)
        if params.get("confirm") == "true":
            required(params, "payment_method", "off_session")
            self._account.charge_off_session(payment["id"], str(method))
        return self._account.get(payment["id"])

    def payment_method_is_of(self, method: str | None, customer: str | None) -> bool:
        if method is None or method in TEST_CARDS:
            return True
        return customer is not None and self.find("payment_method", method)["customer"] == customer

    def cancel_payment(self, params: Mapping[str, Any], id: str) -> Object:
        payment = self.find("payment_intent", id)
        if payment["status"] in ("succeeded", "canceled", "processing"):
            message = f"You cannot cancel this PaymentIntent because it has a status of {payment['status']}."
            raise Refused(400, message, code="payment_intent_unexpected_state", payment_intent=payment)
        self._account.cancel(id, params.get("cancellation_reason"))
        return self._account.get(id)

    def create_refund(self, params: Mapping[str, Any]) -> Object:
        known(params, "payment_intent", "charge", "amount", "reason", "metadata")
        if "charge" in params:
            payment_id = self.find("charge", params["charge"], param="charge")["payment_intent"]
        else:
            required(params, "payment_intent")
            payment_id = params["payment_intent"]
        payment = self.find("payment_intent", payment_id, param="payment_intent")
        if payment["status"] != "succeeded":
            raise Refused(400, f"This PaymentIntent ({payment_id}) does not have a successful charge to refund.")
        charge = self._account.get(payment["latest_charge"])
        left = charge["amount"] - charge["amount_refunded"]
        amount = int(params.get("amount", left))
        if left == 0:
            raise Refused(400, f"Charge {charge['id']} has already been refunded.", code="charge_already_refunded")
        if not 0 < amount <= left:
            raise Refused(400, "Refund amount is greater than unrefunded amount on charge", param="amount")
        events = self._account.refund(payment_id, amount, reason=params.get("reason"), metadata=params.get("metadata"))
        return self._account.get(events[0]["data"]["object"]["id"])

    def attach(self, params: Mapping[str, Any], id: str) -> Object:
        required(params, "customer")
        self.customer(params)
        if id not in TEST_CARDS:
            self.find("payment_method", id)
        return self._account.get(self._account.attach(id, params["customer"])["id"])

    def events(self, params: Mapping[str, Any]) -> Object:
        types = set(dict(params.get("types", {})).values()) | {params[name] for name in ("type",) if name in params}
        rows = [event for event in reversed(self._account.events) if not types or event["type"] in types]
        return self.page("/v1/events", rows, {name: params[name] for name in params if name not in ("types", "type")})

    def listing(self, object: str, path: str, filters: tuple[str, ...]) -> Callable[..., Object]:
        def lists(params: Mapping[str, Any]) -> Object:
            known(params, *filters, *_PAGE_PARAMS)
            rows = self._account.all(object, **{name: params[name] for name in filters if name in params})
            return self.page(path, rows, params)

        return lists

    def page(self, path: str, rows: list[Object], params: Mapping[str, Any]) -> Object:
        """*rows*, the newest first, as far as *params* ask for them."""
        limit = int(params.get("limit", PAGE_DEFAULT))
        if not 1 <= limit <= PAGE_MAX:
            raise Refused(400, "Limit must be between 1 and 100.", param="limit")
        bounds = params.get("created", {})
        bounds = bounds if isinstance(bounds, Mapping) else {"gte": bounds, "lte": bounds}
        rows = [row for row in rows if all(_BOUNDS[name](row["created"], int(at)) for name, at in bounds.items())]
        if "starting_after" in params:
            ids = [row["id"] for row in rows]
            if params["starting_after"] not in ids:
                raise Refused(400, "No such object", code="resource_missing", param="starting_after")
            rows = rows[ids.index(params["starting_after"]) + 1 :]
        return listed(rows[:limit], url=path, has_more=len(rows) > limit)


_OTHER_PARAMETERS: Final = (
    "Keys for idempotent requests can only be used with the same parameters they were first used with. "
    "Try using a key other than '{}' if you meant to execute a different request."
)

_BOUNDS: Final[Mapping[str, Callable[[int, int], bool]]] = {
    "gte": lambda at, bound: at >= bound,
    "gt": lambda at, bound: at > bound,
    "lte": lambda at, bound: at <= bound,
    "lt": lambda at, bound: at < bound,
}

_PAGE_PARAMS: Final = ("limit", "starting_after", "created")

_SESSION_PARAMS: Final = (
    *("mode", "line_items", "success_url", "cancel_url", "customer", "client_reference_id", "metadata", "expires_at"),
    *("payment_intent_data", "payment_method_types", "locale", "submit_type", "saved_payment_method_options"),
    *("billing_address_collection", "payment_method_collection", "custom_text", "consent_collection"),
)

_PAYMENT_PARAMS: Final = (
    *("amount", "currency", "customer", "payment_method", "confirm", "off_session", "metadata", "description"),
    *("setup_future_usage", "error_on_requires_action", "payment_method_types", "automatic_payment_methods"),
    "statement_descriptor_suffix",
)

_LISTS: Final = {
    "/v1/checkout/sessions": ("checkout.session", ("customer", "payment_intent", "status")),
    "/v1/payment_intents": ("payment_intent", ("customer",)),
    "/v1/charges": ("charge", ("customer", "payment_intent")),
    "/v1/refunds": ("refund", ("payment_intent", "charge")),
    "/v1/disputes": ("dispute", ("payment_intent", "charge")),
    "/v1/balance_transactions": ("balance_transaction", ("type", "source", "currency")),
    "/v1/payment_methods": ("payment_method", ("customer", "type")),
}

Handler = Callable[..., Object]


def _routes() -> Iterable[tuple[str, re.Pattern[str], Handler]]:
    """Method, path and handler; a path's groups are ids."""

    def finds(object: str) -> Handler:
        return lambda api, params, id: api.find(object, id)

    def lists(path: str) -> Handler:
        object, filters = _LISTS[path]
        return lambda api, params: api.listing(object, path, filters)(params)

    table: list[tuple[str, str, Handler]] = [
        ("POST", "/v1/customers", StripeAPI.create_customer),
        ("GET", "/v1/customers/(id)", finds("customer")),
        ("DELETE", "/v1/customers/(id)", StripeAPI.delete_customer),
        ("GET", "/v1/customers/(id)/payment_methods", _methods_of_customer),
        ("POST", "/v1/checkout/sessions", StripeAPI.create_session),
        ("POST", "/v1/checkout/sessions/(id)/expire", StripeAPI.expire_session),
        ("POST", "/v1/payment_intents", StripeAPI.create_payment),
        ("POST", "/v1/payment_intents/(id)/cancel", StripeAPI.cancel_payment),
        ("POST", "/v1/refunds", StripeAPI.create_refund),
        ("POST", "/v1/payment_methods/(id)/attach", StripeAPI.attach),
        ("GET", "/v1/events", StripeAPI.events),
    ]
    for path, (object, _) in _LISTS.items():
        table += [("GET", path, lists(path)), ("GET", f"{path}/(id)", finds(object))]
    for method, path, handler in table:
        yield method, re.compile(path.replace("(id)", "([A-Za-z0-9_]+)")), handler


def _methods_of_customer(api: StripeAPI, params: Mapping[str, Any], id: str) -> Object:
    path = f"/v1/customers/{id}/payment_methods"
    return api.listing("payment_method", path, ("customer", "type"))({**params, "customer": id})


_ROUTES: Final = tuple(_routes())
