"""What the parts of a chat request count, by OpenAI's published formulas.

How it works: message and tool overheads are those of the cookbook's «How to count tokens with tiktoken», images those
of `pricing.images`. What has no published formula counts so that it is rather too much, since this bounds a
reservation: audio by the longest it can last, files by their bytes, everything else as its JSON text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import msgspec

from pricing.encodings import count_text, encoding_for
from pricing.images import ImageRule, image_rule_for, size_of_base64, size_of_data_url
from pricing.money import ceil_div

TOKENS_PER_MESSAGE = 3
TOKENS_PER_NAME = 1
TOKENS_PER_REPLY = 3
"""Every reply is primed with <|start|>assistant<|message|>."""
TOKENS_PER_TOOL_CALL = 8
"""The frame around a call's name and arguments; not published, measured frames are smaller."""

TOOL_TOKENS_O200K = 7
TOOL_TOKENS_CL100K = 10
TOOLS_END_TOKENS = 12
PROPERTIES_TOKENS = 3
PROPERTY_TOKENS = 3
ENUM_TOKENS = -3
ENUM_ITEM_TOKENS = 3

AUDIO_TOKENS_PER_SECOND = 32
"""Google's published rate; OpenAI's is 10."""
WAV_BYTES_PER_SECOND = 8_000
COMPRESSED_AUDIO_BYTES_PER_SECOND = 1_000
"""The lowest rates in use (telephone PCM, 8 kbit/s MP3): an audio of so many bytes lasts at most that long."""
FILE_TOKENS_UNKNOWN = 65_536
"""A file named by an id or a URL: its size is not known."""
FILE_TOKENS_MIN = 2_048
"""A file's page is seen as an image too, so that a small file may count more than its bytes."""


class RequestInvalid(ValueError):
    """A request that cannot be counted because a part of it has the wrong type; *param* says where."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param
        self.message = message


class Rules(msgspec.Struct, frozen=True):
    """How a family of models counts: what two models share here, they share in memory."""

    encoding_name: str
    image_rule: ImageRule
    tool_tokens: int
    key: bytes

    def text(self, text: str) -> int:
        return count_text(text, self.encoding_name)

    def json(self, value: object, where: str) -> int:
        """What is not text counts as its JSON text."""
        if value is None:
            return 0
        return self.text(value if isinstance(value, str) else encoded(value, where).decode())


@lru_cache(maxsize=1024)
def rules_for(model: str) -> Rules:
    name = encoding_for(model)
    image_rule = image_rule_for(model)
    key = blake2b(repr((name, image_rule)).encode(), digest_size=8).digest()
    return Rules(name, image_rule, TOOL_TOKENS_CL100K if name == "cl100k_base" else TOOL_TOKENS_O200K, key)


def decoded(raw: bytes | msgspec.Raw, where: str) -> Any:
    try:
        return msgspec.json.decode(raw)
    except RecursionError:
        raise RequestInvalid(where, "is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise RequestInvalid(where, "is not valid JSON") from None


def encoded(value: object, where: str) -> bytes:
    try:
        return msgspec.json.encode(value)
    except RecursionError:
        raise RequestInvalid(where, "is nested too deeply") from None
    except (TypeError, ValueError, OverflowError):
        raise RequestInvalid(where, "is not JSON") from None


def count_message(raw: bytes | msgspec.Raw, where: str, rules: Rules) -> int:
    message = decoded(raw, where)
    if not isinstance(message, dict):
        raise RequestInvalid(where, "must be an object")
    tokens = TOKENS_PER_MESSAGE
    for key, value in message.items():
        if value is None:
            continue
        match key:
            case "content":
                tokens += _count_content(value, f"{where}.content", rules)
            case "tool_calls":
                tokens += _count_tool_calls(value, f"{where}.tool_calls", rules)
            case "name":
                tokens += TOKENS_PER_NAME + rules.json(value, f"{where}.name")
            case _:
                tokens += rules.json(value, f"{where}.{key}")
    return tokens


def _count_content(content: object, where: str, rules: Rules) -> int:
    if isinstance(content, str):
        return rules.text(content)
    if not isinstance(content, list):
        raise RequestInvalid(where, "must be a string or a list of parts")
    return sum(_count_content_part(part, f"{where}[{index}]", rules) for index, part in enumerate(content))


def _count_content_part(part: object, where: str, rules: Rules) -> int:
    if isinstance(part, str):
        return rules.text(part)
    if not isinstance(part, dict):
        raise RequestInvalid(where, "must be an object")
    kind = part.get("type")
    count = _PARTS.get(kind, _count_unknown) if isinstance(kind, str) else _count_unknown
    return count(part, where, rules)


def _count_text_part(part: Mapping[str, Any], where: str, rules: Rules) -> int:
    return rules.json(part.get("text"), where)


def _count_refusal(part: Mapping[str, Any], where: str, rules: Rules) -> int:
    return rules.json(part.get("refusal"), where)


def _count_unknown(part: Mapping[str, Any], where: str, rules: Rules) -> int:
    return rules.json(part, where)


def _count_image_url(part: Mapping[str, Any], where: str, rules: Rules) -> int:
    image = part.get("image_url")
    holder = image if isinstance(image, dict) else part
    url = holder.get("url", image)
    size = size_of_data_url(url) if isinstance(url, str) else None
    return rules.image_rule.tokens(size, str(holder.get("detail", "auto")))


def _count_image_source(part: Mapping[str, Any], where: str, rules: Rules) -> int:
    """An image as Anthropic's API writes it: {"type": "base64", "data": …} or {"type": "url", …}."""
    source = part.get("source")
    data = source.get("data") if isinstance(source, dict) else None
    return rules.image_rule.tokens(size_of_base64(data) if isinstance(data, str) else None, "auto")


def _count_audio(part: Mapping[str, Any], where: str, rules: Rules) -> int:
    """At most the seconds that so many bytes can hold, at the highest published rate."""
    audio = part.get("input_audio")
    data = audio.get("data") if isinstance(audio, dict) else None
    if not isinstance(data, str):
        return FILE_TOKENS_UNKNOWN
    is_wav = isinstance(audio, dict) and audio.get("format") == "wav"
    bytes_per_second = WAV_BYTES_PER_SECOND if is_wav else COMPRESSED_AUDIO_BYTES_PER_SECOND
    return ceil_div(_base64_bytes(data) * AUDIO_TOKENS_PER_SECOND, bytes_per_second)


def _count_file(part: Mapping[str, Any], where: str, rules: Rules) -> int:
    """One token a byte of a file that comes along: a compressed document unpacks to about four letters a byte."""
    holder = next((part[key] for key in ("file", "source") if isinstance(part.get(key), dict)), part)
    data = holder.get("file_data", holder.get("data"))
    if not isinstance(data, str):
        return FILE_TOKENS_UNKNOWN
    return max(FILE_TOKENS_MIN, _base64_bytes(data)) + rules.json(holder.get("filename"), where)


def _base64_bytes(data: str) -> int:
    return ceil_div(len(data) * 3, 4)


_PARTS: Mapping[str, Callable[[Mapping[str, Any], str, Rules], int]] = {
    "text": _count_text_part,
    "input_text": _count_text_part,
    "output_text": _count_text_part,
    "refusal": _count_refusal,
    "image_url": _count_image_url,
    "input_image": _count_image_url,
    "image": _count_image_source,
    "input_audio": _count_audio,
    "file": _count_file,
    "input_file": _count_file,
    "document": _count_file,
}


def _count_tool_calls(calls: object, where: str, rules: Rules) -> int:
    if not isinstance(calls, list):
        raise RequestInvalid(where, "must be a list")
    tokens = 0
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            name, arguments = function.get("name"), function.get("arguments")
            tokens += rules.json(name, where) + rules.json(arguments, where)
        else:
            tokens += rules.json(call, f"{where}[{index}]")
        tokens += TOKENS_PER_TOOL_CALL
    return tokens


def count_tools(tools: object, where: str, rules: Rules) -> int:
    """OpenAI's published formula for functions. What it says nothing of counts as its JSON text."""
    if not isinstance(tools, list):
        raise RequestInvalid(where, "must be a list")
    if not tools:
        return 0
    return TOOLS_END_TOKENS + sum(_count_tool(tool, f"{where}[{index}]", rules) for index, tool in enumerate(tools))


def _count_tool(tool: object, where: str, rules: Rules) -> int:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return rules.tool_tokens + rules.json(tool, where)
    tokens = rules.tool_tokens + rules.text(f"{function['name']}:{_sentence(function.get('description'))}")
    parameters = function.get("parameters")
    if not isinstance(parameters, dict) or not isinstance(parameters.get("properties", {}), dict):
        return tokens + rules.json(parameters, where)
    properties = parameters.get("properties", {})
    if properties:
        tokens += PROPERTIES_TOKENS
    for key, schema in properties.items():
        tokens += PROPERTY_TOKENS + _count_property(key, schema, where, rules)
    # Definitions that properties refer to are shown to the model as well.
    return tokens + sum(rules.json(parameters.get(key), where) for key in ("$defs", "definitions", "anyOf", "oneOf"))


def _count_property(key: str, schema: object, where: str, rules: Rules) -> int:
    if not isinstance(schema, dict):
        return rules.text(f"{key}:") + rules.json(schema, where)
    tokens = 0
    kind = schema.get("type", "")
    if not isinstance(kind, str):
        tokens += rules.json(kind, where)
        kind = ""
    choices = schema.get("enum")
    if isinstance(choices, list):
        tokens += ENUM_TOKENS + sum(ENUM_ITEM_TOKENS + rules.json(choice, where) for choice in choices)
    tokens += rules.text(f"{key}:{kind}:{_sentence(schema.get('description'))}")
    rest = {name: value for name, value in schema.items() if name not in ("type", "enum", "description")}
    return tokens + (rules.json(rest, where) if rest else 0)


def _sentence(description: object) -> str:
    return description.removesuffix(".") if isinstance(description, str) else ""
