"""API keys: their form, and that nothing but a hash of them remains."""

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.identity import keys
from gateway.identity.keys import APP_SCOPES, INSTALLATION_SCOPES, KeyKind, KeyScope
from gateway.ids import new_id


@pytest.mark.parametrize("kind", ["live", "test", "admin"])
def test_a_key_says_its_kind_and_its_id(kind: KeyKind):
    key_id = new_id("key")
    generated = keys.generate(kind, key_id)
    assert re.fullmatch(rf"fb_{kind}_{key_id.removeprefix('key_')}_[a-z2-7]{{52}}", generated.token)
    assert keys.parse(generated.token.encode()) == (kind, key_id)
    assert len(generated.token) <= keys.TOKEN_LENGTH_MAX


def test_only_a_hash_and_the_last_four_characters_remain():
    generated = keys.generate("live", new_id("key"))
    assert generated.secret_hash == hashlib.sha256(generated.token.encode()).digest()
    assert generated.last4 == generated.token[-4:]


def test_two_keys_share_no_secret():
    key_id = new_id("key")
    assert keys.generate("live", key_id).token != keys.generate("live", key_id).token


def test_the_hash_covers_the_kind():
    token = keys.generate("test", new_id("key")).token
    forged = token.replace("fb_test_", "fb_live_")
    assert keys.parse(forged.encode()) is not None
    assert not keys.same(keys.digest(forged.encode()), keys.digest(token.encode()))


GOOD = keys.generate("live", new_id("key")).token.encode()


@pytest.mark.parametrize(
    "token",
    [
        b"",
        b"fb_",
        b"sk-123",
        GOOD[:-1],
        GOOD + b"a",
        GOOD.upper(),
        GOOD + b"\n",
        b" " + GOOD,
        GOOD * 2,
        GOOD.replace(b"live", b"root"),
        GOOD.replace(b"_", b"-"),
        b"\xff\xfe\x00",
        b"fb_live_" + b"a" * 1_000_000,
    ],
    ids=range(13),
)
def test_what_is_no_key_is_none(token: bytes):
    assert keys.parse(token) is None


@given(st.binary(max_size=200))
def test_parsing_survives_any_bytes(token: bytes):
    assert keys.parse(token) is None


def test_an_apps_key_does_not_administer_and_the_installations_does_not_proxy():
    assert {*APP_SCOPES} == {KeyScope.PROXY, KeyScope.CREDITS_READ, KeyScope.CREDITS_WRITE, KeyScope.CATALOG_WRITE}
    assert KeyScope.ADMIN in INSTALLATION_SCOPES
    assert KeyScope.PROXY not in INSTALLATION_SCOPES
    assert [scope.value for scope in KeyScope] == [
        "proxy",
        "credits:read",
        "credits:write",
        "catalog:write",
        "admin",
    ]
