"""What a package brings for its price, in whatever a tenant calls a credit: nothing is lost, and nothing made up."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.payments.packages import Bought, Package, Packages, price_text
from gateway.settings import Settings
from pricing.money import CREDIT, PICOS_PER_USD, Asset

UNITS = 10**CREDIT.scale
"""Of one credit, which is worth a cent."""

TOKEN = Asset(code="token", scale=0, usd_value_picos=PICOS_PER_USD // 3)


def package(price_minor: int, worth: str, *, bonus: str = "0", currency: str = "usd") -> Package:
    return Package("a", price_minor, currency, Fraction(worth), Fraction(bonus))


@pytest.mark.parametrize(
    ("sold", "bought"),
    [
        (package(1000, "10"), Bought(1000 * UNITS, 0, 0)),
        (package(1000, "8.50"), Bought(850 * UNITS, 0, 150 * UNITS)),
        (package(1000, "10", bonus="1"), Bought(1000 * UNITS, 100 * UNITS, 0)),
        (package(1000, "12"), Bought(1000 * UNITS, 200 * UNITS, 0)),
        (package(1000, "12", bonus="1"), Bought(1000 * UNITS, 300 * UNITS, 0)),
        (package(1000, "11", currency="eur"), Bought(1100 * UNITS, 0, 0)),
    ],
    ids=["at face value", "with a spread", "with a bonus", "worth more", "worth more and a bonus", "in euros"],
)
def test_what_a_package_brings(sold: Package, bought: Bought):
    assert sold.in_credits(CREDIT) == bought


def test_a_part_of_the_smallest_unit_is_not_sold():
    assert package(100, "1").in_credits(TOKEN) == Bought(3, 0, 0)
    assert package(100, "0.3").in_credits(TOKEN) == Bought(0, 0, 3)


@given(
    price_minor=st.integers(1, 10**8),
    worth=st.fractions(min_value=Fraction(1, 10**6), max_value=10**6),
    scale=st.integers(0, 9),
    value=st.integers(1, 10**15),
)
def test_what_is_paid_for_is_what_the_price_is_worth(price_minor: int, worth: Fraction, scale: int, value: int):
    asset = Asset(code="x", scale=scale, usd_value_picos=value)
    bought = Package("a", price_minor, "usd", worth, Fraction(0)).in_credits(asset)
    face = int(Fraction(price_minor, 100) * PICOS_PER_USD * 10**scale / value)
    assert bought.credited + bought.spread == face
    assert bought.credited + bought.bonus == int(worth * PICOS_PER_USD * 10**scale / value)
    assert min(bought.credited, bought.bonus, bought.spread) >= 0
    assert not (bought.spread and bought.bonus)


@pytest.mark.parametrize(
    ("price_minor", "currency", "text"),
    [(1000, "usd", "10.00"), (5, "eur", "0.05"), (500, "jpy", "500"), (1234, "kwd", "1.234")],
)
def test_a_price_has_the_decimal_places_of_its_currency(price_minor: int, currency: str, text: str):
    assert price_text(price_minor, currency) == text


def test_packages_are_found_by_their_ids_and_listed_by_price():
    packages = Packages(Settings().packages)
    assert [each.price_minor for each in packages] == [500, 1000, 2500, 5000]
    found = packages.find("usd-25")
    assert found is not None
    assert found.worth == 25
    assert packages.find("usd-26") is None
