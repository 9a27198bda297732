"""A Stripe account: its objects, what happens to them, and the events that tell of it.

How it works: the account keeps every object by its id, as it is now. What happens changes them, books what moves money,
and returns the events that Stripe would send, each with a copy of its object at that moment. Nothing is delivered by
itself: a test hands events over in the order that it likes. One lock makes each of these whole.
"""

from collections.abc import Mapping

from tests.servers import stripe_movements as movements
from tests.servers.stripe_objects import Object, new_id
from tests.servers.stripe_payments import StripePayments
from tests.servers.stripe_store import Events, alone


class StripeAccount(StripePayments):
    """What may become of a payment after it succeeded: refunds and disputes."""

    @alone
    def refund(
        self,
        payment_id: str,
        amount: int | None = None,
        *,
        status: str = "succeeded",
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Events:
        """Give *amount* back, or what is left; the first event has the refund itself."""
        charge = self._objects[self._objects[payment_id]["latest_charge"]]
        amount = charge["amount"] - charge["amount_refunded"] if amount is None else amount
        refund = self._new(
            movements.refund(
                id=new_id("re_3"),
                created=self.now_s(),
                charge=charge,
                amount=amount,
                status=status,
                reason=reason,
                metadata=dict(metadata or {}),
            )
        )
        self._change_refunded(charge, amount)
        refund["balance_transaction"] = self._move("refund", -amount, refund, charge)
        return [
            self._event("refund.created", refund),
            self._event("charge.refunded", charge, previous={"amount_refunded": charge["amount_refunded"] - amount}),
        ]

    @alone
    def complete_refund(self, refund_id: str) -> Events:
        """A pending refund has reached the customer."""
        refund = self._objects[refund_id]
        before, refund["status"] = refund["status"], "succeeded"
        return [
            self._event(type, refund, previous={"status": before})
            for type in ("refund.updated", "charge.refund.updated")
        ]

    @alone
    def fail_refund(self, refund_id: str) -> Events:
        """The bank sends the refund back: the money is on Stripe's balance again."""
        refund = self._objects[refund_id]
        charge = self._objects[refund["charge"]]
        before = refund["status"]
        self._change_refunded(charge, -refund["amount"])
        refund.update(
            status="failed",
            failure_reason="lost_or_stolen_card",
            failure_balance_transaction=self._move("refund_failure", refund["amount"], refund, charge),
        )
        types = ("refund.failed", "refund.updated", "charge.refund.updated")
        previous = {"status": before, "failure_balance_transaction": None, "failure_reason": None}
        return [self._event(type, refund, previous=previous) for type in types]

    @alone
    def dispute(
        self,
        payment_id: str,
        amount: int | None = None,
        reason: str = "fraudulent",
        *,
        currency: str | None = None,
        inquiry: bool = False,
    ) -> Events:
        """The cardholder disputes *amount*, or all of it. Nothing is withdrawn before `withdraw`."""
        charge = self._objects[self._objects[payment_id]["latest_charge"]]
        charge["disputed"] = True
        dispute = self._new(
            movements.dispute(
                id=new_id("du_1"),
                created=self.now_s(),
                charge=charge,
                amount=charge["amount"] if amount is None else amount,
                currency=currency or charge["currency"],
                reason=reason,
                inquiry=inquiry,
            )
        )
        return [self._event("charge.dispute.created", dispute)]

    @alone
    def update_dispute(self, dispute_id: str, status: str = "under_review") -> Events:
        """Evidence was handed in, or an inquiry became a dispute."""
        dispute = self._objects[dispute_id]
        before, dispute["status"] = dispute["status"], status
        dispute["evidence_details"].update(has_evidence=True, submission_count=1)
        return [self._event("charge.dispute.updated", dispute, previous={"status": before})]

    @alone
    def withdraw(self, dispute_id: str) -> Events:
        """Stripe takes the disputed amount and its fee from the balance."""
        dispute = self._objects[dispute_id]
        self._adjust(dispute, "dispute", -dispute["amount"], fee=movements.DISPUTE_FEE_MINOR)
        return [self._event("charge.dispute.funds_withdrawn", dispute)]

    @alone
    def reinstate(self, dispute_id: str, amount: int | None = None) -> Events:
        """Stripe puts *amount*, or all that was disputed, back; its fee stays paid."""
        dispute = self._objects[dispute_id]
        self._adjust(dispute, "dispute_reversal", dispute["amount"] if amount is None else amount, fee=0)
        return [self._event("charge.dispute.funds_reinstated", dispute)]

    @alone
    def close_dispute(self, dispute_id: str, status: str) -> Events:
        """*status*: won, lost or warning_closed. What moves money is for `withdraw` and `reinstate`."""
        dispute = self._objects[dispute_id]
        before, dispute["status"] = dispute["status"], status
        dispute["is_charge_refundable"] = status == "warning_closed"
        return [self._event("charge.dispute.closed", dispute, previous={"status": before})]

    def _change_refunded(self, charge: Object, by: int) -> None:
        charge["amount_refunded"] += by
        charge["refunded"] = charge["amount_refunded"] == charge["amount"]
