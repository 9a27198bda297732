"""`grant` and `statement`."""

from typing import TYPE_CHECKING, Annotated

import typer

from gateway.cli.shared import (
    ConfigOption,
    JsonOption,
    ModeOption,
    TenantOption,
    credits_text,
    print_json,
    print_table,
    settings_from,
    time_us_of,
    units_of,
    with_books,
)

if TYPE_CHECKING:
    from gateway.installation import Books


def grant(
    *,
    customer: Annotated[str, typer.Argument(help="Your id of the user, cus_…, or app_… for a developer's wallet.")],
    amount: Annotated[str, typer.Argument(metavar="CREDITS", help="Decimal credits, such as 12.5.")],
    mode: ModeOption = "live",
    source: Annotated[str, typer.Option("--source", help="Shown with the block.")] = "operator",
    priority: Annotated[int, typer.Option("--priority", help="Higher burns first.")] = 0,
    expires_at: Annotated[str | None, typer.Option("--expires-at", help="2036-04-13T11:00:00Z; default never.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="The same key grants once.")] = None,
    tenant: TenantOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give credits, as the operator. The customer is created on first use."""
    from gateway.installation import Gift, give, tenant_of, wallet_named  # noqa: PLC0415
    from ledger.outcomes import Granted  # noqa: PLC0415

    gift = Gift(
        amount=units_of(amount, "CREDITS"),
        source=source,
        priority=priority,
        expires_at_us=None if expires_at is None else time_us_of(expires_at),
        key=key,
    )

    async def work(books: "Books") -> tuple[str, Granted]:
        owner = await tenant_of(books, tenant)
        wallet = await wallet_named(books, owner, mode, customer, create=True)
        return wallet.wallet, await give(books, wallet, gift)

    wallet, granted = with_books(settings_from(config), work)
    if as_json:
        print_json(
            {
                "wallet": wallet,
                "block_id": granted.block_id,
                "amount_decimal": credits_text(granted.amount),
                "balance_decimal": credits_text(granted.balance_after),
            }
        )
    else:
        typer.echo(
            f"Granted {credits_text(granted.amount)} credits: {wallet} has {credits_text(granted.balance_after)}."
        )


def statement(
    *,
    customer: Annotated[str, typer.Argument(help="Your id of the user, cus_…, or app_… for a developer's wallet.")],
    mode: ModeOption = "live",
    limit: Annotated[int, typer.Option("--limit", min=1, max=200, help="The newest so many lines.")] = 50,
    tenant: TenantOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """What went into a wallet and out of it, newest first."""
    from gateway.api.credits import TransactionView, statement_of, wallet_now  # noqa: PLC0415
    from gateway.installation import tenant_of, wallet_named  # noqa: PLC0415
    from pricing.money import CREDIT  # noqa: PLC0415

    async def work(books: "Books") -> tuple[str, int, list[TransactionView]]:
        owner = await tenant_of(books, tenant)
        wallet = await wallet_named(books, owner, mode, customer, create=False)
        view = await wallet_now(books.ledger, wallet, CREDIT)
        page = await statement_of(books.ledger, wallet, CREDIT, cursor=None, limit=limit)
        return wallet.wallet, view.balance, page.data

    wallet, balance, lines = with_books(settings_from(config), work)
    if as_json:
        print_json(
            {"wallet": wallet, "balance_decimal": credits_text(balance), "data": [line.model_dump() for line in lines]}
        )
        return
    rows = [(line.created_at, line.type, line.amount_decimal, line.reference) for line in lines]
    print_table(("time", "what", ">credits", "reference"), rows)
    typer.echo(f"{wallet} has {credits_text(balance)} credits.")
