"""The bounded dictionary."""

import pytest

from gateway.lru import LRU


def test_what_was_longest_unused_goes_first():
    lru: LRU[str, int] = LRU(2)
    lru.put("a", 1)
    lru.put("b", 2)
    assert lru.get("a") == 1
    lru.put("c", 3)
    assert [lru.get(key) for key in "abc"] == [1, None, 3]
    assert len(lru) == 2


def test_putting_again_renews():
    lru: LRU[str, int] = LRU(2)
    lru.put("a", 1)
    lru.put("b", 2)
    lru.put("a", 9)
    lru.put("c", 3)
    assert [lru.get(key) for key in "abc"] == [9, None, 3]


def test_what_is_discarded_or_cleared_is_gone():
    lru: LRU[str, int] = LRU(2)
    lru.put("a", 1)
    lru.discard("a")
    lru.discard("missing")
    assert lru.get("a") is None
    lru.put("b", 2)
    lru.clear()
    assert len(lru) == 0


def test_it_must_hold_something():
    with pytest.raises(ValueError, match="at least 1"):
        LRU(0)
