"""Nobody overspends, however many ask at once, of however many processes."""

import asyncio
import random
from collections import Counter
from typing import Any, Final

import aiohttp
import pytest

from tests.conftest import Campaign
from tests.e2e.books import Books
from tests.e2e.conftest import FreshStore, Install
from tests.e2e.farebox import UNITS_OF_OUTPUT, Farebox, Gateway
from tests.e2e.fleet import Fleets
from tests.e2e.load import Seen, ask, chat, session, units

REQUESTS: Final = 500
TOKENS: Final = 40
CONNECTIONS: Final = 200
PRICE: Final = "0.008"
PRICE_MILLICREDITS: Final = 8
"""Of TOKENS output tokens; the prompt is free."""

SERVED: Final = 333
"""More than either process is asked for, so that both of them serve."""

FUNDS_MILLICREDITS: Final = 2_668
"""333 times the price, and half of it again."""

REFUSE: Final = {"X-Quota-Clamping": "off"}


async def all_at_once(
    farebox: Farebox, gateways: list[Gateway], user: str, bodies: list[dict[str, Any]], headers: list[dict[str, str]]
) -> list[Seen]:
    """Send *bodies* at the same time, to the gateways in turn."""
    async with session() as client:
        return await asyncio.gather(
            *(
                ask(client, gateways[number % len(gateways)].base_url, {**farebox.headers(user), **more}, body)
                for number, (body, more) in enumerate(zip(bodies, headers, strict=True))
            )
        )


def assert_sound(farebox: Farebox) -> None:
    """What holds of the books when nothing is under way."""
    books = farebox.books
    assert books.open_requests() == set()
    assert books.reserved() == 0
    assert min(books.lowest_balances().values()) == 0, "no wallet was ever below zero, entry by entry"
    farebox.verify()


async def test_exactly_those_are_served_whom_the_wallet_affords(install: Install) -> None:
    """Each request's quote is its cost: the prompt is free, and the answer as long as its limit."""
    farebox = install()
    gateways = [farebox.serve(), farebox.serve()]
    farebox.top_up(gateways[0], "alice", millicredits=FUNDS_MILLICREDITS)
    body = chat("output-only", simulate={"tokens": TOKENS + 1, "first_byte_delay_ms": 300}, max_tokens=TOKENS)
    seen = await all_at_once(farebox, gateways, "alice", [body] * REQUESTS, [REFUSE] * REQUESTS)

    assert Counter(each.status for each in seen) == {200: SERVED, 402: REQUESTS - SERVED}
    assert all(each.complete for each in seen)
    for each in seen:
        if each.status == 200:
            assert each.headers["x-quota-cost"] == each.headers["x-quota-reserved"] == each.usage["cost"] == PRICE  # type: ignore[index]
            continue
        error = each.json["error"]
        assert (error["code"], error["needed"], error["needed_decimal"]) == ("insufficient_credits", 8, PRICE)
        assert error["available"] == units(error["available_decimal"]) // 10**6
        assert units(error["available_decimal"]) < units(PRICE)
        assert error["request_id"] == each.request_id
    for half in (seen[::2], seen[1::2]):
        assert 200 in {each.status for each in half}, "both processes served"
    statement = farebox.statement("alice")
    assert statement["balance_decimal"] == "0.004"
    assert_sound(farebox)


@pytest.mark.campaign
@pytest.mark.parametrize("workers", [(4,), (1, 1, 1, 1)], ids=["4 workers", "4 processes"])
async def test_four_processes_on_one_server_serve_exactly_what_one_wallet_affords(
    install: Install, fleets: Fleets, campaign: Campaign, workers: tuple[int, ...]
) -> None:
    """As above, with requests that keep coming, and more of them than a process has ever under way."""
    requests = campaign.rounds(short=600, long=20_000)
    served = requests * 2 // 3
    farebox = install(database_url=fleets.servers.postgres.create_database())
    gateways = [farebox.serve("--workers", str(many)) for many in workers]
    assert sum(len(gateway.workers) or 1 for gateway in gateways) == 4
    farebox.top_up(gateways[0], "alice", millicredits=served * PRICE_MILLICREDITS + PRICE_MILLICREDITS // 2)
    body = chat("output-only", simulate={"tokens": TOKENS + 1}, max_tokens=TOKENS)
    headers = {**farebox.headers("alice"), **REFUSE}
    numbers = iter(range(requests))
    seen: list[Seen] = []

    async def ask_on(client: aiohttp.ClientSession) -> None:
        for number in numbers:
            seen.append(await ask(client, gateways[number % len(gateways)].base_url, headers, body))

    async with session() as client:
        await asyncio.gather(*(ask_on(client) for _ in range(CONNECTIONS)))

    assert Counter(each.status for each in seen) == {200: served, 402: requests - served}
    assert all(each.complete for each in seen)
    booked = farebox.books.requests()
    assert {each.request_id for each in seen if each.status == 200} == booked.keys()
    assert {entry.charged for entry in booked.values()} == {units(PRICE)}
    assert farebox.statement("alice")["balance_decimal"] == "0.004"
    assert_sound(farebox)


@pytest.mark.campaign
async def test_mixed_costs_never_overspend_and_leave_nothing_reserved(
    install: Install, fresh_store: FreshStore, campaign: Campaign
) -> None:
    """Quotes above their costs, streams that grow, fixed prices: the wallet is used up, and never below zero."""
    rng = campaign.random()
    for _ in range(campaign.rounds(short=1, long=10)):
        farebox = install(**fresh_store())
        gateways = [farebox.serve(), farebox.serve()]
        farebox.top_up(gateways[0], "alice", millicredits=6_000)
        bodies = [mixed(rng) for _ in range(REQUESTS)]
        headers = [{"X-Quota-Action": "reply"} if rng.random() < 0.1 else {} for _ in bodies]
        seen = await all_at_once(farebox, gateways, "alice", bodies, headers)

        assert {each.status for each in seen} == {200, 402}
        assert all(each.complete for each in seen)
        assert_sound(farebox)
        books = farebox.books
        booked = books.requests()
        shown = {each.request_id: each for each in seen if each.usage is not None}
        assert len(shown) > 50
        for request_id, each in shown.items():
            assert units(each.usage["cost"]) <= booked[request_id].charged == booked[request_id].recorded  # type: ignore[index]
        refused = {each.request_id for each in seen if each.status == 402}
        assert not refused & booked.keys(), "who is refused reserves nothing"
        await assert_affords_its_balance(farebox, gateways[0], books)


def mixed(rng: random.Random) -> dict[str, Any]:
    """A request whose worst case is more than its cost, mostly."""
    tokens = rng.randrange(1, 80)
    prompt = "word " * rng.randrange(1, 60)
    simulate = {"tokens": tokens, "first_byte_delay_ms": rng.randrange(300), "chunk_delay_ms": rng.randrange(5)}
    if rng.random() < 0.5:
        return chat("meter", prompt=prompt, simulate=simulate, max_tokens=rng.choice([64, 100, 200]))
    fields: dict[str, Any] = {"max_tokens": rng.choice([100, 400])} if rng.random() < 0.5 else {}
    simulate["tokens"] *= 8
    options = {"include_usage": True}
    return chat("meter", prompt=prompt, simulate=simulate, stream=True, stream_options=options, **fields)


async def assert_affords_its_balance(farebox: Farebox, gateway: Gateway, books: Books) -> None:
    """A request that costs all that is left, to the last token, is served; one token more is refused."""
    farebox.top_up(gateway, "alice", millicredits=10)
    remaining = books.remaining("alice")
    tokens = remaining // UNITS_OF_OUTPUT
    assert tokens >= 50
    headers = {**farebox.headers("alice"), **REFUSE}
    async with session() as client:
        more = await ask(client, gateway.base_url, headers, chat("output-only", max_tokens=tokens + 1))
        assert more.status == 402
        assert units(more.json["error"]["available_decimal"]) == remaining
        all_of_it = chat("output-only", simulate={"tokens": tokens}, max_tokens=tokens)
        served = await ask(client, gateway.base_url, headers, all_of_it)
    assert served.status == 200, served.json
    assert books.remaining("alice") == remaining - tokens * UNITS_OF_OUTPUT < UNITS_OF_OUTPUT
