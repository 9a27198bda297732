"""The simulated upstream as a pure function: OpenAI's wire format, and each speed and fault that one can ask for."""

import json
from typing import Any

import pytest
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.proxy.simulated import Cut, Hang, Script, Send, Wait, respond, simulate
from gateway.proxy.sse import SSEDecoder

HELLO = [{"role": "user", "content": "Say hello."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"enum": ["C", "F"]},
                "days": {"type": "integer", "minimum": 3},
                "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 2},
                "strict": {"type": ["boolean", "null"]},
                "note": {"type": "string"},
            },
            "required": ["city", "unit", "days", "tags", "strict"],
            "$defs": {"tag": {"anyOf": [{"type": "string", "minLength": 9}, {"type": "null"}]}},
        },
    },
}
STREAM_WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def request(**fields: Any) -> bytes:
    return json.dumps({"model": "gpt-4o-mini", "messages": HELLO, **fields}).encode()


def sent(script: Script) -> bytes:
    return b"".join(step.data for step in script.steps if isinstance(step, Send))


def completion(**fields: Any) -> ChatCompletion:
    script = simulate(request(**fields))
    assert script.status == 200, sent(script)
    assert dict(script.headers)[b"content-length"] == b"%d" % len(sent(script))
    return ChatCompletion.model_validate_json(sent(script))


def events(**fields: Any) -> list[bytes]:
    script = simulate(request(stream=True, **fields))
    assert script.status == 200, sent(script)
    assert b"content-length" not in dict(script.headers)
    decoder = SSEDecoder()
    decoded = [event.data for event in decoder.feed(sent(script)) if event.data is not None]
    assert decoder.remainder == b""
    return decoded


def chunks(**fields: Any) -> list[ChatCompletionChunk]:
    *data, done = events(**fields)
    assert done == b"[DONE]"
    return [ChatCompletionChunk.model_validate_json(one) for one in data]


def error(body: bytes) -> dict[str, Any]:
    script = simulate(body)
    assert script.status == 400
    envelope: dict[str, dict[str, Any]] = json.loads(sent(script))
    assert set(envelope["error"]) == {"message", "type", "param", "code"}
    assert envelope["error"]["type"] == "invalid_request_error"
    return envelope["error"]


def content(stream: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in stream for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def test_a_completion() -> None:
    answer = completion()
    [choice] = answer.choices
    assert (answer.object, answer.model, choice.index, choice.finish_reason) == (
        "chat.completion",
        "gpt-4o-mini",
        0,
        "stop",
    )
    assert choice.message.content == 'You said: "Say hello.". This answer is simulated.'
    assert (choice.message.role, choice.message.refusal, choice.message.annotations) == ("assistant", None, [])
    usage = answer.usage
    assert usage is not None
    assert usage.completion_tokens == len(choice.message.content.split())
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.completion_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens, usage.completion_tokens_details.reasoning_tokens) == (0, 0)


def test_the_same_request_has_the_same_answer() -> None:
    for fields in ({}, STREAM_WITH_USAGE):
        script = simulate(request(**fields))
        assert list(script.steps) == list(script.steps) == list(simulate(request(**fields)).steps)
    assert completion().id != completion(temperature=1).id


def test_a_stream() -> None:
    first, *middle, last = chunks()
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert all(chunk.choices[0].finish_reason is None for chunk in middle)
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("stop", None)
    assert content(middle) == completion().choices[0].message.content
    assert {chunk.id for chunk in middle} == {first.id}
    assert all("usage" not in json.loads(data) for data in events()[:-1])


def test_each_content_chunk_is_a_token() -> None:
    stream = chunks(stream_options={"include_usage": True}, simulate={"tokens": 37})
    tokens = [chunk for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    assert len(tokens) == 37
    assert stream[-1].usage is not None
    assert stream[-1].usage.completion_tokens == 37


def test_usage_is_the_last_chunk_of_a_stream_that_asked_for_it() -> None:
    *before, last = [json.loads(data) for data in events(stream_options={"include_usage": True})[:-1]]
    assert last["choices"] == []
    assert last["usage"] == json.loads(sent(simulate(request())))["usage"]
    assert all("usage" in chunk and chunk["usage"] is None for chunk in before)


def test_choices_take_turns() -> None:
    stream = chunks(n=3, simulate={"tokens": 2})
    assert [chunk.choices[0].index for chunk in stream] == [0, 1, 2] * 4
    whole = completion(n=3, simulate={"tokens": 2}, stream=False)
    assert whole.usage is not None
    assert (len(whole.choices), whole.usage.completion_tokens) == (3, 6)
    assert len({choice.message.content for choice in whole.choices}) == 3


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_the_limit_ends_the_answer(field: str) -> None:
    answer = completion(**{field: 3})
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == 'You said: "Say'
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    stream = chunks(**{field: 3})
    assert stream[-1].choices[0].finish_reason == "length"
    assert content(stream) == 'You said: "Say'


def test_an_answer_of_exactly_the_limit_is_not_cut() -> None:
    assert completion(max_tokens=5, simulate={"tokens": 5}).choices[0].finish_reason == "stop"
    assert completion(max_tokens=5, simulate={"tokens": 6}).choices[0].finish_reason == "length"


def test_reasoning_counts_and_does_not_show() -> None:
    answer = completion(simulate={"tokens": 5, "hidden_reasoning_tokens": 100})
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert (answer.usage.completion_tokens, answer.usage.completion_tokens_details.reasoning_tokens) == (105, 100)
    cut = completion(max_completion_tokens=60, simulate={"tokens": 5, "hidden_reasoning_tokens": 100})
    assert cut.usage is not None
    assert (cut.usage.completion_tokens, cut.choices[0].message.content) == (60, "")
    assert cut.choices[0].finish_reason == "length"


@pytest.mark.parametrize(("stop", "text"), [("hello", 'You said: "Say '), (["zzz", ":", "said"], "You "), ([], None)])
def test_stop_sequences(stop: Any, text: str | None) -> None:
    answer = completion(stop=stop)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == (text or completion().choices[0].message.content)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(chunks(stop=stop)) - 2


def test_a_tool_call() -> None:
    answer = completion(tools=[WEATHER])
    [choice] = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert arguments == {"city": "example", "unit": "C", "days": 3, "tags": ["example.."] * 2, "strict": True}


def test_a_streamed_tool_call_comes_in_fragments() -> None:
    stream = chunks(tools=[WEATHER], stream_options={"include_usage": True})
    deltas = [chunk.choices[0].delta.tool_calls for chunk in stream if chunk.choices]
    assert deltas[0] is not None
    assert deltas[0][0].function is not None
    assert (deltas[0][0].function.name, deltas[0][0].function.arguments, deltas[0][0].type) == (
        "get_weather",
        "",
        "function",
    )
    fragments = [call.function.arguments or "" for delta in deltas[1:] for call in delta or [] if call.function]
    assert len(fragments) > 10
    assert set(json.loads("".join(fragments))) == {"city", "unit", "days", "tags", "strict"}
    assert stream[-2].choices[0].finish_reason == "tool_calls"
    assert stream[-1].usage is not None
    assert stream[-1].usage.completion_tokens == len(fragments) + 1


def test_the_tool_that_is_named_is_called() -> None:
    other = {"type": "function", "function": {"name": "other"}}
    choice = {"type": "function", "function": {"name": "other"}}
    answer = completion(tools=[WEATHER, other], tool_choice=choice)
    assert answer.choices[0].message.tool_calls is not None
    assert answer.choices[0].message.tool_calls[0].type == "function"
    assert answer.choices[0].message.tool_calls[0].function.name == "other"
    assert answer.choices[0].message.tool_calls[0].function.arguments == "{}"


def test_no_tool_is_called_when_it_must_not_be() -> None:
    assert completion(tools=[WEATHER], tool_choice="none").choices[0].message.tool_calls is None
    result = [*HELLO, {"role": "tool", "tool_call_id": "call_1", "content": "22 degrees"}]
    assert completion(tools=[WEATHER], messages=result).choices[0].message.content == (
        'The tool says: "22 degrees". This answer is simulated.'
    )


@pytest.mark.parametrize(
    "parameters",
    [
        {"$ref": "#"},
        {"type": "object", "properties": {"a": {"$ref": "#"}, "b": {"$ref": "#"}}, "required": ["a", "b"]},
        {"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9, "items": {"$ref": "#"}}},
        {"type": 7, "required": "x", "properties": [], "enum": {}, "anyOf": 3, "minItems": "z"},
        {"properties": {"a": {"default": "x" * 100_000}}, "required": ["a"]},
    ],
)
def test_a_hostile_schema_has_a_small_example(parameters: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    answer = completion(tools=[tool])
    assert answer.choices[0].message.tool_calls is not None
    assert answer.choices[0].message.tool_calls[0].type == "function"
    arguments = answer.choices[0].message.tool_calls[0].function.arguments
    json.loads(arguments)
    assert len(arguments) < 256 * 1024


def test_json_mode() -> None:
    answer = completion(response_format={"type": "json_object"})
    assert "Say hello." in json.loads(answer.choices[0].message.content or "")["answer"]
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    answer = completion(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    )
    assert json.loads(answer.choices[0].message.content or "") == {"n": 1}


def test_logprobs() -> None:
    answer = completion(logprobs=True, top_logprobs=2, simulate={"text": "naïve idea"})
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [one.token for one in logprobs.content] == ["naïve", " idea"]
    assert logprobs.content[0].bytes == list("naïve".encode())
    assert [len(one.top_logprobs) for one in logprobs.content] == [2, 2]
    assert all(-20 < one.logprob < 0 for one in logprobs.content)
    streamed = [chunk.choices[0].logprobs for chunk in chunks(logprobs=True, simulate={"text": "naïve idea"})]
    assert [one.content[0].token for one in streamed if one and one.content] == ["naïve", " idea"]


def test_parts_of_a_message_are_read() -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    answer = completion(messages=[{"role": "user", "content": parts}])
    assert "What is this?" in (answer.choices[0].message.content or "")
    without = completion(messages=[{"role": "user", "content": parts[:1]}])
    assert answer.usage is not None
    assert without.usage is not None
    assert answer.usage.prompt_tokens == without.usage.prompt_tokens + 85


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": None}, "messages", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hello"}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"model": 7}, "model", "invalid_value"),
        ({"model": ""}, "model", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10**40}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens", "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "invalid_parameter_combination"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "missing_required_parameter"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"simulate": {"speed": 9}}, "simulate.speed", "unknown_parameter"),
        ({"simulate": {"tokens": 100_001}}, "simulate.tokens", "invalid_value"),
        ({"simulate": {"first_byte_delay_ms": 60_001}}, "simulate.first_byte_delay_ms", "invalid_value"),
        ({"simulate": {"status": 200}}, "simulate.status", "invalid_value"),
        ({"simulate": {"text": "x" * (256 * 1024 + 1)}}, "simulate.text", "invalid_value"),
        ({"simulate": {"extra": {"x": "x" * 65_536}}}, "simulate.extra", "invalid_value"),
    ],
)
def test_a_wrong_request(fields: dict[str, Any], param: str, code: str | None) -> None:
    refused = error(request(**fields))
    assert (refused["param"], refused["code"]) == (param, code)
    assert param.split("[", maxsplit=1)[0] in refused["message"]


def test_a_missing_parameter() -> None:
    refused = error(b'{"model": "gpt-4o"}')
    assert refused["message"] == "Missing required parameter: 'messages'."
    assert (refused["param"], refused["code"]) == ("messages", "missing_required_parameter")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"model":"\xff"}', b"[" * 100_000, b"[]", b"null", b"7"])
def test_a_body_that_is_no_request(body: bytes) -> None:
    assert error(body)["param"] is None


def test_deep_nesting_is_refused_or_ignored() -> None:
    deep = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    script = simulate(b'{"model":"m","messages":[{"role":"user","content":"x"}],"metadata":' + deep + b"}")
    assert script.status in (200, 400)


def test_other_paths() -> None:
    for path in ("/v1/models", "/models"):
        models = json.loads(sent(respond("GET", path, b"")))
        assert [Model.model_validate(model).id for model in models["data"]][:2] == ["gpt-4o", "gpt-4o-mini"]
    assert json.loads(sent(respond("GET", "/v1/models/gpt-9", b"")))["id"] == "gpt-9"
    assert respond("GET", "/v1/chat/completions", b"").status == 405
    assert respond("POST", "/v1/nothing", b"").status == 404
    assert respond("POST", "/v1/chat/completions?x=1", request()).status == 200


# What a request can ask for in its `simulate` object.


def test_usage_is_reported_exactly_as_dictated() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 0, "cost_in_usd_ticks": 5, "prompt_tokens_details": None}
    assert json.loads(sent(simulate(request(simulate={"usage": usage}))))["usage"] == usage
    last = events(stream_options={"include_usage": True}, simulate={"usage": usage})[-2]
    assert json.loads(last)["usage"] == usage
    assert json.loads(last)["choices"] == []


def test_no_usage() -> None:
    assert completion(simulate={"usage": None}).usage is None
    stream = chunks(stream_options={"include_usage": True}, simulate={"usage": None})
    assert all(chunk.choices and chunk.usage is None for chunk in stream)


@pytest.mark.parametrize("fields", [{}, {"stream_options": {"include_usage": True}}])
def test_usage_in_the_last_chunk_with_a_choice(fields: dict[str, Any]) -> None:
    stream = chunks(n=2, simulate={"in_choice_chunk": True}, **fields)
    assert all(chunk.choices for chunk in stream)
    assert [chunk.usage is not None for chunk in stream] == [False] * (len(stream) - 1) + [True]


def test_the_text_is_dictated() -> None:
    text = "  two words\n\n and   more "
    assert completion(simulate={"text": text}).choices[0].message.content == text
    assert content(chunks(simulate={"text": text})) == text
    empty = completion(simulate={"text": ""})
    assert empty.usage is not None
    assert (empty.choices[0].message.content, empty.usage.completion_tokens) == ("", 0)


def test_one_huge_chunk() -> None:
    stream = chunks(simulate={"chunk_bytes": 5_000_000})
    assert [len(chunk.choices[0].delta.content or "") for chunk in stream] == [0, 5_000_000, 0]


def test_extra_fields() -> None:
    extra = {"x_provider": {"region": "eu"}, "service_tier": "flex"}
    answer = json.loads(sent(simulate(request(simulate={"extra": extra}))))
    assert {name: answer[name] for name in extra} == extra
    for data in events(simulate={"extra": extra})[:-1]:
        assert {name: json.loads(data)[name] for name in extra} == extra


def test_echo() -> None:
    body = request(simulate={"echo": True}, unknown={"deep": [1.50, None]})
    assert json.loads(sent(simulate(body)))["echo"] == json.loads(body)
    first, second, *_ = events(simulate={"echo": True})
    assert json.loads(first)["echo"]["stream"] is True
    assert "echo" not in json.loads(second)


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (400, "invalid_request_error", None),
        (401, "invalid_request_error", "invalid_api_key"),
        (418, "invalid_request_error", None),
        (429, "requests", "rate_limit_exceeded"),
        (500, "server_error", None),
        (503, "server_error", None),
        (529, "server_error", None),
    ],
)
def test_an_error_status(status: int, kind: str, code: str | None) -> None:
    script = simulate(request(stream=True, simulate={"status": status, "retry_after": 7}))
    assert script.status == status
    assert dict(script.headers)[b"retry-after"] == b"7"
    failure = json.loads(sent(script))["error"]
    assert (failure["type"], failure["code"], failure["param"]) == (kind, code, None)


def test_refuse() -> None:
    assert list(simulate(request(simulate={"refuse": True})).steps) == [Cut()]
    slowly = simulate(request(simulate={"refuse": True, "first_byte_delay_ms": 5}))
    assert list(slowly.steps) == [Wait(0.005), Cut()]


@pytest.mark.parametrize(("fault", "step"), [("cut_after_chunks", Cut()), ("hang_after_chunks", Hang())])
def test_a_stream_that_breaks_off(fault: str, step: Cut | Hang) -> None:
    whole = list(simulate(request(stream=True)).steps)
    for count in range(len(whole) + 1):
        steps = list(simulate(request(stream=True, simulate={fault: count})).steps)
        assert (len(steps), steps[-1]) == (count + 1, step)
    assert step not in simulate(request(stream=True, simulate={fault: len(whole) + 1})).steps


@pytest.mark.parametrize(("fault", "step"), [("cut_after_chunks", Cut()), ("hang_after_chunks", Hang())])
def test_a_body_that_breaks_off(fault: str, step: Cut | Hang) -> None:
    whole = simulate(request(simulate={fault: 3}))
    [half, last] = list(whole.steps)
    assert last == step
    assert isinstance(half, Send)
    assert 0 < len(half.data) < int(dict(whole.headers)[b"content-length"])
    assert list(simulate(request(simulate={fault: 0})).steps) == [step]


def test_delays() -> None:
    steps = list(simulate(request(stream=True, simulate={"first_byte_delay_ms": 100, "chunk_delay_ms": 20})).steps)
    assert steps[0] == Wait(0.1)
    assert steps[2::2] == [Wait(0.02)] * (len(steps) // 2 - 1)


def test_malformed_events_come_between_good_ones() -> None:
    good = events()
    bad = events(simulate={"malformed_sse": True})
    assert len(bad) > len(good)
    with pytest.raises(json.JSONDecodeError):
        json.loads(bad[2])
    assert bad[-1] == b"[DONE]"


def test_no_done() -> None:
    assert b"[DONE]" not in sent(simulate(request(stream=True, simulate={"no_done": True})))
    assert json.loads(events(simulate={"no_done": True})[-1])["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_split_bytes(stream: bool) -> None:
    steps = list(simulate(request(stream=stream, simulate={"split_bytes": True})).steps)
    assert all(isinstance(step, Send) and len(step.data) == 1 for step in steps)
    assert len(steps) > 500


def test_a_long_stream_is_not_held_in_memory() -> None:
    steps = iter(simulate(request(stream=True, simulate={"tokens": 100_000})).steps)
    assert isinstance(next(steps), Send)
