"""An example of what a JSON schema describes: the arguments of a simulated tool call, the answer in JSON mode."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

DEPTH_MAX: Final = 12
EXAMPLE_BYTES_MAX: Final = 64 * 1024
"""A schema may refer to itself, or to others many times over: deeper or longer than this, the example is null."""
_NODE_BYTES: Final = 16
_TEXT_LENGTH_MAX: Final = 1024

_FORMATS: Final = {
    "date-time": "2024-05-01T12:00:00Z",
    "date": "2024-05-01",
    "time": "12:00:00Z",
    "email": "someone@example.com",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def example(schema: Any, *, text: str = "example") -> Any:
    """A value with the schema's required properties; *text* is what its free strings say.

    Understood are types, enum, const, default, properties, items, references within the schema, the first of a union,
    minimum and lengths; not patterns.
    """
    return _Example(schema, text).of(schema, DEPTH_MAX)


class _Example:
    def __init__(self, root: Any, text: str) -> None:
        self._root = root
        self._text = text
        self._bytes_left = EXAMPLE_BYTES_MAX

    def of(self, schema: Any, depth: int) -> Any:
        self._bytes_left -= _NODE_BYTES
        if not isinstance(schema, Mapping) or depth == 0 or self._bytes_left <= 0:
            return None
        for given in [schema[name] for name in ("const", "default") if name in schema] + _list(schema, "enum"):
            return self._given(given)
        if isinstance(schema.get("$ref"), str):
            return self.of(_referred(schema["$ref"], self._root), depth - 1)
        for alternative in _list(schema, "anyOf") + _list(schema, "oneOf") + _list(schema, "allOf"):
            return self.of(alternative, depth - 1)
        return self._of_type(schema, depth)

    def _of_type(self, schema: Mapping[str, Any], depth: int) -> Any:
        match _type_of(schema):
            case "object":
                properties = schema.get("properties")
                properties = properties if isinstance(properties, Mapping) else {}
                return {name: self.of(properties.get(name, {}), depth - 1) for name in self._required(schema)}
            case "array":
                return self._items(schema.get("items", {}), _natural(schema, "minItems"), depth)
            case "integer" | "number":
                least = schema.get("minimum", 1)
                return least if isinstance(least, int | float) else 1
            case "boolean":
                return True
            case "null":
                return None
            case _:
                return self._given(_FORMATS.get(str(schema.get("format"))) or self._free_text(schema))

    def _items(self, schema: Any, count: int, depth: int) -> list[Any]:
        items: list[Any] = []
        while len(items) < count and self._bytes_left > 0:
            items.append(self.of(schema, depth - 1))
        return items

    def _required(self, schema: Mapping[str, Any]) -> list[str]:
        names = [name for name in _list(schema, "required") if isinstance(name, str)]
        return [name for name in names if self._given(name) is not None]

    def _free_text(self, schema: Mapping[str, Any]) -> str:
        text = self._text.ljust(min(_natural(schema, "minLength"), _TEXT_LENGTH_MAX), ".")
        return text[: _natural(schema, "maxLength")] if "maxLength" in schema else text

    def _given(self, value: Any) -> Any:
        size = len(msgspec.json.encode(value))
        self._bytes_left -= size
        return value if self._bytes_left > 0 else None


def _type_of(schema: Mapping[str, Any]) -> Any:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((one for one in kind if one != "null"), "null")
    if kind is None:
        return "object" if "properties" in schema else "string"
    return kind


def _list(schema: Mapping[str, Any], name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []


def _natural(schema: Mapping[str, Any], name: str) -> int:
    value = schema.get(name, 0)
    return max(0, value) if isinstance(value, int) else 0


def _referred(reference: str, root: Any) -> Any:
    found = root
    for name in reference.removeprefix("#").strip("/").split("/"):
        if name:
            found = found.get(name) if isinstance(found, Mapping) else None
    return found
