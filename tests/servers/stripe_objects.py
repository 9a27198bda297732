"""What Stripe's API answers with, in full shape: each object has every field that the pinned SDK declares for it.

A field that a maker is not told is null, as Stripe sends it. `NOT_SENT` names those that Stripe leaves out unless one
asks for them or uses a product that nobody here uses.
"""

import secrets
import string
from collections.abc import Iterable, Mapping
from typing import Any, Final

import stripe
import stripe.checkout

Object = dict[str, Any]

API_VERSION: Final = "2026-10-28.endive"

PERSON: Final = {
    "name": "Jenny Rosen",
    "email": "jenny.rosen@example.com",
    "phone": "+15555550123",
    "line1": "510 Townsend Street",
    "postal_code": "94103",
}
"""Who pays. Nothing of it may be found anywhere in Farebox."""

LAST4: Final = "4242"
FINGERPRINT: Final = "Xt5EWLLDS7FJjR1c"

NOT_SENT: Final[Mapping[type, frozenset[str]]] = {
    stripe.checkout.Session: frozenset({"line_items", "presentment_details"}),
    stripe.PaymentIntent: frozenset({"presentment_details", "hooks"}),
    stripe.Charge: frozenset({"refunds", "level3", "presentment_details", "authorization_code", "transfer"}),
    stripe.Refund: frozenset({"instructions_email", "next_action", "presentment_details", "pending_reason"}),
    stripe.Customer: frozenset(
        {"sources", "subscriptions", "tax", "tax_ids", "cash_balance", "deleted", "invoice_credit_balance"}
    ),
    stripe.Event: frozenset({"account", "context", "reason"}),
}

PAYMENT_METHOD_FIELDS: Final = frozenset(
    {
        *("id", "object", "type", "allow_redisplay", "billing_details", "created", "customer", "customer_account"),
        *("livemode", "metadata"),
    }
)
"""What payment methods of every type have; each has the field named like its type besides."""


def shape(kind: type, **values: Any) -> Object:
    """An object of the SDK's class *kind* with these values, and null for whatever else Stripe sends of it."""
    fields = declared(kind) - NOT_SENT.get(kind, frozenset())
    unknown = values.keys() - declared(kind)
    assert not unknown, f"{kind.__name__} has no {unknown}"
    return dict.fromkeys(sorted(fields)) | values


def declared(kind: type) -> frozenset[str]:
    return frozenset(kind.__annotations__) - {"OBJECT_NAME"}


def new_id(prefix: str) -> str:
    return prefix + "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(24))


def address() -> Object:
    return shape(
        stripe.Customer.Address,
        city="San Francisco",
        country="US",
        line1=PERSON["line1"],
        postal_code=PERSON["postal_code"],
        state="CA",
    )


def customer(*, id: str, created: int, livemode: bool, metadata: Object, email: str | None, name: str | None) -> Object:
    return shape(
        stripe.Customer,
        id=id,
        object="customer",
        balance=0,
        created=created,
        delinquent=False,
        email=email,
        invoice_prefix=id[-8:].upper(),
        invoice_settings=shape(stripe.Customer.InvoiceSettings),
        livemode=livemode,
        metadata=metadata,
        name=name,
        next_invoice_sequence=1,
        preferred_locales=[],
        tax_exempt="none",
    )


def payment_method(*, id: str, created: int, livemode: bool, customer: str | None, type: str, last4: str) -> Object:
    details = _card(last4) if type == "card" else _bank_account(last4)
    return dict.fromkeys(PAYMENT_METHOD_FIELDS) | {
        "id": id,
        "object": "payment_method",
        "allow_redisplay": "unspecified",
        "billing_details": shape(
            stripe.PaymentMethod.BillingDetails,
            address=address(),
            email=PERSON["email"],
            name=PERSON["name"],
            phone=PERSON["phone"],
        ),
        type: details,
        "created": created,
        "customer": customer,
        "livemode": livemode,
        "metadata": {},
        "type": type,
    }


def _card(last4: str) -> Object:
    return shape(
        stripe.PaymentMethod.Card,
        brand="visa",
        checks=shape(stripe.PaymentMethod.Card.Checks, address_postal_code_check="pass", cvc_check="pass"),
        country="US",
        display_brand="visa",
        exp_month=4,
        exp_year=2044,
        fingerprint=FINGERPRINT,
        funding="credit",
        last4=last4,
        networks=shape(stripe.PaymentMethod.Card.Networks, available=["visa"]),
        regulated_status="unregulated",
        three_d_secure_usage=shape(stripe.PaymentMethod.Card.ThreeDSecureUsage, supported=True),
    )


def _bank_account(last4: str) -> Object:
    return shape(
        stripe.PaymentMethod.UsBankAccount,
        account_holder_type="individual",
        account_type="checking",
        bank_name="STRIPE TEST BANK",
        fingerprint=FINGERPRINT,
        last4=last4,
        routing_number="110000000",
    )


def session(
    *,
    id: str,
    created: int,
    livemode: bool,
    amount: int,
    currency: str,
    customer: str | None,
    params: Mapping[str, Any],
    url: str,
    expires_at: int,
) -> Object:
    """A hosted Checkout Session in the mode `payment`, as it is when nobody has paid."""
    kind = stripe.checkout.Session
    return shape(
        kind,
        id=id,
        object="checkout.session",
        adaptive_pricing=shape(kind.AdaptivePricing, enabled=True),
        amount_subtotal=amount,
        amount_total=amount,
        automatic_tax=shape(kind.AutomaticTax, enabled=False),
        branding_settings=shape(
            kind.BrandingSettings,
            background_color="#ffffff",
            border_style="rounded",
            button_color="#0074d4",
            display_name="Farebox",
            font_family="default",
        ),
        cancel_url=params.get("cancel_url"),
        client_reference_id=params.get("client_reference_id"),
        collected_information=shape(kind.CollectedInformation),
        created=created,
        currency=currency,
        custom_fields=[],
        custom_text=shape(kind.CustomText),
        customer=customer,
        customer_creation=None if customer else "if_required",
        customer_details=shape(kind.CustomerDetails, email=PERSON["email"], tax_exempt="none", tax_ids=[]),
        discounts=[],
        expires_at=expires_at,
        invoice_creation=shape(
            kind.InvoiceCreation,
            enabled=False,
            invoice_data=shape(kind.InvoiceCreation.InvoiceData, metadata={}),
        ),
        livemode=livemode,
        metadata=dict(params.get("metadata", {})),
        mode="payment",
        payment_method_collection="if_required",
        payment_method_options={"card": {"request_three_d_secure": "automatic"}},
        payment_method_types=["card"],
        payment_status="unpaid",
        phone_number_collection=shape(kind.PhoneNumberCollection, enabled=False),
        saved_payment_method_options=shape(
            kind.SavedPaymentMethodOptions,
            allow_redisplay_filters=["always"],
            payment_method_remove="disabled",
        ),
        shipping_options=[],
        status="open",
        success_url=params.get("success_url"),
        total_details=shape(kind.TotalDetails, amount_discount=0, amount_shipping=0, amount_tax=0),
        ui_mode="hosted_page",
        url=url,
        wallet_options=shape(kind.WalletOptions),
    )


def line_item(*, session_id: str, name: str, unit_amount: int, quantity: int, currency: str, created: int) -> Object:
    return shape(
        stripe.LineItem,
        id=f"li_{session_id[-20:]}",
        object="item",
        amount_discount=0,
        amount_subtotal=unit_amount * quantity,
        amount_tax=0,
        amount_total=unit_amount * quantity,
        currency=currency,
        description=name,
        price={
            **{"id": f"price_{session_id[-20:]}", "object": "price", "active": False, "created": created},
            **{"currency": currency, "type": "one_time", "unit_amount": unit_amount, "metadata": {}},
            **{"unit_amount_decimal": str(unit_amount), "product": f"prod_{session_id[-14:]}", "recurring": None},
        },
        quantity=quantity,
    )


def payment_intent(
    *,
    id: str,
    created: int,
    livemode: bool,
    amount: int,
    currency: str,
    customer: str | None,
    metadata: Object,
    description: str | None = None,
    setup_future_usage: str | None = None,
    automatic: bool = True,
) -> Object:
    """One that waits for a payment method."""
    kind = stripe.PaymentIntent
    return shape(
        kind,
        id=id,
        object="payment_intent",
        amount=amount,
        amount_capturable=0,
        amount_details=shape(kind.AmountDetails, tip={}),
        amount_received=0,
        automatic_payment_methods={"allow_redirects": "always", "enabled": True} if automatic else None,
        capture_method="automatic_async",
        client_secret=f"{id}_secret_{new_id('')}",
        confirmation_method="automatic",
        created=created,
        currency=currency,
        customer=customer,
        description=description,
        livemode=livemode,
        metadata=metadata,
        payment_method_options={"card": {"installments": None, "network": None, "request_three_d_secure": "automatic"}},
        payment_method_types=["card"],
        setup_future_usage=setup_future_usage,
        status="requires_payment_method",
    )


def deleted(object: str, id: str) -> Object:
    return {"id": id, "object": object, "deleted": True}


def listed(rows: Iterable[Object], *, url: str, has_more: bool = False) -> Object:
    return {"object": "list", "data": list(rows), "has_more": has_more, "url": url}


def event(
    type: str,
    subject: Object,
    *,
    created: int,
    livemode: bool,
    request: Object,
    previous: Object | None = None,
) -> Object:
    data = {"object": subject} | ({} if previous is None else {"previous_attributes": previous})
    return shape(
        stripe.Event,
        id=new_id("evt_1"),
        object="event",
        api_version=API_VERSION,
        created=created,
        data=data,
        livemode=livemode,
        pending_webhooks=1,
        request=request,
        type=type,
    )
