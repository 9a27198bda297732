"""Integer money: assets, exact conversions and the one rounding rule.

How it works: an amount is an int in the smallest units of an asset (10**-scale of one whole unit). What one whole unit
is worth is an int of pico-dollars, so every price and every amount meet in integers and nothing is rounded on the way.

THE rounding rule: a charge is rounded up, once, at the end (`ceil_div`). Grants and displays are rounded down.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

import msgspec

PICOS_PER_USD = 10**12
AMOUNT_MAX = 2**62
"""The largest amount that is kept, in smallest units: sums of a few of them still fit int64."""

SCALE_MAX = 9
USD_VALUE_PICOS_MAX = 10**18
"""One whole unit is worth at most a million dollars."""

DECIMAL_TEXT_MAX = 60
"""Characters of a decimal amount that are read at all."""

MILLIS_PER_UNIT = 1000

_DECIMAL = re.compile(r"[0-9]+(?:\.[0-9]+)?", re.ASCII)


def ceil_div(numerator: int, denominator: int) -> int:
    """numerator / denominator rounded up. Denominator > 0."""
    return -(-numerator // denominator)


def parse_decimal(text: str) -> Fraction:
    """A plain non-negative decimal number, exactly.

    Raises:
        ValueError: signs, exponents, NaN, infinities, spaces, or more than DECIMAL_TEXT_MAX characters.
    """
    if not isinstance(text, str):
        raise ValueError("an amount must be a decimal number written as a string")
    if len(text) > DECIMAL_TEXT_MAX:
        raise ValueError(f"a decimal number has at most {DECIMAL_TEXT_MAX} characters")
    if _DECIMAL.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not a plain non-negative decimal number such as 12.5")
    whole, _, decimals = text.partition(".")
    return Fraction(int(whole + decimals), 10 ** len(decimals))


def _plain(number: str | Decimal) -> str:
    """A decimal as it is written without an exponent.

    Raises:
        ValueError: it has none, or more digits than anybody would read.
    """
    if not isinstance(number, Decimal):
        return number
    # The size is checked first: 1E+999999 has a million digits.
    if not number.is_finite() or abs(number.adjusted()) > DECIMAL_TEXT_MAX:
        raise ValueError("an amount must be a finite number of a sensible size")
    return format(number, "f")


def format_decimal(value: int, scale: int) -> str:
    """value * 10**-scale as an exact decimal: no exponent, no trailing zeros."""
    digits = str(abs(value)).rjust(scale + 1, "0")
    whole, decimals = (digits[:-scale], digits[-scale:].rstrip("0")) if scale else (digits, "")
    return f"{'-' if value < 0 else ''}{whole}{'.' if decimals else ''}{decimals}"


class Asset(msgspec.Struct, frozen=True):
    """What a wallet holds: a currency with an immutable scale and a dollar value.

    Attributes:
        scale: decimal places of one whole unit, 0..SCALE_MAX; the smallest unit is 10**-scale of it.
        usd_value_picos: the value of ONE whole unit in pico-dollars, > 0.
    """

    code: str
    scale: int
    usd_value_picos: int

    def __post_init__(self) -> None:
        if not self.code:
            raise ValueError("an asset needs a code")
        if not 0 <= self.scale <= SCALE_MAX:
            raise ValueError(f"the scale of {self.code} must be 0..{SCALE_MAX}")
        if not 0 < self.usd_value_picos <= USD_VALUE_PICOS_MAX:
            raise ValueError(f"one {self.code} must be worth more than nothing and at most $1,000,000")

    def parse(self, text: str | Decimal) -> int:
        """An exact decimal number of whole units, in smallest units.

        Raises:
            ValueError: not exactly representable at this scale, not a plain non-negative decimal, or too large.
        """
        text = _plain(text)
        return self._exact(parse_decimal(text) * self._units_per_whole, text)

    def format(self, units: int) -> str:
        """Whole units as an exact decimal: "0", "1.5", "-0.000000001"."""
        return format_decimal(units, self.scale)

    def to_millis(self, units: int) -> int:
        """Thousandths of a whole unit (millicredits), floored: nobody is shown what they do not have."""
        return units * MILLIS_PER_UNIT // self._units_per_whole

    def from_millis(self, millis: int) -> int:
        """Smallest units of a number of thousandths.

        Raises:
            ValueError: negative, too large, or finer than this asset's scale.
        """
        if isinstance(millis, bool) or not isinstance(millis, int) or millis < 0:
            raise ValueError("an amount in thousandths must be a non-negative integer")
        return self._exact(Fraction(millis * self._units_per_whole, MILLIS_PER_UNIT), f"{millis} thousandths")

    def from_usd(self, usd: str | Decimal) -> int:
        """Smallest units worth exactly this many dollars.

        Raises:
            ValueError: not exactly representable, negative, not finite, or too large.
        """
        usd = _plain(usd)
        return self._exact(parse_decimal(usd) * PICOS_PER_USD * self._units_per_whole / self.usd_value_picos, f"${usd}")

    def to_usd_text(self, units: int) -> str:
        """The dollar value as an exact decimal. Always exact: the denominator is a power of ten."""
        return format_decimal(units * self.usd_value_picos, self.scale + 12)

    @property
    def _units_per_whole(self) -> int:
        return int(10**self.scale)

    def _exact(self, units: Fraction, given: str) -> int:
        if units.denominator != 1:
            raise ValueError(f"{given} is not a whole number of the smallest unit of {self.code} (scale {self.scale})")
        if units.numerator > AMOUNT_MAX:
            raise ValueError(f"{given} is more than an account can hold")
        return units.numerator


CREDIT = Asset("credit", 9, 10**10)
"""The default credit: one cent, kept to a billionth."""
