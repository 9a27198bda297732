"""What a tenant has chosen for when the ledger cannot be reached: to be refused, or to be served from an allowance."""

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

Availability = Literal["closed", "open"]

OPEN_ALLOWANCE_DEFAULT: Final = 0
"""What each process may serve without the ledger unless the tenant's settings say otherwise: nothing, which is closed.
"""

_CHOICE: Final = "when_ledger_is_down"
_ALLOWANCE: Final = "open_allowance"


class Chosen(NamedTuple):
    """As it stands in the settings; *allowance* is in the asset's smallest unit, and counts while it is open."""

    choice: Availability
    allowance: int


def chosen(settings: Mapping[str, Any]) -> Chosen:
    """What a tenant with these *settings* has chosen."""
    allowance = settings.get(_ALLOWANCE, OPEN_ALLOWANCE_DEFAULT)
    known = allowance if isinstance(allowance, int) and not isinstance(allowance, bool) else OPEN_ALLOWANCE_DEFAULT
    return Chosen("open" if settings.get(_CHOICE, "closed") == "open" else "closed", known)


def open_allowance(settings: Mapping[str, Any]) -> int:
    """What a tenant with these *settings* may be served without the ledger, in its asset's smallest unit."""
    choice, allowance = chosen(settings)
    return allowance if choice == "open" else 0


def with_availability(
    settings: Mapping[str, Any], *, choice: Availability | None, allowance: int | None
) -> dict[str, Any]:
    """*settings* with what is not None of the two changed."""
    changes = {_CHOICE: choice, _ALLOWANCE: allowance}
    return {**settings, **{name: value for name, value in changes.items() if value is not None}}
