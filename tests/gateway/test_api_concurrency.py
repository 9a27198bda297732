"""One idempotency key, fifty times at once: one effect and one answer, for every POST of the table below.

A row arranges what its request needs, and counts how often the request has taken effect. Another endpoint is another
row.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest

from gateway.app import Gateway
from tests.gateway.office import Office
from tests.gateway.rig import open_store

AT_ONCE = 50
WHILE_IT_RUNS = 409


@dataclass(frozen=True)
class Asked:
    """A POST, and *other*, a body of it that asks for something else; None where it has none."""

    path: str
    body: dict[str, Any] | None
    other: dict[str, Any] | None = None


@dataclass(frozen=True)
class Row:
    """*effects* is how often the request has taken effect since it was arranged."""

    name: str
    arrange: Callable[[Office], Awaitable[Asked]]
    effects: Callable[[Office, Asked], Awaitable[int]]


async def lines(office: Office, kind: str) -> int:
    """How many lines of ann's statement are of this kind."""
    page = await office.get("/v1/customers/ann/transactions?limit=200")
    return sum(line["type"] == kind for line in page["data"])


async def fund(office: Office) -> str:
    """Give ann ten credits; the block."""
    made = await office.post("/v1/topup/grant", {"customer_id": "ann", "credits": 10_000})
    block: str = made["ledger_id"]
    return block


async def reserve(office: Office, credits: int = 4000) -> dict[str, Any]:
    await fund(office)
    made: dict[str, Any] = await office.post("/v1/reservations", {"customer_id": "ann", "credits": credits})
    return made


async def a_grant(office: Office) -> Asked:
    return Asked("/v1/topup/grant", {"customer_id": "ann", "credits": 700}, {"customer_id": "ann", "credits": 701})


async def grants(office: Office, asked: Asked) -> int:
    return await lines(office, "grant")


async def a_capped_grant(office: Office) -> Asked:
    await office.post("/v1/topup/grant", {"customer_id": "ann", "credits": 900, "source": "monthly"})
    body = {"customer_id": "ann", "credits": 500, "source": "monthly", "accumulation_cap": 1000}
    return Asked("/v1/topup/grant", body, {**body, "accumulation_cap": 2000})


async def capped_grants(office: Office, asked: Asked) -> int:
    balance = (await office.get("/v1/customers/ann/credits"))["balance"]
    return await lines(office, "grant") - 1 if balance == 1000 else -1


async def a_pool(office: Office) -> Asked:
    await office.fund_developer("100")
    return Asked("/v1/funding/pool", {"credits": 1000}, {"credits": 1001})


async def pool_moves(office: Office, asked: Asked) -> int:
    balance: int = (await office.get("/v1/funding"))["pool"]["balance"]
    return balance // 1000


async def a_gift(office: Office) -> Asked:
    await office.fund_developer("100")
    await office.post("/v1/funding/pool", {"credits": 90_000})
    body = {"customer_id": "ann", "amount": "0.01"}
    return Asked("/v1/funding/grant", body, {**body, "amount": "0.02"})


async def a_reservation(office: Office) -> Asked:
    await fund(office)
    body = {"customer_id": "ann", "credits": 100}
    return Asked("/v1/reservations", body, {**body, "credits": 101})


async def reservations(office: Office, asked: Asked) -> int:
    reserved: int = (await office.get("/v1/customers/ann/credits"))["reserved"]
    return reserved // 100


async def a_commit(office: Office) -> Asked:
    made = await reserve(office)
    return Asked(f"/v1/reservations/{made['id']}/commit", {"credits": 300}, {"credits": 301})


async def a_partial_commit(office: Office) -> Asked:
    asked = await a_commit(office)
    return replace(asked, body={"credits": 300, "final": False}, other={"credits": 300})


async def charges(office: Office, asked: Asked) -> int:
    return await lines(office, "charge")


async def an_extension(office: Office) -> Asked:
    made = await reserve(office)
    return Asked(f"/v1/reservations/{made['id']}/extend", {"credits": 100}, {"credits": 101})


async def extensions(office: Office, asked: Asked) -> int:
    reserved: int = (await office.get("/v1/customers/ann/credits"))["reserved"]
    return (reserved - 4000) // 100


async def a_release(office: Office) -> Asked:
    made = await reserve(office)
    await reserve(office)
    return Asked(f"/v1/reservations/{made['id']}/release", None)


async def releases(office: Office, asked: Asked) -> int:
    reserved: int = (await office.get("/v1/customers/ann/credits"))["reserved"]
    return (8000 - reserved) // 4000


async def a_refund(office: Office) -> Asked:
    made = await reserve(office)
    done = await office.post(f"/v1/reservations/{made['id']}/commit", {"credits": 4000})
    return Asked(f"/v1/requests/{done['request_id']}/refund", {"credits": 50}, {})


async def refunds(office: Office, asked: Asked) -> int:
    return await lines(office, "refund")


async def a_revocation(office: Office) -> Asked:
    block = await fund(office)
    return Asked(f"/v1/customers/ann/credits/{block}/revoke", {"credits": 100}, {"credits": 100, "clawback": True})


async def revocations(office: Office, asked: Asked) -> int:
    return await lines(office, "revocation")


async def a_customer(office: Office) -> Asked:
    return Asked("/v1/customers", {"external_id": "ann"}, {"external_id": "bob"})


async def customers(office: Office, asked: Asked) -> int:
    return len((await office.get("/v1/customers"))["data"])


TABLE = [
    Row("grant", a_grant, grants),
    Row("capped grant", a_capped_grant, capped_grants),
    Row("pool", a_pool, pool_moves),
    Row("grant from the pool", a_gift, grants),
    Row("reservation", a_reservation, reservations),
    Row("commit", a_commit, charges),
    Row("partial commit", a_partial_commit, charges),
    Row("extension", an_extension, extensions),
    Row("release", a_release, releases),
    Row("refund", a_refund, refunds),
    Row("revocation", a_revocation, revocations),
    Row("customer", a_customer, customers),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
async def test_one_key_fifty_times_at_once_has_one_effect_and_one_answer(office: Office, row: Row):
    asked = await row.arrange(office)

    answers = await asyncio.gather(
        *(office.ask("POST", asked.path, asked.body, once="the-key") for _ in range(AT_ONCE))
    )

    answered = [answer for answer in answers if answer.status_code != WHILE_IT_RUNS]
    assert answered
    assert answered[0].status_code in (200, 201, 202), answered[0].text
    assert {answer.status_code for answer in answered} == {answered[0].status_code}
    assert len({without_replay(answer) for answer in answered}) == 1
    assert sum("x-idempotent-replayed" not in answer.headers for answer in answered) == 1
    assert await row.effects(office, asked) == 1

    async with another_process(office) as other:
        again = await other.ask("POST", asked.path, asked.body, once="the-key")
        assert (again.status_code, without_replay(again)) == (answered[0].status_code, without_replay(answered[0]))
        assert again.headers["x-idempotent-replayed"] == "true"
    if asked.other is not None:
        refused = await office.refused("POST", asked.path, asked.other, once="the-key")
        assert refused == (422, "idempotency_key_reused", None)
    assert await row.effects(office, asked) == 1


def without_replay(answer: httpx.Response) -> str:
    """The answer, but for the one member that tells of the repetition itself."""
    said = answer.json()
    said.pop("duplicate", None)
    return str(said)


@contextlib.asynccontextmanager
async def another_process(office: Office) -> AsyncIterator[Office]:
    """A gateway that remembers nothing, on the same database: as after a restart."""
    settings = office.gateway.services.settings
    apart = settings.model_copy(update={"journal_dir": settings.journal_dir / "other"})
    gateway = Gateway(apart, now_us=office.clock.now_us, open_store=open_store)
    await gateway.start()
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=gateway), base_url="http://farebox") as client:
            yield replace(office, gateway=gateway, client=client)
    finally:
        await gateway.stop()
