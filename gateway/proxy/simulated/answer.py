"""What the simulated model says: a pure function of the request.

How it works. A simulated token is a word with the space before it, or a piece of a tool call's arguments. In a stream
each of them is one chunk, and `completion_tokens` is their number, so that a test can count what it was given.
"""

import itertools
import re
from typing import Any, Final

import msgspec

from gateway.proxy.simulated.request import CHUNK_BYTES_MAX, TOKENS_MAX, ChatRequest, Message, Tool
from gateway.proxy.simulated.schema import example

_SENTENCE: Final = (
    "the meter counts each token as it passes and the wallet pays for what was used no more no less so that every"
    " answer costs exactly what its price list says while a small reservation grows with the stream"
)
_WORDS: Final = tuple(f" {word}" for word in _SENTENCE.split())
_TOKEN: Final = re.compile(r"\s*\S+|\s+")
_ARGUMENT_TOKEN: Final = re.compile(r"\w+|\W+")
_EXCERPT_LENGTH: Final = 160
_IMAGE_TOKENS: Final = 85


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    name: str


class Choice(msgspec.Struct, frozen=True):
    """One choice of an answer.

    Attributes:
        tokens: of the content, or of the tool call's arguments.
        reasoning_tokens: those that do not show.
    """

    tokens: tuple[str, ...]
    finish_reason: str
    reasoning_tokens: int
    tool_call: ToolCall | None = None

    @property
    def tokens_count(self) -> int:
        """What it adds to `completion_tokens`; a call's name counts as one token."""
        return len(self.tokens) + self.reasoning_tokens + (self.tool_call is not None)


def answer(request: ChatRequest, *, seed: int) -> tuple[Choice, ...]:
    """The choices for a request, the same for the same request and *seed*."""
    choices_count = request.n or 1
    tool = _tool_to_call(request)
    if tool is not None:
        return tuple(_call(request, tool, seed=seed, index=index) for index in range(choices_count))
    tokens_max = min(request.tokens_limit, TOKENS_MAX // choices_count)
    return tuple(_say(request, seed=seed, index=index, tokens_max=tokens_max) for index in range(choices_count))


def prompt_tokens(request: ChatRequest) -> int:
    """A deterministic count: words, a fixed number for each message and image, and a quarter of the tools' JSON."""
    count = 3
    for message in request.messages:
        count += 4 + message.text.count(" ") + 1
        if isinstance(message.content, list):
            count += _IMAGE_TOKENS * sum(part.get("type") == "image_url" for part in message.content)
        if message.tool_calls:
            count += len(msgspec.json.encode(message.tool_calls)) // 4
    if request.tools:
        count += len(msgspec.json.encode(request.tools)) // 4
    return count


def _say(request: ChatRequest, *, seed: int, index: int, tokens_max: int) -> Choice:
    directive = request.simulate
    reasoning_tokens = min(directive.hidden_reasoning_tokens, tokens_max)
    if directive.chunk_bytes is not None:
        size = min(directive.chunk_bytes, CHUNK_BYTES_MAX // (request.n or 1))
        tokens: tuple[str, ...] = (("lorem ipsum " * (size // 12 + 1))[:size],)
    elif directive.text is None and directive.tokens is not None and request.response_format is None:
        tokens = _words(min(directive.tokens, tokens_max - reasoning_tokens + 1), seed=seed + index)
    else:
        tokens = _tokens_of(_text(request, seed=seed, index=index))
    if request.stop:
        tokens = _stopped(tokens, [request.stop] if isinstance(request.stop, str) else request.stop)
    cut = tokens[: tokens_max - reasoning_tokens]
    return Choice(cut, "stop" if len(cut) == len(tokens) else "length", reasoning_tokens)


def _call(request: ChatRequest, tool: Tool, *, seed: int, index: int) -> Choice:
    assert tool.function is not None
    arguments = msgspec.json.encode(example(tool.function.parameters or {"type": "object"})).decode()
    tokens = tuple(_ARGUMENT_TOKEN.findall(arguments))
    reasoning_tokens = min(request.simulate.hidden_reasoning_tokens, request.tokens_limit)
    cut = tokens[: max(0, request.tokens_limit - reasoning_tokens - 1)]
    if len(cut) < len(tokens):
        finish_reason = "length"
    else:
        # https://platform.openai.com/docs/guides/function-calling: a call that the request forced by name ends with
        # "stop", one that the model chose with "tool_calls".
        finish_reason = "stop" if isinstance(request.tool_choice, dict) else "tool_calls"
    call_id = f"call_{(seed + index) % 16**24:024x}"
    return Choice(cut, finish_reason, reasoning_tokens, ToolCall(call_id, tool.function.name))


def _tool_to_call(request: ChatRequest) -> Tool | None:
    """The function that the answer calls: the named one, else the first. A tool's result is answered in words."""
    functions = [tool for tool in request.tools or [] if tool.type == "function" and tool.function is not None]
    if not functions or request.tool_choice == "none" or request.messages[-1].role in ("tool", "function", "assistant"):
        return None
    named: Any = request.tool_choice.get("function") if isinstance(request.tool_choice, dict) else None
    name = named.get("name") if isinstance(named, dict) else None
    return next((tool for tool in functions if tool.function is not None and tool.function.name == name), functions[0])


def _text(request: ChatRequest, *, seed: int, index: int) -> str:
    directive = request.simulate
    if directive.text is not None:
        return directive.text
    text = _reply_to(request.messages[-1]) + (f" (Variant {index + 1}.)" if index else "")
    if directive.tokens is not None:
        text = "".join(_words(directive.tokens, seed=seed + index))
    if request.response_format is None or request.response_format.type == "text":
        return text
    schema = (request.response_format.json_schema or {}).get("schema")
    value = {"answer": text} if schema is None else example(schema, text=text)
    return msgspec.json.encode(value).decode()


def _reply_to(message: Message) -> str:
    text = message.text
    excerpt = " ".join(text[:_EXCERPT_LENGTH].split()) + (" ..." if len(text) > _EXCERPT_LENGTH else "")
    said_by = "The tool says" if message.role in ("tool", "function") else "You said"
    return f'{said_by}: "{excerpt}". This answer is simulated.'


def _words(count: int, *, seed: int) -> tuple[str, ...]:
    start = seed % len(_WORDS)
    words = itertools.islice(itertools.cycle(_WORDS), start, start + count)
    return tuple(word.lstrip() if position == 0 else word for position, word in enumerate(words))


def _tokens_of(text: str) -> tuple[str, ...]:
    return tuple(_TOKEN.findall(text))


def _stopped(tokens: tuple[str, ...], sequences: list[str]) -> tuple[str, ...]:
    text = "".join(tokens)
    found = [position for sequence in sequences if sequence and (position := text.find(sequence)) >= 0]
    return _tokens_of(text[: min(found)]) if found else tokens
