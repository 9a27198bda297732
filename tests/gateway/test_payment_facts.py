"""What is known of a payment: a join of facts, which no order and no repetition of events can change."""

import copy
from functools import reduce
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.payments.facts import NOTHING, Dispute, Facts, Money, Refund, Stage, target
from gateway.payments.observed import SELECTED, Observed, OrderRef, Unreadable, facts_of
from ledger.model import Scope
from tests.gateway.payment_histories import PRICE, Told, deliveries, histories, order, session_for
from tests.servers.stripe import only
from tests.servers.stripe_account import StripeAccount

MONEY = st.builds(Money, st.integers(0, 3), st.sampled_from(("usd", "eur")))
REFUNDS = st.builds(Refund, st.integers(0, 3), st.booleans())
DISPUTES = st.builds(
    Dispute,
    st.integers(0, 3),
    st.sampled_from(("usd", "eur")),
    st.sampled_from(Stage),
    st.dictionaries(st.sampled_from("ab"), st.integers(-3, 3)),
    *(st.booleans() for _ in range(4)),
)
WORDS = st.frozensets(st.sampled_from(("expired", "canceled", "card_declined")))
FACTS = st.builds(
    Facts,
    received=st.frozensets(MONEY),
    ended=WORDS,
    declined=WORDS,
    methods=WORDS,
    amount_refunded=st.integers(0, 3),
    refunds=st.dictionaries(st.sampled_from("ab"), REFUNDS),
    disputes=st.dictionaries(st.sampled_from("ab"), DISPUTES),
)


@given(FACTS, FACTS, FACTS)
def test_facts_join_in_any_order_and_any_grouping_and_as_often_as_one_likes(a: Facts, b: Facts, c: Facts):
    assert a.join(b) == b.join(a)
    assert a.join(b).join(c) == a.join(b.join(c))
    assert a.join(a) == a
    assert a.join(NOTHING) == a


@given(FACTS)
def test_facts_are_kept_as_json_without_loss(facts: Facts):
    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(facts))), Facts) == facts


def test_every_history_ends_as_it_happened_however_it_is_told():
    """Exhaustive: each history of up to six events, in each order, with each repetition up to six events."""
    ordered = order()
    tried = 0
    for history, end in histories():
        account = StripeAccount()
        told = [facts(event) for event in Told(account, session_for(account, ordered)).all(history)]
        # A join is a function of two values, so each pair that comes up is joined once.
        known: dict[bytes, Facts] = {b"": NOTHING}
        after: dict[tuple[bytes, int], bytes] = {}
        for delivery in deliveries(len(history)):
            state = b""
            for each in delivery:
                if (state, each) not in after:
                    joined = known[state].join(told[each])
                    name = msgspec.json.encode(joined, order="deterministic")
                    known[name] = joined
                    after[state, each] = name
                state = after[state, each]
            goal = target(ordered, known[state])
            found = (goal.credited, goal.failed is not None, goal.taken_minor, goal.frozen)
            assert found == (end.credited, end.failed, end.taken, end.frozen), (history, delivery)
            tried += 1
    assert tried > 600_000


def facts(event: dict[str, Any]) -> Facts:
    return observed(event).facts


def observed(event: dict[str, Any]) -> Observed:
    found = facts_of(event)
    assert found is not None
    return found


class Happening:
    """A payment of the order of `payment_histories`, and all that was told of it."""

    def __init__(self, **fields: Any) -> None:
        self.account = StripeAccount()
        self.order = order(**fields)
        self.session = session_for(self.account, self.order)

    def paid(self) -> "Happening":
        self.account.pay(self.session)
        return self

    @property
    def payment(self) -> str:
        return self.account.payment_of(self.session)

    def target(self) -> Any:
        """By all events that we select, the newest first."""
        told = [event for event in self.account.events if event["type"] in SELECTED]
        return target(self.order, reduce(Facts.join, map(facts, reversed(told)), NOTHING))


def test_a_refund_that_failed_after_all_takes_nothing():
    it = Happening().paid()
    refund = it.account.refund(it.payment, 400, status="pending")[0]["data"]["object"]["id"]
    assert it.target().taken_minor == 400
    it.account.refund(it.payment, 100)
    assert it.target().taken_minor == 500
    it.account.fail_refund(refund)
    assert it.target().taken_minor == 100


def test_a_refund_counts_once_whether_the_charge_or_the_refund_tells_of_it():
    it = Happening().paid()
    made, charge = it.account.refund(it.payment, 400)
    paid = facts(only(it.account.events, "checkout.session.completed"))
    for told in ([made], [charge], [made, charge]):
        known = reduce(Facts.join, map(facts, told), paid)
        assert target(it.order, known).taken_minor == 400


def test_an_inquiry_freezes_until_it_is_closed_and_takes_nothing():
    it = Happening().paid()
    dispute = it.account.dispute(it.payment, inquiry=True)[0]["data"]["object"]["id"]
    assert (it.target().frozen, it.target().taken_minor) == (True, 0)
    it.account.close_dispute(dispute, "warning_closed")
    assert (it.target().frozen, it.target().taken_minor) == (False, 0)


def test_an_inquiry_can_become_a_dispute_even_after_it_was_closed():
    it = Happening().paid()
    dispute = it.account.dispute(it.payment, inquiry=True)[0]["data"]["object"]["id"]
    it.account.close_dispute(dispute, "warning_closed")
    it.account.update_dispute(dispute, "needs_response")
    it.account.withdraw(dispute)
    assert (it.target().frozen, it.target().taken_minor) == (True, PRICE)


def test_what_was_lost_comes_back_when_an_appeal_is_won():
    it = Happening().paid()
    dispute = it.account.dispute(it.payment)[0]["data"]["object"]["id"]
    it.account.withdraw(dispute)
    it.account.close_dispute(dispute, "lost")
    it.account.update_dispute(dispute, "appeal_under_review")
    assert (it.target().frozen, it.target().taken_minor) == (False, PRICE)
    it.account.close_dispute(dispute, "won")
    assert (it.target().frozen, it.target().taken_minor) == (False, 0)


def test_a_refund_and_a_dispute_together_take_no_more_than_was_paid():
    it = Happening().paid()
    it.account.refund(it.payment, 400)
    dispute = it.account.dispute(it.payment)[0]["data"]["object"]["id"]
    it.account.withdraw(dispute)
    assert it.target().taken_minor == PRICE
    it.account.close_dispute(dispute, "won")
    assert it.target().taken_minor == 400


def test_a_dispute_of_a_part_takes_that_part():
    it = Happening().paid()
    it.account.withdraw(it.account.dispute(it.payment, 250)[0]["data"]["object"]["id"])
    assert it.target().taken_minor == 250


def test_of_a_dispute_that_is_lost_only_what_was_refunded_before_comes_back():
    """The cardholder disputed all, though a part was refunded: together no more is gone than was paid, and no less."""
    it = Happening().paid()
    it.account.refund(it.payment, 400)
    dispute = it.account.dispute(it.payment)[0]["data"]["object"]["id"]
    it.account.withdraw(dispute)
    it.account.close_dispute(dispute, "lost")
    it.account.reinstate(dispute, 400)
    assert it.target().taken_minor == PRICE


def test_what_came_back_and_was_withdrawn_once_more_is_gone():
    it = Happening().paid()
    dispute = it.account.dispute(it.payment, 250)[0]["data"]["object"]["id"]
    it.account.withdraw(dispute)
    it.account.close_dispute(dispute, "won")
    it.account.reinstate(dispute)
    assert it.target().taken_minor == 0
    it.account.withdraw(dispute)
    assert it.target().taken_minor == 250
    it.account.close_dispute(dispute, "lost")
    assert it.target().taken_minor == 250


def test_each_of_several_disputes_takes_its_part():
    it = Happening().paid()
    first, second = (it.account.dispute(it.payment, part)[0]["data"]["object"]["id"] for part in (250, 400))
    for dispute, taken in ((first, 250), (second, 650)):
        it.account.withdraw(dispute)
        assert (it.target().frozen, it.target().taken_minor) == (True, taken)
    it.account.close_dispute(first, "won")
    assert (it.target().frozen, it.target().taken_minor) == (True, 400)
    it.account.close_dispute(second, "lost")
    assert (it.target().frozen, it.target().taken_minor) == (False, 400)


def test_a_dispute_that_moves_another_currency_takes_as_much_of_its_amount_as_is_gone():
    """The balance is in euros; the payment and its dispute in dollars."""
    it = Happening().paid()
    event = copy.deepcopy(it.account.dispute(it.payment, 250)[0])
    paid = facts(only(it.account.events, "checkout.session.completed"))
    dispute = event["data"]["object"]
    for moved, status, taken in (
        ([-230], "needs_response", 250),
        ([-230, 92], "lost", 150),
        ([-230, 229], "won", 0),
    ):
        amounts = [{"id": f"txn_{at}", "amount": amount, "currency": "eur"} for at, amount in enumerate(moved)]
        dispute.update(status=status, balance_transactions=amounts)
        assert target(it.order, paid.join(facts(event))).taken_minor == taken


def test_a_dispute_in_another_currency_takes_all():
    it = Happening().paid()
    it.account.withdraw(it.account.dispute(it.payment, 250, currency="eur")[0]["data"]["object"]["id"])
    assert it.target().taken_minor == PRICE


def test_a_payment_that_was_made_in_the_end_is_no_failure():
    it = Happening()
    it.account.expire(it.session)
    assert it.target().failed == "expired"
    other = Happening()
    other.account.pay_later(other.session)
    assert (other.target().credited, other.target().failed) == (False, None)
    other.account.bounce(other.payment)
    assert other.target().failed == "async_payment_failed"
    paid = facts(only(Happening().paid().account.events, "payment_intent.succeeded"))
    late = facts(only(it.account.events, "checkout.session.expired")).join(paid)
    assert target(it.order, late).credited
    assert target(it.order, late).failed is None


def test_a_session_that_was_sent_off_and_whose_payment_came_back_has_failed():
    """So says who asks for it, where the event of that never came."""
    it = Happening()
    it.account.pay_later(it.session)
    for happens, ended in ((None, frozenset()), (it.account.bounce, frozenset({"async_payment_failed"}))):
        if happens is not None:
            happens(it.payment)
        asked = it.account.get(it.session) | {"payment_intent": it.account.get(it.payment)}
        assert facts(asked).ended == ended


@pytest.mark.parametrize(("kind", "failed"), [("checkout", None), ("auto", "generic_decline")])
def test_a_declined_attempt_ends_only_what_nobody_can_try_again(kind: str, failed: str | None):
    declined = {"object": "payment_intent", "id": "pi_1", "status": "requires_payment_method", "currency": "usd"}
    declined |= {
        "livemode": False,
        "metadata": {"farebox_order": "ord_1", "farebox_tenant": "t", "farebox_mode": "live"},
    }
    declined |= {"last_payment_error": {"code": "card_declined", "decline_code": "generic_decline"}}
    assert target(order(kind=kind), facts(declined)).failed == failed


@pytest.mark.parametrize("wrong", [{"price_minor": 999}, {"price_minor": 1001}, {"currency": "eur"}])
def test_another_amount_or_currency_than_the_orders_is_no_payment(wrong: dict[str, Any]):
    it = Happening().paid()
    told = [event for event in it.account.events if event["type"] in SELECTED]
    goal = target(order(**wrong), reduce(Facts.join, map(facts, told), NOTHING))
    assert (goal.credited, goal.failed) == (False, None)


def test_an_unpaid_session_is_no_payment():
    it = Happening()
    it.account.pay_later(it.session)
    assert not it.target().credited
    free = copy.deepcopy(only(it.account.events, "checkout.session.completed"))
    free["data"]["object"]["payment_status"] = "no_payment_required"
    assert not target(it.order, facts(free)).credited


def test_what_is_only_set_aside_on_a_card_is_no_payment():
    it = Happening().paid()
    charge = it.account.all("charge")[0]
    assert facts(charge).received == {Money(PRICE, "usd")}
    assert facts(charge | {"captured": False, "amount_captured": 0}).received == frozenset()
    assert facts(charge | {"status": "pending"}).received == frozenset()


def test_the_order_is_named_by_metadata_and_never_by_a_reference_that_anybody_can_write():
    it = Happening().paid()
    event = copy.deepcopy(only(it.account.events, "checkout.session.completed"))
    assert observed(event).order == OrderRef(Scope("ten_1", "live"), "ord_1")
    assert observed(event).payment_intent == it.payment
    event["data"]["object"].update(metadata={}, client_reference_id="ord_1")
    assert facts_of(event) is None


def test_a_method_is_kept_only_where_the_payment_was_made_with_that():
    it = Happening().paid()
    event = copy.deepcopy(only(it.account.events, "payment_intent.succeeded"))
    assert facts(event).methods == frozenset()
    event["data"]["object"]["setup_future_usage"] = "off_session"
    assert facts(event).methods == {event["data"]["object"]["payment_method"]}


def test_what_was_asked_for_says_the_same_as_an_event_and_has_a_name_of_its_own():
    it = Happening().paid()
    session = it.account.get(it.session)
    asked, told = observed(session), observed(only(it.account.events, "checkout.session.completed"))
    assert asked.facts == told.facts
    assert asked.id == observed(session).id != told.id
    assert asked.id.startswith(f"seen:{it.session}:")
    expanded = session | {"payment_intent": it.account.get(it.payment)}
    assert observed(expanded).facts.ended == frozenset()
    assert observed(expanded).payment_intent == it.payment


def test_objects_that_were_asked_for_tell_of_refunds_and_disputes():
    it = Happening().paid()
    it.account.refund(it.payment, 100)
    dispute = it.account.dispute(it.payment)[0]["data"]["object"]["id"]
    it.account.withdraw(dispute)
    paid = facts(it.account.get(it.payment))
    refunds = [facts(each) for each in it.account.all("refund")]
    assert target(it.order, reduce(Facts.join, refunds, paid)).taken_minor == 100
    disputed = paid.join(facts(it.account.get(dispute)))
    assert target(it.order, disputed).taken_minor == PRICE
    it.account.reinstate(dispute)
    assert target(it.order, disputed.join(facts(it.account.get(dispute)))).taken_minor == 0
    charge = it.account.all("charge")[0]
    assert target(it.order, facts(charge)).taken_minor == 100


def test_null_and_absent_fields_are_the_same_and_unknown_ones_are_passed_over():
    it = Happening().paid()
    it.account.refund(it.payment, 100)
    it.account.close_dispute(it.account.dispute(it.payment)[0]["data"]["object"]["id"], "won")
    for event in it.account.events:
        if event["type"] not in SELECTED:
            continue
        lean = copy.deepcopy(event)
        lean["data"]["object"] = {name: value for name, value in event["data"]["object"].items() if value is not None}
        lean["data"]["object"]["new_in_2030"] = {"a": [1]}
        assert observed(lean) == observed(event)


def test_events_of_other_kinds_and_of_others_payments_say_nothing():
    it = Happening().paid()
    others = [event for event in it.account.events if event["type"] not in SELECTED]
    assert {event["type"] for event in others} >= {"payment_intent.created", "charge.succeeded"}
    assert facts_of(only(others, "payment_intent.created")) is None
    assert facts_of({"object": "v2.core.event", "id": "evt_1", "type": "v1.billing.meter.error"}) is None
    foreign = copy.deepcopy(only(it.account.events, "payment_intent.succeeded"))
    foreign["data"]["object"]["metadata"] = {"order": "of a shop"}
    assert facts_of(foreign) is None


@pytest.mark.parametrize(
    ("type", "field", "value"),
    [
        ("checkout.session.completed", "amount_total", None),
        ("checkout.session.completed", "amount_total", "1000"),
        ("checkout.session.completed", "object", "bank_account"),
        ("payment_intent.succeeded", "amount_received", 10.5),
        ("payment_intent.succeeded", "status", None),
        ("charge.refunded", "amount_refunded", "all"),
        ("charge.dispute.created", "amount", None),
    ],
)
def test_a_shape_that_cannot_be_read_is_not_guessed_at(type: str, field: str, value: Any):
    it = Happening().paid()
    it.account.refund(it.payment, 100)
    it.account.dispute(it.payment)
    event = copy.deepcopy(only(it.account.events, type))
    event["data"]["object"][field] = value
    with pytest.raises(Unreadable):
        facts_of(event)


def test_a_dispute_that_was_prevented_freezes_nothing():
    it = Happening().paid()
    dispute = it.account.dispute(it.payment)[0]["data"]["object"]["id"]
    it.account.update_dispute(dispute, "prevented")
    assert not it.target().frozen


def test_who_appeals_has_lost_until_the_appeal_is_won():
    it = Happening().paid()
    dispute = it.account.dispute(it.payment)[0]["data"]["object"]["id"]
    for status in ("appeal_needs_response", "appeal_under_review"):
        it.account.update_dispute(dispute, status)
        seen = facts(it.account.get(it.payment)).join(facts(it.account.get(dispute)))
        goal = target(it.order, seen)
        assert (goal.taken_minor, goal.frozen) == (PRICE, False)
    it.account.close_dispute(dispute, "won")
    assert target(it.order, seen.join(facts(it.account.get(dispute)))).taken_minor == 0


def test_a_status_that_is_new_is_an_open_dispute_until_it_is_closed():
    it = Happening().paid()
    dispute = it.account.dispute(it.payment)[0]["data"]["object"]["id"]
    it.account.update_dispute(dispute, "in_arbitration_on_mars")
    assert it.target().frozen
    it.account.close_dispute(dispute, "settled_on_mars")
    assert not it.target().frozen
