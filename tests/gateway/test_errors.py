"""The envelope of every refusal, and the public table of status and code."""

import json

import httpx2
import openai
import pytest

from gateway import errors
from gateway.database import DatabaseUnavailable
from gateway.errors import KINDS, ApiError, ErrorTable
from pricing.money import CREDIT

PUBLIC_TABLE = [
    (400, errors.invalid_request("Wrong.", param="messages[0]"), "invalid_request"),
    (401, errors.invalid_api_key(), "invalid_api_key"),
    (402, errors.insufficient_credits(needed=2, available=1, asset=CREDIT), "insufficient_credits"),
    (
        402,
        errors.budget_exceeded("bud_1", needed=2, available=1, asset=CREDIT, resets_at="2027-01-01T00:00:00Z"),
        "budget_exceeded",
    ),
    (403, errors.permission_denied("No."), "permission_denied"),
    (404, errors.not_found("customer cus_1"), "not_found"),
    (404, errors.model_not_found("gpt-9"), "model_not_found"),
    (404, errors.model_not_priced("gpt-9"), "model_not_priced"),
    (405, errors.method_not_allowed("POST"), "method_not_allowed"),
    (409, errors.already_exists("metric with the key chat", param="key"), "already_exists"),
    (409, errors.request_in_progress(), "request_in_progress"),
    (409, errors.request_already_completed("req_1"), "request_already_completed"),
    (409, errors.reservation_settled("committed"), "reservation_settled"),
    (412, errors.version_mismatch(3), "version_mismatch"),
    (413, errors.request_too_large(10), "request_too_large"),
    (422, errors.idempotency_key_reused(), "idempotency_key_reused"),
    (429, errors.rate_limit_exceeded(limit=100, retry_after_s=7), "rate_limit_exceeded"),
    (500, errors.internal_error(), "internal_error"),
    (502, errors.upstream_error(), "upstream_error"),
    (503, errors.ledger_unavailable(), "ledger_unavailable"),
    (503, errors.payments_unavailable(), "payments_unavailable"),
    (503, errors.shutting_down(), "shutting_down"),
    (504, errors.upstream_timeout(), "upstream_timeout"),
]


@pytest.mark.parametrize(("status", "error", "code"), PUBLIC_TABLE, ids=[row[2] for row in PUBLIC_TABLE])
def test_each_refusal_has_its_status_and_the_envelope(status: int, error: ApiError, code: str):
    assert error.status == status
    envelope = json.loads(error.to_body("req_7"))
    assert envelope.keys() == {"error"}
    assert list(envelope["error"])[:5] == ["message", "type", "code", "param", "request_id"]
    assert envelope["error"]["code"] == code
    assert envelope["error"]["request_id"] == "req_7"
    assert envelope["error"]["message"].endswith(".")


def test_every_code_has_its_row_here():
    assert {code for _, _, code in PUBLIC_TABLE} == KINDS.keys()


def test_the_param_says_where():
    envelope = json.loads(errors.invalid_request("Wrong.", param="messages[0]").to_body("req_1"))
    assert envelope["error"]["param"] == "messages[0]"
    assert envelope["error"]["type"] == "invalid_request_error"


def test_402_tells_what_is_needed_in_millicredits_and_exactly():
    error = errors.insufficient_credits(
        needed=1_234_567_890, available=999_999, asset=CREDIT, top_up_url="https://example.com/top-up"
    )
    body = json.loads(error.to_body("req_1"))["error"]
    assert (body["needed"], body["needed_decimal"]) == (1_234, "1.23456789")
    assert (body["available"], body["available_decimal"]) == (0, "0.000999999")
    assert body["top_up_url"] == "https://example.com/top-up"
    assert "top_up_url" not in errors.insufficient_credits(needed=1, available=0, asset=CREDIT).facts


@pytest.mark.parametrize(("resets_at", "told"), [("2027-01-01T00:00:00Z", "wait until 2027"), (None, "raise it")])
def test_402_tells_which_budget_is_reached_and_when_it_is_filled_again(resets_at: str | None, told: str):
    error = errors.budget_exceeded("bud_1", needed=2_000_000, available=1_000_000, asset=CREDIT, resets_at=resets_at)
    body = json.loads(error.to_body("req_1"))["error"]
    assert (body["budget"], body["needed"], body["available"], body["resets_at"]) == ("bud_1", 2, 1, resets_at)
    assert told in body["message"]


@pytest.mark.parametrize(
    ("error", "header"),
    [
        (errors.rate_limit_exceeded(limit=1, retry_after_s=7), ("Retry-After", "7")),
        (errors.ledger_unavailable(retry_after_s=3), ("Retry-After", "3")),
        (errors.invalid_api_key(), ("WWW-Authenticate", "Bearer")),
        (errors.method_not_allowed("GET, POST"), ("Allow", "GET, POST")),
    ],
)
def test_what_a_client_must_know_before_it_reads_the_body_is_a_header(error: ApiError, header: tuple[str, str]):
    assert header in error.headers


def test_a_fact_cannot_hide_a_member_of_the_envelope():
    with pytest.raises(AssertionError):
        ApiError("not_found", "Gone.", facts={"request_id": "forged"})


@pytest.mark.parametrize(
    ("error", "exception"),
    [
        (errors.invalid_request("Wrong."), openai.BadRequestError),
        (errors.invalid_api_key(), openai.AuthenticationError),
        (errors.permission_denied("No."), openai.PermissionDeniedError),
        (errors.model_not_found("m"), openai.NotFoundError),
        (errors.request_in_progress(), openai.ConflictError),
        (errors.idempotency_key_reused(), openai.UnprocessableEntityError),
        (errors.rate_limit_exceeded(limit=1, retry_after_s=1), openai.RateLimitError),
        (errors.upstream_error(), openai.InternalServerError),
    ],
)
def test_openais_sdk_understands_the_envelope(error: ApiError, exception: type[openai.APIStatusError]):
    client = openai.OpenAI(api_key="x", base_url="http://127.0.0.1:1/v1")
    body = json.loads(error.to_body("req_1"))
    response = httpx2.Response(error.status, request=httpx2.Request("POST", "http://127.0.0.1:1/v1"))
    seen = client._make_status_error("refused", body=body, response=response)
    assert type(seen) is exception
    assert (seen.code, seen.type, seen.param) == (error.code, error.type, error.param)
    client.close()


class Refused(Exception):
    pass


class RefusedTwice(Refused):
    pass


def test_the_table_translates_by_the_nearest_ancestor():
    table = ErrorTable({Refused: lambda error: errors.permission_denied(str(error))})
    translated = table.translate(RefusedTwice("no"))
    assert translated is not None
    assert (translated.code, translated.message) == ("permission_denied", "no")
    assert table.translate(ValueError("ours")) is None
    wider = table | {RefusedTwice: lambda _error: errors.not_found("it"), ValueError: lambda _: errors.internal_error()}
    assert [wider.translate(error).code for error in (Refused(), RefusedTwice(), ValueError())] == [  # type: ignore[union-attr]
        "permission_denied",
        "not_found",
        "internal_error",
    ]
    assert table.translate(ValueError()) is None


def test_what_is_a_refusal_already_stays_as_it_is():
    error = errors.not_found("it")
    assert ErrorTable({}).translate(error) is error


def test_a_database_that_is_away_fails_closed():
    translated = errors.BASE_TABLE.translate(DatabaseUnavailable("gone"))
    assert translated is not None
    assert (translated.status, translated.code) == (503, "ledger_unavailable")
