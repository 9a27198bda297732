"""The command line. What is slow to import is imported by the command that needs it: `--help` answers at once."""

import sys
from collections.abc import Iterator
from typing import Final

import typer

from gateway.cli.accounting import accounting
from gateway.cli.credits import grant, statement
from gateway.cli.installing import copy, init, migrate, verify
from gateway.cli.keys import keys
from gateway.cli.prices import prices
from gateway.cli.serving import demo, serve
from gateway.cli.shared import EXIT_FAILED
from gateway.cli.stripe import stripe
from gateway.cli.tenants import tenants

CONNECT_ADVICE: Final = "Does the server run, and does database_url name its host and port?"

ADVICE: Final = {
    "08": CONNECT_ADVICE,
    "28": "Look at the user and the password in database_url, and at the server's pg_hba.conf.",
    "3D": "Make the database first: CREATE DATABASE … OWNER …, or name another one in database_url.",
    "42501": "`farebox migrate` wants the owner of the tables, everything else a member of their role: "
    "GRANT farebox_gateway TO …",
}
"""What to do next, by the beginning of PostgreSQL's SQLSTATE."""

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
cli.add_typer(stripe, name="stripe")
cli.add_typer(accounting, name="accounting")


def main() -> None:
    """Run the command line; what can go wrong on the user's side is a sentence, not a traceback."""
    try:
        cli()
    except Exception as error:
        message = explained(error)
        if message is None:
            raise
        typer.echo(message, err=True)
        sys.exit(getattr(error, "exit_code", EXIT_FAILED))


def explained(error: Exception) -> str | None:
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
            said = str(error).partition("\n")[0].rstrip(".")
            return " ".join(filter(None, (f"The database cannot be used: {said}.", _advice(error))))
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
    if (refusal := REFUSALS.translate(error)) is not None:
        return refusal.message
    # What the database refuses its user: the statement that stands beside it is no business of theirs.
    advice = _advice(error)
    return None if advice is None else f"The database refuses it. {advice}"


def _advice(error: Exception) -> str | None:
    for cause in _causes(error):
        if isinstance(cause, OSError):  # TimeoutError is one.
            return CONNECT_ADVICE
        if state := getattr(cause, "sqlstate", None):
            return next((advice for prefix, advice in ADVICE.items() if str(state).startswith(prefix)), None)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """*error* and what it was raised from; SQLAlchemy keeps the driver's own error in an attribute."""
    while error is not None:
        yield error
        error = getattr(error, "orig", None) or error.__cause__
