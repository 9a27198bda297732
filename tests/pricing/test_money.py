"""Amounts are integers; every conversion is exact or refused; only `ceil_div` and the floored display round."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pricing.money import AMOUNT_MAX, CREDIT, Asset, ceil_div

POINT = Asset("point", 0, 10**9)
EURO = Asset("euro", 2, 1_083_700_000_000)

assets = st.builds(Asset, st.just("a"), st.integers(0, 9), st.integers(1, 10**15))
amounts = st.integers(0, AMOUNT_MAX)


@pytest.mark.parametrize(
    ("asset", "text", "units"),
    [
        (CREDIT, "0", 0),
        (CREDIT, "1", 10**9),
        (CREDIT, "1.5", 1_500_000_000),
        (CREDIT, "0.000000001", 1),
        (CREDIT, "0001.50", 1_500_000_000),
        (CREDIT, "4611686018.427387904", AMOUNT_MAX),
        (EURO, "12.340000", 1234),
        (POINT, "7", 7),
        (POINT, "7.0", 7),
    ],
)
def test_parse_is_exact(asset: Asset, text: str, units: int) -> None:
    assert asset.parse(text) == units


@pytest.mark.parametrize(
    "text",
    [
        *("", " 1", "1 ", "+1", "-1", "-0", "1e3", "1E3", "NaN", "inf", "0x1", "1_000", "1,5", ".5", "5.", "١", "1\n"),
        *("0.0000000001", "4611686018.427387905", "9" * 40, "0." + "0" * 60),
    ],
)
def test_parse_refuses_what_is_not_a_plain_exact_amount(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        CREDIT.parse(text)


@pytest.mark.parametrize("value", [1, 1.5, None, True, b"1"])
def test_parse_refuses_what_is_not_text(value: object) -> None:
    with pytest.raises(ValueError, match="string"):
        CREDIT.parse(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asset", "units", "text"),
    [
        (CREDIT, 0, "0"),
        (CREDIT, 1_500_000_000, "1.5"),
        (CREDIT, -1, "-0.000000001"),
        (CREDIT, 10**9, "1"),
        (CREDIT, AMOUNT_MAX, "4611686018.427387904"),
        (EURO, -1230, "-12.3"),
        (POINT, 120, "120"),
        (POINT, 0, "0"),
    ],
)
def test_format_has_no_exponent_and_no_trailing_zeros(asset: Asset, units: int, text: str) -> None:
    assert asset.format(units) == text


@given(assets, amounts)
def test_what_is_formatted_parses_to_itself(asset: Asset, units: int) -> None:
    assert asset.parse(asset.format(units)) == units


@given(assets, amounts)
def test_the_dollar_text_is_exact_and_comes_back(asset: Asset, units: int) -> None:
    usd = asset.to_usd_text(units)
    assert Fraction(usd) == Fraction(units * asset.usd_value_picos, 10 ** (asset.scale + 12))
    if len(usd) <= 60:
        assert asset.from_usd(usd) == units


def test_millicredits_are_floored_and_come_in_exactly() -> None:
    assert CREDIT.to_millis(1_999_999) == 1
    assert CREDIT.to_millis(999_999) == 0
    assert CREDIT.from_millis(50_000) == 50 * 10**9
    assert EURO.from_millis(10) == 1
    assert POINT.to_millis(3) == 3000


@pytest.mark.parametrize("millis", [-1, 2**63, True, 1.0, "1"])
def test_from_millis_refuses_what_is_no_amount(millis: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        CREDIT.from_millis(millis)  # type: ignore[arg-type]


def test_from_millis_refuses_what_the_scale_cannot_hold() -> None:
    with pytest.raises(ValueError, match="smallest unit"):
        EURO.from_millis(5)


@pytest.mark.parametrize(
    ("asset", "usd", "units"),
    [
        (CREDIT, "0.50", 50 * 10**9),
        (CREDIT, Decimal("0.50"), 50 * 10**9),
        (CREDIT, Decimal("1E-11"), 1),
        (CREDIT, Decimal("1E+3"), 100_000 * 10**9),
        (POINT, "0.001", 1),
        (EURO, "1.0837", 100),
    ],
)
def test_from_usd_is_exact(asset: Asset, usd: str | Decimal, units: int) -> None:
    assert asset.from_usd(usd) == units


@pytest.mark.parametrize(
    "usd", ["-1", "1e3", Decimal("NaN"), Decimal("Infinity"), Decimal("1E+999999"), Decimal("-1"), Decimal("1E-12")]
)
def test_from_usd_refuses_the_rest(usd: str | Decimal) -> None:
    with pytest.raises(ValueError, match=r"."):
        CREDIT.from_usd(usd)


def test_a_dollar_is_not_a_whole_number_of_every_unit() -> None:
    with pytest.raises(ValueError, match="smallest unit of euro"):
        EURO.from_usd("1")


@pytest.mark.parametrize(
    ("code", "scale", "value"), [("", 0, 1), ("a", -1, 1), ("a", 10, 1), ("a", 0, 0), ("a", 0, -5)]
)
def test_an_impossible_asset_is_refused(code: str, scale: int, value: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        Asset(code, scale, value)


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**20))
def test_ceil_div_is_the_least_integer_not_below(n: int, d: int) -> None:
    q = ceil_div(n, d)
    assert (q - 1) * d < n <= q * d
