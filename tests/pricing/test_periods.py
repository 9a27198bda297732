"""Periods of the calendar: days that do not exist, midnights that come twice or never, the 31st of a short month."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pricing.periods import AT_US_MAX, AT_US_MIN, Period, Recurrence, next_period, period_at

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
HOUR_US = 3600 * 1_000_000
ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/St_Johns",
    "Asia/Kathmandu",
    "Pacific/Apia",
    "Africa/Cairo",
    "America/Sao_Paulo",
    "Asia/Beirut",
    "Australia/Lord_Howe",
    "Pacific/Kiritimati",
)


def us(text: str) -> int:
    """A time such as `2026-03-29T00:00+01:00`; UTC where it names no offset."""
    at = datetime.fromisoformat(text)
    return ((at if at.tzinfo else at.replace(tzinfo=UTC)) - EPOCH) // timedelta(microseconds=1)


def text(at_us: int | None) -> str | None:
    return None if at_us is None else (EPOCH + timedelta(microseconds=at_us)).strftime("%Y-%m-%dT%H:%M")


def shown(period: Period) -> tuple[str | None, str | None]:
    return text(period.start_us), text(period.end_us)


@pytest.mark.parametrize(
    ("unit", "more", "at", "start", "end"),
    [
        ("day", {}, "2026-05-17T13:00", "2026-05-17T00:00", "2026-05-18T00:00"),
        ("day", {}, "2026-05-17T00:00", "2026-05-17T00:00", "2026-05-18T00:00"),
        ("week", {}, "2026-05-17T13:00", "2026-05-11T00:00", "2026-05-18T00:00"),
        ("week", {"anchor_weekday": 7}, "2026-05-17T00:00", "2026-05-17T00:00", "2026-05-24T00:00"),
        ("week", {"anchor_weekday": 3}, "2026-05-17T13:00", "2026-05-13T00:00", "2026-05-20T00:00"),
        ("month", {}, "2026-12-31T23:59", "2026-12-01T00:00", "2027-01-01T00:00"),
        ("month", {"anchor_day": 15}, "2026-03-14T23:59", "2026-02-15T00:00", "2026-03-15T00:00"),
        ("year", {}, "2026-05-17T13:00", "2026-01-01T00:00", "2027-01-01T00:00"),
        ("year", {"anchor_month": 7, "anchor_day": 4}, "2026-07-03T23:00", "2025-07-04T00:00", "2026-07-04T00:00"),
        ("year", {"anchor_month": 2, "anchor_day": 29}, "2027-06-01T00:00", "2027-02-28T00:00", "2028-02-29T00:00"),
        ("year", {"anchor_month": 2, "anchor_day": 29}, "2028-06-01T00:00", "2028-02-29T00:00", "2029-02-28T00:00"),
        ("never", {}, "2026-05-17T13:00", "1900-01-01T00:00", None),
    ],
)
def test_units_and_anchors(unit: Any, more: dict[str, Any], at: str, start: str, end: str | None):
    assert shown(period_at(Recurrence(unit=unit, **more), us(at))) == (start, end)


@pytest.mark.parametrize(
    ("anchor", "starts"),
    [
        (29, ["2027-01-29", "2027-02-28", "2027-03-29", "2027-04-29", "2027-05-29"]),
        (30, ["2027-01-30", "2027-02-28", "2027-03-30", "2027-04-30", "2027-05-30"]),
        (31, ["2027-01-31", "2027-02-28", "2027-03-31", "2027-04-30", "2027-05-31"]),
        (31, ["2028-01-31", "2028-02-29", "2028-03-31", "2028-04-30", "2028-05-31"]),
    ],
)
def test_the_end_of_a_short_month_and_back(anchor: int, starts: list[str]):
    recurrence = Recurrence(unit="month", anchor_day=anchor)
    period: Period | None = period_at(recurrence, us(f"{starts[0]}T12:00"))
    for start in starts:
        assert period is not None
        assert text(period.start_us) == f"{start}T00:00"
        period = next_period(recurrence, period)


@pytest.mark.parametrize(
    ("zone", "unit", "at", "start", "end"),
    [
        # Clocks in Berlin go forward on March 29 and back on October 25: days of 23 and of 25 hours.
        ("Europe/Berlin", "day", "2026-03-29T12:00+02:00", "2026-03-29T00:00+01:00", "2026-03-30T00:00+02:00"),
        ("Europe/Berlin", "day", "2026-10-25T02:30+01:00", "2026-10-25T00:00+02:00", "2026-10-26T00:00+01:00"),
        ("Europe/Berlin", "month", "2026-03-31T23:59+02:00", "2026-03-01T00:00+01:00", "2026-04-01T00:00+02:00"),
        ("Europe/Berlin", "month", "2026-02-28T23:30+00:00", "2026-03-01T00:00+01:00", "2026-04-01T00:00+02:00"),
        ("Europe/Berlin", "week", "2026-03-29T23:59+02:00", "2026-03-23T00:00+01:00", "2026-03-30T00:00+02:00"),
        # Newfoundland is half an hour off, and until 2011 it changed its clocks at one minute past midnight: the hour
        # before came again, but midnight with it, so the first of them counts.
        ("America/St_Johns", "month", "2026-10-15T00:00+00:00", "2026-10-01T00:00-02:30", "2026-11-01T00:00-02:30"),
        ("America/St_Johns", "month", "2026-11-15T00:00+00:00", "2026-11-01T00:00-02:30", "2026-12-01T00:00-03:30"),
        ("America/St_Johns", "day", "2026-03-08T12:00-02:30", "2026-03-08T00:00-03:30", "2026-03-09T00:00-02:30"),
        ("America/St_Johns", "day", "2010-11-07T12:00-03:30", "2010-11-07T00:00-02:30", "2010-11-08T00:00-03:30"),
        ("America/St_Johns", "day", "2010-11-06T23:30-03:30", "2010-11-07T00:00-02:30", "2010-11-08T00:00-03:30"),
        ("Asia/Kathmandu", "day", "2026-05-17T00:00+05:45", "2026-05-17T00:00+05:45", "2026-05-18T00:00+05:45"),
        ("Asia/Kathmandu", "month", "2026-04-30T18:14+00:00", "2026-04-01T00:00+05:45", "2026-05-01T00:00+05:45"),
        # There was no December 30, 2011 in Samoa: the 29th is followed by the 31st.
        ("Pacific/Apia", "day", "2011-12-29T23:59-10:00", "2011-12-29T00:00-10:00", "2011-12-31T00:00+14:00"),
        ("Pacific/Apia", "day", "2011-12-31T00:00+14:00", "2011-12-31T00:00+14:00", "2012-01-01T00:00+14:00"),
        # In Cairo and Beirut midnight itself is skipped in spring, and the day begins at one.
        ("Africa/Cairo", "day", "2026-04-24T12:00+03:00", "2026-04-24T01:00+03:00", "2026-04-25T00:00+03:00"),
        ("Africa/Cairo", "day", "2026-04-23T23:59+02:00", "2026-04-23T00:00+02:00", "2026-04-24T01:00+03:00"),
        # The hour before midnight comes again in autumn; midnight itself does not.
        ("Africa/Cairo", "day", "2026-10-29T23:30+02:00", "2026-10-29T00:00+03:00", "2026-10-30T00:00+02:00"),
        # In Havana the hour after midnight comes twice: the day begins when it does for the first time.
        ("America/Havana", "day", "2020-11-01T00:30-05:00", "2020-11-01T00:00-04:00", "2020-11-02T00:00-05:00"),
    ],
)
def test_zones(zone: str, unit: Any, at: str, start: str, end: str):
    assert period_at(Recurrence(unit=unit, time_zone=zone), us(at)) == Period(us(start), us(end))


def test_a_gap_that_begins_before_midnight():
    """Toronto's clocks went from half past eleven to half past twelve, once: with that the day began."""
    period = period_at(Recurrence(unit="day", time_zone="America/Toronto"), us("1919-03-31T12:00-04:00"))
    assert period == Period(us("1919-03-31T00:30-04:00"), us("1919-04-01T00:00-04:00"))


@pytest.mark.parametrize(
    ("zone", "anchor", "starts"),
    [
        (
            "Europe/Berlin",
            31,
            ["2026-01-31T00:00+01:00", "2026-02-28T00:00+01:00", "2026-03-31T00:00+02:00", "2026-04-30T00:00+02:00"],
        ),
        (
            "Europe/Berlin",
            29,
            ["2026-02-28T00:00+01:00", "2026-03-29T00:00+01:00", "2026-04-29T00:00+02:00", "2026-05-29T00:00+02:00"],
        ),
        (
            "America/St_Johns",
            31,
            ["2026-09-30T00:00-02:30", "2026-10-31T00:00-02:30", "2026-11-30T00:00-03:30", "2026-12-31T00:00-03:30"],
        ),
    ],
)
def test_ends_of_months_over_the_change_of_clocks(zone: str, anchor: int, starts: list[str]):
    recurrence = Recurrence(unit="month", anchor_day=anchor, time_zone=zone)
    for start, end in itertools.pairwise(starts):
        assert period_at(recurrence, us(start)) == Period(us(start), us(end))
        assert period_at(recurrence, us(end) - 1) == Period(us(start), us(end))


@pytest.mark.parametrize(
    "wrong",
    [
        {"anchor_day": 0},
        {"anchor_day": 32},
        {"anchor_month": 13},
        {"anchor_weekday": 0},
        {"time_zone": "Berlin"},
        {"time_zone": "Europe"},
        {"time_zone": "../zones"},
        {"time_zone": ""},
    ],
)
def test_what_no_calendar_has(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=r"anchor|time_zone"):
        Recurrence(unit="month", **wrong)


@pytest.mark.parametrize("at_us", [AT_US_MIN - 1, AT_US_MAX])
def test_times_out_of_bounds(at_us: int):
    with pytest.raises(ValueError, match="1900"):
        period_at(Recurrence(unit="day"), at_us)


def test_the_first_and_the_last_time_have_a_period_in_every_zone():
    for zone in ZONES:
        for at_us in (AT_US_MIN, AT_US_MAX - 1):
            period = period_at(Recurrence(unit="year", anchor_month=12, anchor_day=31, time_zone=zone), at_us)
            assert period.end_us is not None
            assert period.start_us <= at_us < period.end_us


recurrences = st.builds(
    Recurrence,
    unit=st.sampled_from(["day", "week", "month", "year"]),
    anchor_day=st.integers(1, 31),
    anchor_month=st.integers(1, 12),
    anchor_weekday=st.integers(1, 7),
    time_zone=st.sampled_from(ZONES),
)
times = st.integers(us("1970-01-03T00:00"), us("2100-01-01T00:00"))


@settings(deadline=None, database=None)
@given(recurrence=recurrences, at_us=times)
def test_every_time_lies_in_one_period_and_the_next_begins_where_it_ends(recurrence: Recurrence, at_us: int):
    period = period_at(recurrence, at_us)
    assert period.end_us is not None
    assert period.start_us <= at_us < period.end_us
    assert period_at(recurrence, period.start_us) == period
    assert period_at(recurrence, period.end_us - 1) == period
    following = next_period(recurrence, period)
    assert following is not None
    assert following.start_us == period.end_us
    assert period_at(recurrence, period.start_us - 1).end_us == period.start_us


@settings(deadline=None, database=None)
@given(recurrence=recurrences, at_us=times)
def test_a_period_is_about_as_long_as_its_unit(recurrence: Recurrence, at_us: int):
    period = period_at(recurrence, at_us)
    assert period.end_us is not None
    days = (period.end_us - period.start_us) / (24 * HOUR_US)
    least, most = {"day": (1, 1), "week": (7, 7), "month": (28, 31), "year": (365, 366)}[recurrence.unit]
    assert least - 1.1 <= days <= most + 1.1, "a day more or less where a zone changed sides of the date line"
