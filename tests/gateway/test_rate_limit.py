"""The moving window: so many requests in any sixty seconds, and headers that tell the truth."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.proxy.rate_limit import UNLIMITED, WINDOW_S, Decision, ProcessRateLimit


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


async def test_the_limit_is_reached_and_a_minute_later_is_free_again():
    clock = Clock()
    limit = ProcessRateLimit(monotonic_s=clock)
    assert await limit.check("key_a", 2) == Decision(True, 2, 1, 60, 0)
    clock.now_s += 20
    assert await limit.check("key_a", 2) == Decision(True, 2, 0, 40, 0)
    assert await limit.check("key_a", 2) == Decision(False, 2, 0, 40, 40)
    clock.now_s += 39.5
    assert await limit.check("key_a", 2) == Decision(False, 2, 0, 1, 1)
    clock.now_s += 0.5
    assert await limit.check("key_a", 2) == Decision(True, 2, 0, 20, 0)


async def test_there_is_no_burst_at_the_turn_of_a_minute():
    clock = Clock()
    limit = ProcessRateLimit(monotonic_s=clock)
    clock.now_s = 59.0
    assert all([(await limit.check("key_a", 3)).allowed for _ in range(3)])
    clock.now_s = 61.0
    assert not (await limit.check("key_a", 3)).allowed


async def test_one_keys_requests_do_not_count_for_another():
    limit = ProcessRateLimit(monotonic_s=Clock())
    assert (await limit.check("key_a", 1)).allowed
    assert (await limit.check("key_b", 1)).allowed
    assert not (await limit.check("key_a", 1)).allowed


async def test_a_refused_request_is_not_counted():
    clock = Clock()
    limit = ProcessRateLimit(monotonic_s=clock)
    await limit.check("key_a", 1)
    for _ in range(100):
        clock.now_s += 0.5
        assert not (await limit.check("key_a", 1)).allowed
    clock.now_s += 10
    assert (await limit.check("key_a", 1)).allowed


async def test_zero_is_off_and_remembers_nothing():
    limit = ProcessRateLimit(monotonic_s=Clock())
    assert [await limit.check("key_a", 0) for _ in range(1_000)] == [UNLIMITED] * 1_000
    assert UNLIMITED.headers() == []
    assert (await limit.check("key_a", 5)).remaining == 4


async def test_a_limit_that_was_lowered_holds_at_once():
    clock = Clock()
    limit = ProcessRateLimit(monotonic_s=clock)
    for _ in range(5):
        await limit.check("key_a", 5)
        clock.now_s += 1
    lowered = await limit.check("key_a", 2)
    assert (lowered.allowed, lowered.remaining) == (False, 0)
    clock.now_s += lowered.retry_after_s
    assert (await limit.check("key_a", 2)).allowed


async def test_the_number_of_keys_is_bounded():
    limit = ProcessRateLimit(monotonic_s=Clock(), keys_max=2)
    for key in ("key_a", "key_b", "key_c"):
        await limit.check(key, 1)
    assert not (await limit.check("key_c", 1)).allowed
    assert (await limit.check("key_a", 1)).allowed


def test_the_headers_are_those_of_the_public_contract():
    assert Decision(True, 100, 99, 60, 0).headers() == [
        (b"x-ratelimit-limit", b"100"),
        (b"x-ratelimit-remaining", b"99"),
        (b"x-ratelimit-reset", b"60"),
    ]


@pytest.mark.asyncio
@given(
    limit=st.integers(1, 5),
    steps_s=st.lists(st.sampled_from([0.0, 0.25, 1.0, 15.0, 59.75, 60.0, 61.0]), max_size=40),
)
async def test_it_decides_as_a_list_of_all_requests_would(limit: int, steps_s: list[float]):
    clock = Clock()
    window = ProcessRateLimit(monotonic_s=clock)
    allowed_at_s: list[float] = []
    for step_s in steps_s:
        clock.now_s += step_s
        recent = [at_s for at_s in allowed_at_s if at_s > clock.now_s - WINDOW_S]
        decision = await window.check("key_a", limit)
        assert decision.allowed == (len(recent) < limit)
        if decision.allowed:
            allowed_at_s.append(clock.now_s)
            recent.append(clock.now_s)
        assert decision.remaining == limit - len(recent)
        assert 0 <= decision.reset_s <= WINDOW_S
