"""`GET /docs`: the API on one page of plain HTML, made from `/openapi.json`.

FastAPI's own page fetches its scripts from a CDN, which an installation without internet, or with a strict policy, does
not have. This one needs nothing but itself.
"""

from collections.abc import Iterator, Mapping
from html import escape
from json import dumps
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

STYLE: Final = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1d2129}
h2{margin-top:3rem;border-bottom:1px solid #d0d5dd;text-transform:capitalize}
h3{margin:2rem 0 .3rem;font:600 1rem ui-monospace,monospace}
code,pre{font-family:ui-monospace,monospace;font-size:.875rem}
pre{background:#f4f5f7;padding:.75rem;overflow:auto;border-radius:.4rem}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.25rem .75rem .25rem 0;vertical-align:top}
b{color:#0b57d0}nav a{margin-right:1rem}
@media(prefers-color-scheme:dark){body{background:#15171c;color:#e4e7ec}pre{background:#20242c}b{color:#8ab4f8}}
"""


@router.get("/docs", response_class=HTMLResponse)
async def docs(request: Request) -> HTMLResponse:
    return HTMLResponse(page(request.app.openapi()))


def page(schema: Mapping[str, Any]) -> str:
    """The whole page for an OpenAPI *schema*."""
    groups: dict[str, list[str]] = {}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            tag = operation.get("tags", ["other"])[0]
            groups.setdefault(tag, []).append("".join(_operation(method, path, operation, schema)))
    links = "".join(f'<a href="#{escape(tag)}">{escape(tag)}</a>' for tag in groups)
    sections = "".join(f'<h2 id="{escape(tag)}">{escape(tag)}</h2>{"".join(parts)}' for tag, parts in groups.items())
    info = schema["info"]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>{_text(info.get('description', ''))}"
        f'<p>The same for machines: <a href="/openapi.json">/openapi.json</a></p><nav>{links}</nav>{sections}'
    )


def _operation(method: str, path: str, operation: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h3><b>{escape(method.upper())}</b> {escape(path)}</h3>{_text(operation.get('description', ''))}"
    rows = [
        (f"{parameter['name']} ({parameter['in']})", parameter.get("description", ""))
        for parameter in operation.get("parameters", ())
    ]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    fields = _resolved(body.get("schema", {}), schema)
    rows += [(name, field.get("description", "")) for name, field in fields.get("properties", {}).items()]
    if rows:
        cells = (f"<tr><td><code>{escape(name)}</code><td>{escape(text)}" for name, text in rows)
        yield f"<table>{''.join(cells)}</table>"
    examples = fields.get("examples") or ([body["example"]] if "example" in body else [])
    for example in examples:
        yield f"<pre>{escape(dumps(example, indent=2, ensure_ascii=False))}</pre>"


def _resolved(part: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = part.get("$ref")
    if reference is None:
        return part
    found: Mapping[str, Any] = schema["components"]["schemas"][reference.rpartition("/")[2]]
    return found


def _text(text: str) -> str:
    return "".join(f"<p>{escape(paragraph)}</p>" for paragraph in text.strip().split("\n\n") if paragraph)
