"""When a wallet is topped up by itself: every decision, the months of a cap, and the pauses after failures."""

from datetime import UTC, datetime
from typing import Any, Final

import pytest

from gateway.payments.auto_top_up_terms import (
    BACK_OFF_US,
    DEFAULT_CAP_PACKAGES,
    FINAL_FAILURES,
    HOUR_US,
    LOOK_AGAIN_US,
    Agreement,
    Decision,
    Standing,
    TermsInvalid,
    agreement_of,
    check_terms,
    decide,
    month_of,
    next_attempt_us,
    stopped,
)
from gateway.payments.packages import Packages
from gateway.settings import DEFAULT_PACKAGES, PackageSettings
from pricing.money import CREDIT, Asset

PACKAGES: Final = Packages(DEFAULT_PACKAGES)
AGREED: Final = {"auto_topup_enabled": True, "auto_topup_threshold": 200_000, "auto_topup_package": "usd-10"}


def at_us(text: str) -> int:
    at = datetime.fromisoformat(text).replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    return (at.days * 86_400 + at.seconds) * 1_000_000 + at.microseconds


NOW_US: Final = at_us("2026-03-14T09:00:00")
APRIL_US: Final = at_us("2026-04-01T00:00:00")
SOON: Final = NOW_US + LOOK_AGAIN_US


def agreed(**settings: Any) -> Agreement:
    agreement = agreement_of(AGREED | settings, PACKAGES, CREDIT)
    assert agreement is not None
    return agreement


def standing(**differs: Any) -> Standing:
    """Of a wallet that is to be topped up."""
    due = {"balance": 0, "frozen": False, "spent_minor": 0, "has_method": True, "failures": 0, "last_failure": None}
    return Standing(**(due | differs))


THRESHOLD: Final = agreed().threshold


@pytest.mark.parametrize(
    ("differs", "decision"),
    [
        ({}, Decision("due")),
        ({"balance": THRESHOLD - 1}, Decision("due")),
        ({"balance": -5}, Decision("due")),
        ({"balance": THRESHOLD}, Decision("not_needed", SOON)),
        ({"has_method": False}, Decision("no_payment_method", SOON)),
        ({"has_method": False, "balance": THRESHOLD}, Decision("not_needed", SOON)),
        ({"frozen": True}, Decision("not_needed", SOON)),
        ({"spent_minor": 9_000}, Decision("due")),
        ({"spent_minor": 9_001}, Decision("monthly_cap", APRIL_US)),
        ({"failures": 1, "last_failure": "insufficient_funds"}, Decision("due")),
        ({"failures": 4, "last_failure": "insufficient_funds"}, Decision("due")),
        ({"failures": 5, "last_failure": "insufficient_funds"}, Decision("stopped")),
        ({"failures": 1, "last_failure": "authentication_required"}, Decision("stopped")),
        ({"failures": 1, "last_failure": "stolen_card"}, Decision("stopped")),
    ],
    ids=str,
)
def test_what_is_decided(differs: dict[str, Any], decision: Decision):
    assert decide(agreed(), standing(**differs), NOW_US) == decision


def test_nothing_is_bought_for_who_has_not_agreed():
    assert decide(None, standing(), NOW_US) == Decision("off")


@pytest.mark.parametrize(
    "settings",
    [
        {"auto_topup_enabled": False},
        {"auto_topup_threshold": None},
        {"auto_topup_package": None},
        {"auto_topup_package": "no longer sold"},
    ],
)
def test_half_an_agreement_is_none(settings: dict[str, Any]):
    assert agreement_of(AGREED | settings, PACKAGES, CREDIT) is None


def test_a_package_that_brings_nothing_is_not_bought():
    gold = Asset(code="gold", scale=0, usd_value_picos=1_000 * 10**12)
    assert agreement_of(AGREED | {"auto_topup_threshold": 1_000}, PACKAGES, gold) is None


def test_a_cap_of_ones_own_and_the_default():
    assert agreed().cap_minor == DEFAULT_CAP_PACKAGES * 1_000
    assert agreed(auto_topup_monthly_cap=2_500).cap_minor == 2_500


@pytest.mark.parametrize(
    ("spent", "decision"), [(1_500, "due"), (1_501, "monthly_cap")], ids=["just fits", "a cent too much"]
)
def test_a_cap_is_respected_to_the_cent(spent: int, decision: str):
    assert decide(agreed(auto_topup_monthly_cap=2_500), standing(spent_minor=spent), NOW_US).reason == decision


@pytest.mark.parametrize(
    ("at", "begins", "ends"),
    [
        ("2026-01-29T12:00:00", "2026-01-01", "2026-02-01"),
        ("2026-01-30T12:00:00", "2026-01-01", "2026-02-01"),
        ("2026-01-31T23:59:59.999999", "2026-01-01", "2026-02-01"),
        ("2026-02-01T00:00:00", "2026-02-01", "2026-03-01"),
        ("2026-02-28T23:59:59.999999", "2026-02-01", "2026-03-01"),
        ("2028-02-29T23:59:59.999999", "2028-02-01", "2028-03-01"),
        ("2028-03-01T00:00:00", "2028-03-01", "2028-04-01"),
        ("2026-12-31T23:59:59.999999", "2026-12-01", "2027-01-01"),
        ("2027-01-01T00:00:00", "2027-01-01", "2027-02-01"),
    ],
)
def test_the_month_of_a_cap_is_the_calendars(at: str, begins: str, ends: str):
    assert month_of(at_us(at)) == (at_us(begins), at_us(ends))


@pytest.mark.parametrize(("failures", "hours"), [(1, 1), (2, 6), (3, 24), (4, 72)])
def test_each_failure_makes_the_next_pause_longer(failures: int, hours: int):
    pauses = {next_attempt_us(f"ord_{number}", failures, "card_declined", NOW_US) or 0 for number in range(200)}
    assert len(pauses) > 10, "they do not all come at once"
    assert min(pauses) >= NOW_US + hours * HOUR_US * 9 // 10
    assert max(pauses) <= NOW_US + hours * HOUR_US * 11 // 10


def test_a_pause_is_always_the_same_for_one_order():
    first, again = (next_attempt_us("ord_1", 2, None, NOW_US) for _ in range(2))
    assert first == again


def test_after_the_last_pause_nothing_is_tried_any_more():
    assert next_attempt_us("ord_1", len(BACK_OFF_US) + 1, "card_declined", NOW_US) is None
    assert stopped(len(BACK_OFF_US) + 1, "card_declined")
    assert not stopped(len(BACK_OFF_US), "card_declined")


@pytest.mark.parametrize("failure", sorted(FINAL_FAILURES))
def test_what_only_the_customer_can_mend_is_not_tried_again(failure: str):
    assert next_attempt_us("ord_1", 1, failure, NOW_US) is None
    assert stopped(1, failure)
    assert not stopped(0, failure), "it was forgiven"


YEN: Final = Packages([PackageSettings(id="yen", price="1000", currency="jpy", worth="6.50"), *DEFAULT_PACKAGES])


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        (AGREED, None),
        (AGREED | {"auto_topup_monthly_cap": 1_000}, None),
        (AGREED | {"auto_topup_monthly_cap": 999}, "auto_topup_monthly_cap"),
        (AGREED | {"auto_topup_package": "yen", "auto_topup_monthly_cap": 1_000}, None),
        (AGREED | {"auto_topup_package": "yen", "auto_topup_monthly_cap": 999}, "auto_topup_monthly_cap"),
        (AGREED | {"auto_topup_package": "usd-11"}, "auto_topup_package"),
        (AGREED | {"auto_topup_package": None}, "auto_topup_package"),
        (AGREED | {"auto_topup_threshold": None}, "auto_topup_threshold"),
        ({"auto_topup_enabled": True}, "auto_topup_threshold"),
        ({"auto_topup_enabled": False}, None),
        ({"auto_topup_threshold": 5}, None),
        ({}, None),
    ],
    ids=str,
)
def test_what_can_be_agreed_to(settings: dict[str, Any], wrong: str | None):
    if wrong is None:
        check_terms(settings, YEN, CREDIT, sent=set(settings))
        return
    with pytest.raises(TermsInvalid) as refused:
        check_terms(settings, YEN, CREDIT, sent=set(settings))
    assert refused.value.setting == wrong


def test_a_package_that_is_sold_no_more_does_not_stand_in_the_way_of_switching_off():
    check_terms(
        AGREED | {"auto_topup_package": "gone", "auto_topup_enabled": False},
        PACKAGES,
        CREDIT,
        sent={"auto_topup_enabled"},
    )
