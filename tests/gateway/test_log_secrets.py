"""Hostile inputs, walked through a whole gateway: none of what must not be read is in the log."""

import asyncio
import io
import json
import logging
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from gateway.app import Gateway
from gateway.database import Database, DatabaseUnavailable
from gateway.logs import MESSAGE_LENGTH_MAX, AccessLog, configure_logging, secrets_of
from gateway.settings import Settings
from ledger.commands import AnyCommand
from tests.gateway.office import Office, open_office

PROMPT = "confidential-prompt"
ANSWER = "confidential-answer"
USER = "confidential-user"
UPSTREAM_KEY = "plain-word-that-no-pattern-knows"
PASSWORD = "hunter2-of-the-database"
REDIS_PASSWORD = "hunter2-of-redis"

SETTINGS: dict[str, Any] = {
    "upstreams": [{"name": "gone", "base_url": "http://127.0.0.1:1/v1", "api_key": UPSTREAM_KEY, "retries": 0}],
    "models": [
        {"name": "m", "upstream": "simulated", "price": {"input": "1", "output": "2"}},
        {"name": "gone", "upstream": "gone", "price": {"input": "1", "output": "2"}},
    ],
    "redis_url": f"redis://:{REDIS_PASSWORD}@127.0.0.1:1/0",
}


@pytest.fixture
async def office(tmp_path: Path) -> AsyncIterator[Office]:
    async with open_office(tmp_path, **SETTINGS) as office:
        office.gateway._access_log = AccessLog(_Bytes(log_of := io.StringIO())).write
        office.access = log_of  # type: ignore[attr-defined]
        await office.post("/v1/topup/grant", {"customer_id": USER, "credits": 100_000})
        yield office


class _Bytes(io.RawIOBase):
    def __init__(self, text: io.StringIO) -> None:
        self._text = text

    def write(self, data: Any) -> int:
        return self._text.write(bytes(data).decode())


def body(**fields: Any) -> dict[str, Any]:
    simulate = fields.pop("simulate", {"text": ANSWER})
    return {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "simulate": simulate, **fields}


async def walk(office: Office) -> None:
    """Everything that somebody might send, with secrets in every place."""
    key = office.keys["live"]
    headers = {"Authorization": f"Bearer {key}", "X-Quota-User": USER}
    client = office.client
    for sent in (
        body(),
        body(stream=True),
        body(model="gone"),
        body(model=key),
        body(messages=PROMPT),
        body(simulate={"refuse": True}),
        body(simulate={"status": 500}),
        body(simulate={"status": 400}),
        body(simulate={"text": ANSWER, "malformed_sse": True}, stream=True),
        body(simulate={"text": ANSWER, "cut_after_chunks": 2}, stream=True),
    ):
        await client.post("/v1/chat/completions", json=sent, headers=headers)
        await client.post(f"/v1/users/{USER}/chat/completions", json=sent, headers={"X-API-Key": key})
    await client.post("/v1/chat/completions", content=f'{{"model": "{PROMPT}', headers=headers)
    for path in (
        f"/v1/customers/{USER}?api_key={key}",
        f"/{key}",
        f"/v1/requests/{key}",
        f"/v1/customers?mode={key}",
    ):
        await client.get(path, headers=headers)
    await client.post(
        "/v1/topup/grant", json={"customer_id": USER, "credits": PROMPT, "metadata": {"k": key}}, headers=headers
    )
    await client.post("/v1/keys", json={"name": PROMPT, "secret": key}, headers=headers)
    await client.get("/v1/customers", headers={"Authorization": f"Bearer {key}x"})


def hidden_in(office: Office) -> list[str]:
    keys = [key.rpartition("_")[2] for key in office.keys.values()]
    return [*keys, PROMPT, ANSWER, USER, UPSTREAM_KEY, PASSWORD, REDIS_PASSWORD]


def clean(office: Office, text: str) -> bool:
    return not [hidden for hidden in hidden_in(office) if hidden in text]


async def test_whatever_is_sent_leaves_nothing_in_the_log(office: Office, log: io.StringIO):
    await walk(office)
    assert clean(office, log.getvalue())


async def test_the_access_log_has_a_line_for_each_request_and_nothing_of_what_was_said(
    office: Office, log: io.StringIO
):
    await walk(office)
    lines = [json.loads(line) for line in office.access.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert len(lines) == 21
    assert clean(office, office.access.getvalue())  # type: ignore[attr-defined]
    assert lines[0] | {"timestamp": "", "request_id": "", "took_ms": 0, "upstream_ms": 0} == {
        "timestamp": "",
        "level": "info",
        "logger": "farebox.access",
        "event": "request",
        "request_id": "",
        "route": "/v1/chat/completions",
        "status": 200,
        "took_ms": 0,
        "upstream_ms": 0,
        "model": "m",
        "stream": False,
        "upstream": "simulated",
        "ending": "finished",
        "code": None,
        "trace_id": None,
    }
    assert lines[1]["route"] == "/v1/users/{user}/chat/completions"
    assert all(line["request_id"].startswith("req_") for line in lines)
    assert {line["code"] for line in lines} >= {None, "invalid_request", "model_not_found", "upstream_error"}


async def test_a_fault_of_ours_is_logged_with_its_request_and_without_what_was_sent(
    office: Office, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
):
    configure_logging("info", stream=log, secrets=secrets_of(office.gateway.services.settings))
    quoted = (
        f"cannot do this for {UPSTREAM_KEY} {office.keys['live']}\nDETAIL:  Failing row contains ({PROMPT}, {ANSWER})"
    )

    async def broken(*arguments: object, **options: object) -> None:
        raise ValueError(quoted) from RuntimeError(f"no\n{USER}")

    monkeypatch.setattr(office.gateway.services.quoter, "plan", broken)
    monkeypatch.setattr(office.gateway.services.customers, "page", broken, raising=False)
    answer = await office.chat(model="m", user=USER)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    (line,) = [json.loads(line) for line in log.getvalue().splitlines() if "request failed" in line]
    assert line["request_id"] == answer.headers["x-request-id"]
    assert "ValueError: cannot do this for …" in line["exception"]
    assert "in broken" in line["exception"]
    assert clean(office, log.getvalue())


async def test_a_ledger_that_breaks_on_a_batch_quotes_nothing_of_it(
    office: Office, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
):
    async def broken(commands: list[AnyCommand]) -> None:
        raise RuntimeError(f"row {commands!r}".replace("(", f"(\n{PROMPT}"))

    monkeypatch.setattr(office.gateway.services.ledger._writer, "_run_batch", broken)
    await walk(office)
    assert "RuntimeError: row" in log.getvalue()
    assert clean(office, log.getvalue())


@pytest.mark.parametrize(
    "url",
    [f"postgresql://farebox:{PASSWORD}@127.0.0.1:1/farebox", f"postgresql://farebox:{PASSWORD}@no.such.host/farebox"],
)
async def test_a_database_that_cannot_be_reached_is_named_without_its_password(url: str, log: io.StringIO):
    database = Database(url)
    try:
        await database.check()
    except DatabaseUnavailable:
        structlog.get_logger("gateway").exception("the database is away", url=url)
    finally:
        await database.close()
    assert "the database is away" in log.getvalue()
    assert PASSWORD not in log.getvalue()


async def test_a_gateway_that_cannot_start_says_why_without_a_secret(tmp_path: Path, log: io.StringIO):
    settings = Settings(
        database_url=f"sqlite:///{tmp_path}/{PASSWORD}.db", journal_dir=tmp_path / "journal", **SETTINGS
    )
    gateway = Gateway(settings)
    messages = asyncio.Queue[dict[str, Any]]()

    async def receive() -> dict[str, Any]:
        return {"type": "lifespan.startup"}

    await gateway({"type": "lifespan"}, receive, messages.put)  # type: ignore[arg-type]
    failed = await messages.get()
    assert failed["type"] == "lifespan.startup.failed"
    assert "run `farebox migrate` first" in failed["message"]
    for hidden in (UPSTREAM_KEY, REDIS_PASSWORD):
        assert hidden not in failed["message"] + log.getvalue()


def test_every_secret_of_the_settings_is_taken_out_by_value():
    settings = Settings(
        database_url=f"postgresql://farebox:{PASSWORD}%2F%40@db/farebox",
        stripe_secret_key="sk_test_stripe-secret",
        stripe_webhook_secret="whsec_stripe-signature",
        **{**SETTINGS, "upstreams": [{**SETTINGS["upstreams"][0], "headers": {"X-Extra": "header-secret"}}]},
    )
    written = io.StringIO()
    configure_logging("info", stream=written, secrets=secrets_of(settings))
    log = structlog.get_logger("gateway")
    for secret in (
        f"{PASSWORD}/@",
        f"{PASSWORD}%2F%40",
        "sk_test_stripe-secret",
        "whsec_stripe-signature",
        UPSTREAM_KEY,
        "header-secret",
        REDIS_PASSWORD,
    ):
        log.info("somebody said", what=f"it is {secret}, is it not")
        log.info(f"it is {secret}")
    assert not [secret for secret in secrets_of(settings) if secret in written.getvalue()]
    assert written.getvalue().count("it is …") == 14


def test_an_exceptions_message_is_cut_and_those_in_a_group_are_told(log: io.StringIO):
    try:
        raise ExceptionGroup("two", [ValueError("a" * 10_000), KeyError("b")])
    except ExceptionGroup:
        structlog.get_logger("gateway").exception("failed")
    told = json.loads(log.getvalue())["exception"]
    assert f"ValueError: {'a' * MESSAGE_LENGTH_MAX}\n" in told + "\n"
    assert "a" * (MESSAGE_LENGTH_MAX + 1) not in told
    assert "KeyError: 'b'" in told


def test_the_standard_librarys_loggers_go_the_same_way(log: io.StringIO):

    try:
        raise ValueError(f"no\n{PROMPT}")
    except ValueError:
        logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=sys.exc_info())
    assert "ValueError: no" in json.loads(log.getvalue())["exception"]
    assert PROMPT not in log.getvalue()
