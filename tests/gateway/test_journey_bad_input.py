"""Bad input: the documented error in the one envelope, nothing charged, and nothing secret in the logs."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from gateway.identity.keys import KeyScope
from gateway.settings import ModelSettings, Settings
from ledger.commands import Reserve
from tests.gateway.rig import Rig, running

PROMPT = "the secret of the prompt"
USER = "secret-user@example.com"
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


@pytest.fixture
async def rig(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Rig]:
    """A gateway; when the test ends, nothing was reserved, and its logs have neither the prompt, the user nor a key."""
    caplog.set_level(logging.INFO)
    settings = Settings(
        default_upstream="simulated", rate_limit_per_minute=0, journal_dir=tmp_path / "kept", body_bytes_max=200_000
    )
    with structlog.testing.capture_logs() as logged:
        async with running(tmp_path, settings=settings) as rig:
            await rig.grant("1", user=USER)
            yield rig
            assert rig.store.count(Reserve) == 0
            assert await rig.balance(USER) == "1"
    written = str(logged) + caplog.text
    for secret in (PROMPT, USER, *(key.split("_")[-1] for key in rig.keys.values())):
        assert secret not in written
    assert logged == []


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": PROMPT}], **fields}


async def check(rig: Rig, sent: Any, status: int, code: str, param: str | None = None, **options: Any) -> None:
    answer = await rig.chat(sent, **{"user": USER, **options})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (status, code, KINDS[status]), answer.text
    assert error["param"] == param
    assert error["request_id"] == answer.headers["X-Request-Id"]
    assert answer.headers["Content-Type"] == "application/json"
    assert PROMPT not in answer.text


DEEP = b"[" * 50_000 + b"]" * 50_000
MESSAGES = json.dumps(body()["messages"]).encode()


NO_OBJECTS = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"7",
    b'{"model": "gpt-4o-mini", "messages": ' + MESSAGES + b"} trailing",
    b'{"model": "gpt-4o-mini", "messages": ' + MESSAGES + b",}",
    b"{'model': 'gpt-4o-mini'}",
    b'\xef\xbb\xbf{"model": "gpt-4o-mini"}',
    b'{"model": "gpt-4o-mini", "messages": ' + MESSAGES + b', "x": NaN}',
    b'{"model": "gpt-4o-mini", "messages": ' + MESSAGES + b', "x": "\xff\xfe"}',
    b'{"model": "gpt-4o-mini", "messages": ' + MESSAGES + b', "\xff": 1}',
    b'{"model": "gpt-4o-mini", "messages": ' + MESSAGES + b', "x": "\xed\xa0\x80"}',
    b'{"model": "gpt-4o-mini", "messages": ' + MESSAGES + b', "x": ' + DEEP + b"}",
    b'{"x": ' * 20_000 + b"1" + b"}" * 20_000,
    DEEP,
    "{}".encode("utf-16"),
]


async def test_a_body_that_is_no_json_object(rig: Rig) -> None:
    for content in NO_OBJECTS:
        await check(rig, content, 400, "invalid_request")
        await check(rig, content.replace(b"{", b'{"stream": true, ', 1), 400, "invalid_request")


WRONG: list[tuple[str, list[Any]]] = [
    ("model", [None, 7, True, "", [], {}, "x" * 257, "a\nb", "a\x00b", "\u2028"]),
    ("messages", [None, "Hi", {}, [], 7]),
    ("stream", ["true", 1, 0, [], {}, "yes"]),
    ("n", [0, -1, 129, 1.5, "2", True, False, [], 10**30]),
    ("max_tokens", [0, -1, 1.5, 1e3, "16", True, False, [], {}, 10_000_001, 2**63, 10**40]),
    ("max_completion_tokens", [0, -1, 1.5, "16", True, False, 10**40]),
    ("stream_options", ["x", 7, [], True]),
    ("modalities", ["text", [1], {}, 7]),
]


@pytest.mark.parametrize(("field", "values"), WRONG)
async def test_a_field_of_the_wrong_type_is_named(rig: Rig, field: str, values: list[Any]) -> None:
    for value in values:
        await check(rig, body(**{field: value}), 400, "invalid_request", field)
        await check(rig, body(**{"stream": True, field: value}), 400, "invalid_request", field)


@pytest.mark.parametrize("field", ["model", "messages"])
async def test_a_field_that_is_missing_is_named(rig: Rig, field: str) -> None:
    sent = body()
    del sent[field]
    await check(rig, sent, 400, "invalid_request", field)


async def test_whether_usage_is_asked_for_is_a_yes_or_no(rig: Rig) -> None:
    await check(rig, body(stream=True, stream_options={"include_usage": 1}), 400, "invalid_request", "include_usage")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [7]}, "messages[0]"),
        ({"messages": [None]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [7]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": 7}]}, "messages[0].tool_calls"),
        ({"tools": "x"}, "tools"),
    ],
)
async def test_a_prompt_that_cannot_be_counted_is_named(rig: Rig, fields: dict[str, Any], param: str) -> None:
    await check(rig, body(**fields), 400, "invalid_request", param)


async def test_a_declared_body_over_the_limit_is_refused_before_it_is_read(rig: Rig) -> None:
    await check(rig, body(x="y" * 200_000), 413, "request_too_large")


async def test_an_undeclared_body_over_the_limit_is_refused_as_it_comes(rig: Rig) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b'{"x": "'
        for _ in range(20):
            yield b"y" * 20_000

    answer = await rig.client.post("/v1/chat/completions", content=endless(), headers=rig.headers(USER))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert answer.json()["error"]["bytes_max"] == 200_000


async def test_a_compressed_body_is_refused(rig: Rig) -> None:
    await check(rig, body(), 400, "invalid_request", "Content-Encoding", Content_Encoding="gzip")


@pytest.mark.parametrize("length", ["99999999999999999999999999", "200001"])
async def test_a_length_that_no_body_has_is_refused(rig: Rig, length: str) -> None:
    """Without waiting for the body."""
    status, _ = await raw(rig, ("Authorization", f"Bearer {rig.keys['live']}"), ("Content-Length", length))
    assert status in (400, 413)


# Headers.


async def raw(rig: Rig, *headers: tuple[str, str], content: bytes = b"") -> tuple[int, dict[str, Any]]:
    """Send headers as they are, which a client library would not."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(rig.base_url.split(":")[2].split("/")[0]))
    lines = [b"POST /v1/chat/completions HTTP/1.1", b"Host: test", b"Connection: close"]
    lines += [name.encode() + b": " + value.encode("latin-1") for name, value in headers]
    if not any(name == "Content-Length" for name, _ in headers):
        lines.append(b"Content-Length: %d" % len(content))
    writer.write(b"\r\n".join(lines) + b"\r\n\r\n" + content)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, rest = answer.partition(b"\r\n\r\n")
    try:
        parsed = json.loads(rest)
    except json.JSONDecodeError:
        parsed = {"error": {"code": None, "param": None}}
    return int(head.split()[1]), parsed


@pytest.mark.parametrize(
    "name", ["X-Quota-User", "X-Quota-Action", "Idempotency-Key", "X-Quota-Max-Cost", "X-Quota-Clamping"]
)
async def test_a_header_that_stands_twice_is_too_long_or_not_printable(rig: Rig, name: str) -> None:
    for values in (("a", "b"), ("x" * 513,), ("caf\xe9",), ("a\tb",), ("\xff\xfe",)):
        headers = [("Authorization", f"Bearer {rig.keys['live']}"), *((name, value) for value in values)]
        status, answer = await raw(rig, *headers, content=json.dumps(body()).encode())
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "invalid_request", name), values


async def test_what_would_be_another_header_never_arrives(rig: Rig) -> None:
    for value in ("a\x00b", "a\rb", "a\nb", "a\r\n b"):
        headers = [("Authorization", f"Bearer {rig.keys['live']}"), ("X-Quota-User", value)]
        status, _ = await raw(rig, *headers, content=json.dumps(body()).encode())
        assert status == 400, value


async def test_a_user_whom_there_cannot_be(rig: Rig) -> None:
    for user in ("cus_1", "req_x", " ", "x" * 257, "a\u2028b"):
        headers = [("Authorization", f"Bearer {rig.keys['live']}"), ("X-Quota-User", user.encode().decode("latin-1"))]
        status, answer = await raw(rig, *headers, content=json.dumps(body()).encode())
        assert (status, answer["error"]["code"]) == (400, "invalid_request"), user
        assert answer["error"]["param"] in ("user", "X-Quota-User")


async def test_the_header_and_the_path_name_one_user(rig: Rig) -> None:
    path = "/v1/users/somebody-else/chat/completions"
    await check(rig, body(), 400, "invalid_request", "user", path=path)


async def test_a_most_cost_that_is_no_amount(rig: Rig) -> None:
    for cost in ("-1", "1e3", "NaN", "", "1,5", "0.0000000001", "9" * 60, "x"):
        await check(rig, body(), 400, "invalid_request", "X-Quota-Max-Cost", X_Quota_Max_Cost=cost)


async def test_an_action_that_there_is_not(rig: Rig) -> None:
    await check(rig, body(), 400, "invalid_request", "X-Quota-Action", X_Quota_Action="no-such-action")


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_an_idempotency_key_of_no_length_or_too_long(rig: Rig, key: str) -> None:
    await check(rig, body(), 400, "invalid_request", "Idempotency-Key", Idempotency_Key=key)


# Keys.


NO_KEYS = [
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Basic dTpw"},
    {"Authorization": "Bearer sk-not-one-of-ours"},
    {"Authorization": "Bearer fb_live_nobody_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"},
    {"Authorization": "Bearer " + "x" * 10_000},
    {"X-API-Key": "fb_live"},
]


async def test_no_key_or_an_unknown_one(rig: Rig) -> None:
    for given in NO_KEYS:
        answer = await rig.client.post("/v1/chat/completions", json=body(), headers=given)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (401, "invalid_api_key"), given
        assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_two_keys_are_none(rig: Rig) -> None:
    key = ("Authorization", f"Bearer {rig.keys['live']}")
    status, answer = await raw(rig, key, key, content=json.dumps(body()).encode())
    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")


async def test_a_key_that_is_nearly_right(rig: Rig) -> None:
    for wrong in (rig.keys["live"][:-1], rig.keys["live"] + "a", rig.keys["live"].replace("live", "test")):
        answer = await rig.client.post("/v1/chat/completions", json=body(), headers={"X-API-Key": wrong})
        assert answer.status_code == 401


async def test_a_revoked_key(rig: Rig) -> None:
    key = await rig.tenants.create_key(rig.tenant, "live", app_id=rig.app)
    await rig.tenants.revoke_key(rig.tenant, key.info.id)
    answer = await rig.client.post("/v1/chat/completions", json=body(), headers={"X-API-Key": key.token})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


async def test_a_key_without_the_scope_and_the_installations_key(rig: Rig) -> None:
    reader = await rig.tenants.create_key(rig.tenant, "live", app_id=rig.app, scopes=[KeyScope.CREDITS_READ])
    admin = await rig.tenants.create_key(rig.tenant, "admin")
    for key in (reader, admin):
        answer = await rig.client.post("/v1/chat/completions", json=body(), headers={"X-API-Key": key.token})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "permission_denied")


# Models.


async def test_a_model_without_a_price_is_not_served(rig: Rig) -> None:
    for model in ("no-such-model", "gpt-4o-mini-but-not-really", "../gpt-4o-mini", "💥", "a/b/c"):
        await check(rig, body(model=model), 404, "model_not_priced", "model")


async def test_a_model_that_is_not_listed_is_not_found(tmp_path: Path) -> None:
    models = (ModelSettings(name="gpt-4o", upstream="simulated"), ModelSettings(name="unpriced", upstream="simulated"))
    settings = Settings(models=models, rate_limit_per_minute=0, journal_dir=tmp_path / "kept")
    async with running(tmp_path, settings=settings) as rig:
        await rig.grant("1")
        await check(rig, body(), 404, "model_not_found", "model", user="alice")
        await check(rig, body(model="unpriced"), 404, "model_not_priced", "model", user="alice")
        assert rig.store.count(Reserve) == 0


async def test_live_traffic_without_an_upstream_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, settings=Settings(rate_limit_per_minute=0, journal_dir=tmp_path / "kept")) as rig:
        refused = await rig.chat(body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (502, "upstream_error")


# A fault of ours.


async def test_a_bug_is_told_as_one_and_its_log_has_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path) as rig:
        await rig.grant("1", user=USER)

        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr("gateway.proxy.quoting.dearest", broken)
        with structlog.testing.capture_logs() as logged:
            answer = await rig.chat(body(), user=USER)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        (line,) = logged
        assert line["request_id"] == answer.headers["X-Request-Id"]
        assert PROMPT not in str(line)
        assert rig.keys["live"] not in str(line)
