"""Amounts are exact, both ways; a float is refused."""

from datetime import UTC, datetime
from decimal import Decimal, localcontext
from typing import Any

import pytest

from farebox import Block, Credits, calls
from farebox.credits import millis, text
from farebox.reading import reader


@pytest.mark.parametrize(
    ("amount", "expected"),
    [(5, 5000), ("0.5", 500), (Decimal("0.001"), 1), ("1E+2", 100_000), (10**30, 10**33), ("2.500000", 2500), (0, 0)],
)
def test_credits_are_sent_as_millicredits(amount: Any, expected: int):
    assert millis(amount, name="credits") == expected


@pytest.mark.parametrize("amount", [0.5, 5.0, True, None, b"1", [1]])
def test_a_float_is_no_amount(amount: Any):
    with pytest.raises(TypeError, match="credits must be an int, a str or a Decimal"):
        millis(amount, name="credits")


@pytest.mark.parametrize("amount", ["", "five", "NaN", "Infinity", "-1", -1, "0.0001", "1E+999999", "1E-999999"])
def test_what_is_no_amount_is_refused(amount: Any):
    with pytest.raises(ValueError, match="credits"):
        millis(amount, name="credits")


@pytest.mark.parametrize(
    ("amount", "expected"), [(1, "1"), ("1.0000000", "1"), ("1E+3", "1000"), ("0.000001", "0.000001"), ("0.0", "0")]
)
def test_units_are_sent_in_plain_digits(amount: Any, expected: str):
    assert text(amount, name="units") == expected


def test_millicredits_are_rounded_down_whatever_the_context():
    with localcontext(prec=3):
        assert Credits("123456789.9999").millicredits == 123456789999
        assert Credits("-0.0005").millicredits == -1


def test_an_amount_is_given_once():
    with pytest.raises(ValueError, match="give the amount once"):
        calls.grant("alice", credits=1, millicredits=1000)
    with pytest.raises(ValueError, match="give the amount: credits or millicredits"):
        calls.grant("alice")
    with pytest.raises(ValueError, match="give the amount once"):
        calls.refund("req_1", credits=1, millicredits=1000)
    with pytest.raises(TypeError, match="millicredits must be an int"):
        calls.grant("alice", millicredits=True)


def test_a_time_has_its_zone():
    with pytest.raises(ValueError, match="time zone"):
        calls.grant("alice", credits=1, expires_at=datetime(2036, 1, 1))


BLOCK: dict[str, Any] = {
    "id": "blk_1",
    "customer_id": "cus_1",
    "granted_amount": 1,
    "granted_amount_decimal": "0.001999999",
    "remaining_amount_decimal": "0",
    "priority": 10,
    "source": "topup",
    "funding": "external",
    "created_at": "2026-04-13T11:00:00.000001Z",
    "expires_at": None,
    "restrictions": {"apps": ["app_1"], "of_tomorrow": 1},
    "metadata": {"weight": 0.5},
    "of_tomorrow": 1,
}


def test_an_answer_is_read_exactly_and_what_is_new_in_it_is_passed_over():
    block = reader(Block)(BLOCK)
    assert block.granted_amount == Decimal("0.001999999")
    assert block.granted_amount.millicredits == 1
    assert block.created_at == datetime(2026, 4, 13, 11, 0, 0, 1, tzinfo=UTC)
    assert block.restrictions.apps == ("app_1",)
    assert block.metadata == {"weight": 0.5}
    with pytest.raises(AttributeError):
        block.priority = 0  # type: ignore[misc]


@pytest.mark.parametrize("name", ["id", "granted_amount_decimal", "restrictions", "expires_at"])
def test_an_answer_that_lacks_something_is_not_read(name: str):
    with pytest.raises(KeyError):
        reader(Block)({field: value for field, value in BLOCK.items() if field != name})


@pytest.mark.parametrize(
    ("name", "value"), [("id", 7), ("priority", True), ("granted_amount_decimal", 0.5), ("created_at", 1)]
)
def test_an_answer_of_another_type_is_not_read(name: str, value: Any):
    with pytest.raises(TypeError):
        reader(Block)({**BLOCK, name: value})
