"""When a wallet is topped up by itself: what its customer agreed to, and what follows from how things stand. Pure.

Money is in the minor unit of a currency, credits in the smallest unit of the tenant's asset.
"""

import hashlib
from collections.abc import Mapping, Set
from typing import Any, Final, Literal

import msgspec

from gateway.payments.packages import Bought, Package, Packages
from pricing.money import Asset
from pricing.periods import Period, Recurrence, period_at

DEFAULT_CAP_PACKAGES: Final = 10
"""What a month may cost without a cap of the customer's own: so many times the package's price."""

SECOND_US: Final = 1_000_000
HOUR_US: Final = 3600 * SECOND_US

BACK_OFF_US: Final = (HOUR_US, 6 * HOUR_US, 24 * HOUR_US, 72 * HOUR_US)
"""The pause after the first failure, the second, and so on. After one more nothing is tried any more."""

JITTER_PERCENT: Final = 10
"""Each pause is longer or shorter by up to so much."""

LOOK_AGAIN_US: Final = HOUR_US
"""How often a wallet is looked at that nothing was heard of."""

AUTHENTICATION_REQUIRED: Final = "authentication_required"

FINAL_FAILURES: Final = frozenset(
    {AUTHENTICATION_REQUIRED, "lost_card", "pickup_card", "revocation_of_all_authorizations", "stolen_card"}
    | {"revocation_of_authorization", "stop_payment_order"}
)
"""To try these again does not help: the customer has to act. Source: Stripe, «Decline codes»."""

REVERSED: Final = "payment_reversed"
DISPUTED: Final = "payment_disputed"
"""The failures of who has got money of an order back, or disputes it; `REVERSED:ORDER`. To take it again is not for us,
and while the dispute is open for nobody.
"""

_CALENDAR_MONTH: Final = Recurrence(unit="month")

SETTINGS: Final = ("auto_topup_enabled", "auto_topup_threshold", "auto_topup_package", "auto_topup_monthly_cap")


class AutoTopUpSettings(msgspec.Struct, frozen=True):
    """What stands in a customer's settings. The threshold is in millicredits."""

    auto_topup_enabled: bool = False
    auto_topup_threshold: int | None = None
    auto_topup_package: str | None = None
    auto_topup_monthly_cap: int | None = None


class Agreement(msgspec.Struct, frozen=True):
    """That *package* is bought below *threshold*, for no more than *cap_minor* a month."""

    threshold: int
    package: Package
    bought: Bought
    asset: str
    cap_minor: int


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """How things stand. *spent_minor* is what the month's automatic orders come to, those that are open among them."""

    balance: int
    frozen: bool
    spent_minor: int
    has_method: bool
    failures: int
    last_failure: str | None


Reason = Literal["due", "off", "stopped", "not_needed", "no_payment_method", "monthly_cap"]


class Decision(msgspec.Struct, frozen=True):
    """Why something is bought now, if it is `due`, or is not; *look_at_us* is when to look again, if ever."""

    reason: Reason
    look_at_us: int | None = None


class TermsInvalid(Exception):
    """Settings that cannot be agreed to: *setting* names the one that is missing or wrong."""

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(message)
        self.setting = setting


def decide(agreement: Agreement | None, standing: Standing, now_us: int) -> Decision:
    """What follows at *now_us*, where no automatic order of the customer's is open."""
    if agreement is None:
        return Decision("off")
    if stopped(standing.failures, standing.last_failure):
        return Decision("stopped")
    if standing.frozen or standing.balance >= agreement.threshold:
        return Decision("not_needed", now_us + LOOK_AGAIN_US)
    if not standing.has_method:
        return Decision("no_payment_method", now_us + LOOK_AGAIN_US)
    if standing.spent_minor + agreement.package.price_minor > agreement.cap_minor:
        return Decision("monthly_cap", month_of(now_us).end_us)
    return Decision("due")


def agreement_of(settings: Mapping[str, Any], packages: Packages, asset: Asset) -> Agreement | None:
    """What *settings* agree to; None where that is nothing, or cannot be had (any more)."""
    agreed = msgspec.convert({name: settings.get(name, None) or None for name in SETTINGS[1:]}, AutoTopUpSettings)
    package = None if agreed.auto_topup_package is None else packages.find(agreed.auto_topup_package)
    if not settings.get("auto_topup_enabled") or agreed.auto_topup_threshold is None or package is None:
        return None
    bought = package.in_credits(asset)
    if bought.credited <= 0:
        return None
    cap_minor = agreed.auto_topup_monthly_cap
    return Agreement(
        threshold=asset.from_millis(agreed.auto_topup_threshold),
        package=package,
        bought=bought,
        asset=asset.code,
        cap_minor=DEFAULT_CAP_PACKAGES * package.price_minor if cap_minor is None else cap_minor,
    )


def check_terms(settings: Mapping[str, Any], packages: Packages, asset: Asset, *, sent: Set[str]) -> None:
    """Whether *settings*, of which those *sent* are new, can be agreed to.

    Raises:
        TermsInvalid
    """
    package_id, cap_minor = settings.get("auto_topup_package"), settings.get("auto_topup_monthly_cap")
    package = None if package_id is None else packages.find(package_id)
    if package_id is not None and package is None and "auto_topup_package" in sent:
        known = ", ".join(each.id for each in packages)
        raise TermsInvalid("auto_topup_package", f"There is no such package; there are {known}.")
    if package is not None and package.in_credits(asset).credited <= 0:
        raise TermsInvalid("auto_topup_package", "This package brings no credits of yours.")
    if package is not None and cap_minor is not None and cap_minor < package.price_minor:
        raise TermsInvalid(
            "auto_topup_monthly_cap", f"It must be at least the package's price, {package.price_minor} minor units."
        )
    if settings.get("auto_topup_enabled"):
        for name in ("auto_topup_threshold", "auto_topup_package"):
            if settings.get(name) is None:
                raise TermsInvalid(name, f"Automatic top-ups need {name}: set it, or switch them off.")


def month_of(at_us: int) -> Period:
    """The calendar month of *at_us*, in UTC. A cap is for one."""
    return period_at(_CALENDAR_MONTH, at_us)


def stopped(failures: int, last_failure: str | None) -> bool:
    """Whether nothing is tried until the customer pays by themselves, or changes something."""
    if failures == 0:
        return False
    return failures > len(BACK_OFF_US) or last_failure in FINAL_FAILURES or reversal_of(last_failure) is not None


def reversal_of(last_failure: str | None) -> str | None:
    """`REVERSED` or `DISPUTED` where that is what *last_failure* says."""
    kind, _, _ = (last_failure or "").partition(":")
    return kind if kind in (REVERSED, DISPUTED) else None


def next_attempt_us(order_id: str, failures: int, failure: str | None, failed_at_us: int) -> int | None:
    """When to try again after *order_id* failed, the failure number *failures* in a row; None is never.

    It always says the same of one order.
    """
    if stopped(failures, failure):
        return None
    pause_us = BACK_OFF_US[failures - 1]
    drawn = int.from_bytes(hashlib.sha256(order_id.encode()).digest()[:4], "big") % (2 * JITTER_PERCENT + 1)
    return failed_at_us + pause_us * (100 - JITTER_PERCENT + drawn) // 100
