"""Authentication: which key is who, how long it is believed, and how rarely the database is asked."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.database import Database, DatabaseUnavailable, of
from gateway.errors import ApiError
from gateway.identity import keys
from gateway.identity.keys import APP_SCOPES, INSTALLATION_SCOPES, KeyScope
from gateway.identity.principals import LEASE_S, OUTAGE_LEASE_S, OUTAGE_LOOK_S, UNKNOWN_MAX, Principals
from gateway.identity.tenants import Tenants
from gateway.ids import new_id
from gateway.tables import AssetVersion
from pricing.money import CREDIT
from tests.gateway.conftest import Clock


class CountedDatabase(Database):
    """Counts reads, and lets a test hold them or make them fail."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads = 0
        self.away = False
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.reading = asyncio.Event()

    @asynccontextmanager
    async def read_of_key(self, key_id: str) -> AsyncIterator[AsyncConnection]:
        self.reads += 1
        if self.away:
            raise DatabaseUnavailable("away")
        async with super().read_of_key(key_id) as connection:
            yield connection
            self.reading.set()
            await self.go_on.wait()


@pytest.fixture
async def counted(database: Database, database_url: str) -> AsyncIterator[CountedDatabase]:
    counted = CountedDatabase(database_url)
    yield counted
    await counted.close()


@pytest.fixture
def tenants(database: Database) -> Tenants:
    return Tenants(database)


@pytest.fixture
def principals(counted: CountedDatabase, clock: Clock) -> Principals:
    return Principals(counted, now_us=clock.now_us, monotonic_s=clock.monotonic_s)


async def new_key(tenants: Tenants) -> tuple[bytes, str, str]:
    """A live key with its tenant's and its own id."""
    tenant = await tenants.create_tenant("One")
    app = await tenants.create_app(tenant.id, "Chat")
    key = await tenants.create_key(tenant.id, "live", app_id=app.id)
    return key.token.encode(), tenant.id, key.info.id


async def refusal(principals: Principals, token: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await principals.authenticate(token)
    return caught.value


async def test_a_key_tells_tenant_mode_app_and_terms(tenants: Tenants, principals: Principals):
    tenant = await tenants.create_tenant("One")
    app = await tenants.create_app(
        tenant.id, "Chat", billing_mode="developer_pays", markup_bps=2_000, on_disconnect="drain"
    )
    for kind in ("live", "test"):
        key = await tenants.create_key(tenant.id, kind, app_id=app.id)
        principal = await principals.authenticate(key.token.encode())
        assert (principal.tenant_id, principal.mode, principal.app_id) == (tenant.id, kind, app.id)
        assert (principal.key_id, principal.scopes) == (key.info.id, frozenset(APP_SCOPES))
        assert (principal.billing_mode, principal.markup_bps) == ("developer_pays", 2_000)
        assert (principal.on_disconnect, principal.asset, principal.unfunded_limit) == ("drain", CREDIT, 0)


async def test_the_installations_key_has_no_app_and_no_proxy(tenants: Tenants, principals: Principals):
    tenant = await tenants.create_tenant("Operator", first=True)
    key = await tenants.create_key(tenant.id, "admin")
    principal = await principals.authenticate(key.token.encode())
    assert (principal.mode, principal.app_id, principal.unfunded_limit) == ("live", None, None)
    assert principal.scopes == frozenset(INSTALLATION_SCOPES)
    principal.require(KeyScope.ADMIN)
    with pytest.raises(ApiError) as caught:
        principal.require(KeyScope.PROXY)
    assert (caught.value.status, caught.value.code) == (403, "permission_denied")


async def test_a_credits_value_is_the_one_in_force_now(
    database: Database, tenants: Tenants, principals: Principals, clock: Clock
):
    token, tenant_id, _ = await new_key(tenants)
    for effective_from_us, value in ((clock.us - 10, 2 * 10**10), (clock.us + 10_000_000, 3 * 10**10)):
        async with database.write(of(tenant_id)) as connection:
            await connection.execute(
                insert(AssetVersion).values(
                    tenant=tenant_id,
                    code="credit",
                    effective_from_us=effective_from_us,
                    scale=9,
                    usd_value_picos=value,
                )
            )
    assert (await principals.authenticate(token)).asset.usd_value_picos == 2 * 10**10
    clock.pass_s(11)
    assert (await principals.authenticate(token)).asset.usd_value_picos == 3 * 10**10


@pytest.mark.parametrize(
    "token", [b"", b"nonsense", b"fb_live_x_y", b"\xff" * 50, b"fb_live_" + b"0" * 10_000], ids=range(5)
)
async def test_what_is_no_key_never_reaches_the_database(
    principals: Principals, counted: CountedDatabase, token: bytes
):
    error = await refusal(principals, token)
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert counted.reads == 0


async def test_the_right_id_with_a_wrong_secret_is_refused(tenants: Tenants, principals: Principals):
    token, _, key_id = await new_key(tenants)
    forged = keys.generate("live", key_id).token.encode()
    assert (await refusal(principals, forged)).code == "invalid_api_key"
    assert (await refusal(principals, token.replace(b"fb_live", b"fb_test"))).code == "invalid_api_key"
    assert (await principals.authenticate(token)).key_id == key_id


async def test_the_key_of_an_archived_app_is_refused(tenants: Tenants, principals: Principals):
    token, tenant_id, _ = await new_key(tenants)
    [app] = await tenants.list_apps(tenant_id)
    await tenants.change_app(tenant_id, app.id, archived=True)
    assert (await refusal(principals, token)).code == "invalid_api_key"


async def test_the_database_is_asked_once_a_lease(
    tenants: Tenants, principals: Principals, counted: CountedDatabase, clock: Clock
):
    token, _, _ = await new_key(tenants)
    for _ in range(100):
        await principals.authenticate(token)
    assert counted.reads == 1
    clock.pass_s(0.999)
    await principals.authenticate(token)
    assert counted.reads == 1
    clock.pass_s(0.001)
    await principals.authenticate(token)
    assert counted.reads == 2


async def test_a_revocation_elsewhere_is_seen_within_a_second(tenants: Tenants, principals: Principals, clock: Clock):
    token, tenant_id, key_id = await new_key(tenants)
    await principals.authenticate(token)
    await tenants.revoke_key(tenant_id, key_id)
    clock.pass_s(1)
    assert (await refusal(principals, token)).status == 401


async def test_invalidate_is_seen_at_once(tenants: Tenants, principals: Principals):
    token, tenant_id, key_id = await new_key(tenants)
    await principals.authenticate(token)
    await tenants.revoke_key(tenant_id, key_id)
    principals.invalidate()
    assert (await refusal(principals, token)).status == 401


async def test_what_was_read_before_an_invalidation_is_not_kept(
    tenants: Tenants, principals: Principals, counted: CountedDatabase
):
    token, tenant_id, key_id = await new_key(tenants)
    counted.go_on.clear()
    early = asyncio.create_task(principals.authenticate(token))
    await counted.reading.wait()
    await tenants.revoke_key(tenant_id, key_id)
    principals.invalidate()
    counted.go_on.set()
    await early
    assert (await refusal(principals, token)).status == 401


async def test_a_crowd_that_arrives_at_once_asks_once(
    tenants: Tenants, principals: Principals, counted: CountedDatabase
):
    token, _, _ = await new_key(tenants)
    found = await asyncio.gather(*(principals.authenticate(token) for _ in range(50)))
    assert len(set(map(id, found))) == 1
    assert counted.reads == 1


async def test_one_who_leaves_does_not_stop_the_others(
    tenants: Tenants, principals: Principals, counted: CountedDatabase
):
    token, _, key_id = await new_key(tenants)
    counted.go_on.clear()
    leaving = asyncio.create_task(principals.authenticate(token))
    staying = asyncio.create_task(principals.authenticate(token))
    await counted.reading.wait()
    leaving.cancel()
    counted.go_on.set()
    assert (await staying).key_id == key_id
    assert counted.reads == 1


async def test_an_unknown_key_is_asked_for_once_a_lease(principals: Principals, counted: CountedDatabase, clock: Clock):
    token = keys.generate("live", new_id("key")).token.encode()
    for _ in range(10):
        assert (await refusal(principals, token)).status == 401
    assert counted.reads == 1
    clock.pass_s(1)
    await refusal(principals, token)
    assert counted.reads == 2


async def test_guesses_do_not_push_out_keys_that_work(
    tenants: Tenants, principals: Principals, counted: CountedDatabase
):
    token, _, key_id = await new_key(tenants)
    await principals.authenticate(token)
    guesses = [keys.generate("live", key_id).token.encode() for _ in range(UNKNOWN_MAX // 50)]
    for guess in guesses:
        await refusal(principals, guess)
    before = counted.reads
    await principals.authenticate(token)
    assert counted.reads == before


async def test_a_database_that_is_away_is_not_a_wrong_key(
    tenants: Tenants, principals: Principals, counted: CountedDatabase
):
    token, _, key_id = await new_key(tenants)
    counted.away = True
    error = await refusal(principals, token)
    assert (error.status, error.code) == (503, "ledger_unavailable")
    counted.away = False
    assert (await principals.authenticate(token)).key_id == key_id


# The database is away.


async def test_a_tenant_that_chose_it_is_known_for_a_while_without_the_database(
    tenants: Tenants, principals: Principals, counted: CountedDatabase, clock: Clock
):
    token, tenant_id, _ = await new_key(tenants)
    await tenants.change_tenant(tenant_id, when_ledger_is_down="open", open_allowance=7)
    assert (await principals.authenticate(token)).open_allowance == 7
    counted.away = True
    clock.pass_s(LEASE_S)
    reads = counted.reads
    for _ in range(5):
        assert (await principals.authenticate(token)).tenant_id == tenant_id
    assert counted.reads == reads + 1, "it is asked once, and then taken for away for a moment"
    clock.pass_s(OUTAGE_LOOK_S)
    await principals.authenticate(token)
    assert counted.reads == reads + 2
    clock.pass_s(OUTAGE_LEASE_S)
    assert (await refusal(principals, token)).status == 503


async def test_a_tenant_that_did_not_choose_it_is_refused_without_the_database(
    tenants: Tenants, principals: Principals, counted: CountedDatabase, clock: Clock
):
    token, _, _ = await new_key(tenants)
    await principals.authenticate(token)
    counted.away = True
    clock.pass_s(LEASE_S)
    assert (await refusal(principals, token)).status == 503


async def test_a_key_that_was_revoked_meanwhile_ends_when_the_database_is_back(
    tenants: Tenants, principals: Principals, counted: CountedDatabase, clock: Clock
):
    token, tenant_id, key_id = await new_key(tenants)
    await tenants.change_tenant(tenant_id, when_ledger_is_down="open", open_allowance=7)
    await principals.authenticate(token)
    await tenants.revoke_key(tenant_id, key_id)
    counted.away = True
    clock.pass_s(LEASE_S)
    await principals.authenticate(token)
    counted.away = False
    clock.pass_s(OUTAGE_LOOK_S)
    assert (await refusal(principals, token)).status == 401


async def test_a_database_that_hangs_is_waited_for_once_by_those_who_may_go_on(
    tenants: Tenants, principals: Principals, counted: CountedDatabase, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    token, tenant_id, key_id = await new_key(tenants)
    await tenants.change_tenant(tenant_id, when_ledger_is_down="open", open_allowance=7)
    await principals.authenticate(token)
    monkeypatch.setattr("gateway.identity.principals.LOOK_UP_S", 2.0)
    monkeypatch.setattr("gateway.identity.principals.OUTAGE_WAIT_S", 0.01)
    counted.away = True
    clock.pass_s(LEASE_S)
    await principals.authenticate(token)
    counted.away = False
    counted.go_on.clear()
    for _ in range(3):
        clock.pass_s(OUTAGE_LOOK_S)
        assert (await asyncio.wait_for(principals.authenticate(token), 1)).key_id == key_id
    await tenants.revoke_key(tenant_id, key_id)
    counted.go_on.set()
    clock.pass_s(OUTAGE_LOOK_S)
    monkeypatch.setattr("gateway.identity.principals.OUTAGE_WAIT_S", 5.0)
    await principals.authenticate(token)  # The look-up that was under way had read the row before.
    assert (await refusal(principals, token)).status == 401, "one that answers again is believed"


async def test_look_ups_under_way_are_bounded_and_end(
    tenants: Tenants, principals: Principals, counted: CountedDatabase, monkeypatch: pytest.MonkeyPatch
):
    token, _, _ = await new_key(tenants)
    others = [(await new_key(tenants))[0] for _ in range(2)]
    monkeypatch.setattr("gateway.identity.principals.LOOK_UPS_MAX", 2)
    monkeypatch.setattr("gateway.identity.principals.LOOK_UP_S", 0.05)
    counted.go_on.clear()
    waiting = [asyncio.create_task(refusal(principals, other)) for other in others]
    await asyncio.sleep(0)
    assert (await refusal(principals, token)).status == 503
    assert [(await each).status for each in waiting] == [503, 503], "a database that hangs is not waited for"
    counted.go_on.set()
    monkeypatch.undo()
    await principals.authenticate(token)
