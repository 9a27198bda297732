"""OpenAI's own SDK, pointed at a gateway with nothing changed but base URL, key and header.

Run as a script, under whichever version of the SDK is on the path: `python sdk.py WORLD_JSON`. Each `check_…` is one
promise; the script prints a line of JSON for the version, then one for each check with its failure or null.
"""

import asyncio
import inspect
import json
import re
import sys
import traceback
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

DECIMAL = re.compile(r"\d+(\.\d+)?")
HELLO: list[Any] = [{"role": "user", "content": "Hello there!"}]
PIXEL = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
WEATHER: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city", "days"],
                "additionalProperties": False,
            },
            "strict": True,
        },
    }
]


@dataclass(frozen=True)
class World:
    """Where the gateways are, and who may use them; *pauper* has no credits, *limited_url* one request a minute."""

    base_url: str
    limited_url: str
    live_key: str
    limited_key: str
    admin_key: str
    user: str
    pauper: str

    def client(self, **changed: Any) -> OpenAI:
        return OpenAI(**self._options(changed))

    def async_client(self, **changed: Any) -> AsyncOpenAI:
        return AsyncOpenAI(**self._options(changed))

    def _options(self, changed: dict[str, Any]) -> dict[str, Any]:
        usual = {
            "base_url": self.base_url,
            "api_key": self.live_key,
            "default_headers": {"X-Quota-User": self.user},
            "max_retries": 0,
        }
        return {**usual, **changed}


def said(chunks: list[Any], index: int = 0) -> str:
    """The text of one choice of a stream."""
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def check_chat(world: World) -> None:
    answer = world.client().chat.completions.create(model="gpt-4o-mini", messages=HELLO)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == 'You said: "Hello there!". This answer is simulated.'
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0


def check_usage_tells_cost_and_balance(world: World) -> None:
    answer = world.client().chat.completions.create(model="gpt-4o-mini", messages=HELLO)
    assert answer.usage is not None
    quota = answer.usage.model_extra
    assert quota is not None
    assert DECIMAL.fullmatch(quota["cost"])
    assert float(quota["cost"]) > 0
    assert DECIMAL.fullmatch(quota["balance"])


def check_stream(world: World) -> None:
    stream = world.client().chat.completions.create(model="gpt-4o-mini", messages=HELLO, stream=True)
    chunks = list(stream)
    assert said(chunks) == 'You said: "Hello there!". This answer is simulated.'
    assert chunks[-1].choices[0].finish_reason == "stop", "the last chunk of a stream without usage has a choice"
    assert all(chunk.choices and chunk.usage is None for chunk in chunks), "the usage that we asked for is hidden"


def check_stream_with_usage(world: World) -> None:
    stream = world.client().chat.completions.create(
        model="gpt-4o-mini", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert said(chunks) == 'You said: "Hello there!". This answer is simulated.'
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == sum(bool(chunk.choices[0].delta.content) for chunk in chunks)
    assert last.usage.model_extra is not None
    assert DECIMAL.fullmatch(last.usage.model_extra["cost"])
    assert DECIMAL.fullmatch(last.usage.model_extra["balance"])


def check_stream_is_not_buffered(world: World) -> None:
    """The first words arrive although the upstream never ends; leaving is the client's right."""
    with world.client().chat.completions.create(
        model="gpt-4o-mini", messages=HELLO, stream=True, extra_body={"simulate": {"hang_after_chunks": 3}}
    ) as stream:
        assert said([next(stream), next(stream), next(stream)]) == "You said:"


def check_stream_helper(world: World) -> None:
    with world.client().chat.completions.stream(model="gpt-4o-mini", messages=HELLO) as stream:
        events = [event.type for event in stream]
        answer = stream.get_final_completion()
    assert "content.delta" in events
    assert answer.choices[0].message.content == 'You said: "Hello there!". This answer is simulated.'


def check_tools(world: World) -> None:
    client = world.client()
    question: Any = [{"role": "user", "content": "What will the weather be in Bern?"}]
    answer = client.chat.completions.create(model="gpt-4o-mini", messages=question, tools=WEATHER)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    call: Any = choice.message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city", "days"}
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
    call_message: Any = choice.message.model_dump(exclude_none=True)
    said_then = client.chat.completions.create(
        model="gpt-4o-mini", messages=[*question, call_message, result], tools=WEATHER
    )
    assert said_then.choices[0].message.content == 'The tool says: "Sunny.". This answer is simulated.'


def check_tools_streamed(world: World) -> None:
    stream = world.client().chat.completions.create(
        model="gpt-4o-mini",
        messages=HELLO,
        tools=WEATHER,
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        stream=True,
    )
    choices = [chunk.choices[0] for chunk in stream]
    calls: list[Any] = [call for choice in choices for call in choice.delta.tool_calls or ()]
    assert calls[0].id
    assert calls[0].function.name == "get_weather"
    assert set(json.loads("".join(call.function.arguments or "" for call in calls))) == {"city", "days"}
    assert len(calls) > 2, "the arguments come in pieces"
    assert choices[-1].finish_reason == "stop"


def check_json_mode(world: World) -> None:
    answer = world.client().chat.completions.create(
        model="gpt-4o-mini", messages=HELLO, response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


class Recipe(BaseModel):
    """What `parse` is asked for."""

    title: str
    minutes: int
    steps: list[str]


def check_parse(world: World) -> None:
    answer = world.client().chat.completions.parse(model="gpt-4o-mini", messages=HELLO, response_format=Recipe)
    assert isinstance(answer.choices[0].message.parsed, Recipe)


def check_two_choices(world: World) -> None:
    answer = world.client().chat.completions.create(model="gpt-4o-mini", messages=HELLO, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.content != answer.choices[1].message.content


def check_two_choices_streamed(world: World) -> None:
    chunks = list(world.client().chat.completions.create(model="gpt-4o-mini", messages=HELLO, n=2, stream=True))
    assert said(chunks, 0) == 'You said: "Hello there!". This answer is simulated.'
    assert said(chunks, 1) == said(chunks, 0) + " (Variant 2.)"


def check_image_in_a_message(world: World) -> None:
    content = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    client = world.client()
    answer = client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": content}])  # type: ignore[list-item, misc]
    plain = client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "What is this?"}])
    assert answer.choices[0].message.content == 'You said: "What is this?". This answer is simulated.'
    assert answer.usage is not None
    assert plain.usage is not None
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens


def check_logprobs(world: World) -> None:
    answer = world.client().chat.completions.create(model="gpt-4o-mini", messages=HELLO, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(token.token for token in logprobs.content) == answer.choices[0].message.content
    assert len(logprobs.content[0].top_logprobs) == 2


def check_max_tokens(world: World) -> None:
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3}):
        answer = world.client().chat.completions.create(model="gpt-4o-mini", messages=HELLO, **limit)  # type: ignore[call-overload]
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3


def check_user_in_the_path(world: World) -> None:
    client = world.client(base_url=f"{world.base_url}/users/{world.user}", default_headers={})
    answer = client.chat.completions.create(model="gpt-4o-mini", messages=HELLO)
    assert answer.choices[0].finish_reason == "stop"


def check_developer_pays_without_a_user(world: World) -> None:
    answer = world.client(default_headers={}).chat.completions.create(model="gpt-4o-mini", messages=HELLO)
    assert answer.choices[0].finish_reason == "stop"


def check_models(world: World) -> None:
    client = world.client()
    assert "gpt-4o-mini" in [model.id for model in client.models.list()]
    assert client.models.retrieve("gpt-4o-mini").id == "gpt-4o-mini"


def check_raw_response_headers(world: World) -> None:
    raw = world.client().chat.completions.with_raw_response.create(model="gpt-4o-mini", messages=HELLO)
    answer = raw.parse()
    assert raw.headers["X-Request-Id"].startswith("req_")
    assert answer._request_id == raw.headers["X-Request-Id"]
    assert answer.usage is not None
    assert answer.usage.model_extra is not None
    assert raw.headers["X-Quota-Cost"] == answer.usage.model_extra["cost"]
    assert raw.headers["X-Quota-Balance"] == answer.usage.model_extra["balance"]
    assert DECIMAL.fullmatch(raw.headers["X-Quota-Reserved"])
    assert float(raw.headers["X-Quota-Reserved"]) >= float(raw.headers["X-Quota-Cost"])


def check_streaming_response_headers(world: World) -> None:
    with world.client().chat.completions.with_streaming_response.create(
        model="gpt-4o-mini", messages=HELLO, stream=True
    ) as raw:
        assert raw.headers["X-Request-Id"].startswith("req_")
        assert DECIMAL.fullmatch(raw.headers["X-Quota-Reserved"])
        lines = [line for line in raw.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


NOVEL = {"deep": [1, 2.25, None, {"ü": "\u2028"}], "big": 2**53 + 1}


def check_unknown_fields_survive(world: World) -> None:
    answer = world.client().chat.completions.create(
        model="gpt-4o-mini",
        messages=[{"role": "user", "content": "Hello", "novel": NOVEL}],  # type: ignore[list-item]
        metadata={"trace": "abc"},
        extra_body={"novel": NOVEL, "simulate": {"echo": True, "extra": {"novel": NOVEL}}},
    )
    assert answer.model_extra is not None
    assert answer.model_extra["novel"] == NOVEL
    received = answer.model_extra["echo"]
    assert received["novel"] == NOVEL
    assert received["metadata"] == {"trace": "abc"}
    assert received["messages"] == [{"role": "user", "content": "Hello", "novel": NOVEL}]


def check_unknown_fields_survive_in_a_stream(world: World) -> None:
    stream = world.client().chat.completions.create(
        model="gpt-4o-mini",
        messages=HELLO,
        stream=True,
        extra_body={"novel": NOVEL, "simulate": {"echo": True, "extra": {"novel": NOVEL}}},
    )
    first, *rest = list(stream)
    assert first.model_extra is not None
    assert first.model_extra["echo"]["novel"] == NOVEL
    assert all(chunk.model_extra is not None and chunk.model_extra["novel"] == NOVEL for chunk in rest)


def check_authentication_error(world: World) -> None:
    for key in ("fb_live_nobody_secret", "sk-something-else", world.live_key[:-1] + "0"):
        with pytest.raises(openai.AuthenticationError) as caught:
            world.client(api_key=key).chat.completions.create(model="gpt-4o-mini", messages=HELLO)
        assert caught.value.code == "invalid_api_key"
        assert caught.value.request_id


def check_permission_denied_error(world: World) -> None:
    with pytest.raises(openai.PermissionDeniedError) as caught:
        world.client(api_key=world.admin_key).chat.completions.create(model="gpt-4o-mini", messages=HELLO)
    assert caught.value.code == "permission_denied"


def check_not_found_error(world: World) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        world.client().chat.completions.create(model="no-such-model", messages=HELLO)
    assert caught.value.code == "model_not_found"


def check_bad_request_error(world: World) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        world.client().chat.completions.create(model="gpt-4o-mini", messages="hello")  # type: ignore[arg-type]
    assert caught.value.param == "messages"


def check_bad_request_of_the_upstream_passes_through(world: World) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        world.client().chat.completions.create(model="gpt-4o-mini", messages=HELLO, temperature=9)
    assert caught.value.param == "temperature"
    assert caught.value.request_id.startswith("req_")  # type: ignore[union-attr]


def check_rate_limit_error(world: World) -> None:
    client = world.client(base_url=world.limited_url, api_key=world.limited_key)
    client.chat.completions.create(model="gpt-4o-mini", messages=HELLO)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="gpt-4o-mini", messages=HELLO)
    assert caught.value.code == "rate_limit_exceeded"
    assert 0 < int(caught.value.response.headers["Retry-After"]) <= 60
    assert caught.value.response.headers["X-RateLimit-Remaining"] == "0"


def check_rate_limit_of_the_upstream(world: World) -> None:
    with pytest.raises(openai.RateLimitError) as caught:
        world.client().chat.completions.create(
            model="gpt-4o-mini", messages=HELLO, extra_body={"simulate": {"status": 429, "retry_after": 7}}
        )
    assert caught.value.response.headers["Retry-After"] == "7"


def check_conflict_and_reuse_of_an_idempotency_key(world: World) -> None:
    client = world.client(default_headers={"X-Quota-User": world.user, "Idempotency-Key": f"sdk-{openai.__version__}"})
    first = client.chat.completions.create(model="gpt-4o-mini", messages=HELLO)
    again = client.chat.completions.with_raw_response.create(model="gpt-4o-mini", messages=HELLO)
    assert again.headers["X-Idempotent-Replayed"] == "true"
    assert again.parse() == first
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(model="gpt-4o-mini", messages=[*HELLO, *HELLO])
    assert caught.value.code == "idempotency_key_reused"


def check_no_credits_is_a_status_error_with_the_facts_and_is_not_retried(world: World) -> None:
    sent: list[Any] = []
    with openai.DefaultHttpxClient(event_hooks={"request": [sent.append]}) as http:
        client = world.client(default_headers={"X-Quota-User": world.pauper}, max_retries=3, http_client=http)
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="gpt-4o-mini", messages=HELLO)
    error = caught.value
    assert error.status_code == 402
    assert error.code == "insufficient_credits"
    assert isinstance(error.body, dict)
    assert error.body["needed"] >= 0
    assert float(error.body["needed_decimal"]) > 0
    assert error.body["available"] == 0
    assert error.body["available_decimal"] == "0"
    assert len(sent) == 1


def check_retries_of_the_sdk_are_charged_once(world: World) -> None:
    """Two refusals of the upstream are retried by the SDK itself; it is the last answer that costs."""
    client = world.client()
    before = balance(client)
    with pytest.raises(openai.InternalServerError) as caught:
        world.client(max_retries=1).chat.completions.create(
            model="gpt-4o-mini", messages=HELLO, extra_body={"simulate": {"status": 500}}
        )
    assert caught.value.status_code == 502
    assert caught.value.code == "upstream_error"
    assert balance(client) == before


def balance(client: OpenAI) -> str:
    """The user's balance, by the Credits API."""
    got: Any = client.get(f"/customers/{client.default_headers['X-Quota-User']}/credits", cast_to=object)
    return str(got["balance_decimal"])


def check_a_stream_that_breaks_is_an_error(world: World) -> None:
    stream = world.client().chat.completions.create(
        model="gpt-4o-mini",
        messages=HELLO,
        stream=True,
        extra_body={"simulate": {"cut_after_chunks": 4, "chunk_delay_ms": 50}},
    )
    chunks: list[Any] = []
    with pytest.raises(openai.APIError) as caught:
        chunks.extend(stream)
    assert said(chunks).startswith("You said:")
    assert caught.value.code == "upstream_error"


async def check_async_chat(world: World) -> None:
    async with world.async_client() as client:
        answers = await asyncio.gather(
            *(
                client.chat.completions.create(
                    model="gpt-4o-mini", messages=[{"role": "user", "content": f"Number {number}"}]
                )
                for number in range(8)
            )
        )
    assert [answer.choices[0].message.content for answer in answers] == [
        f'You said: "Number {number}". This answer is simulated.' for number in range(8)
    ]


async def check_async_stream(world: World) -> None:
    async with world.async_client() as client:
        stream = await client.chat.completions.create(model="gpt-4o-mini", messages=HELLO, stream=True)
        chunks = [chunk async for chunk in stream]
    assert said(chunks) == 'You said: "Hello there!". This answer is simulated.'


async def check_async_parse(world: World) -> None:
    async with world.async_client() as client:
        answer = await client.chat.completions.parse(model="gpt-4o-mini", messages=HELLO, response_format=Recipe)
    assert isinstance(answer.choices[0].message.parsed, Recipe)


async def check_async_errors(world: World) -> None:
    async with world.async_client(api_key="fb_live_nobody_secret") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(model="gpt-4o-mini", messages=HELLO)
    async with world.async_client(default_headers={"X-Quota-User": world.pauper}) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(model="gpt-4o-mini", messages=HELLO, stream=True)
    assert caught.value.status_code == 402


def main() -> None:
    world = World(**json.loads(sys.argv[1]))
    print(json.dumps({"version": openai.__version__, "path": openai.__file__}), flush=True)
    for name, check in sorted(globals().items()):
        if not name.startswith("check_"):
            continue
        failure = None
        try:
            outcome = check(world)
            if inspect.isawaitable(outcome):
                asyncio.run(outcome)  # type: ignore[arg-type]
        except (Exception, pytest.fail.Exception):
            failure = traceback.format_exc()
        print(json.dumps({"check": name, "failure": failure}), flush=True)


if __name__ == "__main__":
    main()
