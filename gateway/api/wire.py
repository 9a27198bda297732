"""How amounts and times are written in the Credits API, both ways.

An amount is an integer of millicredits, floored, and beside it a twin with the suffix `_decimal` that has the exact
decimal credits. Times are RFC 3339, UTC.
"""

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec
from fastapi import Response
from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from gateway.clock import EPOCH, MICROSECOND
from gateway.errors import invalid_request
from gateway.identity.thresholds import THRESHOLDS_MAX
from pricing.metering import MICROS_PER_UNIT, UNITS_MAX, microunits
from pricing.money import Asset, parse_decimal

METADATA_BYTES_MAX: Final = 16 * 1024
METADATA_DEPTH_MAX: Final = 16
TEXT_LENGTH_MAX: Final = 500
PAGE_DEFAULT: Final = 50
PAGE_MAX: Final = 200
CURSOR_LENGTH_MAX: Final = 200

T = TypeVar("T")

_EXACT: Final = msgspec.json.Encoder(decimal_format="number")

Millicredits = Annotated[int, Field(description="Thousandths of a credit, rounded down.", examples=[500000])]
Credits = Annotated[str, Field(description="The exact amount in credits.", examples=["500"])]
Time = Annotated[str, Field(examples=["2026-04-13T11:00:00Z"], json_schema_extra={"format": "date-time"})]


class Body(BaseModel):
    """What a POST may send. A field that nobody knows is refused: a misspelt `expires_at` would be money."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    idempotency_key: str | None = Field(
        default=None, description="The same as the header `Idempotency-Key`.", examples=["topup:pay_abc123"]
    )


class View(BaseModel):
    """What an answer holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Page(View, Generic[T]):
    data: list[T]
    has_more: bool
    next_cursor: str | None = Field(description="Give it as `cursor` to get the next page.")


def amounts(asset: Asset, **units: int) -> dict[str, Any]:
    """`balance=…` in the asset's smallest unit, as `balance` in millicredits and `balance_decimal` in credits."""
    written: dict[str, Any] = {}
    for name, amount in units.items():
        written[name] = asset.to_millis(amount)
        written[f"{name}_decimal"] = asset.format(amount)
    return written


def exact(view: View, *, status: int = 200) -> Response:
    """*view* with its decimals as JSON numbers that have all of their digits, which no binary float would."""
    return Response(_EXACT.encode(view.model_dump(by_alias=True)), status, media_type="application/json")


def time_us(at: datetime) -> int:
    """Microseconds since the epoch."""
    return (at - EPOCH) // MICROSECOND


def units_of_millis(millicredits: int, asset: Asset, *, param: str) -> int:
    """A number of millicredits in the asset's smallest unit.

    Raises:
        ApiError: 400 naming *param* for what the asset cannot hold.
    """
    try:
        return asset.from_millis(millicredits)
    except ValueError as error:
        raise invalid_request(f"{param}: {error}.", param=param) from None


def units_of_credits(credits: str | Decimal, asset: Asset, *, param: str) -> int:
    """Decimal credits in the asset's smallest unit, exactly.

    Raises:
        ApiError: 400 naming *param* for what the asset cannot hold, and for nothing at all.
    """
    try:
        units = asset.parse(credits)
    except ValueError as error:
        raise invalid_request(f"{param}: {error}.", param=param) from None
    if units == 0:
        raise invalid_request(f"{param} must be more than nothing.", param=param)
    return units


def units_of_usd(usd: Decimal, asset: Asset, *, param: str) -> int:
    """A number of dollars in the asset's smallest unit, exactly.

    Raises:
        ApiError: 400 naming *param* for what the asset cannot hold, and for nothing at all.
    """
    try:
        units = asset.from_usd(usd)
    except ValueError as error:
        raise invalid_request(f"{param}: {error}.", param=param) from None
    if units == 0:
        raise invalid_request(f"{param} must be more than nothing.", param=param)
    return units


def check_thresholds(thresholds: tuple[int, ...], asset: Asset, *, param: str) -> None:
    """Raises ApiError 400 naming *param* for a threshold that the asset cannot hold, or that is there twice."""
    for threshold in thresholds:
        units_of_millis(threshold, asset, param=param)
    if len(set(thresholds)) < len(thresholds):
        raise invalid_request(f"{param} has a threshold twice.", param=param)


def shown_units(micros: int) -> float | int:
    """A quantity in millionths, as the JSON number that has its exact digits: a double tells all that there can be."""
    whole, part = divmod(micros, MICROS_PER_UNIT)
    return micros / MICROS_PER_UNIT if part else whole


def _quantity(value: Decimal) -> Decimal:
    """Units of a metric. However they were written, they are the same number in the same form."""
    return Decimal(microunits(value)) / MICROS_PER_UNIT


def _exact_number(value: Any) -> Any:
    """A decimal as a JSON number or a string. It never was a binary float: see `gateway/api/route.py`."""
    if isinstance(value, bool) or not isinstance(value, int | str | Decimal):
        raise ValueError("it must be a decimal number")
    if isinstance(value, str):
        parse_decimal(value)
    return value


def _written_out(value: Any) -> Any:
    """Not a number, of which nobody knows whether it counts seconds or milliseconds."""
    if not isinstance(value, str) or "-" not in value[1:]:
        raise ValueError("it must be a time such as 2036-04-13T11:00:00Z")
    return value


def year_that_fits(value: datetime) -> datetime:
    """Raises ValueError for a time that could not be shown in every time zone."""
    if not 1970 <= value.year <= 9000:
        raise ValueError("it must lie between the years 1970 and 9000")
    return value


def _metadata(value: Any) -> Any:
    """Opaque, but JSON that can be kept: numbers are plain again, and the size is bounded."""
    if not isinstance(value, dict):
        raise ValueError("it must be an object")
    plain = _plain(value, METADATA_DEPTH_MAX)
    if len(msgspec.json.encode(plain)) > METADATA_BYTES_MAX:
        raise ValueError(f"it has more than {METADATA_BYTES_MAX} bytes")
    return plain


def _plain(value: Any, depth: int) -> Any:
    if depth < 0:
        raise ValueError(f"it is nested deeper than {METADATA_DEPTH_MAX} levels")
    if isinstance(value, dict):
        return {_plain(key, depth - 1): _plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, Decimal):
        number = float(value)
        if number in (float("inf"), float("-inf")):
            raise ValueError("it has a number that is too large")
        return number
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        raise ValueError("it has a whole number that is too large")
    if isinstance(value, str) and "\x00" in value:
        raise ValueError("it has a zero character, which cannot be kept")
    return value


def _printable(value: str) -> str:
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise ValueError("it has control characters")
    return value


ExactDecimal = Annotated[
    Decimal,
    BeforeValidator(_exact_number),
    Field(json_schema_extra={"type": "number"}, allow_inf_nan=False, ge=0),
]
Units = Annotated[ExactDecimal, AfterValidator(_quantity), Field(le=UNITS_MAX)]
Exactly = Annotated[Decimal, WithJsonSchema({"type": "number"})]
"""A number in an answer that `exact` writes."""

FutureTime = Annotated[
    AwareDatetime,
    BeforeValidator(_written_out),
    AfterValidator(year_that_fits),
    Field(examples=["2026-04-13T11:00:00Z"]),
]
Metadata = Annotated[
    dict[str, Any],
    BeforeValidator(_metadata),
    Field(description=f"Yours to use: stored and returned, never read. At most {METADATA_BYTES_MAX} bytes of JSON."),
]
Text = Annotated[str, AfterValidator(_printable), Field(max_length=TEXT_LENGTH_MAX)]
Word = Annotated[str, AfterValidator(_printable), Field(min_length=1, max_length=256)]
Thresholds = Annotated[
    tuple[Annotated[int, Field(strict=True, ge=1)], ...], Field(max_length=THRESHOLDS_MAX, examples=[[5000, 1000]])
]
