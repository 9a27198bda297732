"""The meter of a stream, sans-io: what passes, what is held up, what it counts, and how it ends a stream."""

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk

from gateway.proxy.meter import StreamMeter
from gateway.proxy.tally import CHOICE_TOKENS_MAX, TOOL_CALL_TOKENS_MAX
from pricing.encodings import count_text
from pricing.tokens import TextCounter
from pricing.usage import Usage

ENVELOPE = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-mini"}
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "of_theirs": {"x": 1.5}}
QUOTA = {"cost": "0.5", "balance": "2"}
DRY = {"code": "insufficient_credits", "message": "Top up."}
DONE = b"data: [DONE]\n\n"
UNLIMITED = 2**62


def meter(*, wants_usage: bool = False, hidden_reasoning: bool = False) -> StreamMeter:
    return StreamMeter(TextCounter, wants_usage=wants_usage, hidden_reasoning=hidden_reasoning)


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps({**ENVELOPE, **fields}, ensure_ascii=False).encode() + b"\n\n"


def choice(index: int = 0, finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish_reason}


def said(text: str, index: int = 0, **fields: Any) -> bytes:
    return event(choices=[choice(index, content=text)], **fields)


def finished(index: int = 0, reason: str = "stop") -> bytes:
    return event(choices=[choice(index, reason)])


def tokens(text: str) -> int:
    return count_text(text, "o200k_base")


def chunks(data: bytes) -> list[dict[str, Any]]:
    events = [part.removeprefix(b"data: ") for part in data.split(b"\n\n") if part]
    return [ChatCompletionChunk.model_validate_json(part).to_dict() for part in events if part != b"[DONE]"]


# What passes.


def test_all_that_is_covered_passes_as_it_came() -> None:
    stream = [b": keep-alive\n\n", event(choices=[choice(role="assistant", content="")]), said("Hi"), finished()]
    counting = meter()
    for part in stream:
        counting.feed(part)
        assert counting.take(UNLIMITED) == part
    counting.feed(DONE)
    assert counting.take(UNLIMITED) == b""  # Its own turn comes with the charge.
    assert counting.finished
    assert counting.ending(Usage(), QUOTA) == DONE


def test_what_comes_after_done_does_not_pass() -> None:
    counting = meter()
    counting.feed(DONE + said("more"))
    assert counting.take(UNLIMITED) == b""


def test_an_event_that_is_not_covered_waits_and_passes_when_it_is() -> None:
    counting = meter()
    counting.feed(said("one two three") + said(" four"))
    assert counting.take(0) == b""
    assert counting.waiting
    assert counting.take(counting.needed) == said("one two three")
    assert counting.take(counting.needed) == said(" four")
    assert not counting.waiting


def test_what_has_no_text_needs_no_cover() -> None:
    counting = meter()
    opening = event(choices=[choice(role="assistant", content="")])
    counting.feed(opening + finished() + b": a comment\n\n")
    assert counting.take(0) == opening + finished() + b": a comment\n\n"


def test_a_comment_is_no_delivery() -> None:
    counting = meter()
    counting.feed(b": OPENROUTER PROCESSING\n\n")
    assert counting.take(0) == b": OPENROUTER PROCESSING\n\n"
    assert not counting.delivered
    counting.feed(said("Hi"))
    counting.take(UNLIMITED)
    assert counting.delivered


@pytest.mark.parametrize(
    "data",
    [b"not JSON", b"7", b'"text"', b"[]", b'{"choices": 7}', b'{"choices":[7]}', b'{"choices":[{"delta":{"content":'],
)
def test_what_is_no_chunk_is_delivered_and_all_of_it_is_text(data: bytes) -> None:
    counting = meter()
    counting.feed(b"data: " + data + b"\n\n")
    assert counting.take(UNLIMITED) == b"data: " + data + b"\n\n"
    counting.measure()
    assert counting.passed == (tokens(data.decode()), 0) or data in (b"[]", b'{"choices": 7}')
    assert counting.bound >= counting.passed[0]


# What it counts.


def counted(*stream: bytes, **options: Any) -> tuple[int, int]:
    counting = meter(**options)
    counting.feed(b"".join(stream))
    counting.take(UNLIMITED)
    counting.measure()
    return counting.passed


@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        ({"content": "Hello there, world"}, (tokens("Hello there, world"), 0)),
        ({"refusal": "I will not."}, (tokens("I will not."), 0)),
        ({"reasoning_content": "Let me think"}, (0, tokens("Let me think"))),
        ({"reasoning": "Let me think"}, (0, tokens("Let me think"))),
        ({"content": "A", "reasoning": "because"}, (tokens("A"), tokens("because"))),
        ({"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": '{"a":1}'}}]}, (tokens('f{"a":1}'), 0)),
        ({"tool_calls": [{"index": 0, "custom": {"name": "f", "input": "ls"}}]}, (tokens("fls"), 0)),
        ({"function_call": {"name": "f", "arguments": "{}"}}, (tokens("f{}"), 0)),
        ({"content": [{"type": "text", "text": "Hi"}]}, (tokens('[{"type":"text","text":"Hi"}]'), 0)),
        ({"role": "assistant", "content": None, "tool_calls": None}, (0, 0)),
    ],
)
def test_the_texts_of_a_chunk(delta: dict[str, Any], expected: tuple[int, int]) -> None:
    assert counted(event(choices=[choice(**delta)])) == expected


def test_a_text_counts_as_a_whole_however_it_was_split() -> None:
    text = "Tokenisation does not care for chunks, 中文也不, nor does 🎉🎉."
    assert counted(*(said(character) for character in text)) == (tokens(text), 0)


def test_choices_and_tool_calls_count_apart() -> None:
    calls = [{"index": 0, "function": {"arguments": "ab"}}, {"index": 1, "function": {"arguments": "ab"}}]
    stream = [said("ab", 0), said("ab", 1), event(choices=[choice(0, tool_calls=calls)])]
    assert counted(*stream) == (4 * tokens("ab"), 0)


def test_a_chunk_that_looks_like_the_one_before_is_counted_like_it() -> None:
    """Even where its text has what JSON escapes, or another chunk's bytes."""
    texts = ["plain", " more", 'a "quote"', "a \\ line\n", " more", "", '"},"logprobs":null', "é", "\u2028"]
    assert counted(*(said(text) for text in texts)) == (tokens("".join(texts)), 0)
    assert counted(*(said(text, index) for text in texts for index in (0, 1))) == (2 * tokens("".join(texts)), 0)


def test_a_text_in_two_places_is_not_mistaken_for_one() -> None:
    first = b'data: {"choices":[{"delta":{"reasoning":"x","content":"x"}}]}\n\n'
    second = b'data: {"choices":[{"delta":{"reasoning":"x","content":"y"}}]}\n\n'
    assert counted(first, second) == (tokens("xy"), tokens("xx"))
    same = b'data: {"id":"ok","choices":[{"delta":{"content":"ok"}}]}\n\n'
    other = b'data: {"id":"ok","choices":[{"delta":{"content":"okay"}}]}\n\n'
    renamed = b'data: {"id":"ko","choices":[{"delta":{"content":"ok"}}]}\n\n'
    assert counted(same, other, renamed) == (tokens("okokayok"), 0)


def test_between_two_measures_each_event_is_taken_for_one_token() -> None:
    counting = meter()
    counting.feed(said("Hello there, world"))
    counting.take(UNLIMITED)
    assert counting.passed == (1, 0)
    counting.measure()
    assert counting.passed == (4, 0)
    counting.feed(said(" again and again"))
    counting.take(UNLIMITED)
    assert counting.passed == (5, 0)


def test_the_cover_has_room_for_what_the_upstream_counts_beside_the_text() -> None:
    call = event(choices=[choice(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": ""}}])])
    counting = meter()
    counting.feed(call)
    counting.take(UNLIMITED)
    counting.feed(said("a"))
    assert counting.needed == 2 + CHOICE_TOKENS_MAX + TOOL_CALL_TOKENS_MAX
    counting.exact = True
    assert counting.needed == 2


# Usage.


def reported(*stream: bytes, **options: Any) -> StreamMeter:
    counting = meter(**options)
    counting.feed(b"".join(stream) + DONE)
    counting.take(UNLIMITED)
    return counting


def test_a_usage_chunk_is_not_for_a_client_that_did_not_ask() -> None:
    counting = meter()
    counting.feed(said("Hi", usage=None) + event(choices=[], usage=USAGE) + DONE)
    assert counting.take(UNLIMITED) == said("Hi", usage=None)
    assert counting.reported == Usage(input=7, output=5)
    assert counting.ending(Usage(input=7, output=5), QUOTA) == DONE


def test_from_a_chunk_with_both_only_the_usage_is_taken() -> None:
    counting = meter()
    counting.feed(said("Hi", usage=USAGE, extra=[1, 2]) + DONE)
    passed = json.loads(counting.take(UNLIMITED).removeprefix(b"data: "))
    assert passed == {**ENVELOPE, "choices": [choice(content="Hi")], "usage": None, "extra": [1, 2]}
    assert counting.reported == Usage(input=7, output=5)


def test_the_usage_goes_out_last_with_the_charge_to_a_client_that_asked() -> None:
    counting = meter(wants_usage=True)
    counting.feed(said("Hi") + event(choices=[], usage=USAGE, theirs="kept") + DONE)
    assert counting.take(UNLIMITED) == said("Hi")
    ending = counting.ending(Usage(input=7, output=5), QUOTA)
    assert ending.endswith(DONE)
    assert chunks(ending) == [{**ENVELOPE, "choices": [], "usage": {**USAGE, **QUOTA}, "theirs": "kept"}]


def test_usage_in_the_last_chunk_with_choices_goes_out_once_and_its_text_is_covered_first() -> None:
    counting = meter(wants_usage=True)
    last = event(choices=[choice(0, "stop", content=" there")], usage=USAGE)
    counting.feed(said("Hi") + last + DONE)
    assert counting.take(CHOICE_TOKENS_MAX + 2) == said("Hi")
    assert counting.waiting
    assert chunks(counting.take(UNLIMITED)) == [
        {**ENVELOPE, "choices": [choice(0, "stop", content=" there")], "usage": None}
    ]
    assert chunks(counting.ending(Usage(), QUOTA)) == [{**ENVELOPE, "choices": [], "usage": {**USAGE, **QUOTA}}]
    counting.measure()
    assert counting.passed == (tokens("Hi there"), 0)


def test_usage_on_every_chunk_passes_but_for_the_last() -> None:
    """As some upstreams report it, when a client asks for it: the running total."""
    running = [said("a", usage={**USAGE, "completion_tokens": 1}), said("b", usage={**USAGE, "completion_tokens": 2})]
    counting = meter(wants_usage=True)
    counting.feed(b"".join(running) + event(choices=[], usage=USAGE) + DONE)
    assert counting.take(UNLIMITED) == b"".join(running)
    assert counting.reported == Usage(input=7, output=5)


def test_usage_split_over_chunks_is_one_report() -> None:
    first = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 1, "prompt_tokens_details": None})
    last = event(
        choices=[], usage={"completion_tokens": 5, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 3}}
    )
    counting = reported(first, said("Hi"), last, wants_usage=True)
    assert counting.reported == Usage(input=4, cached_input=3, output=5)
    shown = chunks(counting.ending(Usage(), QUOTA))[0]["usage"]
    assert (shown["prompt_tokens"], shown["completion_tokens"]) == (7, 5)


def test_a_reported_zero_is_reported() -> None:
    usage = event(choices=[], usage={"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0})
    assert reported(said("Hi"), usage).reported == Usage()


@pytest.mark.parametrize(
    "usage", [{}, {"prompt_tokens": -1}, {"prompt_tokens": 1.5}, {"prompt_tokens": True}, {"a": 1}]
)
def test_a_report_that_cannot_be_charged_is_none_and_our_count_is_shown(usage: dict[str, Any]) -> None:
    counting = reported(said("Hi"), event(choices=[], usage=usage), wants_usage=True)
    assert counting.reported is None
    assert chunks(counting.ending(Usage(input=3, output=1), QUOTA))[0]["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 1,
        "total_tokens": 4,
        **QUOTA,
    }


def test_a_report_is_stale_when_something_came_after_it() -> None:
    counting = meter()
    counting.feed(said("a"))
    assert not counting.stale
    counting.feed(event(choices=[], usage=USAGE))
    assert not counting.stale
    counting.feed(said("b"))
    assert counting.stale


def test_the_word_usage_in_a_text_is_a_text() -> None:
    stream = [said('{"usage": {"prompt_tokens": 1}}'), event(choices=[], nested={"usage": {"prompt_tokens": 1}})]
    counting = meter()
    counting.feed(b"".join(stream))
    assert counting.take(UNLIMITED) == b"".join(stream)
    assert counting.reported is None


def test_hidden_reasoning_is_what_the_total_holds_beyond_the_rest() -> None:
    usage = event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 17})
    assert reported(usage, hidden_reasoning=True).reported == Usage(input=5, output=2, reasoning=10)
    assert reported(usage).reported == Usage(input=5, output=2)


# The last stretch.


def test_on_the_last_stretch_every_token_that_is_covered_passes() -> None:
    text = [" one", " two", " three", " four", " five"]
    counting = meter()
    counting.exact = True
    counting.feed(b"".join(said(word) for word in text))
    assert counting.take(3) == said(" one") + said(" two") + said(" three")
    assert counting.cut(3) == b""
    counting.measure()
    assert counting.passed == (3, 0)
    assert not counting.waiting


def test_a_large_chunk_is_cut_where_the_cover_ends() -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 200
    counting = meter()
    counting.exact = True
    counting.feed(said("So: ") + event(choices=[choice(0, "stop", content=text)], usage=None, extra="kept"))
    assert counting.take(100) == said("So: ")
    (cut,) = chunks(counting.cut(100))
    delivered = cut["choices"][0]["delta"]["content"]
    assert text.startswith(delivered)
    assert tokens("So: " + delivered) == 100
    assert cut == {
        **ENVELOPE,
        "choices": [{**choice(0, None, content=delivered), "logprobs": None}],
        "usage": None,
        "extra": "kept",
    }
    counting.measure()
    assert counting.passed == (100, 0)


def test_a_tool_call_is_cut_in_its_arguments() -> None:
    arguments = json.dumps({"text": "word " * 300})
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "write", "arguments": arguments}}
    counting = meter()
    counting.exact = True
    counting.feed(event(choices=[choice(tool_calls=[call])]))
    assert counting.take(50) == b""
    (cut,) = chunks(counting.cut(50))
    (part,) = cut["choices"][0]["delta"]["tool_calls"]
    assert (part["id"], part["function"]["name"]) == ("call_1", "write")
    assert arguments.startswith(part["function"]["arguments"])
    assert tokens("write" + part["function"]["arguments"]) == 50


def test_what_is_no_chunk_is_not_cut() -> None:
    counting = meter()
    counting.exact = True
    counting.feed(b"data: " + b"not JSON at all " * 100 + b"\n\n")
    assert counting.take(10) == counting.cut(10) == b""


def test_a_large_chunk_is_encoded_before_it_is_said_to_be_uncovered() -> None:
    counting = meter()
    counting.feed(said("word " * 2_000))
    assert counting.needed <= 2_002 + CHOICE_TOKENS_MAX
    assert counting.take(counting.needed) == said("word " * 2_000)


@pytest.mark.parametrize("exact", [False, True])
def test_text_is_encoded_seldom_until_the_cover_is_nearly_used_up(exact: bool) -> None:
    encoded = 0

    class Watched(TextCounter):
        def exact_with(self, text: str) -> int:
            nonlocal encoded
            encoded += 1
            return super().exact_with(text)

    counting = StreamMeter(Watched, wants_usage=False, hidden_reasoning=False)
    counting.exact = exact
    for _ in range(2_000):
        counting.feed(said(" word"))
        assert counting.take(2_100)
    assert encoded == 0


def test_much_text_is_heavy_until_it_has_passed() -> None:
    counting = meter()
    counting.feed(said("word " * 10_000))
    assert counting.heavy
    counting.take(UNLIMITED)
    assert not counting.heavy


# Endings.


def cut_short(counting: StreamMeter) -> list[dict[str, Any]]:
    ending = counting.cut_short(Usage(input=3, output=1, reasoning=2), QUOTA, DRY)
    assert ending.endswith(DONE)
    return chunks(ending)


def test_a_stream_that_we_stop_ends_with_length_and_the_reason() -> None:
    counting = meter()
    counting.feed(said("Hi", system_fingerprint="fp", theirs="not repeated"))
    counting.take(UNLIMITED)
    end = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert cut_short(counting) == [{**ENVELOPE, "system_fingerprint": "fp", "choices": [end], "quota": DRY}]


def test_only_choices_that_were_seen_and_are_open_are_ended() -> None:
    counting = meter()
    counting.feed(said("a", 0) + said("b", 1) + finished(0) + said("not covered", 2) + finished(1))
    counting.take(2 * CHOICE_TOKENS_MAX + 3)
    counting.cut(0)
    assert [chunk["choices"][0]["index"] for chunk in cut_short(counting)] == [1]


def test_the_end_of_a_chunk_that_was_not_delivered_is_not_an_end() -> None:
    counting = meter()
    counting.exact = True
    counting.feed(said("Hi") + event(choices=[choice(0, "stop", content=" there, all of you")]))
    counting.take(2)
    counting.cut(2)
    assert [chunk["choices"][0]["finish_reason"] for chunk in cut_short(counting)] == ["length"]


def test_a_stream_that_we_stop_tells_what_is_charged_and_not_what_the_upstream_said() -> None:
    counting = meter(wants_usage=True)
    counting.feed(said("Hi " * 100) + event(choices=[], usage=USAGE) + DONE)
    counting.take(1)
    counting.cut(1)
    usage = cut_short(counting)[-1]["usage"]
    assert usage == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "completion_tokens_details": {"reasoning_tokens": 2},
        **QUOTA,
    }


def test_a_stream_that_we_stop_before_anything_has_passed_ends_its_first_choice() -> None:
    counting = meter()
    counting.feed(said("Hi"))
    counting.cut(0)
    end = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert cut_short(counting) == [{**ENVELOPE, "choices": [end], "quota": DRY}]


def test_a_stream_of_nothing_ends_well_formed_too() -> None:
    counting = reported(wants_usage=True)
    assert [chunk["choices"] for chunk in chunks(counting.ending(Usage(), QUOTA))] == [[]]
    assert len(cut_short(meter())) == 1


def test_line_breaks_between_the_fields_of_an_event_do_not_break_what_we_write() -> None:
    counting = meter(wants_usage=True)
    counting.feed(
        b'data: {"id": "x", "choices": [],\ndata: "usage": {"prompt_tokens": 1,\ndata: "completion_tokens": 2}}\n\n'
    )
    counting.feed(DONE)
    ending = counting.ending(Usage(), QUOTA)
    assert ending.count(b"\n\n") == 2
    assert json.loads(ending.split(b"\n\n")[0].removeprefix(b"data: "))["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("end", [b"data: [DONE]", b"data: [DONE]\n", b"data:[DONE]", b"data: [DONE]\r\n"])
def test_a_last_line_without_its_blank_line_is_an_end_all_the_same(end: bytes) -> None:
    counting = meter(wants_usage=True)
    counting.feed(said("Hi") + event(choices=[], usage=USAGE) + end)
    assert not counting.finished
    counting.close()
    assert counting.finished
    assert counting.take(UNLIMITED) == said("Hi")
    assert chunks(counting.ending(Usage(), QUOTA))[0]["usage"] == {**USAGE, **QUOTA}


def test_the_end_of_a_stream_with_single_carriage_returns_is_seen() -> None:
    counting = meter()
    counting.feed(said("Hi").replace(b"\n", b"\r") + b"data: [DONE]\r\r")
    counting.close()
    assert counting.finished


def test_what_was_held_back_goes_on_when_the_stream_just_ends() -> None:
    counting = meter(wants_usage=True)
    last = said("Hi", usage=USAGE)
    counting.feed(last)
    assert counting.take(UNLIMITED) == b""
    counting.close()
    assert counting.take(UNLIMITED) == last
    assert not counting.finished
