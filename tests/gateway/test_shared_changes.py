"""What one process changes of keys and apps, the others forget at once; and Redis is told of where it is wanted."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gateway.app import Gateway
from gateway.cli.shared import with_books
from gateway.installation import Books
from gateway.settings import Settings
from gateway.shared.changes import Changes
from gateway.shared.link import Link
from gateway.telemetry import Metrics
from tests.gateway.office import open_office
from tests.gateway.test_shared_link import DEADLINE_S, until
from tests.servers.valkey import ValkeyServer

PATIENT_S = 5.0


class Process:
    """One that caches something, and counts how often it was told to forget it."""

    def __init__(self, url: str) -> None:
        self.forgot = 0
        self.link = Link(url, Metrics(), timeout_s=PATIENT_S, lease_s=0.05)
        self.changes = Changes(self._forget, url=url, link=self.link, retry_s=0.05)

    def _forget(self) -> None:
        self.forgot += 1

    async def start(self) -> "Process":
        await self.link.start()
        self.changes.start()
        return self

    async def stop(self) -> None:
        await self.changes.stop()
        await self.link.stop()


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    server = ValkeyServer().start()
    yield server
    server.close()


@pytest.fixture
async def two(server: ValkeyServer) -> AsyncIterator[list[Process]]:
    both = [await Process(server.url).start() for _ in range(2)]
    await until(lambda: all(each.changes.heard.is_set() for each in both))
    yield both
    for each in both:
        await each.stop()


@pytest.mark.parametrize("kind", ["redis_url", "redis_cluster_url"])
async def test_a_change_is_heard_by_all(kind: str, request: pytest.FixtureRequest):
    one, other = [await Process(request.getfixturevalue(kind)).start() for _ in range(2)]
    await until(other.changes.heard.is_set)
    before = other.forgot
    one.changes.announce()
    assert one.forgot  # At once, whatever Redis does.
    await until(lambda: other.forgot > before)
    for each in (one, other):
        await each.stop()


async def test_without_redis_a_process_still_forgets_its_own(two: list[Process], server: ValkeyServer):
    server.kill()
    before = two[0].forgot
    two[0].changes.announce()
    assert two[0].forgot == before + 1


async def test_a_listener_comes_back_and_forgets_what_it_may_have_missed(two: list[Process], server: ValkeyServer):
    one, other = two
    server.kill()
    await until(lambda: not other.changes.heard.is_set())
    before = other.forgot
    server.start()
    await until(lambda: other.changes.heard.is_set() and one.link.up)
    assert other.forgot > before
    before = other.forgot
    one.changes.announce()
    await until(lambda: other.forgot > before)


# In the gateway.


async def test_two_gateways_share_limits_and_hear_of_a_revoked_key(tmp_path: Path, redis_url: str):
    async with open_office(tmp_path, redis_url=redis_url, management_rate_limit_per_minute=5) as office:
        other = Gateway(Settings(**{**dict(office.gateway.services.settings), "journal_dir": tmp_path / "other"}))
        await other.start()
        try:
            principals = other.services.principals
            await until(other.services.changes.heard.is_set)
            principals._lease_s = 3_600  # Only a message can make it forget.
            new = await office.gateway.services.tenants.create_key(office.tenant, "live", app_id=office.app)
            assert (await principals.authenticate(new.token.encode())).key_id == new.info.id
            assert len(principals._known)
            answer = await office.ask("POST", f"/v1/keys/{new.info.id}/revoke", key="owner")
            assert answer.status_code == 200, answer.text
            await until(lambda: not len(principals._known))
            decisions = [await each.services.rate_limit.check("key_x", 3) for each in (office.gateway, other) * 2]
            assert [decision.allowed for decision in decisions] == [True, True, True, False]
        finally:
            await other.stop()


async def test_the_command_line_tells_the_gateways(tmp_path: Path, redis_url: str):
    async with open_office(tmp_path, redis_url=redis_url) as office:
        services = office.gateway.services
        await until(services.changes.heard.is_set)
        services.principals._lease_s = 3_600
        await services.principals.authenticate(office.keys["live"].encode())
        assert len(services.principals._known)

        async def nothing(books: Books) -> None:
            """Whatever the command does."""

        await asyncio.to_thread(with_books, services.settings, nothing)
        await until(lambda: not len(services.principals._known))


async def test_a_gateway_without_its_redis_is_ready_and_says_so(tmp_path: Path, server: ValkeyServer):
    async with open_office(tmp_path, redis_url=server.url) as office:
        assert "redis" not in (await office.ask_plain("/health/ready")).json()["degraded"]
        server.kill()
        async with asyncio.timeout(DEADLINE_S):
            while "farebox_redis_up 0.0" not in (await office.ask_plain("/metrics")).text:
                pass
        answer = await office.ask_plain("/health/ready")
        assert answer.status_code == 200
        assert answer.json()["degraded"]["redis"].startswith("away: ")
        assert (await office.ask("GET", "/v1/keys", key="owner")).status_code == 200


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", "redis://h/0?socket_timeout=3"])
def test_a_url_that_is_not_understood_is_refused(url: str):
    with pytest.raises(ValueError, match="redis"):
        Settings(redis_url=url)
