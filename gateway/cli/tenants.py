"""`tenants`."""

from typing import Annotated, Final, Literal

import typer

from gateway.cli.shared import (
    ConfigOption,
    JsonOption,
    credits_text,
    print_json,
    print_table,
    settings_from,
    units_of,
    with_books,
)
from gateway.clock import time_text

DAY_S: Final = 86_400

tenants = typer.Typer(help="Tenants: list, create, change.", no_args_is_help=True)


@tenants.command("list")
def list_tenants(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """All tenants of the installation."""
    from msgspec.structs import asdict  # noqa: PLC0415

    found = with_books(settings_from(config), lambda books: books.tenants.list_tenants())
    if as_json:
        print_json([{**asdict(tenant), "created_at": time_text(tenant.created_at_us)} for tenant in found])
        return
    print_table(
        ("id", "name", "first", ">unfunded limit", ">open allowance", "created"),
        [
            (
                tenant.id,
                tenant.name,
                "yes" if tenant.is_first else "",
                "none" if tenant.unfunded_limit is None else credits_text(tenant.unfunded_limit),
                credits_text(tenant.open_allowance) if tenant.open_allowance else "",
                time_text(tenant.created_at_us),
            )
            for tenant in found
        ],
    )


@tenants.command("create")
def create_tenant(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    unfunded_limit: Annotated[
        str, typer.Option("--unfunded-limit", help="Credits it may burn that you were not paid for.")
    ] = "0",
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """A further tenant. It needs an app and keys next: `farebox keys create --tenant`."""
    from msgspec.structs import asdict  # noqa: PLC0415

    from gateway.installation import add_tenant  # noqa: PLC0415

    limit = units_of(unfunded_limit, "--unfunded-limit")
    tenant = with_books(settings_from(config), lambda books: add_tenant(books, name, unfunded_limit=limit))
    if as_json:
        print_json(asdict(tenant))
    else:
        typer.echo(f"Created {tenant.id}.")


@tenants.command("change")
def change_tenant(
    *,
    tenant_id: Annotated[str, typer.Argument(metavar="TENANT", help="ten_…")],
    when_ledger_is_down: Annotated[
        Literal["closed", "open"] | None,
        typer.Option(
            "--when-ledger-is-down",
            help="While the ledger cannot be reached: refuse (closed), or serve from the allowance (open).",
        ),
    ] = None,
    open_allowance: Annotated[
        str | None,
        typer.Option("--open-allowance", help="Credits that each process may serve before the ledger is back."),
    ] = None,
    default_grant: Annotated[
        str | None,
        typer.Option("--default-grant", help="Credits that each new customer gets, live and test; 0 ends it."),
    ] = None,
    default_grant_days: Annotated[
        int | None,
        typer.Option("--default-grant-days", min=1, help="For how many days they can be spent. Default: for ever."),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change what is given. What is served while the ledger is away is charged when it is back, or owed."""
    from msgspec.structs import asdict  # noqa: PLC0415

    from gateway.identity.default_grant import DefaultGrant  # noqa: PLC0415

    grant: DefaultGrant | Literal["none"] | None = None
    if default_grant is not None:
        amount = units_of(default_grant, "--default-grant")
        life_s = None if default_grant_days is None else default_grant_days * DAY_S
        grant = DefaultGrant(amount=amount, expires_after_s=life_s) if amount else "none"
    elif default_grant_days is not None:
        raise typer.BadParameter("give --default-grant as well", param_hint="--default-grant-days")
    allowance = None if open_allowance is None else units_of(open_allowance, "--open-allowance")
    tenant = with_books(
        settings_from(config),
        lambda books: books.tenants.change_tenant(
            tenant_id, when_ledger_is_down=when_ledger_is_down, open_allowance=allowance, default_grant=grant
        ),
    )
    if as_json:
        print_json(asdict(tenant))
        return
    if tenant.open_allowance:
        typer.echo(f"{tenant.id} is served up to {credits_text(tenant.open_allowance)} credits by each process.")
    else:
        typer.echo(f"{tenant.id} is refused while the ledger cannot be reached.")
    if tenant.default_grant is not None:
        typer.echo(f"Each new customer gets {credits_text(tenant.default_grant.amount)} credits.")
