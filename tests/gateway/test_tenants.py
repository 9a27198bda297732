"""Tenants, apps and keys as the operator and the tenants manage them."""

import asyncio

import pytest

from gateway.database import Database
from gateway.errors import ApiError
from gateway.identity import keys
from gateway.identity.keys import KeyScope
from gateway.identity.tenants import Tenants
from pricing.money import Asset
from tests.gateway.conftest import Clock


@pytest.fixture
def tenants(database: Database, clock: Clock) -> Tenants:
    return Tenants(database, now_us=clock.now_us)


async def test_the_first_tenant_is_the_operator_and_others_start_without_credit_of_it(tenants: Tenants):
    assert await tenants.first_tenant() is None
    first = await tenants.create_tenant("Operator", first=True)
    other = await tenants.create_tenant("Other")
    assert (first.is_first, first.unfunded_limit) == (True, None)
    assert (other.is_first, other.unfunded_limit) == (False, 0)
    assert await tenants.first_tenant() == first
    assert await tenants.tenant(other.id) == other
    assert await tenants.list_tenants() == [first, other]


async def test_another_tenant_may_be_lent_the_operators_money_up_to_a_limit(tenants: Tenants):
    assert (await tenants.create_tenant("Other", unfunded_limit=5)).unfunded_limit == 5
    with pytest.raises(ApiError) as caught:
        await tenants.create_tenant("Other", unfunded_limit=-1)
    assert caught.value.param == "unfunded_limit"


async def test_a_tenant_is_refused_without_a_ledger_until_it_chooses_otherwise(tenants: Tenants):
    tenant, other = await tenants.create_tenant("One"), await tenants.create_tenant("Other")
    assert tenant.open_allowance == 0
    chosen = await tenants.change_tenant(tenant.id, when_ledger_is_down="open")
    assert chosen.open_allowance == 0, "without an allowance nothing is served"
    assert (await tenants.change_tenant(tenant.id, open_allowance=50)).open_allowance == 50
    assert (await tenants.change_tenant(tenant.id)).open_allowance == 50
    assert (await tenants.change_tenant(tenant.id, when_ledger_is_down="closed")).open_allowance == 0
    assert (await tenants.tenant(other.id)).settings == {}
    with pytest.raises(ApiError) as caught:
        await tenants.change_tenant(tenant.id, open_allowance=-1)
    assert caught.value.param == "open_allowance"
    with pytest.raises(ApiError) as caught:
        await tenants.change_tenant("ten_none", open_allowance=1)
    assert caught.value.code == "not_found"


async def test_two_who_change_different_things_of_a_tenant_at_once_both_do(tenants: Tenants):
    for _ in range(5):
        tenant = await tenants.create_tenant("One")
        await asyncio.gather(
            tenants.change_tenant(tenant.id, when_ledger_is_down="open"),
            tenants.change_tenant(tenant.id, open_allowance=50),
        )
        assert (await tenants.tenant(tenant.id)).open_allowance == 50


async def test_there_is_one_first_tenant(tenants: Tenants):
    await tenants.create_tenant("Operator", first=True)
    with pytest.raises(ApiError, match="first tenant already"):
        await tenants.create_tenant("Usurper", first=True)
    assert len(await tenants.list_tenants()) == 1


async def test_an_app_is_its_tenants_alone(tenants: Tenants):
    one, other = await tenants.create_tenant("One"), await tenants.create_tenant("Other")
    app = await tenants.create_app(one.id, "Chat", billing_mode="developer_pays", markup_bps=2_000)
    assert (await tenants.app(one.id, app.id)) == app
    assert await tenants.list_apps(one.id) == [app]
    assert await tenants.list_apps(other.id) == []
    with pytest.raises(ApiError) as caught:
        await tenants.app(other.id, app.id)
    assert caught.value.code == "not_found"
    with pytest.raises(ApiError):
        await tenants.change_app(other.id, app.id, markup_bps=1)
    assert (await tenants.app(one.id, app.id)).markup_bps == 2_000


async def test_an_app_can_change_its_terms(tenants: Tenants):
    tenant = await tenants.create_tenant("One")
    app = await tenants.create_app(tenant.id, "Chat")
    changed = await tenants.change_app(tenant.id, app.id, markup_bps=333, billing_mode="developer_pays")
    assert (changed.markup_bps, changed.billing_mode, changed.archived) == (333, "developer_pays", False)
    assert (await tenants.change_app(tenant.id, app.id, archived=True)).archived
    assert (await tenants.change_app(tenant.id, app.id)).markup_bps == 333
    assert (await tenants.change_app(tenant.id, app.id, on_disconnect="drain")).on_disconnect == "drain"
    assert (await tenants.change_app(tenant.id, app.id, markup_bps=0)).on_disconnect == "drain"
    assert (await tenants.change_app(tenant.id, app.id, on_disconnect="default")).on_disconnect is None


@pytest.mark.parametrize("markup_bps", [-1, 1_000_001])
async def test_a_markup_out_of_range_is_refused(tenants: Tenants, markup_bps: int):
    tenant = await tenants.create_tenant("One")
    with pytest.raises(ApiError) as caught:
        await tenants.create_app(tenant.id, "Chat", markup_bps=markup_bps)
    assert (caught.value.status, caught.value.param) == (400, "markup_bps")
    app = await tenants.create_app(tenant.id, "Chat")
    with pytest.raises(ApiError):
        await tenants.change_app(tenant.id, app.id, markup_bps=markup_bps)


@pytest.mark.parametrize("name", ["", "a" * 201, "two\nlines"])
async def test_a_name_is_a_line_of_text(tenants: Tenants, name: str):
    with pytest.raises(ApiError) as caught:
        await tenants.create_tenant(name)
    assert caught.value.param == "name"


async def test_a_key_is_shown_once_and_listed_without_its_secret(tenants: Tenants):
    tenant = await tenants.create_tenant("One")
    app = await tenants.create_app(tenant.id, "Chat")
    key = await tenants.create_key(tenant.id, "test", app_id=app.id, name="staging")
    assert keys.parse(key.token.encode()) == ("test", key.info.id)
    assert await tenants.list_keys(tenant.id) == [key.info]
    assert key.token.endswith(key.info.last4)
    assert key.info.scopes == ["catalog:write", "credits:read", "credits:write", "proxy"]
    secret = key.token.rpartition("_")[2]
    assert secret not in repr(await tenants.list_keys(tenant.id))


async def test_a_key_has_the_scopes_that_it_was_given(tenants: Tenants):
    tenant = await tenants.create_tenant("One")
    app = await tenants.create_app(tenant.id, "Chat")
    key = await tenants.create_key(tenant.id, "live", app_id=app.id, scopes=[KeyScope.PROXY, KeyScope.ADMIN])
    assert key.info.scopes == ["admin", "proxy"]
    assert (await tenants.create_key(tenant.id, "live", app_id=app.id, scopes=[])).info.scopes == []


async def test_an_admin_key_has_no_app_and_never_proxies(tenants: Tenants):
    tenant = await tenants.create_tenant("One")
    app = await tenants.create_app(tenant.id, "Chat")
    assert "proxy" not in (await tenants.create_key(tenant.id, "admin")).info.scopes
    with pytest.raises(ApiError, match="An admin key has no app"):
        await tenants.create_key(tenant.id, "admin", app_id=app.id)
    with pytest.raises(ApiError, match="An admin key has no app"):
        await tenants.create_key(tenant.id, "live")
    with pytest.raises(ApiError, match="never proxies"):
        await tenants.create_key(tenant.id, "admin", scopes=[KeyScope.PROXY])


async def test_keys_and_apps_hang_on_what_is_there(tenants: Tenants):
    one, other = await tenants.create_tenant("One"), await tenants.create_tenant("Other")
    app = await tenants.create_app(one.id, "Chat")
    for attempt in (
        tenants.create_app("ten_missing", "Chat"),
        tenants.create_key("ten_missing", "admin"),
        tenants.create_key(other.id, "live", app_id=app.id),
        tenants.revoke_key(one.id, "key_missing"),
        tenants.tenant("ten_missing"),
    ):
        with pytest.raises(ApiError) as caught:
            await attempt
        assert caught.value.code == "not_found"


async def test_a_key_is_revoked_once_and_only_by_its_tenant(tenants: Tenants, clock: Clock):
    one, other = await tenants.create_tenant("One"), await tenants.create_tenant("Other")
    key = await tenants.create_key(one.id, "admin")
    with pytest.raises(ApiError):
        await tenants.revoke_key(other.id, key.info.id)
    assert (await tenants.list_keys(one.id))[0].revoked_at_us is None
    revoked_at_us = clock.us
    assert (await tenants.revoke_key(one.id, key.info.id)).revoked_at_us == revoked_at_us
    clock.pass_s(10)
    assert (await tenants.revoke_key(one.id, key.info.id)).revoked_at_us == revoked_at_us


async def test_a_tenants_credit_may_be_another_asset(tenants: Tenants):
    tenant = await tenants.create_tenant("One", asset=Asset(code="cent", scale=2, usd_value_picos=10**10))
    assert tenant.asset_code == "cent"
