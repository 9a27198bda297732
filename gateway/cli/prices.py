"""`prices`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli.shared import EXIT_FAILED, ConfigOption, JsonOption, print_json, print_table, settings_from
from gateway.clock import time_text

if TYPE_CHECKING:
    from pricing.book import RateCard

prices = typer.Typer(help="What models cost: list, show, check.", no_args_is_help=True)


@prices.command("list")
def list_prices(
    pattern: Annotated[str, typer.Argument(help="Only models whose name contains this.")] = "",
    provider: Annotated[str | None, typer.Option("--provider", help="Only this provider's.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prices in force now, in dollars a million tokens."""
    from gateway.clock import now_us  # noqa: PLC0415
    from gateway.prices import price_book  # noqa: PLC0415

    cards = price_book(settings_from(config)).models(now_us(), provider=provider)
    found = [_price(card) for card in cards if pattern.lower() in card.model.lower()]
    if as_json:
        print_json(found)
        return
    print_table(
        ("model", "provider", ">input", ">cached", ">output", ">context", ">max output"),
        [
            (
                price["model"],
                price["provider"],
                price["rates"].get("input"),
                price["rates"].get("cached_input"),
                price["rates"].get("output"),
                price["context_window"],
                price["max_output_tokens"],
            )
            for price in found
        ],
    )


@prices.command("show")
def show_price(
    model: Annotated[str, typer.Argument(help="As clients write it.")],
    provider: Annotated[str | None, typer.Option("--provider", help="Whose price.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """All rates of one model, as they are charged now."""
    from gateway.clock import now_us  # noqa: PLC0415
    from gateway.prices import price_book  # noqa: PLC0415

    price = _price(price_book(settings_from(config)).lookup(model, now_us(), provider))
    if as_json:
        print_json(price)
        return
    typer.echo(f"{price['model']} of {price['provider'] or 'any provider'}, price version {price['version']}")
    rows = [(unit, rate, "") for unit, rate in price["rates"].items()]
    for tier in price["tiers"]:
        rows += [(unit, rate, f"above {tier['input_tokens_above']} tokens") for unit, rate in tier["rates"].items()]
    print_table(("unit", ">$ per million", "when"), rows)


@prices.command("check")
def check_prices(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Whether every model in the settings has a price: exit 0, or 1 with those that have none."""
    from gateway.app import configured_upstreams  # noqa: PLC0415
    from gateway.clock import now_us  # noqa: PLC0415
    from gateway.errors import ApiError  # noqa: PLC0415
    from gateway.prices import price_book  # noqa: PLC0415
    from gateway.proxy.routing import Router  # noqa: PLC0415

    settings = settings_from(config)
    router = Router(settings, configured_upstreams(settings), price_book(settings))
    problems: dict[str, str] = {}
    for model in settings.models:
        try:
            router.route(model.name, mode="live", at_us=now_us())
        except ApiError as error:
            problems[model.name] = error.message
    if as_json:
        print_json({"ok": not problems, "models": len(settings.models), "problems": problems})
    else:
        for name, message in problems.items():
            typer.echo(f"{name}: {message}")
        if not problems:
            listed = (
                f"{len(settings.models)} models in the settings: all" if settings.models else "No model listed: all"
            )
            typer.echo(f"{listed} that are served have a price.")
    raise typer.Exit(EXIT_FAILED if problems else 0)


def _price(card: "RateCard") -> dict[str, Any]:
    return {
        "model": card.model,
        "provider": card.provider,
        "version": card.version,
        "effective_from": time_text(card.effective_from_us),
        "rates": _rates(card.rates),
        "tiers": [{"input_tokens_above": tier.input_tokens_above, "rates": _rates(tier.rates)} for tier in card.tiers],
        "context_window": card.context_window,
        "max_output_tokens": card.max_output_tokens,
        "hidden_reasoning": card.hidden_reasoning,
    }


def _rates(rates: Any) -> dict[str, str]:
    """Pico-dollars a unit as dollars a million units, exactly."""
    from pricing.money import format_decimal  # noqa: PLC0415

    return {str(unit): format_decimal(rate, 6) for unit, rate in rates.items()}
