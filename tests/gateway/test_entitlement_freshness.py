"""After a change was answered, no check gives what was before: not in the process that made it, nor in another.

Two processes with links, caches and connections of their own work on one PostgreSQL and one Valkey. Each customer's
changes come one after the other, made by either; while one is under way both processes look, so that every read, put
and word about it meets every other. When it is answered, both must show what the database has.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Set
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, cast

import pytest

from gateway.billing.budgets import Budgets
from gateway.billing.catalog import Catalog, Metric, PricedMetric
from gateway.billing.entitlements import Entitlement, Entitlements, Named
from gateway.billing.spender import Spender
from gateway.clock import now_us
from gateway.identity.customers import Customers
from gateway.identity.keys import KeyScope
from gateway.identity.principals import Principal
from gateway.identity.wallets import customer_wallet
from gateway.ids import new_id
from gateway.shared.balances import Balances
from gateway.shared.leases import Leases
from gateway.shared.link import Link
from gateway.shared.wallets import SharedWallets, holders_key
from gateway.telemetry import Metrics
from ledger.commands import AnyCommand, Commit, Debit, Expire, Grant, Release, Reserve, ReserveLeg, Revoke
from ledger.errors import LedgerError
from ledger.ledger import Ledger, _view
from ledger.model import Block, Charge, Funding, ReservationRef, Scope, Settlement, Tags, WalletRef
from ledger.store.postgres import PostgresStore
from pricing.metering import PerUnitRule
from pricing.money import CREDIT
from tests.conftest import Campaign

SCOPE = Scope("ten_a", "live")
PATIENT_S = 10.0
"""No answer comes late enough to be given up on a busy machine: with a link that is lost nothing is promised."""

LEASE_S = 0.15
CUSTOMERS = 48
METRIC = PricedMetric(Metric("mtr_1", "chat", "Chat", "block", None, False, 1, 0), PerUnitRule(10**12), "rul_1")
PRINCIPAL = Principal(
    tenant_id=SCOPE.tenant,
    mode="live",
    app_id="app_1",
    key_id="key_1",
    scopes=frozenset(KeyScope),
    billing_mode="user_pays",
    markup_bps=0,
    on_disconnect=None,
    asset=CREDIT,
    unfunded_limit=None,
)


class OneMetric:
    """A catalog and a register of customers in which everything is known, and no budgets."""

    async def priced(self, tenant: str, mode: str, key: str, *, at_us: int) -> PricedMetric:
        return METRIC

    def known(self, tenant: str, mode: str, name: str, **options: Any) -> Any:
        return METRIC if name == METRIC.metric.key else name

    async def named(self, tenant: str, mode: str, reference: str, *, param: str) -> str:
        return reference

    def known_to_be_none(self, scope: Scope) -> bool:
        return True

    async def remaining(self, scope: Scope, spender: Spender) -> None:
        return None


@dataclass
class Process:
    """What one process has of its own."""

    store: PostgresStore
    ledger: Ledger
    entitlements: Entitlements
    leases: Leases
    shared: SharedWallets

    def check_at_once(self, customer: str) -> Entitlement | None:
        return self.entitlements.check_at_once(PRINCIPAL, Named(customer), METRIC.metric.key, Decimal(1))

    async def check(self, customer: str) -> Entitlement:
        return await self.entitlements.check(PRINCIPAL, Named(customer), METRIC.metric.key, Decimal(1))


@contextlib.asynccontextmanager
async def running(database_url: str, redis_url: str) -> AsyncIterator[Process]:
    link = Link(redis_url, Metrics(), timeout_s=PATIENT_S)
    await link.start()
    leases = Leases(link, holders_key=holders_key, lease_s=LEASE_S)
    leases.start()
    shared = SharedWallets(link, now_us=now_us, leases=leases)
    store = await PostgresStore.open(database_url, clock=now_us, watcher=shared)
    balances = Balances(store, Metrics(), shared=shared)
    ledger = await Ledger.open(
        store,
        clock=now_us,
        new_command_id=lambda: new_id("cmd"),
        read_wallet=balances.wallet,
        kept_wallet=balances.kept,
    )
    known = OneMetric()
    entitlements = Entitlements(
        ledger=ledger,
        catalog=cast(Catalog, known),
        customers=cast(Customers, known),
        budgets=cast(Budgets, known),
        now_us=now_us,
    )
    async with asyncio.timeout(30):
        await leases.heard.wait()
    yield Process(store, ledger, entitlements, leases, shared)
    await ledger.close()
    await leases.stop()
    await link.stop()


@dataclass
class Life:
    """One customer, and everything that can happen to their credits."""

    customer: str
    processes: list[Process]
    rng: random.Random
    open: list[ReservationRef] = field(default_factory=list)
    blocks: tuple[Block, ...] = ()
    changes: int = 0
    at_once: int = 0
    stale: list[str] = field(default_factory=list)

    @property
    def wallet(self) -> WalletRef:
        return customer_wallet(*SCOPE, self.customer)

    async def live(self, rounds: int) -> None:
        for _ in range(rounds):
            racing = [asyncio.create_task(process.check(self.customer)) for process in self._some()]
            command = self._next()
            with contextlib.suppress(LedgerError):
                await self.rng.choice(self.processes).ledger.execute(command)
            await self._must_show(command)
            await asyncio.gather(*racing)

    def _some(self) -> list[Process]:
        return self.rng.choices(self.processes, k=self.rng.choice((0, 0, 1, 2)))

    def _next(self) -> AnyCommand:
        kinds: list[Callable[[], AnyCommand | None]] = [self._grant, self._grant_briefly, self._debit, self._debit]
        kinds += [self._reserve, self._settle, self._revoke, self._expire]
        return self.rng.choice(kinds)() or self._grant()

    def _amount(self) -> int:
        return self.rng.randrange(1, 10**9)

    def _grant(self, life_us: int | None = None) -> AnyCommand:
        return Grant(
            id=new_id("cmd"),
            scope=SCOPE,
            wallet=self.wallet,
            asset=CREDIT.code,
            block_id=new_id("blk"),
            amount=self._amount(),
            expires_at_us=None if life_us is None else now_us() + life_us,
            funding=Funding.EXTERNAL,
            operator_paid=False,
        )

    def _grant_briefly(self) -> AnyCommand:
        return self._grant(self.rng.randrange(20_000, 2_000_000))

    def _leg(self) -> tuple[ReserveLeg, ...]:
        amount = self._amount()
        return (ReserveLeg(wallets=(self.wallet,), amount=amount, minimum=amount),)

    def _debit(self) -> AnyCommand:
        legs, reservation = self._leg(), ReservationRef(*SCOPE, new_id("rsv"))
        return Debit(
            id=new_id("cmd"),
            scope=SCOPE,
            reservation=reservation,
            asset=CREDIT.code,
            legs=legs,
            settlement=Settlement(charges=(Charge(markup=legs[0].amount),)),
        )

    def _reserve(self) -> AnyCommand:
        self.open.append(ReservationRef(*SCOPE, new_id("rsv")))
        return Reserve(
            id=new_id("cmd"),
            scope=SCOPE,
            reservation=self.open[-1],
            asset=CREDIT.code,
            legs=self._leg(),
            ttl_us=60_000_000,
        )

    def _settle(self) -> AnyCommand | None:
        if not self.open:
            return None
        reservation = self.open.pop()
        if self.rng.random() < 0.5:
            return Release(id=new_id("cmd"), scope=SCOPE, reservation=reservation)
        settlement = Settlement(charges=(Charge(markup=1),))
        return Commit(id=new_id("cmd"), scope=SCOPE, reservation=reservation, settlement=settlement)

    def _revoke(self) -> AnyCommand | None:
        if not self.blocks:
            return None
        block = self.rng.choice(self.blocks)
        amount = self.rng.randrange(1, block.remaining + 1)
        return Revoke(id=new_id("cmd"), scope=SCOPE, wallet=self.wallet, block_id=block.id, amount=amount)

    def _expire(self) -> AnyCommand:
        return Expire(id=new_id("cmd"), scope=SCOPE, wallet=self.wallet)

    async def _must_show(self, command: AnyCommand) -> None:
        """Each process, asked now, must show what the database has."""
        self.changes += 1
        began_us = now_us()
        found = [process.check_at_once(self.customer) for process in self.processes]
        stored = await self.processes[0].store.wallet(self.wallet)
        if stored is None:
            return
        self.blocks = stored.blocks
        tags = Tags(app=PRINCIPAL.app_id, metric=METRIC.metric.key)
        found += [process.check_at_once(self.customer) for process in self.processes]
        self.at_once += sum(each is not None for each in found)
        asked = [await process.check(self.customer) for process in self.rng.sample(self.processes, 2)]
        # Time goes on, and blocks expire, while we ask; each answer is that of a time in between.
        first, last = (_view(stored, tags, at_us, line=None) for at_us in (began_us, now_us()))
        for each in (*found, *asked):
            if each is not None and not (
                last.balance <= each.balance <= first.balance
                and last.effective_balance <= each.effective_balance <= first.effective_balance
            ):
                self.stale.append(f"{type(command).__name__}: {each} is not {stored}")


async def lead(processes: list[Process], rng: random.Random, *, changes: int) -> list[Life]:
    lives = [Life(new_id("cus"), processes, random.Random(rng.random())) for _ in range(CUSTOMERS)]
    await asyncio.gather(*(life.live(changes // CUSTOMERS) for life in lives))
    return lives


def stale_among(lives: list[Life]) -> list[str]:
    return [stale for life in lives for stale in life.stale]


@pytest.fixture
async def processes(gateway_url: str, redis_url: str) -> AsyncIterator[list[Process]]:
    async with running(gateway_url, redis_url) as one, running(gateway_url, redis_url) as other:
        yield [one, other]


async def test_no_check_gives_what_was_before_a_change(processes: list[Process], campaign: Campaign):
    began_s = time.monotonic()
    changes = campaign.rounds(short=2_000, long=100_000)
    lives = await lead(processes, campaign.random(), changes=changes)
    made, at_once = sum(life.changes for life in lives), sum(life.at_once for life in lives)
    print(f"{made} changes, {at_once} answers at once, {time.monotonic() - began_s:.0f} s, seed {campaign.seed}")
    assert stale_among(lives) == []
    assert made > changes - CUSTOMERS
    assert at_once > made // 10, "the campaign is about answers that nobody was asked for"


# The campaign can fail.


async def nothing(*arguments: object) -> None:
    """What a broken process does."""


async def waits_for_nobody(holders: Mapping[int, Set[str]]) -> dict[int, Set[str]]:
    return {ticket: frozenset() for ticket in holders}


async def test_it_would_find_floors_that_are_not_raised(
    processes: list[Process], campaign: Campaign, monkeypatch: pytest.MonkeyPatch
):
    for process in processes:
        monkeypatch.setattr(process.shared, "changing", nothing)
    assert stale_among(await lead(processes, campaign.random(), changes=500))


async def test_it_would_find_holders_that_are_not_waited_for(
    processes: list[Process], campaign: Campaign, monkeypatch: pytest.MonkeyPatch
):
    for process in processes:
        monkeypatch.setattr(process.leases, "acknowledged", waits_for_nobody)
        monkeypatch.setattr(process.leases, "_take", deaf_for(0.05, process.leases._take))
    assert stale_among(await lead(processes, campaign.random(), changes=500))


async def test_a_holder_that_is_slow_to_hear_is_waited_for(
    processes: list[Process], campaign: Campaign, monkeypatch: pytest.MonkeyPatch
):
    """As one that hangs: its lease ends before the change is answered."""
    for process, late_s in zip(processes, (0.005, 2 * LEASE_S), strict=True):
        monkeypatch.setattr(process.leases, "_take", deaf_for(late_s, process.leases._take))
    assert stale_among(await lead(processes, campaign.random(), changes=500)) == []


def deaf_for(seconds: float, take: Callable[[bytes], None]) -> Callable[[bytes], None]:
    def later(word: bytes) -> None:
        asyncio.get_running_loop().call_later(seconds, take, word)

    return later
