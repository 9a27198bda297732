"""A gateway that dies or stands still in the middle of its work: every answer that was seen is paid once, and no work
is silently free.

How it works. A round keeps more than fifty requests in flight, waits until one of them is in the phase that the round
aims at, and kills. What phase each request was in is told afterwards by three witnesses that are not the gateway: the
client, the upstream's log, and the database file.
"""

import asyncio
import fcntl
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, Final

import pytest

from gateway.proxy.upkeep import SWEEP_S
from tests.conftest import Campaign
from tests.e2e.audit import assert_charged_once, assert_receipts
from tests.e2e.books import Booked, Books
from tests.e2e.conftest import FreshStore, Install
from tests.e2e.farebox import Farebox, Gateway, Upstream, until_async
from tests.e2e.load import Seen, Traffic, a_request, chat

LIFE_S: Final = 2.0
SETTINGS: Final = {"reservation_life_s": LIFE_S, "heartbeat_s": 0.5, "ledger_timeout_s": 60}
"""A stop is longer than a request usually waits for the ledger; here none shall give up."""

CLIENTS: Final = 64
IN_FLIGHT_MIN: Final = 50
ROUNDS_OF_ONE_FILE: Final = 10
"""`farebox verify` replays the whole journal after each round; a fresh file now and then keeps that short."""

USERS: Final = tuple(f"user-{number}" for number in range(8))
AIM_S: Final = 60.0
SETTLED_S: Final = LIFE_S + SWEEP_S + 15.0
"""When the last orphan is settled, at the latest: its time, the sweeper's pause, and two busy cores."""

LOCK_FREE_S: Final = 1.0
LARGE_BYTES: Final = 6 * 2**20


class Phase(StrEnum):
    """Where a request was when its gateway died."""

    RESERVED = "reserved, and the upstream knows nothing of it"
    FORWARDED = "forwarded, and nothing of the answer has come"
    STREAMING = "the client has begun to read"
    SETTLING = "the upstream has sent everything, and nothing is charged yet"
    UNANSWERED = "charged, and the client does not have the whole answer"


# What the clients ask.


def a_request_or_one_that_nobody_hears(rng: random.Random) -> dict[str, Any]:
    """The same, and some to an upstream that is not there, which is asked again and again for more than a second."""
    if rng.random() < 0.1:
        return chat("unreachable", max_tokens=64)
    return a_request(rng)


NOT_READ: Final = chat("meter", simulate={"chunk_bytes": LARGE_BYTES}, max_tokens=64)


# What is found afterwards.


@dataclass
class Findings:
    """What a campaign met, added up over its rounds."""

    rounds: int = 0
    in_flight: list[int] = field(default_factory=list)
    phases: Counter[Phase] = field(default_factory=Counter)
    complete: int = 0
    orphans: int = 0
    late: int = 0
    locked: int = 0
    longest_settling_s: float = 0.0

    def __str__(self) -> str:
        facts = [
            f"{self.rounds} rounds, in flight {min(self.in_flight)}-{max(self.in_flight)}",
            *(f"{phase.name.lower()} {self.phases[phase]}" for phase in Phase if self.phases[phase]),
            f"{self.complete} complete answers, each charged once",
            f"{self.orphans} orphans, none free",
            f"{self.late} commits after the sweeper",
            f"{self.locked} stops with the write lock held",
            f"all settled within {self.longest_settling_s:.1f} s",
        ]
        return "; ".join(facts)


def phase_of(request_id: str, booked: Booked, seen: Seen | None, upstream: Upstream) -> Phase | None:
    """None for a request that was over."""
    if booked.state == "open":
        if request_id not in upstream.received:
            return Phase.RESERVED
        if request_id in upstream.sent:
            return Phase.SETTLING
        return Phase.STREAMING if seen is not None and seen.body else Phase.FORWARDED
    complete = seen is not None and seen.complete
    return Phase.UNANSWERED if booked.charged > 0 and not complete else None


async def assert_paid(
    farebox: Farebox, gateway: Gateway, upstream: Upstream, seen: list[Seen], findings: Findings
) -> None:
    """Each answer that a client saw whole is charged once, as its receipt says, and the rest of the work too."""
    booked = farebox.books.requests()
    complete = [each for each in seen if each.complete]
    for each in complete:
        assert each.request_id is not None
        entry = booked[each.request_id]
        assert entry.charged == entry.recorded, "the journal and the usage rows agree"
        if each.status != 200:
            assert (each.model, each.status) == ("unreachable", 502), each.body
            assert (entry.state, entry.charged, entry.endings) == ("released", 0, ()), "nothing was charged"
        else:
            assert_charged_once(each, entry)
    await assert_receipts(farebox, gateway, complete, booked)
    for request_id in upstream.received & booked.keys():
        assert booked[request_id].charged > 0, f"{request_id} reached the upstream for free: {booked[request_id]}"
    findings.complete += sum(each.status == 200 for each in complete)
    findings.late += sum(booked[each.request_id or ""].endings == ("died", "finished") for each in complete)


async def assert_all_settled(books: Books, findings: Findings) -> None:
    """No reservation outlives its time."""
    began = time.monotonic()
    await until_async(
        lambda: not books.open_requests(), within_s=SETTLED_S, what="end of the last orphan's reservation"
    )
    findings.longest_settling_s = max(findings.longest_settling_s, time.monotonic() - began)
    assert books.reserved() == 0
    assert min(books.lowest_balances().values()) == 0


# The kills.


@contextmanager
def ledger_held_up(farebox: Farebox, upstream: Upstream) -> Iterator[Callable[[], bool]]:
    """Keep every other process from writing to the ledger; the condition holds when answers pile up before it."""
    with farebox.held_up():
        already = len(upstream.sent)
        yield lambda: len(upstream.sent) >= already + 3


@contextmanager
def aimed_at(phase: Phase, farebox: Farebox, upstream: Upstream, traffic: Traffic) -> Iterator[Callable[[], bool]]:
    """The condition under which a kill meets *phase*."""
    books = farebox.books
    if phase is Phase.SETTLING:
        with ledger_held_up(farebox, upstream) as there:
            yield there
    elif phase is Phase.RESERVED:
        yield lambda: bool(books.open_requests("unreachable"))
    elif phase is Phase.FORWARDED:
        yield lambda: bool((upstream.received - upstream.sent) & books.open_requests())
    elif phase is Phase.STREAMING:
        yield lambda: any(each.body and not each.complete for each in traffic.seen)
    else:
        # Of those in the log the large ones alone are read by nobody: charged, they wait in their gateway's memory.
        yield lambda: large_is_charged(books, upstream, traffic)


def large_is_charged(books: Books, upstream: Upstream, traffic: Traffic) -> bool:
    unseen = upstream.sent - {each.request_id for each in traffic.seen}
    return bool(unseen & books.settled_requests())


async def kill_in_the_middle(
    farebox: Farebox, gateway: Gateway, upstream: Upstream, rng: random.Random, *, aim: Phase, findings: Findings
) -> list[Seen]:
    """One round up to the kill: what the clients saw."""
    books = farebox.books
    before = books.requests().keys()
    traffic = Traffic(
        gateway.base_url, [farebox.headers(user) for user in USERS], a_request_or_one_that_nobody_hears, rng
    )
    clients = asyncio.create_task(traffic.run(clients=CLIENTS, not_reading=(NOT_READ,) * 2))
    await under_way(traffic, upstream, rng)
    with aimed_at(aim, farebox, upstream, traffic) as there:
        await until_async(
            lambda: traffic.in_flight >= IN_FLIGHT_MIN and there(), within_s=AIM_S, what=f"request {aim.value}"
        )
        findings.in_flight.append(traffic.in_flight)
        gateway.kill()
    traffic.stop()
    seen = await clients
    by_id = {each.request_id: each for each in seen}
    for request_id, booked in books.requests().items():
        if request_id not in before:
            phase = phase_of(request_id, booked, by_id.get(request_id), upstream)
            findings.phases.update([phase] if phase else [])
            findings.orphans += booked.state == "open"
    return seen


@pytest.mark.campaign
async def test_a_killed_gateway_charges_every_answer_once_and_no_work_for_free(
    install: Install,
    fresh_store: FreshStore,
    upstream: Upstream,
    campaign: Campaign,
    record_property: Callable[[str, object], None],
) -> None:
    rng, findings = campaign.random(), Findings()
    rounds = campaign.rounds(short=4, long=100)
    # One after the other; what four rounds do not aim at, they meet anyway.
    aims = [Phase.SETTLING, Phase.UNANSWERED, Phase.RESERVED, Phase.STREAMING, Phase.FORWARDED]
    farebox = gateway = None
    for number in range(rounds):
        if farebox is None or gateway is None or number % ROUNDS_OF_ONE_FILE == 0:
            if gateway is not None:
                assert gateway.stop() == 0
            farebox = install(**SETTINGS, **fresh_store())
            gateway = funded(farebox)
        books = farebox.books
        seen = await kill_in_the_middle(
            farebox, gateway, upstream, rng, aim=aims[number % len(aims)], findings=findings
        )
        if number % 2:
            await until_async(partial(run_out, books), within_s=SETTLED_S, what="end of the reservations' time")
        gateway = farebox.serve()
        await assert_all_settled(books, findings)
        await assert_paid(farebox, gateway, upstream, seen, findings)
        await asyncio.to_thread(farebox.verify)
        findings.rounds += 1
    assert set(findings.phases) == set(Phase), findings
    report("kill -9", findings, record_property)


def run_out(books: Books) -> bool:
    """Whether a sweeper that starts now finds every orphan due."""
    return books.last_expiry_us() < time.time_ns() // 1000


def funded(farebox: Farebox) -> Gateway:
    """A gateway whose users have more than they can spend."""
    gateway = farebox.serve()
    for user in USERS:
        farebox.top_up(gateway, user, millicredits=10**9)
    return gateway


# The stops.


@pytest.mark.campaign
async def test_a_gateway_that_stood_still_past_its_reservations_charges_only_what_is_missing(
    install: Install,
    fresh_store: FreshStore,
    upstream: Upstream,
    campaign: Campaign,
    record_property: Callable[[str, object], None],
) -> None:
    """The other process settles what the still one holds; when that one goes on, its late commits charge the rest."""
    rng, findings = campaign.random(), Findings()
    farebox = install(**SETTINGS, **fresh_store())
    paused, other = funded(farebox), farebox.serve()
    books = farebox.books
    for number in range(campaign.rounds(short=1, long=20)):
        if number and number % ROUNDS_OF_ONE_FILE == 0:
            assert (paused.stop(), other.stop()) == (0, 0)
            farebox = install(**SETTINGS, **fresh_store())
            paused, other = funded(farebox), farebox.serve()
            books = farebox.books
        traffic = Traffic(paused.base_url, [farebox.headers(user) for user in USERS], a_request, rng)
        clients = asyncio.create_task(traffic.run(clients=CLIENTS))
        await under_way(traffic, upstream, rng)
        while await asyncio.to_thread(paused_in_a_batch, paused, farebox):
            # It holds the file's write lock, so that nobody can do anything before it goes on. A server would take
            # the locks of one that says nothing for so long, and go on without it.
            findings.locked += 1
            await until_async(partial(run_out, books), within_s=SETTLED_S, what="end of the reservations' time")
            paused.resume()
            await under_way(traffic, upstream, rng)
        findings.in_flight.append(traffic.in_flight)
        await assert_all_settled(books, findings)
        findings.orphans += sum(booked.endings == ("died",) for booked in books.requests().values())
        traffic.stop()
        paused.resume()
        seen = await clients
        odd = [each for each in seen if not (each.complete and each.status == 200)]
        assert odd == [], [(each, books.requests().get(each.request_id or "")) for each in odd]
        await assert_all_settled(books, findings)
        await assert_paid(farebox, other, upstream, seen, findings)
        await asyncio.to_thread(farebox.verify)
        findings.rounds += 1
    assert findings.late > 0, "some commits came after the sweeper's"
    report("SIGSTOP", findings, record_property)


async def under_way(traffic: Traffic, upstream: Upstream, rng: random.Random) -> None:
    """Wait for some more requests, and for enough of them in flight."""
    goal = len(upstream.received) + rng.randrange(80, 300)
    await until_async(
        lambda: len(upstream.received) >= goal and traffic.in_flight >= IN_FLIGHT_MIN,
        within_s=AIM_S,
        what="traffic",
    )


def paused_in_a_batch(gateway: Gateway, farebox: Farebox) -> bool:
    """Pause *gateway*, and tell whether it stands still with a file's write lock in its hands."""
    gateway.pause()
    if not farebox.on_sqlite:
        return False
    with farebox.write_lock.open() as lock:
        # Another process holds it for a moment; the one that stands still keeps it.
        deadline = time.monotonic() + LOCK_FREE_S
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            return False
    return True


def report(name: str, findings: Findings, record_property: Callable[[str, object], None]) -> None:
    """Shown with `-s`, and kept in a report of the run."""
    print(f"\n{name}: {findings}")
    record_property(name, str(findings))
