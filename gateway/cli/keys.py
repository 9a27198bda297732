"""`keys`."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gateway.cli.shared import (
    ConfigOption,
    JsonOption,
    TenantOption,
    print_json,
    print_table,
    settings_from,
    with_books,
)
from gateway.clock import time_text

if TYPE_CHECKING:
    from gateway.installation import Books

keys = typer.Typer(help="API keys: list, create, revoke.", no_args_is_help=True)


@keys.command("list")
def list_keys(tenant: TenantOption = None, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """All keys of a tenant, the revoked ones too. The keys themselves are not kept."""
    from msgspec.structs import asdict  # noqa: PLC0415

    from gateway.installation import tenant_of  # noqa: PLC0415

    async def work(books: "Books") -> list[Any]:
        return await books.tenants.list_keys((await tenant_of(books, tenant)).id)

    found = with_books(settings_from(config), work)
    if as_json:
        print_json([asdict(key) for key in found])
        return
    print_table(
        ("id", "mode", "app", "name", "ends in", "scopes", "revoked"),
        [
            (
                key.id,
                key.mode,
                key.app_id,
                key.name,
                key.last4,
                " ".join(key.scopes),
                "" if key.revoked_at_us is None else time_text(key.revoked_at_us),
            )
            for key in found
        ],
    )


@keys.command("create")
def create_key(
    *,
    mode: Annotated[Literal["live", "test", "admin"], typer.Option("--mode", help="What it reaches.")] = "live",
    app: Annotated[str | None, typer.Option("--app", help="app_…; default: the tenant's only app.")] = None,
    scopes: Annotated[
        list[str] | None, typer.Option("--scope", help="Repeatable. Default: all that its kind usually has.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="To tell it from others.")] = "",
    tenant: TenantOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """A new key, shown this once: only its hash is stored."""
    from msgspec.structs import asdict  # noqa: PLC0415

    from gateway.identity.keys import KeyScope  # noqa: PLC0415
    from gateway.identity.tenants import NewKey  # noqa: PLC0415
    from gateway.installation import app_of, tenant_of  # noqa: PLC0415

    try:
        wanted = None if not scopes else [KeyScope(scope) for scope in scopes]
    except ValueError as error:
        raise typer.BadParameter(f"{error}; known: {', '.join(KeyScope)}", param_hint="--scope") from None

    async def work(books: "Books") -> NewKey:
        owner = await tenant_of(books, tenant)
        app_id = None if mode == "admin" else (await app_of(books, owner, app)).id
        return await books.tenants.create_key(owner.id, mode, app_id=app_id, name=name, scopes=wanted)

    new = with_books(settings_from(config), work)
    if as_json:
        print_json({"key": new.token, **asdict(new.info)})
    else:
        typer.echo(new.token)


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="key_…")],
    tenant: TenantOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a key: every gateway refuses it within a second."""
    from msgspec.structs import asdict  # noqa: PLC0415

    from gateway.identity.tenants import KeyInfo  # noqa: PLC0415
    from gateway.installation import tenant_of  # noqa: PLC0415

    async def work(books: "Books") -> KeyInfo:
        return await books.tenants.revoke_key((await tenant_of(books, tenant)).id, key_id)

    revoked = with_books(settings_from(config), work)
    if as_json:
        print_json(asdict(revoked))
    else:
        typer.echo(f"Revoked {revoked.id}.")
