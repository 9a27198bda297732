"""What the domain's exceptions become at the edge. The one place that turns them into HTTP.

A lack of credits is not in the table: who asked knows the asset, and what to do about it; see `unaffordable`.
"""

from typing import Final

from gateway.billing.budgets import BudgetExceeded
from gateway.billing.catalog import MetricNotFound, MetricNotPriced
from gateway.billing.packs import PackArchived
from gateway.billing.reservations import TaskNotFound
from gateway.billing.usage_queries import PeriodTooWide, UsageBehind
from gateway.clock import time_text_or_none
from gateway.database import DatabaseUnavailable
from gateway.errors import (
    ApiError,
    Denomination,
    ErrorTable,
    budget_exceeded,
    idempotency_key_reused,
    insufficient_credits,
    invalid_request,
    ledger_unavailable,
    not_found,
    payments_not_set_up,
    payments_unavailable,
    permission_denied,
    reservation_settled,
    usage_behind,
)
from gateway.payments.checkout import PackageNotFound, PackageWorthless, ReturnUnknown, SandboxNotServed
from gateway.payments.operator import NoOperator
from gateway.payments.processor import ProcessorRefused, ProcessorUnavailable
from gateway.payments.processor_customers import CustomerErased
from ledger.errors import (
    AlreadyExists,
    AssetMismatch,
    InsufficientCredits,
    InvalidAmount,
    KeyReused,
    LedgerUnavailable,
    LimitReached,
    NotFound,
    ReceivableOutstanding,
    ReservationSettled,
    TooManyBlocks,
    WalletFrozen,
)


def _no_metric(message: str) -> ApiError:
    advice = "Set one up with POST /v1/billable-metrics and POST /v1/metering-rules."
    return ApiError("not_found", f"{message} {advice}", param="billable_metric_key")


REFUSALS: Final = ErrorTable(
    {
        DatabaseUnavailable: lambda error: ledger_unavailable(),
        LedgerUnavailable: lambda error: ledger_unavailable(),
        KeyReused: lambda error: idempotency_key_reused(),
        ReservationSettled: lambda error: reservation_settled(error.state.value if error.state else "settled"),
        MetricNotFound: lambda error: _no_metric(f"There is no billable metric {error.key[:64]!r}."),
        MetricNotPriced: lambda error: _no_metric(
            f"The billable metric {error.key[:64]!r} has no metering rule in force."
        ),
        TaskNotFound: lambda error: not_found(f"reservation {error.reservation_id[:64]}"),
        NotFound: lambda error: not_found("such wallet, block or reservation"),
        AlreadyExists: lambda error: invalid_request("It exists already: take a new id."),
        AssetMismatch: lambda error: invalid_request("The wallet holds another asset than the tenant's credits."),
        InvalidAmount: lambda error: invalid_request("An amount or a time is out of bounds."),
        TooManyBlocks: lambda error: invalid_request(
            "The wallet has too many blocks that are not used up: grant fewer, larger ones, or let some expire."
        ),
        PackArchived: lambda error: invalid_request(f"The pack {error.key} is archived: offer another.", param="pack"),
        PeriodTooWide: lambda error: invalid_request(
            "That is more usage than one question can read: ask for whole days, in UTC, for a shorter period, or "
            "without the metadata of single customers.",
            param="from",
        ),
        UsageBehind: lambda error: usage_behind(),
        ProcessorUnavailable: lambda error: payments_unavailable(),
        ProcessorRefused: lambda error: payments_unavailable(),
        NoOperator: lambda error: payments_not_set_up(),
        CustomerErased: lambda error: not_found("such customer: they are being erased"),
        PackageNotFound: lambda error: ApiError(
            "not_found",
            f"There is no package {error.package_id[:64]!r}. GET /v1/packages lists them.",
            param="package_id",
        ),
        PackageWorthless: lambda error: invalid_request(
            "The package brings less than the smallest part of a credit.", param="package_id"
        ),
        SandboxNotServed: lambda error: invalid_request(
            "Payments are live here, and this key is for test data: nobody pays for that with real money."
        ),
        ReturnUnknown: lambda error: invalid_request(
            f"{error.param} must be the absolute URL of a page where the customer goes then.", param=error.param
        ),
        WalletFrozen: lambda error: permission_denied(
            "This wallet is frozen: nothing is taken from it until whoever runs this app lifts that."
        ),
    }
)

UNAFFORDABLE: Final = (InsufficientCredits, LimitReached, ReceivableOutstanding)
"""What is refused for lack of credits, or of what a limit leaves."""


def unaffordable(
    error: InsufficientCredits | LimitReached | ReceivableOutstanding,
    asset: Denomination,
    *,
    top_up_url: str | None = None,
) -> ApiError:
    """402 for one of `UNAFFORDABLE`, in the words of the asset. *top_up_url* is where whoever is short adds credits."""
    if isinstance(error, BudgetExceeded):
        resets_at = time_text_or_none(error.resets_at_us)
        return budget_exceeded(
            error.budget_id, needed=error.needed, available=error.available, asset=asset, resets_at=resets_at
        )
    return insufficient_credits(needed=error.needed, available=error.available, asset=asset, top_up_url=top_up_url)
