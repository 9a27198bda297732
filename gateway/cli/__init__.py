"""The command line. What is slow to import is imported by the command that needs it: `--help` answers at once."""

import sys

import typer

from gateway.cli.credits import grant, statement
from gateway.cli.installing import copy, init, migrate, verify
from gateway.cli.keys import keys
from gateway.cli.prices import prices
from gateway.cli.serving import demo, serve
from gateway.cli.shared import EXIT_FAILED
from gateway.cli.tenants import tenants

cli = typer.Typer(
    name="farebox",
    help="The prepaid meter in front of an LLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (serve, demo, init, migrate, verify, copy, grant, statement):
    cli.command()(command)
cli.add_typer(keys, name="keys")
cli.add_typer(tenants, name="tenants")
cli.add_typer(prices, name="prices")


def main() -> None:
    """Run the command line; what can go wrong on the user's side is a sentence, not a traceback."""
    try:
        cli()
    except Exception as error:
        message = _explained(error)
        if message is None:
            raise
        typer.echo(message, err=True)
        sys.exit(getattr(error, "exit_code", EXIT_FAILED))


def _explained(error: Exception) -> str | None:
    """What to tell, or None when it is a fault of ours."""
    from gateway.copying import CannotCopy  # noqa: PLC0415
    from gateway.installation import CannotInstall  # noqa: PLC0415
    from gateway.refusals import REFUSALS  # noqa: PLC0415
    from gateway.settings import SettingsInvalid  # noqa: PLC0415
    from gateway.stores import StoreUnsupported  # noqa: PLC0415
    from gateway.supervisor import CannotListen  # noqa: PLC0415
    from ledger.store.protocol import SchemaMissing, StoreUnavailable  # noqa: PLC0415
    from pricing.book import ModelNotPriced, PriceInvalid  # noqa: PLC0415

    match error:
        case SchemaMissing():
            return "The database has no Farebox in it yet: run `farebox init`, or `farebox migrate`."
        case StoreUnavailable():
            return f"The database cannot be used: {error}."
        case (
            CannotCopy()
            | CannotInstall()
            | CannotListen()
            | ModelNotPriced()
            | PriceInvalid()
            | SettingsInvalid()
            | StoreUnsupported()
        ):
            return str(error)
    refusal = REFUSALS.translate(error)
    return None if refusal is None else refusal.message
