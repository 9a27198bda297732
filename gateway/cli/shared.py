"""What the commands share: their common options, the settings, and how values are read and written."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

import typer

if TYPE_CHECKING:
    from gateway.installation import Books
    from gateway.settings import Settings

T = TypeVar("T")

EXIT_FAILED: Final = 1


ConfigOption = Annotated[Path | None, typer.Option("--config", help="A TOML file; also FAREBOX_CONFIG.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HostOption = Annotated[str | None, typer.Option("--host", help="The address to listen on. Default 127.0.0.1.")]
PortOption = Annotated[int | None, typer.Option("--port", min=0, max=65_535, help="0 takes a free port. Default 8080.")]
TenantOption = Annotated[str | None, typer.Option("--tenant", help="ten_…; default: the first tenant.")]
ModeOption = Annotated[Literal["live", "test"], typer.Option("--mode", help="Live data, or the sandbox's.")]


def settings_from(config: Path | None, **changes: Any) -> "Settings":
    """The settings; *changes* that are not None come from the command line and win."""
    from gateway.settings import load  # noqa: PLC0415

    return load(config).model_copy(update={name: value for name, value in changes.items() if value is not None})


def with_books(settings: "Settings", work: "Callable[[Books], Awaitable[T]]") -> T:
    from gateway.installation import opened  # noqa: PLC0415

    async def run() -> T:
        async with opened(settings) as books:
            return await work(books)

    return asyncio.run(run())


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table for people; right-aligned where a column's name says that it holds numbers."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def units_of(credits: str, param: str) -> int:
    from pricing.money import CREDIT  # noqa: PLC0415

    try:
        return CREDIT.parse(credits)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=param) from None


def credits_text(units: int) -> str:
    from pricing.money import CREDIT  # noqa: PLC0415

    return CREDIT.format(units)


def time_us_of(text: str, param: str = "--expires-at") -> int:
    from gateway.api.wire import time_us, year_that_fits  # noqa: PLC0415

    try:
        at = year_that_fits(datetime.fromisoformat(text))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=param) from None
    if at.tzinfo is None:
        raise typer.BadParameter("say in which time zone: 2036-04-13T11:00:00Z", param_hint=param)
    return time_us(at)
