"""`accounting`."""

import asyncio
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from gateway.cli.shared import ConfigOption, JsonOption, print_json, settings_from

if TYPE_CHECKING:
    from gateway.payments.accounting import Month, Statement
    from gateway.settings import Settings

COLUMNS: Final = ("month", "tenant", "mode", "asset", "line", "amount", "usd")

FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the beginning of a formula."""

accounting = typer.Typer(help="Accounts: a month for the accountant.", no_args_is_help=True)


@accounting.callback()
def group() -> None:
    """Accounts: a month for the accountant."""  # A group of one command would be that command.


@accounting.command("export")
def export(
    *,
    month: Annotated[str, typer.Option("--month", metavar="YYYY-MM", help="A calendar month, UTC.")],
    tenant: Annotated[str | None, typer.Option("--tenant", help="ten_…; default: all tenants.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="A file to write; default: print.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """A month's accounts as CSV: one row a tenant, mode, asset and line. It reads the whole journal."""
    from gateway.payments.accounting import Month  # noqa: PLC0415

    try:
        wanted = Month.parse(month)
    except ValueError:
        raise typer.BadParameter("a month is written like 2026-11", param_hint="--month") from None
    statement = asyncio.run(_statement(settings_from(config), wanted, tenant))
    if as_json:
        print_json([dict(zip(COLUMNS, row, strict=True)) for row in rows_of(statement)])
        return
    text = csv_text(statement)
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_bytes(text.encode())
        typer.echo(f"{len(statement.lines)} lines of {wanted}, from {statement.entries} entries of the journal.")


async def _statement(settings: "Settings", month: "Month", tenant: str | None) -> "Statement":
    from gateway.clock import now_us  # noqa: PLC0415
    from gateway.database import Database  # noqa: PLC0415
    from gateway.identity.tenants import Tenants  # noqa: PLC0415
    from gateway.installation import CannotInstall  # noqa: PLC0415
    from gateway.payments.accounting import Accounts  # noqa: PLC0415
    from gateway.stores import open_store  # noqa: PLC0415

    store = await open_store(settings.database_url, clock=now_us)
    database = Database(settings.database_url)
    try:
        tenants = Tenants(database)
        first = await tenants.first_tenant()
        if first is None:
            raise CannotInstall("There is no tenant yet: run `farebox init` first.")
        if tenant is not None:
            await tenants.tenant(tenant)
        return await Accounts(store, database, operator=first.id).month(month, tenant=tenant)
    finally:
        await store.close()
        await database.close()


def rows_of(statement: "Statement") -> Iterator[tuple[str, ...]]:
    """The cells of `COLUMNS`. Amounts are exact decimals; dollars are empty for what is no asset."""
    for line in statement.lines:
        yield (str(statement.month), line.tenant, line.mode, line.asset, line.line, line.decimal, line.usd or "")


def csv_text(statement: "Statement") -> str:
    """RFC 4180. No text can be taken for a formula; an amount is a number, and may begin with a minus."""
    written = io.StringIO(newline="")
    writer = csv.writer(written, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for *texts, amount, usd in rows_of(statement):
        writer.writerow((*map(harmless, texts), amount, usd))
    return written.getvalue()


def harmless(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA) else text
