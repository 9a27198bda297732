"""What Stripe's API tells of money that moved: charges, refunds, disputes and balance transactions, in full shape."""

from typing import Any, Final

import stripe

from tests.servers.stripe_objects import PERSON, Object, address, new_id, shape

FEE_BPS: Final = 290
FEE_FIXED_MINOR: Final = 30
DISPUTE_FEE_MINOR: Final = 1500
EVIDENCE_S: Final = 7 * 24 * 3600
AVAILABLE_S: Final = 2 * 24 * 3600


def fee_of(amount: int) -> int:
    """2.9 % and thirty cents, rounded to the nearest cent."""
    return (amount * FEE_BPS + 5_000) // 10_000 + FEE_FIXED_MINOR


def charge(*, id: str, created: int, payment_intent: Object, payment_method: Object, status: str) -> Object:
    """*status*: succeeded, pending or failed. It has no balance transaction yet."""
    kind = stripe.Charge
    amount = payment_intent["amount"]
    billing = payment_method["billing_details"]
    return shape(
        kind,
        id=id,
        object="charge",
        amount=amount,
        amount_captured=amount if status == "succeeded" else 0,
        amount_refunded=0,
        billing_details=shape(kind.BillingDetails, **billing),
        calculated_statement_descriptor="FAREBOX",
        captured=status == "succeeded",
        created=created,
        currency=payment_intent["currency"],
        customer=payment_intent["customer"],
        description=payment_intent["description"],
        disputed=False,
        fraud_details={},
        livemode=payment_intent["livemode"],
        metadata=dict(payment_intent["metadata"]),
        outcome=_outcome(status),
        paid=status != "failed",
        payment_intent=payment_intent["id"],
        payment_method=payment_method["id"],
        payment_method_details=_details(payment_method, amount),
        radar_options=shape(kind.RadarOptions),
        receipt_url=f"https://pay.stripe.com/receipts/payment/{id}",
        refunded=False,
        status=status,
    )


def _outcome(status: str) -> Object:
    failed = status == "failed"
    return shape(
        stripe.Charge.Outcome,
        network_status="declined_by_network" if failed else "approved_by_network",
        reason="generic_decline" if failed else None,
        risk_level="normal",
        risk_score=17,
        seller_message="The bank did not return any further details." if failed else "Payment complete.",
        type="issuer_declined" if failed else "authorized",
    )


def _details(method: Object, amount: int) -> Object:
    kind = stripe.Charge.PaymentMethodDetails
    if method["type"] != "card":
        bank = method["us_bank_account"]
        shared = {name: bank[name] for name in ("account_type", "bank_name", "fingerprint", "last4", "routing_number")}
        return {"type": "us_bank_account", "us_bank_account": shape(kind.UsBankAccount, **shared)}
    card = method["card"]
    shared = {
        name: card[name] for name in ("brand", "country", "exp_month", "exp_year", "fingerprint", "funding", "last4")
    }
    return {
        "type": "card",
        "card": shape(
            kind.Card,
            **shared,
            amount_authorized=amount,
            authorization_code="123456",
            checks=shape(kind.Card.Checks, address_postal_code_check="pass", cvc_check="pass"),
            extended_authorization={"status": "disabled"},
            incremental_authorization={"status": "unavailable"},
            multicapture={"status": "unavailable"},
            network="visa",
            network_token={"used": False},
            network_transaction_id="104102978678771",
            overcapture={"maximum_amount_capturable": amount, "status": "unavailable"},
            regulated_status="unregulated",
        ),
    }


def refund(
    *, id: str, created: int, charge: Object, amount: int, status: str, reason: str | None, metadata: Object
) -> Object:
    """*status*: succeeded, pending or requires_action."""
    kind = stripe.Refund
    return shape(
        kind,
        id=id,
        object="refund",
        amount=amount,
        charge=charge["id"],
        created=created,
        currency=charge["currency"],
        destination_details={
            "type": "card",
            "card": shape(
                kind.DestinationDetails.Card,
                reference_status="pending",
                reference_type="acquirer_reference_number",
                type="refund",
            ),
        },
        metadata=metadata,
        payment_intent=charge["payment_intent"],
        reason=reason,
        status=status,
    )


def dispute(*, id: str, created: int, charge: Object, amount: int, currency: str, reason: str, inquiry: bool) -> Object:
    """One that was just opened: nothing is withdrawn yet."""
    kind = stripe.Dispute
    evidence = shape(
        kind.Evidence,
        billing_address="\n".join(filter(None, address().values())),
        customer_email_address=PERSON["email"],
        customer_name=PERSON["name"],
        enhanced_evidence={},
    )
    return shape(
        kind,
        id=id,
        object="dispute",
        amount=amount,
        balance_transactions=[],
        charge=charge["id"],
        created=created,
        currency=currency,
        enhanced_eligibility_types=[],
        evidence=evidence,
        evidence_details=shape(
            kind.EvidenceDetails,
            due_by=created + EVIDENCE_S,
            enhanced_eligibility={},
            has_evidence=False,
            past_due=False,
            submission_count=0,
            submission_method="manual",
        ),
        is_charge_refundable=inquiry,
        livemode=charge["livemode"],
        metadata={},
        network_reason_code="10.4" if reason == "fraudulent" else "13.1",
        payment_intent=charge["payment_intent"],
        payment_method_details={
            "type": "card",
            "card": shape(
                kind.PaymentMethodDetails.Card,
                brand="visa",
                case_type="inquiry" if inquiry else "chargeback",
                network="visa",
                network_reason_code="10.4",
            ),
        },
        reason=reason,
        status="warning_needs_response" if inquiry else "needs_response",
    )


def balance_transaction(
    *,
    type: str,
    category: str,
    amount: int,
    fee: int,
    currency: str,
    source: str,
    created: int,
    description: str | None,
) -> Object:
    """Money that came (*amount* above zero) or went. *fee* is what Stripe keeps of it."""
    kind = stripe.BalanceTransaction
    details: list[dict[str, Any]] = []
    if fee:
        details = [
            shape(
                kind.FeeDetail,
                amount=fee,
                currency=currency,
                description="Dispute fee" if type == "adjustment" else "Stripe processing fees",
                type="stripe_fee",
            )
        ]
    return shape(
        kind,
        id=new_id("txn_3"),
        object="balance_transaction",
        amount=amount,
        available_on=created + AVAILABLE_S,
        balance_type="payments",
        created=created,
        currency=currency,
        description=description,
        fee=fee,
        fee_details=details,
        net=amount - fee,
        reporting_category=category,
        source=source,
        status="pending",
        type=type,
    )
