"""The parts of the webhooks that need no gateway: the schedule, the signatures, and where they may go."""

import base64
import ssl
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from standardwebhooks import Webhook

from gateway.events import post
from gateway.events.post import Outcome, Poster, answer_of
from gateway.events.schedule import (
    ATTEMPTS_MAX,
    DELAYS_S,
    FAILED,
    HOLDS_UP_S,
    JITTER_PERCENT,
    PARKED,
    PENDING,
    Next,
    after_failure,
)
from gateway.events.signing import SECRETS_MAX, Secret, new_secret, rotated, signed_headers
from gateway.events.target import ADDRESSES_MAX, Target, TargetRefused, addresses_of, target_of
from tests.gateway.receiver import Reply, receiving

S = 1_000_000
HOUR, DAY = 3600, 24 * 3600


# The schedule.


def failing(*, jitter: int = 0, state: str = PENDING) -> list[tuple[int, str]]:
    """When each attempt is made, in seconds from the first, and what state that leaves."""
    now_us, attempts, seen = 0, 0, []
    while True:
        attempts += 1
        follows = after_failure(state=state, attempts=attempts, started_at_us=0, now_us=now_us, jitter=jitter)
        state = follows.state
        seen.append((now_us // S, state))
        if follows.at_us is None:
            return seen
        now_us = follows.at_us


def test_ten_attempts_over_three_days_of_which_the_first_hour_holds_others_up():
    seen = failing()
    assert len(seen) == ATTEMPTS_MAX == 10
    assert [at for at, _ in seen[:4]] == [0, 5, 305, 2105]
    assert [state for _, state in seen] == [PENDING] * 3 + [PARKED] * 6 + [FAILED]
    assert 3 * DAY <= seen[-1][0] <= 3 * DAY + 6 * HOUR


@pytest.mark.parametrize("jitter", [-JITTER_PERCENT, 0, JITTER_PERCENT])
def test_whatever_the_jitter_no_attempt_that_holds_others_up_comes_after_an_hour(jitter: int):
    seen = failing(jitter=jitter)
    assert max(at for at, state in seen if state == PENDING) <= HOLDS_UP_S
    assert len(seen) == ATTEMPTS_MAX


def test_what_was_waiting_for_longer_than_an_hour_is_parked_when_it_first_fails():
    follows = after_failure(state=PENDING, attempts=1, started_at_us=0, now_us=HOUR * S, jitter=0)
    assert follows == Next(PARKED, (HOUR + DELAYS_S[0]) * S)


def test_what_is_parked_stays_so():
    assert after_failure(state=PARKED, attempts=1, started_at_us=0, now_us=0, jitter=0).state == PARKED


# Signatures.


def test_a_secret_has_32_random_bytes():
    one, two = new_secret(), new_secret()
    assert one != two
    assert len(base64.b64decode(one.removeprefix("whsec_"))) == 32


def test_the_example_of_the_specification_is_signed_as_there():
    """https://github.com/standard-webhooks/standard-webhooks, spec/standard-webhooks.md."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    headers = signed_headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek", '{"test": 2432232314}', [Secret(secret)], now_us=1614265330 * S + 999_999
    )
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_every_live_secret_signs_and_no_other():
    live, ending, over = new_secret(), new_secret(), new_secret()
    secrets = [Secret(live), Secret(ending, 11 * S), Secret(over, 10 * S)]
    signatures = signed_headers("evt_1", "{}", secrets, now_us=10 * S)["webhook-signature"].split(" ")
    at = datetime.fromtimestamp(10, UTC)
    assert signatures == [Webhook(secret).sign("evt_1", at, "{}") for secret in (live, ending)]


def test_rotation_keeps_what_was_live_no_longer_than_it_would_have_been():
    before = (Secret("b"), Secret("a", 5 * S))
    after = rotated(before, "c", now_us=0, expire_current_us=60 * S)
    assert after == (Secret("c"), Secret("b", 60 * S), Secret("a", 5 * S))
    assert rotated(after, "d", now_us=6 * S, expire_current_us=0) == (Secret("d"),)
    secrets: tuple[Secret, ...] = (Secret("0"),)
    for number in range(1, 20):
        secrets = rotated(secrets, str(number), now_us=0, expire_current_us=60 * S)
    assert [each.secret for each in secrets] == ["19", "18", "17", "16", "15"]
    assert len(secrets) == SECRETS_MAX


# Where they may go.

REFUSED_URLS = [
    "http://example.com/",
    "ftp://example.com/",
    "//example.com/",
    "https://",
    "https:///path",
    "https://user@example.com/",
    "https://user:word@example.com/",
    "https://:word@example.com/",
    "https://example.com/#fragment",
    "https://example.com:22/",
    "https://example.com:0/",
    "https://example.com:65536/",
    "https://example.com:port/",
    "https://exa mple.com/",
    "https://example.com\\@127.0.0.1/",
    "https://example.com/\n",
    "https://exämple.com/",
    "https://127.0.0.1/",
    "https://[::1]/",
    "https://[::ffff:10.0.0.1]/",
    "https://[fe80::1%25eth0]/",
    "https://[::1",
    f"https://example.com/{'x' * 2048}",
]


@pytest.mark.parametrize("url", REFUSED_URLS)
def test_a_url_that_is_never_called(url: str):
    with pytest.raises(TargetRefused):
        target_of(url, allow_private=False)


def test_a_url_that_is_called():
    assert target_of("https://example.com/a?b=c", allow_private=False) == Target("https", "example.com", 443)
    assert target_of("https://example.com:8443", allow_private=False).port == 8443
    assert target_of("https://[2606:4700:4700::1111]/", allow_private=False).host == "2606:4700:4700::1111"
    assert target_of("http://127.0.0.1:9/", allow_private=True) == Target("http", "127.0.0.1", 9)


REFUSED_ADDRESSES = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "168.63.129.16",
    "192.0.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "64:ff9b::a00:1",
    "64:ff9b:1::a00:1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:a00:1::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "not an address",
]


@pytest.mark.parametrize("address", REFUSED_ADDRESSES)
async def test_an_address_that_no_name_may_lead_to(address: str):
    for found in ([address], ["93.184.216.34", address]):
        with pytest.raises(TargetRefused, match="not on the public internet"):
            await addresses_of(Target("https", "name.example", 443), _fixed(found), allow_private=False)


async def test_public_addresses_are_taken_in_their_order_and_not_too_many():
    found = ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "1.1.1.1", "8.8.8.8"]
    taken = await addresses_of(Target("https", "name.example", 443), _fixed(found), allow_private=False)
    assert taken == found[:ADDRESSES_MAX]


async def test_a_name_without_an_address_is_refused():
    async def unknown(host: str, port: int) -> Sequence[str]:
        raise OSError("no such name")

    for resolve in (unknown, _fixed([])):
        with pytest.raises(TargetRefused, match="has no address"):
            await addresses_of(Target("https", "name.example", 443), resolve, allow_private=True)


class _fixed:  # noqa: N801 - reads as a function
    def __init__(self, found: Sequence[str]) -> None:
        self._found = found

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        return self._found


async def test_the_connection_goes_to_the_address_that_was_checked_and_the_request_to_the_name():
    async with receiving() as receiver:
        poster = Poster(_fixed(["127.0.0.1"]), allow_private=True)
        answer = await poster.post(f"http://name.example:{receiver.port}/a%20b?c=%2F", b"{}", {"webhook-id": "evt_1"})
        await poster.close()
    assert answer.outcome is Outcome.DELIVERED
    (sent,) = receiver.received
    assert sent.headers["host"] == f"name.example:{receiver.port}"
    assert sent.path == "/a%20b?c=%2F"
    assert sent.headers["connection"] == "close"


async def test_where_an_address_does_not_answer_the_next_one_is_tried():
    async with receiving() as receiver:
        poster = Poster(_fixed(["127.0.0.9", "127.0.0.1"]), allow_private=True)
        answer = await poster.post(f"http://name.example:{receiver.port}/", b"{}", {})
        await poster.close()
    assert answer.outcome is Outcome.DELIVERED


async def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch):
    async with receiving() as proxy, receiving() as receiver:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        poster = Poster(_fixed(["127.0.0.1"]), allow_private=True)
        await poster.post(f"http://name.example:{receiver.port}/", b"{}", {})
        await poster.close()
    assert (len(proxy.received), len(receiver.received)) == (0, 1)


# TLS: the certificate has to be the name's, wherever the connection goes.

CERTIFICATES = Path(__file__).parent / "certificates"


def trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=CERTIFICATES / "authority.pem")


@pytest.mark.parametrize(
    ("name", "context", "outcome"),
    [
        ("name.example", trusting, Outcome.DELIVERED),
        ("other.example", trusting, Outcome.UNREACHABLE),
        ("127.0.0.1", trusting, Outcome.UNREACHABLE),
        ("name.example", ssl.create_default_context, Outcome.UNREACHABLE),
    ],
    ids=["its own", "another's", "an address", "of nobody we trust"],
)
async def test_the_certificate_is_that_of_the_name(name: str, context: Callable[[], ssl.SSLContext], outcome: Outcome):
    named: list[str | None] = []
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(CERTIFICATES / "name.example.pem")
    tls.sni_callback = lambda _connection, server_name, _context: named.append(server_name)
    async with receiving(tls=tls) as receiver:
        poster = Poster(_fixed(["127.0.0.1"]), allow_private=True, new_context=context)
        answer = await poster.post(f"https://{name}:{receiver.port}/", b"{}", {})
        await poster.close()
    assert answer.outcome is outcome
    assert len(receiver.received) == (outcome is Outcome.DELIVERED)
    assert named == [None if name == "127.0.0.1" else name]


async def test_a_status_counts_though_the_body_after_it_never_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(post, "ANSWER_S", 0.05)
    async with receiving(lambda received: Reply(stuck=True)) as receiver:
        poster = Poster(_fixed(["127.0.0.1"]), allow_private=True)
        answer = await poster.post(f"http://name.example:{receiver.port}/", b"{}", {})
        await poster.close()
    assert answer.outcome is Outcome.DELIVERED


@pytest.mark.parametrize(
    "url",
    ["http://.example/", "http://a..b/", f"http://{'a' * 64}.b/", "http://[::1%25]:9/", 'http://"<>:9/', "http://a:0/"],
)
async def test_a_strange_name_is_an_answer_and_no_error(url: str):
    """An error would be nobody's attempt: it would come again for ever."""
    poster = Poster(_fixed(["127.0.0.1"]), allow_private=True, total_s=5)
    for strange in (url, url.replace("http", "https")):
        answer = await poster.post(strange, b"{}", {})
        assert answer.outcome in (Outcome.FORBIDDEN, Outcome.UNREACHABLE, Outcome.BROKEN)
    await poster.close()


def test_what_a_status_means():
    outcomes = {status: answer_of(status).outcome for status in (200, 204, 299, 301, 307, 400, 404, 410, 429, 500, 503)}
    assert outcomes == {
        200: Outcome.DELIVERED,
        204: Outcome.DELIVERED,
        299: Outcome.DELIVERED,
        301: Outcome.REDIRECTED,
        307: Outcome.REDIRECTED,
        400: Outcome.REFUSED,
        404: Outcome.REFUSED,
        410: Outcome.GONE,
        429: Outcome.REFUSED,
        500: Outcome.FAILED,
        503: Outcome.FAILED,
    }
