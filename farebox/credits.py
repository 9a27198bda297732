"""Amounts. Both ways they are credits, exact decimals; a binary float is refused, for it cannot hold a tenth."""

from decimal import Decimal, InvalidOperation
from typing import Final, TypeAlias

MILLICREDIT_PLACES: Final = 3
MILLICREDITS_OF_CREDIT: Final = 10**MILLICREDIT_PLACES
DIGITS_MAX: Final = 40
"""More than any amount has. It bounds what 1E+999999 would be written out to."""

Amount: TypeAlias = int | str | Decimal
"""Credits, or units of a metric: 5, "0.5" or Decimal("0.5")."""


class Credits(Decimal):
    """An exact amount of credits: a decimal in every way."""

    __slots__ = ()

    @property
    def millicredits(self) -> int:
        """The same in thousandths of a credit, rounded down."""
        numerator, denominator = self.as_integer_ratio()
        return numerator * MILLICREDITS_OF_CREDIT // denominator


def exact(amount: Amount, *, name: str) -> Decimal:
    """*amount* as it was written.

    Raises:
        TypeError: for a float, and whatever else is no amount.
        ValueError: for what is negative, infinite or no number.
    """
    if isinstance(amount, bool) or not isinstance(amount, int | str | Decimal):
        raise TypeError(f"{name} must be an int, a str or a Decimal, not {type(amount).__name__}: floats are not exact")
    try:
        value = Decimal(amount)
    except InvalidOperation:
        raise ValueError(f"{name}: {amount!r} is not a decimal number") from None
    if not value.is_finite() or value < 0 or (value and abs(value.adjusted()) > DIGITS_MAX):
        raise ValueError(f"{name}: {amount} is not an amount")
    return value


def text(amount: Amount, *, name: str) -> str:
    """*amount* in plain digits, without zeros that say nothing. Raises what `exact` does."""
    digits = format(exact(amount, name=name), "f")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) or "0"


def millis(amount: Amount, *, name: str) -> int:
    """*amount* of credits in millicredits.

    Raises:
        ValueError: for what is finer than a millicredit; and what `exact` raises.
    """
    whole, _, decimals = text(amount, name=name).partition(".")
    if len(decimals) > MILLICREDIT_PLACES:
        raise ValueError(f"{name}: {amount} credits are not a whole number of millicredits")
    return int(whole + decimals.ljust(MILLICREDIT_PLACES, "0"))


def one_of(credits: Amount | None, millicredits: int | None) -> int | None:
    """Millicredits, from whichever of the two is given; None where neither is.

    Raises:
        ValueError: where both are.
        TypeError: for millicredits that are not an int.
    """
    if millicredits is None:
        return None if credits is None else millis(credits, name="credits")
    if credits is not None:
        raise ValueError("give the amount once: credits or millicredits")
    if isinstance(millicredits, bool) or not isinstance(millicredits, int):
        raise TypeError(f"millicredits must be an int, not {type(millicredits).__name__}")
    return millicredits
