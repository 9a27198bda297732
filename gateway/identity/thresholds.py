"""Below which balances a wallet rings: a setting of the tenant, and of customers who have their own."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

LOW_BALANCE: Final = "low_balance_thresholds"
THRESHOLDS_MAX: Final = 5
"""Of a tenant, or a customer."""


class Thresholds(msgspec.Struct, frozen=True):
    """What settings say of it. Amounts are millicredits; of a customer, None takes the tenant's."""

    low_balance_thresholds: tuple[int, ...] | None = None
    auto_topup_enabled: bool = False
    auto_topup_threshold: int | None = None

    @property
    def top_up(self) -> int | None:
        """Below what credits are bought by themselves; None where the customer has not agreed to it."""
        return self.auto_topup_threshold if self.auto_topup_enabled else None

    @property
    def own(self) -> bool:
        """Whether a customer with these is watched for anything that their tenant's others are not."""
        return self.low_balance_thresholds is not None or self.top_up is not None


def thresholds_of(settings: Mapping[str, Any]) -> Thresholds:
    """What *settings* say. Whoever changes them checks them; what nobody can read says nothing."""
    try:
        return msgspec.convert(settings, Thresholds)
    except msgspec.ValidationError:
        return Thresholds()


def with_thresholds(settings: Mapping[str, Any], thresholds: tuple[int, ...]) -> dict[str, Any]:
    """*settings* of a tenant with other thresholds, or none."""
    return {**settings, LOW_BALANCE: list(thresholds)}
