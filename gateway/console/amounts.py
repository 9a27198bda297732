"""Amounts as end users read them: credits and money, with separators, rounded to their disadvantage, so that nobody is
shown what they do not have. No tokens, no provider's prices.
"""

from typing import Final

from gateway.payments.packages import price_text
from pricing.money import PICOS_PER_USD, Asset

SYMBOLS: Final = {"usd": "$", "eur": "€", "gbp": "£", "jpy": "¥"}
"""Currencies that are written with a sign before the number; others with their code behind it."""

CREDIT_DECIMALS: Final = 2


def credits_text(units: int, asset: Asset) -> str:
    """`1,234.56`: whole credits, with decimals only where there are some."""
    hundredths = abs(asset.to_millis(units) // 10)
    whole, part = divmod(hundredths, 10**CREDIT_DECIMALS)
    sign = "−" if asset.to_millis(units) // 10 < 0 else ""
    return f"{sign}{whole:,}" + (f".{part:0{CREDIT_DECIMALS}d}" if part else "")


def debt_text(units: int, asset: Asset) -> str:
    """What is owed, rounded up: a debt is not shown as none."""
    return credits_text(-units, asset).removeprefix("−")


def dollars_text(units: int, asset: Asset) -> str:
    """`$12.34`: what so many credits are worth."""
    cents = units * asset.usd_value_picos * 100 // (PICOS_PER_USD * 10**asset.scale)
    whole, part = divmod(abs(cents), 100)
    return f"{'−' if cents < 0 else ''}${whole:,}.{part:02d}"


def money_text(price_minor: int, currency: str) -> str:
    """`$10.00`, or `120.00 SEK`."""
    text = price_text(price_minor, currency)
    whole, dot, decimals = text.partition(".")
    text = f"{int(whole):,}{dot}{decimals}"
    symbol = SYMBOLS.get(currency)
    return f"{text} {currency.upper()}" if symbol is None else f"{symbol}{text}"
