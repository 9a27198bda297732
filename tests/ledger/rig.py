"""What the tests of the durable ledger share: a clock, short ways to say a command, and a stream of random ones."""

import itertools
import random
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psycopg
from sqlalchemy import create_engine
from sqlmodel import SQLModel

from ledger.commands import (
    AnyCommand,
    Commit,
    Debit,
    Expire,
    Extend,
    Freeze,
    Grant,
    Key,
    Lapse,
    Limit,
    LimitPeriod,
    Purchase,
    Refund,
    Release,
    Reserve,
    ReserveLeg,
    Reverse,
    Revoke,
    SetLimit,
    SetOverdraft,
    StoredResponse,
    Tell,
    TopUp,
    Watch,
)
from ledger.model import (
    UNRESTRICTED,
    Alert,
    Charge,
    Funding,
    ReservationRef,
    Restriction,
    Scope,
    Settlement,
    Tags,
    UsageRecord,
    WalletRef,
)
from ledger.outcomes import Applied, Outcome, Settled
from ledger.store.postgres import PostgresStore
from ledger.store.protocol import Store
from ledger.store.sqlite import SqliteStore
from ledger.store.tables import TABLES

Dump = dict[str, list[tuple[Any, ...]]]

SCOPE = Scope("ten_a", "live")
SECOND_US = 1_000_000
START_US = 1_700_000_000_000_000


@dataclass
class Clock:
    """Stands still until a test moves it."""

    us: int = START_US

    def __call__(self) -> int:
        return self.us


def create_sqlite(path: Path) -> str:
    """A file with the ledger's tables, and its URL."""
    url = f"sqlite:///{path}"
    engine = create_engine(url)
    SQLModel.metadata.create_all(engine, tables=list(TABLES))
    engine.dispose()
    return url


class Database(Protocol):
    """An empty ledger that can be opened more than once, and looked into from outside."""

    @property
    def url(self) -> str: ...

    async def open(self, clock: Callable[[], int] | None) -> Store: ...

    def dump(self) -> Dump:
        """Every row of every table of the ledger, in the order of the keys."""
        ...

    def damage(self, sql: str) -> None:
        """Do *sql* to it behind the ledger's back, whatever checks and triggers say."""
        ...


class SqliteDatabase:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.url = create_sqlite(path)

    async def open(self, clock: Callable[[], int] | None) -> Store:
        return await SqliteStore.open(self.url, clock=clock or machine_clock)

    def dump(self) -> Dump:
        with sqlite3.connect(self._path) as connection:
            rows = {table.name: sorted(connection.execute(f"SELECT * FROM {table.name}"), key=repr) for table in TABLES}
        connection.close()
        return rows

    def damage(self, sql: str) -> None:
        with sqlite3.connect(self._path) as connection:
            connection.execute("PRAGMA ignore_check_constraints = ON")
            for (trigger,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                connection.execute(f"DROP TRIGGER {trigger}")
            connection.execute(sql)
        connection.close()


class PostgresDatabase:
    """A migrated database. The store works in it as the gateway's role, and here the superuser looks into it."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def open(self, clock: Callable[[], int] | None) -> Store:
        return await PostgresStore.open(self.url, clock=clock)

    def dump(self) -> Dump:
        with psycopg.connect(self.url) as connection:
            return {
                table.name: sorted(connection.execute(f'SELECT * FROM "{table.name}"').fetchall(), key=repr)
                for table in TABLES
            }

    def damage(self, sql: str) -> None:
        with psycopg.connect(self.url) as connection:
            for table, check in connection.execute(
                "SELECT conrelid::regclass::text, conname FROM pg_constraint WHERE contype = 'c' AND connamespace = "
                "current_schema()::regnamespace"
            ).fetchall():
                connection.execute(f'ALTER TABLE {table} DROP CONSTRAINT "{check}"')
            connection.execute("SET session_replication_role = replica")
            connection.execute(sql)


def machine_clock() -> int:
    return time.time_ns() // 1000


def wallet(name: str, scope: Scope = SCOPE) -> WalletRef:
    return WalletRef(*scope, f"customer:{name}")


def reservation(name: str, scope: Scope = SCOPE) -> ReservationRef:
    return ReservationRef(*scope, f"rsv_{name}")


def usage(name: str, **facts: Any) -> UsageRecord:
    record: dict[str, Any] = {"units": {"input": 7, "output": 3}, "provider_cost_nanos": 11, "source": "provider"}
    return UsageRecord(request_id=f"req_{name}", **{**record, **facts})


@dataclass
class Say:
    """Commands in few words; ids count up."""

    scope: Scope = SCOPE
    _ids: "itertools.count[int]" = field(default_factory=itertools.count)

    def id(self) -> str:
        return f"cmd_{next(self._ids):08d}"

    def grant(self, to: str, block: str, amount: int, **more: Any) -> Grant:
        source = more.pop("source_wallet", None)
        return Grant(
            **self._common(more),
            wallet=wallet(to, self.scope),
            asset="CREDIT",
            block_id=f"blk_{block}",
            amount=amount,
            funding=more.pop("funding", Funding.PAID),
            operator_paid=more.pop("operator_paid", True),
            from_wallet=None if source is None else wallet(source, self.scope),
            **more,
        )

    def top_up(self, to: str, block: str, amount: int, **more: Any) -> TopUp:
        return TopUp(
            **self._common(more),
            wallet=wallet(to, self.scope),
            asset="CREDIT",
            block_id=f"blk_{block}",
            amount=amount,
            payment=f"ord_{block}",
            body=more.pop("body", {"package": "usd-10"}),
            **more,
        )

    def reverse(self, of: str, block: str, taken: int, paid: int, *, revision: int, **more: Any) -> Reverse:
        return Reverse(
            **self._common(more),
            wallet=wallet(of, self.scope),
            block_id=f"blk_{block}",
            taken=taken,
            paid=paid,
            frozen=more.pop("frozen", False),
            revision=revision,
            **more,
        )

    def tell(self, of: str, event: str, **more: Any) -> Tell:
        return Tell(**self._common(more), wallet=wallet(of, self.scope), asset="CREDIT", event=event, body=more)

    def purchase(self, of: str, block: str, price: int, amount: int, **more: Any) -> Purchase:
        return Purchase(
            **self._common(more),
            wallet=wallet(of, self.scope),
            asset="CREDIT",
            block_id=f"blk_{block}",
            price=price,
            amount=amount,
            pack=more.pop("pack", "pck_hour"),
            priority=more.pop("priority", 10),
            **more,
        )

    def reserve(self, payers: str, name: str, amount: int, **more: Any) -> Reserve:
        payer_refs = tuple(wallet(payer, self.scope) for payer in payers.split(","))
        return Reserve(
            **self._common(more),
            reservation=reservation(name, self.scope),
            asset="CREDIT",
            legs=(ReserveLeg(payer_refs, amount, more.pop("minimum", amount)),),
            ttl_us=more.pop("ttl_us", 60 * SECOND_US),
            request_id=more.pop("request_id", f"req_{name}"),
            **more,
        )

    def extend(self, name: str, amount: int, **more: Any) -> Extend:
        return Extend(**self._common(more), reservation=reservation(name, self.scope), amount=amount, **more)

    def commit(self, name: str, base: int, markup: int = 0, **more: Any) -> Commit:
        record = more.pop("usage", usage(name))
        return Commit(
            **self._common(more),
            reservation=reservation(name, self.scope),
            settlement=Settlement((Charge(base, markup),), record),
            **more,
        )

    def debit(self, payers: str, name: str, base: int, **more: Any) -> Debit:
        payer_refs = tuple(wallet(payer, self.scope) for payer in payers.split(","))
        return Debit(
            **self._common(more),
            reservation=reservation(name, self.scope),
            asset="CREDIT",
            legs=(ReserveLeg(payer_refs, base, base),),
            settlement=Settlement((Charge(base),), usage(name)),
            **more,
        )

    def refund(self, settled: Settled, amount: int | None = None, **more: Any) -> Refund:
        return Refund(
            **self._common(more),
            reservation=ReservationRef(*self.scope, settled.reservation),
            payments=settled.payments,
            amounts=None if amount is None else (amount,),
            **more,
        )

    def release(self, name: str, **more: Any) -> Release:
        return Release(**self._common(more), reservation=reservation(name, self.scope))

    def lapse(self, name: str, **more: Any) -> Lapse:
        return Lapse(**self._common(more), reservation=reservation(name, self.scope))

    def revoke(self, of: str, block: str, amount: int | None, **more: Any) -> Revoke:
        return Revoke(
            **self._common(more), wallet=wallet(of, self.scope), block_id=f"blk_{block}", amount=amount, **more
        )

    def expire(self, of: str, **more: Any) -> Expire:
        return Expire(**self._common(more), wallet=wallet(of, self.scope))

    def freeze(self, of: str, frozen: bool = True, block: str | None = None, **more: Any) -> Freeze:
        block_id = None if block is None else f"blk_{block}"
        return Freeze(**self._common(more), wallet=wallet(of, self.scope), frozen=frozen, block_id=block_id)

    def limit(self, limit: Limit, **more: Any) -> SetLimit:
        return SetLimit(**self._common(more), limit=limit, asset="CREDIT")

    def overdraft(self, of: str, limit: int, **more: Any) -> SetOverdraft:
        return SetOverdraft(**self._common(more), wallet=wallet(of, self.scope), asset="CREDIT", limit=limit)

    def _common(self, more: dict[str, Any]) -> dict[str, Any]:
        return {"id": more.pop("id", None) or self.id(), "scope": self.scope, "key": more.pop("key", None)}


def key(name: str, digest: str = "same", operation: str = "chat") -> Key:
    return Key(operation=operation, key=name, digest=digest)


RESPONSE = StoredResponse(status=200, headers=(("content-type", "application/json"),), body=b'{"id": "chatcmpl-1"}')


class RandomCommands:
    """Commands over a few wallets, pools, limits and keys: enough of each that they meet often."""

    def __init__(self, seed: random.Random) -> None:
        self._random = seed
        self._say = Say()
        self._names = itertools.count()
        self._reserved: list[str] = ["none"]
        self._granted: list[tuple[str, str]] = [("a", "none")]
        self._paid: list[tuple[str, str]] = [("a", "none")]
        self._sent: list[AnyCommand] = []
        self._charged: list[Settled] = []

    def hear(self, outcomes: Sequence[Outcome]) -> None:
        """What commands came to: who has heard of charges asks for refunds, too."""
        for outcome in outcomes:
            if isinstance(outcome, Applied) and isinstance(outcome.result, Settled) and outcome.result.payments:
                self._charged.append(outcome.result)

    def take(self, count: int, now_us: int) -> list[AnyCommand]:
        return [self._next(now_us) for _ in range(count)]

    def _next(self, now_us: int) -> AnyCommand:
        if self._charged and self._random.random() < 0.08:
            line = self._random.choice([None, wallet("l")])
            amount = self._random.choice([None, None, 1, 10])
            return self._say.refund(self._random.choice(self._charged), amount, unfunded=line)
        if self._sent and self._random.random() < 0.03:
            return self._random.choice(self._sent)
        made = self._random.choices(
            (
                self._grant,
                self._pool_grant,
                self._top_up,
                self._reverse,
                self._purchase,
                self._reserve,
                self._extend,
                self._commit,
                self._end,
                self._debit,
                self._switch,
            ),
            weights=(5, 2, 2, 3, 2, 10, 3, 9, 3, 2, 3),
        )[0](now_us)
        self._sent.append(made)
        return made

    def _grant(self, now_us: int) -> AnyCommand:
        to = self._random.choice("aabbcl")
        name = f"{next(self._names):04d}"
        self._granted.append((to, name))
        expires = self._random.choice([None, None, now_us + self._random.randint(1, 60) * SECOND_US])
        source, cap = self._random.choice([("", None), ("", None), ("monthly", None), ("monthly", 500)])
        return self._say.grant(
            to,
            name,
            self._random.randint(1, 400),
            funding=self._random.choice([Funding.PAID, Funding.PROMOTIONAL, Funding.EXTERNAL]),
            operator_paid=self._random.random() < 0.8,
            priority=self._random.randint(-1, 2),
            source=source,
            accumulation_cap=cap,
            expires_at_us=expires,
            restriction=self._random.choice([UNRESTRICTED, UNRESTRICTED, Restriction(apps=("app_1",))]),
            metadata=self._random.choice([{}, {"note": "héllo", "n": [1, 2]}]),
            key=self._key(),
        )

    def _pool_grant(self, now_us: int) -> AnyCommand:
        name = f"{next(self._names):04d}"
        self._granted.append(("a", name))
        if self._random.random() < 0.4:
            return self._say.grant("pool", name, self._random.randint(50, 300))
        return self._say.grant(
            "a",
            name,
            self._random.randint(1, 120),
            source_wallet="pool",
            funding=Funding.DEVELOPER_GRANT,
            priority=5,
        )

    def _top_up(self, now_us: int) -> AnyCommand:
        to, name = self._random.choice("aabc"), f"{next(self._names):04d}"
        self._paid.append((to, name))
        self._granted += [(to, name), (to, f"{name}_bonus")]
        return self._say.top_up(
            to,
            name,
            self._random.randint(1, 400),
            bonus=self._random.choice([0, 0, 20]),
            spread=self._random.choice([0, 15]),
            metadata=self._random.choice([{}, {"note": "héllo"}]),
            key=self._key(),
        )

    def _reverse(self, now_us: int) -> AnyCommand:
        """Of the last payments; what it tells may be old."""
        of, name = self._random.choice(self._paid[-6:])
        revision, frozen = self._random.randint(1, 9), self._random.random() < 0.3
        return self._say.reverse(of, name, self._random.randint(0, 7), 7, revision=revision, frozen=frozen)

    def _purchase(self, now_us: int) -> AnyCommand:
        name = f"{next(self._names):04d}"
        self._granted.append(("a", name))
        return self._say.purchase(
            self._random.choice("abc"),
            name,
            self._random.randint(0, 80),
            self._random.randint(1, 160),
            duration_us=self._random.choice([None, self._random.randint(1, 60) * SECOND_US]),
            unless_active=self._random.random() < 0.3,
            key=self._key(),
        )

    def _reserve(self, now_us: int) -> AnyCommand:
        name = f"{next(self._names):04d}"
        self._reserved.append(name)
        amount = self._random.randint(1, 150)
        payers = self._random.choice(["a", "a", "b", "c", "a,b", "pool,a"])
        return self._say.reserve(
            payers,
            name,
            amount,
            minimum=self._random.choice([amount, 0]),
            ttl_us=self._random.randint(1, 90) * SECOND_US,
            limits=self._random.choice([(), (), (Limit(wallet("l")),), (self._limit(now_us),)]),
            unfunded=self._random.choice([None, None, wallet("l")]),
            developer="app_1",
            tags=Tags(app=self._random.choice(["app_1", "app_2"])),
            mark=self._random.choice([None, Settlement((Charge(3, 1),), usage(name))]),
            key=self._key(),
            watches=self._watches(payers),
        )

    def _watches(self, payers: str) -> tuple[Watch, ...]:
        """Of the first payer: mostly the same, so that it rings."""
        alerts = (Alert("low", 100), Alert("exhausted", 1), Alert("top_up", 60))
        watched = self._random.choice([None, alerts, alerts, alerts, alerts[:2], ()])
        return () if watched is None else (Watch(wallet(payers.split(",", maxsplit=1)[0]), watched),)

    def _extend(self, now_us: int) -> AnyCommand:
        limits = self._random.choice([(), (self._limit(now_us),)])
        amount = self._random.randint(0, 50)
        return self._say.extend(self._any_reservation(), amount, ttl_us=30 * SECOND_US, limits=limits)

    def _limit(self, now_us: int) -> Limit:
        """Of ten seconds each, and soon used up."""
        number = now_us // (10 * SECOND_US)
        periods = [
            LimitPeriod(f"p{each}", each * 10 * SECOND_US, (each + 1) * 10 * SECOND_US) for each in (number, number + 1)
        ]
        return Limit(wallet("d"), self._random.choice([100, 150]), tuple(periods), (5_000, 10_000))

    def _commit(self, now_us: int) -> AnyCommand:
        return self._say.commit(
            self._any_reservation(),
            self._random.randint(0, 160),
            self._random.randint(0, 20),
            final=self._random.random() < 0.8,
            beyond=self._random.choice(["shortfall", "shortfall", "waive", "receivable"]),
            response=self._random.choice([None, RESPONSE]),
        )

    def _end(self, now_us: int) -> AnyCommand:
        name = self._any_reservation()
        return self._random.choice([self._say.release, self._say.lapse])(name)

    def _debit(self, now_us: int) -> AnyCommand:
        beyond = self._random.choice(["refuse", "receivable", "overage"])
        name = f"{next(self._names):04d}" if self._random.random() < 0.8 else self._any_reservation()
        limits = self._random.choice([(), (self._limit(now_us),)])
        payer, base = self._random.choice("abc"), self._random.randint(1, 60)
        return self._say.debit(payer, name, base, beyond=beyond, limits=limits, watches=self._watches(payer))

    def _switch(self, now_us: int) -> AnyCommand:
        owner, block = self._random.choice(self._granted)
        return self._random.choice(
            [
                self._say.revoke(owner, block, self._random.randint(1, 80), clawback=self._random.random() < 0.5),
                self._say.expire(self._random.choice("abcld")),
                self._say.freeze(owner, self._random.random() < 0.4, block=block),
                self._say.freeze("c", self._random.random() < 0.4),
                self._say.overdraft(self._random.choice("bc"), self._random.randint(0, 60)),
                self._say.limit(self._limit(now_us)),
            ]
        )

    def _any_reservation(self) -> str:
        return self._random.choice(self._reserved[-12:])

    def _key(self) -> Key | None:
        if self._random.random() < 0.7:
            return None
        return key(f"k{self._random.randint(0, 15)}", digest=self._random.choice(["same", "same", "other"]))


def partition(commands: Sequence[AnyCommand], seed: random.Random, size_max: int) -> list[list[AnyCommand]]:
    """Cut *commands* into batches of random sizes up to *size_max*."""
    batches = []
    done = 0
    while done < len(commands):
        size = seed.randint(1, size_max)
        batches.append(list(commands[done : done + size]))
        done += size
    return batches
