"""What customers can buy: the operator's packages, in a currency, and what they bring in a tenant's credits.

What a price is worth and what a package brings need not be the same: of $10 that bring $8.50 of credits the operator
keeps a spread of 1.50; what they bring beyond their price is a bonus that the operator gives.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Final, Protocol

import msgspec

from pricing.money import PICOS_PER_USD, Asset, parse_decimal

DEFAULT_EXPONENT: Final = 2

EXPONENTS: Final = {
    **dict.fromkeys(
        (
            *("bif", "clp", "djf", "gnf", "jpy", "kmf", "krw", "mga"),
            *("pyg", "rwf", "vnd", "vuv", "xaf", "xof", "xpf"),
        ),
        0,
    ),
    **dict.fromkeys(("bhd", "jod", "kwd", "omr", "tnd"), 3),
}
"""Decimal places of the minor unit, where they are not two. Source: Stripe, «Zero-decimal currencies»."""

PRICE_MINOR_MAX: Final = 99_999_999
"""The most that the processor charges at once, in minor units."""


class Offer(Protocol):
    """What the operator writes into the settings; amounts are decimal numbers as texts."""

    @property
    def id(self) -> str: ...
    @property
    def price(self) -> str: ...
    @property
    def currency(self) -> str: ...
    @property
    def worth(self) -> str | None: ...
    @property
    def bonus(self) -> str: ...


class Package(msgspec.Struct, frozen=True):
    """*price_minor* is in the currency's minor unit; *worth* and *bonus* are exact dollars of credits."""

    id: str
    price_minor: int
    currency: str
    worth: Fraction
    bonus: Fraction

    def in_credits(self, asset: Asset) -> "Bought":
        """What it brings in *asset*, rounded down. Of a price in dollars the rest is the spread."""
        credited = _units(self.worth, asset)
        bonus = _units(self.bonus, asset)
        if self.currency != "usd":
            return Bought(credited, bonus, 0)
        face = _units(Fraction(self.price_minor, 100), asset)
        over = max(0, credited - face)
        return Bought(credited - over, bonus + over, max(0, face - credited))


class Bought(msgspec.Struct, frozen=True):
    """In an asset's smallest unit, as in :class:`~ledger.commands.TopUp`."""

    credited: int
    bonus: int
    spread: int


class PackageInvalid(Exception):
    """A package of the settings that nobody could buy: says which, and why."""


class Packages:
    """The packages of the settings, by their ids, the cheapest of a currency first.

    Raises:
        PackageInvalid
    """

    def __init__(self, offers: Iterable[Offer]) -> None:
        packages = sorted(map(_package, offers), key=lambda package: (package.currency, package.price_minor))
        self._packages = {package.id: package for package in packages}

    def __iter__(self) -> Iterator[Package]:
        return iter(self._packages.values())

    def find(self, package_id: str) -> Package | None:
        return self._packages.get(package_id)


def price_text(price_minor: int, currency: str) -> str:
    """`10.00`: as many decimal places as the currency has."""
    exponent = EXPONENTS.get(currency, DEFAULT_EXPONENT)
    if exponent == 0:
        return str(price_minor)
    whole, part = divmod(price_minor, 10**exponent)
    return f"{whole}.{part:0{exponent}d}"


def _package(offer: Offer) -> Package:
    exponent = EXPONENTS.get(offer.currency, DEFAULT_EXPONENT)
    price_minor = parse_decimal(offer.price) * 10**exponent
    if price_minor.denominator != 1 or not 0 < price_minor <= PRICE_MINOR_MAX:
        raise PackageInvalid(
            f'the price of the package "{offer.id}" must be above zero, with at most {exponent} decimal places'
        )
    if offer.worth is None and offer.currency != "usd":
        raise PackageInvalid(f'the package "{offer.id}" is not in dollars: say what its credits are worth')
    worth = parse_decimal(offer.worth if offer.worth is not None else offer.price)
    if worth <= 0:
        raise PackageInvalid(f'the package "{offer.id}" brings no credits')
    return Package(offer.id, int(price_minor), offer.currency, worth, parse_decimal(offer.bonus))


def _units(usd: Fraction, asset: Asset) -> int:
    return int(usd * PICOS_PER_USD * 10**asset.scale / asset.usd_value_picos)
