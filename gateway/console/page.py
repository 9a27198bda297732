"""How a page leaves the gateway: one HTML document that needs nothing but itself, and headers that hold it to that.

Nothing is loaded from anywhere, no script runs, no other page may frame it, no cache keeps it, and no address of it,
which has a token in it, is told to whoever is visited next.
"""

import base64
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES: Final = Path(__file__).parent / "templates"

_STYLE: Final = (TEMPLATES / "page.css").read_text(encoding="utf-8")
_STYLE_HASH: Final = base64.b64encode(sha256(_STYLE.encode()).digest()).decode()

# Compiled once; nothing is ever added to it.
_ENVIRONMENT: Final = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    auto_reload=False,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

SECURE_TARGETS: Final = "'self' https:"
"""Where a form of ours may lead: to us, and from us to the payment processor's page, whose address it chooses."""

PLAIN_TARGETS: Final = "'self' https: http:"
"""The same, where a stand-in for the payment processor is set up, which may have no TLS."""


def page(
    template: str, *, status: int = 200, retry_after_s: int | None = None, plain_targets: bool = False, **facts: Any
) -> HTMLResponse:
    """The *template* with its *facts*, as an answer."""
    text = _ENVIRONMENT.get_template(template).render(style=Markup(_STYLE), **facts)  # noqa: S704 - our own file
    headers = {
        "Cache-Control": "no-store",
        "Content-Security-Policy": _policy(PLAIN_TARGETS if plain_targets else SECURE_TARGETS),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "X-Robots-Tag": "noindex",
    }
    if retry_after_s is not None:
        headers["Retry-After"] = str(retry_after_s)
    return HTMLResponse(text, status, headers)


def _policy(targets: str) -> str:
    return "; ".join(
        (
            "default-src 'none'",
            f"style-src 'sha256-{_STYLE_HASH}'",
            "img-src data:",
            f"form-action {targets}",
            "base-uri 'none'",
            "frame-ancestors 'none'",
        )
    )
