"""Logs and metrics: one JSON object a line, and nothing secret in them."""

import io
import json
import logging

import pytest
import structlog

from gateway.identity.keys import generate
from gateway.ids import new_id
from gateway.logs import masked

KEY = generate("live", new_id("key")).token


@pytest.mark.parametrize(
    ("said", "secret"),
    [
        (f"the key {KEY} is refused", KEY.rpartition("_")[2]),
        ("Authorization: Bearer abcdefghijklmnop", "efghijklmnop"),
        ("sk-proj-abcdefghijklmnopqrstuv", "abcdefghijklmnopqrstuv"),
        ("whsec_abcdefghijklmnopqrstuv", "cdefghijklmnopqrstuv"),
        ("cannot connect to postgresql://farebox:hunter2@db/farebox", "hunter2"),
        ("postgresql+asyncpg://farebox:hunt@er/2@db:5432/farebox?sslmode=require", "hunt@er/2"),
        ("redis://:hunter2@cache:6379/0 refused", "hunter2"),
        ("rediss://default:hunter2@cache:6379/0 refused", "hunter2"),
        ("http://proxy.example/?api_key=hunter2&x=1", "hunter2"),
        ("dsn: host=db user=farebox password=hunter2", "hunter2"),
        ('{"password": "hunter2", "user": "farebox"}', "hunter2"),
        ("Authorization: Basic ZmFyZWJveDpodW50ZXIy", "ZXIy"),
        ("whoever sends AIzaSyA1234567890abcdefghij", "1234567890abcdefghij"),
    ],
)
def test_what_looks_like_a_secret_is_masked(said: str, secret: str):
    assert secret not in masked(said)
    assert masked(said) != said


@pytest.mark.parametrize(
    "said",
    [
        "cus_01k7m3v9c2q8x5t4n6r1b0w3ye has 12.5 credits",
        "skip this",
        "Bearer of bad news",
        "40 tokens at http://127.0.0.1:8080/v1",
    ],
)
def test_what_is_no_secret_is_left(said: str):
    assert masked(said) == said


def test_every_line_is_json_whoever_wrote_it(log: io.StringIO):
    structlog.get_logger("gateway.proxy").info("swept", reservations=2)
    logging.getLogger("somebody.else").warning("the key %s failed", KEY)
    ours, theirs = map(json.loads, log.getvalue().splitlines())
    assert (ours["event"], ours["reservations"], ours["level"], ours["logger"]) == ("swept", 2, "info", "gateway.proxy")
    assert theirs["level"] == "warning"
    assert KEY not in theirs["event"]
    assert ours["timestamp"].endswith("Z")


def test_a_traceback_is_part_of_its_line_and_masked(log: io.StringIO):
    try:
        raise ValueError(f"not a key: {KEY}")
    except ValueError:
        structlog.get_logger("gateway").exception("request failed")
    entry = json.loads(log.getvalue())
    assert "ValueError" in entry["exception"]
    assert KEY not in log.getvalue()


def test_the_level_holds(log: io.StringIO):
    structlog.get_logger("gateway").debug("too much")
    logging.getLogger("uvicorn.error").info("started")
    assert log.getvalue() == ""
