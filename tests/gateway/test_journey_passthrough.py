"""What we do not know passes untouched, to the last byte, in both directions."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.proxy.simulated import simulate
from gateway.proxy.simulated.script import Send
from gateway.settings import ModelSettings, Settings, UpstreamSettings
from tests.gateway.rig import GatedUpstream, running, simulated_server

RAW = msgspec.json.Decoder(dict[str, msgspec.Raw])

ODD_VALUES = [
    b"1.0",
    b"1e5",
    b"-0.0",
    b"12345678901234567890123456789012345678901234567890",
    b"0.1000000000000000055511151231257827",
    b'"\\u0041\\ud83c\\udf89 \\/"',
    '"é中🎉"'.encode(),
    b'{ "a" : [ 1 ,2,  null ] ,"a":2, "" : {} }',
    b"[[[[[]]]]]",
    b"true",
    b"null",
]
MESSAGES = b'[ {"content" :"Hi" ,"role":"user", "theirs": 1.50} ]'
SIMULATE = b'{"usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}, "echo": true}'


def body(stream: bool) -> bytes:
    odd = b"".join(b', "odd %d" : %b' % (number, value) for number, value in enumerate(ODD_VALUES))
    flag = b"true" if stream else b"false"
    head = b' { "model":"gpt-4o-mini",\n "messages" : %b, "stream":%b, "temperature": 1.00, "seed":-7' % (
        MESSAGES,
        flag,
    )
    return head + odd + b', "simulate": ' + SIMULATE + b"} "


def check_forwarded(received: bytes, stream: bool) -> None:
    sent, got = RAW.decode(body(stream)), RAW.decode(received)
    if stream:
        assert json.loads(bytes(got.pop("stream_options"))) == {"include_usage": True}
    assert {name: bytes(value) for name, value in got.items()} == {name: bytes(value) for name, value in sent.items()}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_forwarded_as_it_came(tmp_path: Path, stream: bool) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        answer = await rig.chat(body(stream))
        first = answer.content if not stream else answer.content.split(b"\n\n")[0].removeprefix(b"data: ")
        check_forwarded(bytes(RAW.decode(first)["echo"]), stream)


async def test_over_a_socket_too(tmp_path: Path) -> None:
    async with simulated_server() as server:
        upstream = UpstreamSettings(name="up", base_url=server.url)
        settings = Settings(upstreams=(upstream,), rate_limit_per_minute=0, journal_dir=tmp_path / "kept")
        async with running(tmp_path, settings=settings) as rig:
            await rig.grant("1")
            answer = await rig.chat(body(False))
            check_forwarded(bytes(RAW.decode(answer.content)["echo"]), False)


async def test_a_clients_own_stream_options_stay_beside_ours(tmp_path: Path) -> None:
    gate = GatedUpstream()
    gate.allow()
    settings = Settings(default_upstream="simulated", rate_limit_per_minute=0, journal_dir=tmp_path / "kept")
    async with running(tmp_path, settings=settings, upstreams={"simulated": gate}) as rig:
        await rig.grant("1")
        for given in ({"theirs": [1.50], "include_usage": False}, {"theirs": [1.50]}, None):
            sent = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
            await rig.chat({**sent, "stream_options": given})
            forwarded = json.loads(gate.requests[-1].body)["stream_options"]
            assert forwarded == {**(given or {}), "include_usage": True}


async def test_an_upstream_that_knows_no_stream_options_gets_none_and_is_counted(tmp_path: Path) -> None:
    gate = GatedUpstream()
    gate.allow()
    upstream = UpstreamSettings(name="up", base_url="http://127.0.0.1:9/v1", stream_usage=False)
    settings = Settings(upstreams=(upstream,), rate_limit_per_minute=0, journal_dir=tmp_path / "kept")
    async with running(tmp_path, settings=settings, upstreams={"up": gate}) as rig:
        await rig.grant("1")
        sent = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}
        got = await rig.stream({**sent, "stream_options": {"include_usage": True}})
        assert "stream_options" not in json.loads(gate.requests[-1].body)
        assert got.done
        assert got.usage["completion_tokens"] > 0
        assert (await rig.receipt(got)).usage[0].record.source == "counted"


async def test_a_model_is_renamed_where_the_upstream_has_another_name_for_it(tmp_path: Path) -> None:
    gate = GatedUpstream()
    gate.allow()
    models = (ModelSettings(name="smart", upstream="simulated", upstream_model="gpt-4o-mini"),)
    settings = Settings(models=models, rate_limit_per_minute=0, journal_dir=tmp_path / "kept")
    async with running(tmp_path, settings=settings, upstreams={"simulated": gate}) as rig:
        await rig.grant("1")
        sent = body(False).replace(b"gpt-4o-mini", b"smart")
        assert (await rig.chat(sent)).status_code == 200
        check_forwarded(gate.requests[-1].body, False)


async def test_a_field_that_stands_twice_reaches_the_upstream_once(tmp_path: Path) -> None:
    """Else the upstream could read another limit than we did."""
    gate = GatedUpstream()
    gate.allow()
    settings = Settings(default_upstream="simulated", rate_limit_per_minute=0, journal_dir=tmp_path / "kept")
    async with running(tmp_path, settings=settings, upstreams={"simulated": gate}) as rig:
        await rig.grant("1")
        twice = b'{"max_tokens": 10, "model": "gpt-4o-mini", "messages": %b, "max\\u005ftokens": 20}' % MESSAGES
        await rig.chat(twice)
        assert gate.requests[-1].body.count(b"max") == 1
        assert json.loads(gate.requests[-1].body)["max_tokens"] == 20


async def test_of_an_answer_only_the_usage_is_added_to(tmp_path: Path) -> None:
    extra = {"theirs": {"a": [1.5, None]}, "citations": ["x"], "service_tier": "scale"}
    simulate_ = {"usage": {"prompt_tokens": 3, "completion_tokens": 2, "theirs": {"b": 1}}, "extra": extra}
    sent = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}], "simulate": simulate_}
    async with running(tmp_path) as rig:
        await rig.grant("1")
        answer = await rig.chat(sent)
        upstreams = RAW.decode(
            b"".join(step.data for step in simulate(_forwarded(sent)).steps if isinstance(step, Send))
        )
        got = RAW.decode(answer.content)
        ours = json.loads(bytes(got.pop("usage")))
        theirs = json.loads(bytes(upstreams.pop("usage")))
        assert ours == {**theirs, "cost": answer.headers["X-Quota-Cost"], "balance": answer.headers["X-Quota-Balance"]}
        assert {name: bytes(value) for name, value in got.items()} == {
            name: bytes(value) for name, value in upstreams.items()
        }


@pytest.mark.parametrize("asked", [False, True])
async def test_of_a_stream_every_event_but_the_usage_passes_byte_for_byte(tmp_path: Path, asked: bool) -> None:
    simulate_ = {"tokens": 600, "extra": {"theirs": {"a": [1.5, None]}}}
    sent: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    sent |= {"stream_options": {"include_usage": True}} if asked else {}
    async with running(tmp_path) as rig:
        await rig.grant("1")
        answer = await rig.chat({**sent, "simulate": simulate_})
        with_usage = {**sent, "simulate": simulate_}
        with_usage["stream_options"] = {"include_usage": True}
        theirs = [step.data for step in simulate(_forwarded(with_usage)).steps if isinstance(step, Send)]
        expected = b"".join(theirs[:-2])
        assert answer.content.startswith(expected)
        rest = answer.content[len(expected) :]
        if not asked:
            assert rest == b"data: [DONE]\n\n"
        else:
            usage, done, end = rest.split(b"\n\n")
            assert (done, end) == (b"data: [DONE]", b"")
            got, known = (RAW.decode(event.removeprefix(b"data: ")) for event in (usage, theirs[-2]))
            assert set(json.loads(bytes(got.pop("usage")))) - set(json.loads(bytes(known.pop("usage")))) == {
                "cost",
                "balance",
            }
            assert {name: bytes(value) for name, value in got.items()} == {
                name: bytes(value) for name, value in known.items()
            }


def _forwarded(sent: dict[str, Any]) -> bytes:
    """The bytes that the gateway forwards for a body made with json.dumps, on which the simulated answer depends."""
    fields = RAW.decode(json.dumps(sent).encode())
    if "stream_options" in fields:
        fields["stream_options"] = msgspec.Raw(b'{"include_usage":true}')
    return msgspec.json.encode(fields)


async def test_an_upstreams_headers_pass_but_for_what_is_ours(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1")
        for stream in (False, True):
            answer = await rig.chat(
                {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
            )
            assert answer.headers["openai-version"] == "2020-10-01"
            assert answer.headers.get_list("x-request-id") == [answer.headers["X-Request-Id"]]
            assert answer.headers["X-Request-Id"].startswith("req_")
            assert (await rig.receipt(answer)).usage
            assert len(answer.headers.get_list("content-type")) == 1
