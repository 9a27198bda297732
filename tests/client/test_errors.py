"""Each code is an exception of its own class, with the facts that it carries."""

from datetime import UTC, datetime
from decimal import Decimal

import pytest

import farebox
from farebox.errors import CLASSES, refusal
from gateway.errors import KINDS, budget_exceeded, insufficient_credits, reservation_settled, version_mismatch
from pricing.money import CREDIT


def test_every_code_has_a_class():
    assert CLASSES.keys() == KINDS.keys()


@pytest.mark.parametrize("code", sorted(CLASSES))
def test_a_code_is_told_with_all_that_the_answer_says(code: str):
    error = refusal(
        KINDS[code].status, {"message": "No.", "code": code, "param": "units", "request_id": "req_1", "fact": 1}
    )
    assert type(error) is CLASSES[code]
    assert (error.status, error.code, error.param, error.request_id) == (KINDS[code].status, code, "units", "req_1")
    assert error.facts == {"fact": 1}
    assert str(error) == "No. (req_1)"


def test_a_code_of_tomorrow_is_told_by_its_status():
    assert type(refusal(418, {"message": "No.", "code": "teapot"})) is farebox.FareboxError
    assert type(refusal(507, {"message": "No.", "code": "full"})) is farebox.ServerError


def test_a_lack_of_credits_says_how_much_is_needed():
    ours = insufficient_credits(
        needed=CREDIT.parse("1.0005"), available=CREDIT.parse("0.5"), asset=CREDIT, top_up_url="https://example.com"
    )
    error = refusal(402, {**ours.inner, **ours.facts})
    assert isinstance(error, farebox.InsufficientCredits)
    assert (error.needed, error.available) == (Decimal("1.0005"), Decimal("0.5"))
    assert error.needed is not None
    assert error.needed.millicredits == 1000
    assert error.top_up_url == "https://example.com"


def test_a_lack_whose_amounts_are_not_the_callers_to_know():
    error = refusal(402, {"message": "No.", "code": "insufficient_credits"})
    assert isinstance(error, farebox.InsufficientCredits)
    assert (error.needed, error.available, error.top_up_url) == (None, None, None)


def test_a_budget_says_when_there_is_more():
    ours = budget_exceeded(
        "bud_1", needed=CREDIT.parse("2"), available=0, asset=CREDIT, resets_at="2026-05-01T00:00:00Z"
    )
    error = refusal(402, {**ours.inner, **ours.facts})
    assert isinstance(error, farebox.BudgetExceeded)
    assert (error.budget, error.needed, error.available) == ("bud_1", 2, 0)
    assert error.resets_at == datetime(2026, 5, 1, tzinfo=UTC)


def test_facts_of_conflicts():
    settled = refusal(409, {"message": "No.", "code": "reservation_settled", **reservation_settled("released").facts})
    assert isinstance(settled, farebox.ReservationSettled)
    assert settled.state == "released"
    changed = refusal(412, {"message": "No.", "code": "version_mismatch", **version_mismatch(3).facts})
    assert isinstance(changed, farebox.VersionMismatch)
    assert changed.version == 3
