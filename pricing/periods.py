"""Calendar periods: when what recurs begins and ends, in a time zone. Pure, but for the rules of zones, which are data.

How it works. The periods of a recurrence are numbered, and period n begins on a certain date. It does so at the first
instant of that date: at midnight; where clocks are put forward over midnight, when they have been; where midnight comes
twice, the first time. A period ends where the next begins, so that together they tile the time line: half-open, none
twice, none empty. A date that a zone skipped, when it changed sides of the date line, has no period of its own.

The rules of the zones are the package's, not the machine's, so that two hosts agree on where a period ends.
"""

from calendar import monthrange
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from functools import cache, lru_cache
from importlib.resources import files
from typing import Final, Literal, NamedTuple
from zoneinfo import ZoneInfo

import msgspec

Unit = Literal["day", "week", "month", "year", "never"]

AT_US_MIN: Final = -2_208_988_800_000_000
"""The year 1900."""

AT_US_MAX: Final = 221_845_392_000_000_000
"""The year 9000."""

ZONES_KEPT_MAX: Final = 600
"""All of them."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


class Recurrence(msgspec.Struct, frozen=True, kw_only=True):
    """How something recurs: `anchor_day` of months and years, with `anchor_month` of years, `anchor_weekday` of weeks.

    The anchors 29 to 31 fall on the last day of a shorter month, and on themselves again in the next. Weekdays are
    ISO's: Monday is 1. What recurs `never` has one period, without an end.

    Raises:
        ValueError: an anchor that no date has, or a time zone that nobody knows by this name.
    """

    unit: Unit
    anchor_day: int = 1
    anchor_month: int = 1
    anchor_weekday: int = 1
    time_zone: str = "UTC"

    def __post_init__(self) -> None:
        for name, most in (("anchor_day", 31), ("anchor_month", 12), ("anchor_weekday", 7)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is 1 to {most}")
        _zone(self.time_zone)


class Period(NamedTuple):
    """`start_us <= t < end_us`; without an end it is the only one."""

    start_us: int
    end_us: int | None


def period_at(recurrence: Recurrence, at_us: int) -> Period:
    """The period that *at_us* lies in.

    Raises:
        ValueError: a time before 1900 or after the year 9000.
    """
    if not AT_US_MIN <= at_us < AT_US_MAX:
        raise ValueError("the time must lie between the years 1900 and 9000")
    if recurrence.unit == "never":
        return Period(AT_US_MIN, None)
    zone = _zone(recurrence.time_zone)
    number_of, begins_on = _CALENDARS[recurrence.unit]

    def start_us(number: int) -> int:
        return _first_instant_us(begins_on(recurrence, number), zone)

    # The local date tells the number, but for what clocks that are put forward or back make of it.
    number = number_of(recurrence, (_EPOCH + at_us * _MICROSECOND).astimezone(zone).date())
    while start_us(number) > at_us:
        number -= 1
    while start_us(number + 1) <= at_us:
        number += 1
    return Period(start_us(number), start_us(number + 1))


def next_period(recurrence: Recurrence, period: Period) -> Period | None:
    """The period that follows; None where none does."""
    return None if period.end_us is None else period_at(recurrence, period.end_us)


def _day_number(_: Recurrence, day: date) -> int:
    return day.toordinal()


def _day_begins(_: Recurrence, number: int) -> date:
    return date.fromordinal(number)


def _week_number(recurrence: Recurrence, day: date) -> int:
    return (day.toordinal() - recurrence.anchor_weekday) // 7  # The first day of all was a Monday.


def _week_begins(recurrence: Recurrence, number: int) -> date:
    return date.fromordinal(number * 7 + recurrence.anchor_weekday)


def _month_number(_: Recurrence, day: date) -> int:
    return day.year * 12 + day.month - 1


def _month_begins(recurrence: Recurrence, number: int) -> date:
    year, month = divmod(number, 12)
    return _anchored(year, month + 1, recurrence.anchor_day)


def _year_number(_: Recurrence, day: date) -> int:
    return day.year


def _year_begins(recurrence: Recurrence, number: int) -> date:
    return _anchored(number, recurrence.anchor_month, recurrence.anchor_day)


_Calendar = tuple[Callable[[Recurrence, date], int], Callable[[Recurrence, int], date]]

_CALENDARS: Final[dict[str, _Calendar]] = {
    "day": (_day_number, _day_begins),
    "week": (_week_number, _week_begins),
    "month": (_month_number, _month_begins),
    "year": (_year_number, _year_begins),
}
"""For each unit the number of about the period that a date lies in, and the date on which a period begins."""


def _anchored(year: int, month: int, day: int) -> date:
    _, last = monthrange(year, month)
    return date(year, month, min(day, last))


def _first_instant_us(day: date, zone: ZoneInfo) -> int:
    """When *day* begins, or where it is skipped, what follows it."""
    midnight = datetime(day.year, day.month, day.day, tzinfo=zone)
    before, after = _instant_us(midnight), _instant_us(midnight.replace(fold=1))
    if before <= after:  # Midnight comes once, or twice: then this is the first.
        return before
    # It is skipped, somewhere between *after* (by the later offset) and *before* (by the earlier): find where.
    low, high = after, before
    earlier = _offset(low, zone)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _offset(middle, zone) == earlier else (low, middle)
    return high


def _instant_us(at: datetime) -> int:
    return (at.astimezone(UTC) - _EPOCH) // _MICROSECOND


def _offset(at_us: int, zone: ZoneInfo) -> timedelta | None:
    return (_EPOCH + at_us * _MICROSECOND).astimezone(zone).utcoffset()


@cache
def _zone_names() -> frozenset[str]:
    return frozenset((files("tzdata") / "zones").read_text().split())


@lru_cache(maxsize=ZONES_KEPT_MAX)
def _zone(name: str) -> ZoneInfo:
    """Raises ValueError."""
    if name not in _zone_names():
        raise ValueError("time_zone must be the name of a time zone, such as Europe/Berlin")
    with files("tzdata").joinpath("zoneinfo", *name.split("/")).open("rb") as rules:
        return ZoneInfo.from_file(rules, key=name)
