"""`stripe`."""

from typing import TYPE_CHECKING, Annotated, Final

import typer

from gateway.cli.shared import (
    EXIT_FAILED,
    ConfigOption,
    JsonOption,
    print_json,
    print_table,
    settings_from,
    time_us_of,
    with_books,
)
from gateway.clock import time_text

if TYPE_CHECKING:
    from gateway.installation import Books
    from gateway.payments.comparison import Difference
    from gateway.payments.reconciliation import Report
    from gateway.settings import Settings

DAYS_DEFAULT: Final = 7

EXIT_UNKNOWN: Final = 2
"""Nothing was compared: nobody knows whether the books agree."""

stripe = typer.Typer(help="Stripe: compare its books with ours.", no_args_is_help=True)


@stripe.callback()
def group() -> None:
    """Stripe: compare its books with ours."""


@stripe.command("reconcile")
def reconcile(
    *,
    since: Annotated[str | None, typer.Option("--since", help="2026-11-01T00:00:00Z; default: by --days.")] = None,
    until: Annotated[str | None, typer.Option("--until", help="Before this time; default: now.")] = None,
    days: Annotated[
        int, typer.Option("--days", min=1, help="How far back from --until, without --since.")
    ] = DAYS_DEFAULT,
    repair: Annotated[
        bool, typer.Option("--repair", help="Tell the journal again what it may have missed of a payment.")
    ] = False,
    grace: Annotated[
        int, typer.Option("--grace", min=0, help="Seconds that news of a payment may still be on its way.")
    ] = 0,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare every payment at Stripe with the journal: exit 0, 1 with the differences, or 2 if it could not.

    A payment of this moment may differ because its event is on its way: ask again, or allow it some --grace.
    """
    from gateway.clock import now_us  # noqa: PLC0415
    from gateway.payments.sweeps import DAY_US  # noqa: PLC0415

    until_us = now_us() if until is None else time_us_of(until, "--until")
    since_us = until_us - days * DAY_US if since is None else time_us_of(since, "--since")
    if since_us >= until_us:
        raise typer.BadParameter("--since comes before --until", param_hint="--since")
    settings = settings_from(config)
    try:
        report = with_books(
            settings, lambda books: _report(settings, books, since_us, until_us, repair=repair, grace_s=grace)
        )
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        typer.echo(f"Nothing was compared. {reason}", err=True)
        raise typer.Exit(EXIT_UNKNOWN) from None
    (_print_json if as_json else _print)(report)
    raise typer.Exit(EXIT_FAILED if report.differences else 0)


async def _report(
    settings: "Settings", books: "Books", since_us: int, until_us: int, *, repair: bool, grace_s: int
) -> "Report":
    from gateway.clock import now_us  # noqa: PLC0415
    from gateway.ids import new_id  # noqa: PLC0415
    from gateway.installation import CannotInstall  # noqa: PLC0415
    from gateway.payments.packages import Packages  # noqa: PLC0415
    from gateway.payments.service import open_payments  # noqa: PLC0415

    payments = open_payments(
        settings,
        packages=Packages(settings.packages),
        database=books.database,
        ledger=books.ledger,
        tenants=books.tenants,
        now_us=now_us,
        new_id=new_id,
    )
    if payments is None:
        raise CannotInstall("Stripe is not set up: set stripe_secret_key and stripe_webhook_secret.")
    try:
        return await payments.reconciler.run(since_us, until_us, repair=repair, grace_s=grace_s)
    finally:
        await payments.close()


def _reason(error: Exception) -> str | None:
    """Why nothing was compared; None where it is a fault of ours."""
    from gateway.cli import explained  # noqa: PLC0415
    from gateway.payments.operator import NoOperator  # noqa: PLC0415
    from gateway.payments.processor import ProcessorRefused, ProcessorUnavailable  # noqa: PLC0415

    match error:
        case NoOperator():
            return "There is no tenant yet: run `farebox init` first."
        case ProcessorRefused(status=401 | 403):
            return "Stripe refuses the key, or the key may not read balances and payments: look at stripe_secret_key."
        case ProcessorUnavailable() | ProcessorRefused():
            return f"Stripe did not answer: {str(error).rstrip('.')}. Try again later."
    return explained(error)


def _print_json(report: "Report") -> None:
    """A line for each difference, and a last one that sums up."""
    for difference, mended in _listed(report):
        print_json({**difference.facts, "mended": mended})
    print_json(
        {
            "ok": not report.differences,
            "since": time_text(report.since_us),
            "until": time_text(report.until_us),
            "movements": report.movements,
            "payments": report.payments,
            "entries": report.entries,
            "others": report.others,
            "in_flight": report.in_flight,
            "mended": len(report.mended),
            "differences": len(report.differences),
        }
    )


def _print(report: "Report") -> None:
    rows = [
        (
            f"{difference.kind}{' (mended)' if mended else ''}",
            None if difference.order is None else difference.order.order_id,
            difference.payment_intent,
            difference.expected,
            difference.found,
            _minor(difference, difference.expected_minor),
            _minor(difference, difference.found_minor),
        )
        for difference, mended in _listed(report)
    ]
    if rows:
        columns = ("what", "order", "payment", ">expected", ">found", ">ordered", ">at Stripe")
        print_table(columns, rows)
    typer.echo(
        f"{report.payments} payments and {report.entries} entries compared, {report.others} payments that are not ours,"
        f" {report.in_flight} under way: "
        + (f"{len(report.differences)} differ." if report.differences else "everything agrees.")
    )


def _listed(report: "Report") -> "list[tuple[Difference, bool]]":
    return [(each, False) for each in report.differences] + [(each, True) for each in report.mended]


def _minor(difference: "Difference", amount: int | None) -> str | None:
    from gateway.payments.packages import price_text  # noqa: PLC0415

    if amount is None or difference.currency is None:
        return None
    return f"{price_text(amount, difference.currency)} {difference.currency}"
