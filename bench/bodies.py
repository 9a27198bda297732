"""The requests of the benchmarks."""

from typing import Any, Final

import msgspec

_MESSAGES: Final[list[dict[str, Any]]] = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Tell me a short story about a lighthouse keeper who counts ships. " * 3},
]


def _body(*, max_tokens: int, stream: bool) -> bytes:
    body: dict[str, Any] = {
        "model": "gpt-4o-mini",
        "messages": _MESSAGES,
        "max_tokens": max_tokens,
        "temperature": 0.7,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return msgspec.json.encode(body)


BODIES: Final = {
    "json": _body(max_tokens=20, stream=False),
    "stream20": _body(max_tokens=20, stream=True),
    "stream200": _body(max_tokens=200, stream=True),
}
"""By name; a stream has as many chunks of content as its name says."""
