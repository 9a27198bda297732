"""`serve` and `demo`."""

import asyncio
import os
import sys
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli.first_run import at_its_address, base_url_of, curl_line, install_here, print_installed
from gateway.cli.shared import ConfigOption, HostOption, JsonOption, PortOption, settings_from

if TYPE_CHECKING:
    from gateway.installation import Installed
    from gateway.settings import Settings


def serve(
    config: ConfigOption = None,
    host: HostOption = None,
    port: PortOption = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, max=256, help="Processes. Default 1.")] = None,
) -> None:
    """Serve the gateway until SIGTERM, which lets open requests finish and exits with 0.

    With several processes, SIGHUP reads the settings anew and replaces them one by one, without refusing a request.
    """
    from gateway import supervisor  # noqa: PLC0415
    from gateway.migrations import migrate_or_check  # noqa: PLC0415
    from gateway.settings import moves_money  # noqa: PLC0415
    from gateway.stores import require_supported, whereabouts  # noqa: PLC0415

    supervisor.exit_on_sigterm()
    settings = settings_from(config, host=host, port=port, workers=workers)
    require_supported(settings.database_url)
    listener = supervisor.listen(settings.host, settings.port)
    with closing(listener):
        migrate_or_check(settings.database_url)
        typer.echo(f"The books are in {asyncio.run(whereabouts(settings.database_url))}.", err=True)
        if settings.live_upstream is None:
            typer.echo(
                "No upstream is set up: live keys will get 502. Set OPENAI_API_KEY, or name one under [[upstreams]].",
                err=True,
            )
        if settings.stripe_secret_key is not None and not moves_money(settings.stripe_secret_key.get_secret_value()):
            typer.echo("Stripe's key is a test key: live wallets are credited, and no money comes for it.", err=True)
        listens_on = listener.getsockname()[1]
        base_url = base_url_of(settings, listens_on)
        code = supervisor.serve(
            at_its_address(settings, listens_on),
            listener,
            started=lambda: typer.echo(f"Farebox serves {base_url}", err=True),
            reload=lambda: at_its_address(settings_from(config, host=host, port=port, workers=workers), listens_on),
        )
    raise typer.Exit(code)


def demo(host: HostOption = None, port: PortOption = None, as_json: JsonOption = False) -> None:
    """Serve a complete installation with a simulated upstream: nothing to set up, nothing kept.

    With FAREBOX_DATABASE_URL set, that database is used, and used again the next time.
    """
    from gateway import supervisor  # noqa: PLC0415

    supervisor.exit_on_sigterm()
    with ExitStack() as stack:
        settings = _demo_settings(stack, host=host, port=port)
        listener = supervisor.listen(settings.host, settings.port)
        settings = at_its_address(settings, listener.getsockname()[1])
        installed = install_here(settings, base_url=f"{settings.public_url}/v1", again=True)
        announce = print_installed if as_json else _print_demo
        code = supervisor.serve(settings, listener, started=lambda: announce(installed))
    raise typer.Exit(code)


def _demo_settings(stack: ExitStack, *, host: str | None, port: int | None) -> "Settings":
    from gateway.settings import SIMULATED  # noqa: PLC0415

    changes: dict[str, Any] = {
        "host": host,
        "port": port,
        "workers": 1,
        "upstreams": (),
        "models": (),
        "default_upstream": SIMULATED,
        "test_upstream": SIMULATED,
        "rate_limit_per_minute": 0,
        "management_rate_limit_per_minute": 0,
        "webhooks_allow_private": True,
    }
    if not os.environ.get("FAREBOX_DATABASE_URL"):
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="farebox-demo-")))
        changes |= {"database_url": f"sqlite:///{folder / 'farebox.db'}", "journal_dir": folder / "journal"}
    return settings_from(None, **changes)


def _print_demo(installed: "Installed") -> None:
    typer.echo(
        f"""Farebox is running, with a simulated upstream. Ctrl+C ends it.

  base URL   {installed.base_url}
  key        {installed.live_key}
  test key   {installed.test_key}
  admin key  {installed.admin_key}
  user       {installed.user} (1000 credits)

Try it:

  {curl_line(installed)}
"""
    )
    sys.stdout.flush()
