"""The first tenant, made and shown: what `init` and `demo` have in common."""

import asyncio
import sys
from typing import TYPE_CHECKING

from gateway.cli.shared import print_json

if TYPE_CHECKING:
    from gateway.installation import Installed
    from gateway.settings import Settings


def install_here(settings: "Settings", *, base_url: str, again: bool = False) -> "Installed":
    from gateway.installation import install  # noqa: PLC0415
    from gateway.migrations import migrate  # noqa: PLC0415
    from gateway.stores import require_supported  # noqa: PLC0415

    require_supported(settings.database_url)
    migrate(settings.database_url)
    return asyncio.run(install(settings, base_url=base_url, again=again))


def at_its_address(settings: "Settings", port: int) -> "Settings":
    """*settings* with a public URL: where nobody has named one, the address that is listened on."""
    if settings.public_url is not None:
        return settings
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - it is asked about
    return settings.model_copy(update={"public_url": f"http://{f'[{host}]' if ':' in host else host}:{port}"})


def base_url_of(settings: "Settings", port: int) -> str:
    return f"{at_its_address(settings, port).public_url}/v1"


def print_installed(installed: "Installed") -> None:
    from msgspec.structs import asdict  # noqa: PLC0415

    print_json(asdict(installed))
    sys.stdout.flush()


def curl_line(installed: "Installed") -> str:
    body = '{"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}]}'
    return (
        f"curl -s {installed.base_url}/chat/completions"
        f" -H 'Authorization: Bearer {installed.live_key}' -H 'X-Quota-User: {installed.user}'"
        f" -H 'Content-Type: application/json' -d '{body}'"
    )
