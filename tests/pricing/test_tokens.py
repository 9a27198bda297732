"""Prompts counted as OpenAI publishes it, hostile ones refused by name; answers counted exactly in any pieces."""

import base64
import itertools
import json
import threading
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pricing import formula, tokens
from pricing.encodings import count_text, encoding
from pricing.formula import (
    FILE_TOKENS_MIN,
    FILE_TOKENS_UNKNOWN,
    TOKENS_PER_MESSAGE,
    TOKENS_PER_NAME,
    TOKENS_PER_REPLY,
    TOKENS_PER_TOOL_CALL,
)
from pricing.tokens import PromptCounter, RequestInvalid, TextCounter

# The messages and tools of OpenAI's cookbook, «How to count tokens with tiktoken», and what its API counted for them.
COOKBOOK_MESSAGES = [
    {
        "role": "system",
        "content": "You are a helpful, pattern-following assistant that translates corporate jargon "
        "into plain English.",
    },
    {"role": "system", "name": "example_user", "content": "New synergies will help drive top-line growth."},
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Things working well together will increase revenue.",
    },
    {
        "role": "system",
        "name": "example_user",
        "content": "Let's circle back when we have more bandwidth to touch base on opportunities "
        "for increased leverage.",
    },
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Let's talk later when we're less busy about how to do better.",
    },
    {
        "role": "user",
        "content": "This late pivot means we don't have time to boil the ocean for the client deliverable.",
    },
]
COOKBOOK_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_current_weather",
            "description": "Get the current weather in a given location",
            "parameters": {
                "type": "object",
                "properties": {
                    "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
                    "unit": {
                        "type": "string",
                        "description": "The unit of temperature to return",
                        "enum": ["celsius", "fahrenheit"],
                    },
                },
                "required": ["location"],
            },
        },
    }
]
COOKBOOK_TOOL_MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant that can answer to questions about the weather."},
    {"role": "user", "content": "What's the weather like in San Francisco?"},
]


@pytest.fixture
def counter() -> PromptCounter:
    return PromptCounter()


def message(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def parts_tokens(counter: PromptCounter, *parts: Any, model: str = "gpt-4o") -> int:
    """What the parts count beside the message around them."""
    frame = TOKENS_PER_REPLY + TOKENS_PER_MESSAGE + count_text("user", "o200k_base")
    return counter.count({"model": model, "messages": [message(list(parts))]}) - frame


@pytest.mark.parametrize(
    ("model", "counted"),
    [("gpt-3.5-turbo", 129), ("gpt-4-0613", 129), ("gpt-4", 129), ("gpt-4o", 124), ("gpt-4o-mini", 124)],
)
def test_the_cookbooks_messages(counter: PromptCounter, model: str, counted: int) -> None:
    assert counter.count({"model": model, "messages": COOKBOOK_MESSAGES}) == counted


@pytest.mark.parametrize(
    ("model", "counted"), [("gpt-3.5-turbo", 105), ("gpt-4", 105), ("gpt-4o", 101), ("gpt-4o-mini", 101)]
)
def test_the_cookbooks_tools(counter: PromptCounter, model: str, counted: int) -> None:
    request = {"model": model, "messages": COOKBOOK_TOOL_MESSAGES, "tools": COOKBOOK_TOOLS}
    assert counter.count(request) == counted
    # The older field holds the functions themselves.
    functions = [tool["function"] for tool in COOKBOOK_TOOLS]
    assert counter.count({"model": model, "messages": COOKBOOK_TOOL_MESSAGES, "functions": functions}) == counted


def test_a_message_by_hand(counter: PromptCounter) -> None:
    assert counter.count({"model": "gpt-4o", "messages": []}) == TOKENS_PER_REPLY
    hello = TOKENS_PER_REPLY + TOKENS_PER_MESSAGE + 1 + 2
    assert counter.count({"model": "gpt-4o", "messages": [message("hello world")]}) == hello
    named = counter.count({"model": "gpt-4o", "messages": [message("hello world", name="world")]})
    assert named == hello + TOKENS_PER_NAME + 1
    assert counter.count({"model": "gpt-4o", "messages": [message(None, refusal=None)]}) == hello - 2


def test_raw_messages_count_as_decoded_ones(counter: PromptCounter) -> None:
    raw = [json.dumps(m, indent=1).encode() for m in COOKBOOK_TOOL_MESSAGES]
    tools = json.dumps(COOKBOOK_TOOLS).encode()
    assert counter.count_messages(raw, tools, "gpt-4o") == 101
    assert counter.count_messages([msgspec.Raw(m) for m in raw], msgspec.Raw(tools), "gpt-4o") == 101


def test_a_tool_call_counts_its_name_and_arguments(counter: PromptCounter) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "hello", "arguments": '{"a":1}'}}
    without = counter.count({"model": "gpt-4o", "messages": [{"role": "assistant", "content": None}]})
    with_call = counter.count(
        {"model": "gpt-4o", "messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    )
    assert with_call - without == TOKENS_PER_TOOL_CALL + 1 + count_text('{"a":1}', "o200k_base")


def test_what_a_schema_nests_is_not_free(counter: PromptCounter) -> None:
    def of(properties: dict[str, Any], **more: Any) -> int:
        function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": properties, **more}}
        return counter.count({"messages": [], "tools": [{"type": "function", "function": function}]})

    nested = {"type": "object", "properties": {"street": {"type": "string", "description": "The street's name " * 9}}}
    assert of({"address": nested}) > of({"address": {"type": "object"}}) + 30
    assert of({"a": {"$ref": "#/$defs/A"}}, **{"$defs": {"A": nested}}) > of({"a": {}}) + 30
    assert of({"a": {"type": ["string", "null"]}}) > of({"a": {"type": "string"}})
    assert of({"a": {"enum": ["yes", "no", 7, None]}}) > of({"a": {}})


SHAPES: list[Any] = [None, 7, [], "x", True, {"properties": 9}, {"enum": 3}]


@pytest.mark.parametrize(
    "tools",
    [
        *([shape] for shape in SHAPES),
        [{"type": "web_search", "filters": {"a": 1}}],
        [{"function": 3}],
        [{"function": {"name": 4}}],
        *([{"function": {"name": "f", "description": shape, "parameters": shape}}] for shape in SHAPES),
        *([{"function": {"name": "f", "parameters": {"properties": {"a": shape}}}}] for shape in SHAPES),
    ],
)
def test_tools_of_any_shape_are_counted(counter: PromptCounter, tools: Any) -> None:
    assert counter.count({"messages": [], "tools": tools}) > TOKENS_PER_REPLY


def test_a_response_format_counts(counter: PromptCounter) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {}}}}
    plain = counter.count({"messages": []})
    assert counter.count({"messages": [], "response_format": schema}) > plain + 10


def test_the_same_bytes_as_tools_and_as_response_format_do_not_mix(counter: PromptCounter) -> None:
    as_format = counter.count_messages([], None, "gpt-4o", response_format=b"[]")
    assert counter.count_messages([], b"[]", "gpt-4o") == TOKENS_PER_REPLY
    assert as_format == TOKENS_PER_REPLY + 1


def png_url(width: int, height: int) -> str:
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\0" * 5000
    return "data:image/png;base64," + base64.b64encode(header).decode()


def image(url: Any, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


@pytest.mark.parametrize(
    ("part", "counted"),
    [
        ({"type": "text", "text": "hello world"}, 2),
        ({"type": "refusal", "refusal": "hello world"}, 2),
        ("hello world", 2),
        (image(png_url(1024, 1024)), 765),
        (image(png_url(1024, 1024), detail="low"), 85),
        (image("https://example.com/x.png"), 1445),
        (image(5), 1445),
        ({"type": "image_url"}, 1445),
        ({"type": "input_image", "image_url": png_url(512, 512)}, 255),
        ({"type": "image", "source": {"type": "base64", "data": png_url(512, 512).partition(",")[2]}}, 255),
        ({"type": "image", "source": None}, 1445),
        ({"type": "input_audio", "input_audio": {"data": "A" * 4000, "format": "wav"}}, 12),
        ({"type": "input_audio", "input_audio": {"data": "A" * 4000, "format": "mp3"}}, 96),
        ({"type": "input_audio", "input_audio": {}}, FILE_TOKENS_UNKNOWN),
        ({"type": "file", "file": {"file_data": "A" * 40_000}}, 30_000),
        ({"type": "file", "file": {"file_data": "A" * 40}}, FILE_TOKENS_MIN),
        ({"type": "file", "file": {"file_id": "file-1"}}, FILE_TOKENS_UNKNOWN),
        ({"type": "file"}, FILE_TOKENS_UNKNOWN),
    ],
)
def test_content_parts(counter: PromptCounter, part: Any, counted: int) -> None:
    assert parts_tokens(counter, part) == counted


@pytest.mark.parametrize("part", [{"type": "new"}, {"type": 5}, {"type": None, "a": [1]}, {"type": ["text"]}, {}])
def test_a_part_of_a_kind_that_nobody_knows_counts_as_its_json(counter: PromptCounter, part: Any) -> None:
    assert parts_tokens(counter, part) == count_text(json.dumps(part, separators=(",", ":")), "o200k_base")


def test_the_models_own_image_formula_counts(counter: PromptCounter) -> None:
    assert parts_tokens(counter, image(png_url(128, 64)), model="gpt-4o-mini") == 8500
    assert parts_tokens(counter, image(png_url(128, 64)), model="gpt-4o") == 255


DEEP = b'{"role":"user","content":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b"5", "messages[1]"),
        (b"null", "messages[1]"),
        (b"[]", "messages[1]"),
        (b"{", "messages[1]"),
        (b"", "messages[1]"),
        (b'{"content":"\xff"}', "messages[1]"),
        (DEEP, "messages[1]"),
        (b'{"content":5}', "messages[1].content"),
        (b'{"content":{"a":1}}', "messages[1].content"),
        (b'{"content":[5]}', "messages[1].content[0]"),
        (b'{"content":["a",null]}', "messages[1].content[1]"),
        (b'{"content":"a","tool_calls":"x"}', "messages[1].tool_calls"),
    ],
)
def test_a_message_of_the_wrong_type_is_refused_by_name(counter: PromptCounter, raw: bytes, param: str) -> None:
    with pytest.raises(RequestInvalid) as refused:
        counter.count_messages([b'{"role":"user","content":"fine"}', raw], None, "gpt-4o")
    assert refused.value.param == param


@pytest.mark.parametrize("messages", [None, 5, "hello", {"role": "user"}])
def test_messages_must_be_a_list(counter: PromptCounter, messages: Any) -> None:
    with pytest.raises(RequestInvalid) as refused:
        counter.count({"messages": messages})
    assert refused.value.param == "messages"


@pytest.mark.parametrize("tools", [b"5", b"{}", b"[", b'"x"', b"[" * 100_000])
def test_tools_must_be_a_list(counter: PromptCounter, tools: bytes) -> None:
    with pytest.raises(RequestInvalid) as refused:
        counter.count_messages([], tools, "gpt-4o")
    assert refused.value.param == "tools"


def test_too_many_messages_are_refused(counter: PromptCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MESSAGES_MAX", 2)
    with pytest.raises(RequestInvalid):
        counter.count_messages([b"{}"] * 3, None, "gpt-4o")


def deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


def test_a_decoded_request_that_is_nested_too_deeply_is_refused(counter: PromptCounter) -> None:
    with pytest.raises(RequestInvalid):
        counter.count({"messages": [{"role": "user", "content": deep(100_000)}]})


def test_what_cannot_be_json_is_refused(counter: PromptCounter) -> None:
    with pytest.raises(RequestInvalid):
        counter.count({"messages": [{"role": "user", "content": object()}]})
    with pytest.raises(RequestInvalid):
        counter.count({"messages": [{"role": "user", "content": "\ud83d"}]})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(
    ["role", "content", "name", "tool_calls", "type", "text", "image_url", "input_audio", "file", "function"]
)


@given(
    st.lists(
        st.dictionaries(fields, json_values | st.lists(st.dictionaries(fields, json_values)), max_size=4), max_size=3
    )
)
def test_any_json_is_counted_or_refused(messages: list[Any]) -> None:
    with suppress(RequestInvalid):
        assert PromptCounter().count({"messages": messages, "tools": messages}) >= TOKENS_PER_REPLY


class Spy:
    """Counts how often a message is really counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counted = 0
        real = formula.count_message

        def spy(*arguments: Any) -> int:
            self.counted += 1
            return real(*arguments)

        monkeypatch.setattr(tokens, "count_message", spy)


def test_a_growing_conversation_counts_only_what_is_new(
    counter: PromptCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    short = [msgspec.json.encode(message(f"message {index}")) for index in range(60)]
    long = [msgspec.json.encode(message(f"message {index} " * 200)) for index in range(3)]
    first = counter.count_messages(short + long, None, "gpt-4o")
    assert spy.counted == 63
    new = msgspec.json.encode(message("new"))
    assert counter.uncounted_bytes([*short, *long, new], "gpt-4o") == len(new)
    second = counter.count_messages([*short, *long, new], None, "gpt-4o-2024-08-06")
    assert spy.counted == 64
    assert second == first + PromptCounter().count_messages([new], None, "gpt-4o") - TOKENS_PER_REPLY


def test_models_that_count_differently_do_not_share_their_memory(counter: PromptCounter) -> None:
    raw = [msgspec.json.encode(message("Привет, как дела?"))]
    assert counter.count_messages(raw, None, "gpt-4o") < counter.count_messages(raw, None, "gpt-4")


def test_the_memory_is_bounded_and_keeps_what_is_used(counter: PromptCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "REMEMBERED_MESSAGES_MAX", 20)
    spy = Spy(monkeypatch)
    kept = b'{"content":"kept"}'
    for index in range(100):
        counter.count_messages([kept, b'{"content":"%d"}' % index], None, "gpt-4o")
    assert len(counter._young) + len(counter._old) <= 20
    assert spy.counted == 101


def test_threads_may_share_a_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "REMEMBERED_MESSAGES_MAX", 8)
    counter = PromptCounter()
    raw = [b'{"content":"message %d"}' % index for index in range(50)]
    right = PromptCounter().count_messages(raw, None, "gpt-4o")
    counted: list[int] = []

    def work() -> None:
        counted.extend(counter.count_messages(raw, None, "gpt-4o") for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(counted) == {right}
    assert len(counted) == 200


prose = st.text(
    alphabet=st.one_of(st.sampled_from("abc DEF, .\n'stll123_-文，。ก😀é\u0301\u200d\t"), st.characters()), max_size=300
)


def split(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("name", ["o200k_base", "cl100k_base"])
@given(text=prose, places=st.lists(st.integers(0, 1000), max_size=20), look=st.booleans())
def test_an_answer_counts_exactly_however_it_is_split(name: str, text: str, places: list[int], look: bool) -> None:
    counter = TextCounter(name)
    fed = ""
    for piece in split(text, places):
        counter.feed(piece)
        fed += piece
        so_far = len(encoding(name).encode_ordinary(fed))
        assert counter.upper_bound >= so_far
        if look:
            assert counter.count >= so_far
            assert counter.exact() == so_far
    assert counter.exact() == len(encoding(name).encode_ordinary(text))


@pytest.mark.parametrize("chars", [1, 3, 7, 50, 3000])
def test_a_long_answer_in_many_languages_counts_exactly(chars: int) -> None:
    text = "The fox isn't here, is it? Привет, мир! 今天天气很好，我们去公园吧。 สวัสดีครับ x_y = {'a': 1}\n\n" * 60
    counter = TextCounter()
    for start in range(0, len(text), chars):
        counter.feed(text[start : start + chars])
    exact = len(encoding("o200k_base").encode_ordinary(text))
    assert counter.exact() == exact
    assert exact <= counter.count <= exact + 200
    assert counter.upper_bound == counter.count


def test_the_bound_tightens_when_it_is_asked_for() -> None:
    counter = TextCounter()
    counter.feed("The quick brown fox jumps")
    assert counter.upper_bound == 25
    assert counter.count == 4 + len(" jumps")
    assert counter.exact() == 5


def test_nothing_is_nothing() -> None:
    counter = TextCounter()
    counter.feed("")
    assert (counter.upper_bound, counter.count, counter.exact()) == (0, 0, 0)


@pytest.mark.parametrize("run", ["a", " ", "文", "=", "\u3000 "])
def test_a_run_without_end_is_counted_within_a_few_tokens_and_forgotten(run: str) -> None:
    text = run * (200_000 // len(run))
    counter = TextCounter()
    for start in range(0, len(text), 997):
        counter.feed(text[start : start + 997])
        assert counter._tail_bytes < tokens.STREAM_TAIL_BYTES_MAX
    exact = sum(len(encoding("o200k_base").encode_ordinary(text[i : i + 50_000])) for i in range(0, len(text), 50_000))
    assert abs(counter.exact() - exact) <= 60


def test_halves_of_a_surrogate_pair_are_put_together() -> None:
    counter = TextCounter()
    counter.feed("x \ud83d")
    counter.feed("\ude00")
    assert counter.exact() == count_text("x 😀", "o200k_base")
    assert counter.upper_bound >= counter.exact()
