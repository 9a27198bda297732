"""`init`, `migrate` and `verify`."""

import asyncio

import typer

from gateway.cli.first_run import base_url_of, curl_line, install_here, print_installed
from gateway.cli.shared import EXIT_FAILED, ConfigOption, JsonOption, print_json, settings_from


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
    from gateway.clock import now_us  # noqa: PLC0415
    from gateway.database import Database  # noqa: PLC0415
    from gateway.identity.tenants import Tenants  # noqa: PLC0415
    from gateway.stores import open_store  # noqa: PLC0415
    from ledger.verify import Verified  # noqa: PLC0415
    from ledger.verify import verify as replay  # noqa: PLC0415

    settings = settings_from(config)

    async def run() -> Verified:
        store = await open_store(settings.database_url, clock=now_us)
        database = Database(settings.database_url)
        try:
            first = await Tenants(database).first_tenant()
            return await replay(store, operator=None if first is None else first.id)
        finally:
            await store.close()
            await database.close()

    verified = asyncio.run(run())
    if as_json:
        violations = [{"message": found.message, "facts": found.facts} for found in verified.violations]
        print_json({"ok": not violations, "entries": verified.entries, "violations": violations})
    elif not verified.violations:
        typer.echo(f"{verified.entries} commands replayed: everything holds.")
    else:
        for found in verified.violations:
            typer.echo(f"{found.message}: {', '.join(f'{name}={value}' for name, value in found.facts.items())}")
        typer.echo(f"{len(verified.violations)} violations in {verified.entries} commands.", err=True)
    raise typer.Exit(EXIT_FAILED if verified.violations else 0)
