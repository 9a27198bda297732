"""`init`, `migrate`, `verify` and `copy`."""

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Final

import typer

from gateway.cli.first_run import base_url_of, curl_line, install_here, print_installed
from gateway.cli.shared import EXIT_FAILED, ConfigOption, JsonOption, print_json, print_table, settings_from

if TYPE_CHECKING:
    from ledger.verify import Verified

PROGRESS_PAUSE_S: Final = 1.0


def init(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Make the database, the first tenant, its app and keys, and print them: they are shown this once."""
    settings = settings_from(config)
    installed = install_here(settings, base_url=base_url_of(settings, settings.port))
    if as_json:
        print_installed(installed)
        return
    typer.echo(
        f"""Keep these keys: only their hashes are stored.

  live key   {installed.live_key}
  test key   {installed.test_key}
  admin key  {installed.admin_key}
  tenant     {installed.tenant_id}
  app        {installed.app_id}
  user       {installed.user} (1000 credits, live and test)

Start the gateway with `farebox serve`, then:

  {curl_line(installed)}
"""
    )


def migrate(config: ConfigOption = None) -> None:
    """Bring the database's schema up to date. Repeatable, and safe beside others that do the same."""
    from gateway.migrations import migrate as bring_up_to_date  # noqa: PLC0415
    from gateway.stores import require_supported  # noqa: PLC0415

    database_url = settings_from(config).database_url
    require_supported(database_url)
    bring_up_to_date(database_url)
    typer.echo("The database is up to date.")


def verify(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Replay the journal and check every invariant: exit 0, or 1 with the violations."""
    verified = asyncio.run(_verified(settings_from(config).database_url))
    if as_json:
        print_json({"ok": not verified.violations, "entries": verified.entries, "violations": _listed(verified)})
    elif not verified.violations:
        typer.echo(f"{verified.entries} commands replayed: everything holds.")
    else:
        _print_violations(verified)
    raise typer.Exit(EXIT_FAILED if verified.violations else 0)


def copy(
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="URL", envvar="FAREBOX_COPY_TO", help="The empty database; or env:NAME, file:PATH."
        ),
    ],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy everything into an empty database and verify it there. Stop the gateways first."""
    from gateway.copying import copy_installation  # noqa: PLC0415
    from gateway.settings import database_url  # noqa: PLC0415

    source, target = settings_from(config).database_url, database_url(to, source="--to")
    told_at = time.monotonic()

    def tell(table: str, rows: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at > PROGRESS_PAUSE_S:
            told_at = time.monotonic()
            typer.echo(f"{table}: {rows} rows", err=True)

    rows = copy_installation(source, target, progress=tell)
    typer.echo("Copied. Replaying the journal of the copy.", err=True)
    verified = asyncio.run(_verified(target))
    if as_json:
        print_json(
            {
                "ok": not verified.violations,
                "rows": rows,
                "entries": verified.entries,
                "violations": _listed(verified),
            }
        )
    else:
        print_table(("table", ">rows"), sorted(rows.items()))
        if verified.violations:
            _print_violations(verified)
            typer.echo("Do not serve it. `farebox verify` on the source tells whether it was so before.", err=True)
        else:
            typer.echo(
                f"{sum(rows.values())} rows copied, {verified.entries} commands replayed: everything holds. "
                "Serve the copy from now on, with the same journal_dir, and keep the source as a backup."
            )
    raise typer.Exit(EXIT_FAILED if verified.violations else 0)


async def _verified(database_url: str) -> "Verified":
    from gateway.clock import now_us  # noqa: PLC0415
    from gateway.database import Database  # noqa: PLC0415
    from gateway.identity.tenants import Tenants  # noqa: PLC0415
    from gateway.stores import open_store  # noqa: PLC0415
    from ledger.verify import verify as replay  # noqa: PLC0415

    store = await open_store(database_url, clock=now_us)
    database = Database(database_url)
    try:
        first = await Tenants(database).first_tenant()
        return await replay(store, operator=None if first is None else first.id)
    finally:
        await store.close()
        await database.close()


def _listed(verified: "Verified") -> list[dict[str, object]]:
    return [{"message": found.message, "facts": found.facts} for found in verified.violations]


def _print_violations(verified: "Verified") -> None:
    for found in verified.violations:
        typer.echo(f"{found.message}: {', '.join(f'{name}={value}' for name, value in found.facts.items())}")
    typer.echo(f"{len(verified.violations)} violations in {verified.entries} commands.", err=True)
