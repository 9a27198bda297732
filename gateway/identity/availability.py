"""What a tenant has chosen for when the ledger cannot be reached: to be refused, or to be served from an allowance."""

from collections.abc import Mapping
from typing import Any, Final, Literal

Availability = Literal["closed", "open"]

OPEN_ALLOWANCE_DEFAULT: Final = 0
"""What each process may serve without the ledger unless the tenant's settings say otherwise: nothing, which is closed.
"""

_CHOICE: Final = "when_ledger_is_down"
_ALLOWANCE: Final = "open_allowance"


def open_allowance(settings: Mapping[str, Any]) -> int:
    """What a tenant with these *settings* may be served without the ledger, in its asset's smallest unit."""
    if settings.get(_CHOICE, "closed") != "open":
        return 0
    allowance = settings.get(_ALLOWANCE, OPEN_ALLOWANCE_DEFAULT)
    return allowance if isinstance(allowance, int) and not isinstance(allowance, bool) else OPEN_ALLOWANCE_DEFAULT


def with_availability(
    settings: Mapping[str, Any], *, choice: Availability | None, allowance: int | None
) -> dict[str, Any]:
    """*settings* with what is not None of the two changed."""
    changes = {_CHOICE: choice, _ALLOWANCE: allowance}
    return {**settings, **{name: value for name, value in changes.items() if value is not None}}
