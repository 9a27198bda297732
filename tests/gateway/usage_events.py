"""Made-up charges in the ledger's usage table, and what they come to by a count of our own."""

import json
import random
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from sqlalchemy import insert, text

import ledger.store.tables  # noqa: F401  (fills the metadata)
from gateway.billing.usage_facts import DAY_US, HOUR_US
from gateway.billing.usage_queries import UsagePage, UsageQueries, UsageSum
from gateway.billing.usage_statement import UsageQuestion
from gateway.database import Database, of
from ledger.model import Scope
from ledger.store.tables import LedgerUsageRow

SCOPE = Scope("ten_a", "live")
MONDAY_US = 1_699_833_600_000_000
"""The beginning of a day."""

SUMS = ("events", "microunits", "charged", "markup", "provider_cost_nanos", "input_tokens", "output_tokens")


@dataclass(frozen=True)
class Charge:
    id: str
    at_us: int
    scope: Scope = SCOPE
    customer: str | None = None
    metric: str | None = None
    model: str | None = None
    action: str | None = None
    app: str | None = None
    units: dict[str, int] = field(default_factory=dict)
    charged: int = 0
    markup: int = 0
    provider_cost_nanos: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def row(self) -> dict[str, Any]:
        values = {
            "tenant": self.scope.tenant,
            "mode": self.scope.mode,
            "reservation": self.id,
            "part": 1,
            "request_id": f"req_{self.id}",
            "customer_id": self.customer,
            "app_id": self.app,
            "model": self.model,
            "action": self.action,
            "metric": self.metric,
            "units": json.dumps(self.units),
            "provider_cost_nanos": self.provider_cost_nanos,
            "base": self.charged - self.markup,
            "markup": self.markup,
            "charged": self.charged,
            "shortfall": 0,
            "charges": "[]",
            "source": "",
            "ending": "",
            "started_at_us": self.at_us,
            "at_us": self.at_us,
            "metadata": json.dumps(self.metadata, ensure_ascii=False, separators=(",", ":")),
        }
        return {name: value for name, value in values.items() if value is not None}

    @property
    def counted(self) -> dict[str, str]:
        """The part of the metadata that is counted."""
        if "\x00" in json.dumps(self.metadata).encode().decode("unicode_escape"):
            return {}
        kept: dict[str, str] = {}
        for key in sorted(self.metadata, key=str.encode):
            value = self.metadata[key]
            if isinstance(value, bool):
                value = str(value).lower()
            if not isinstance(value, int | str) or len(kept) == 8:
                continue
            if 1 <= len(key.encode()) <= 128 and len(str(value).encode()) <= 256:
                kept[key] = str(value)
        return kept

    def keys(self, groups: tuple[str, ...]) -> tuple[str | int, ...] | None:
        """The values of its groups; None where it is in none."""
        found: list[str | int] = []
        for group in groups:
            if group == "day":
                found.append(self.at_us // DAY_US * DAY_US)
            elif group.startswith("metadata."):
                if (key := group.removeprefix("metadata.")) not in self.counted:
                    return None
                found.append(self.counted[key])
            else:
                found.append(getattr(self, group) or "")
        return tuple(found)

    @property
    def sums(self) -> tuple[int, ...]:
        def of_units(*names: str, most: int) -> int:
            return sum(self.units.get(name, 0) for name in names if abs(self.units.get(name, 0)) <= most)

        return (
            1,
            of_units("microunits", most=2**62),
            self.charged,
            self.markup,
            self.provider_cost_nanos,
            of_units("input", "cached_input", "cache_write", "cache_write_1h", "input_audio", most=2**31),
            of_units("output", "reasoning", "output_audio", most=2**31),
        )


def recount(charges: list[Charge], question: UsageQuestion) -> list[tuple[tuple[str | int, ...], tuple[int, ...]]]:
    """What *question* should find, one charge after the other."""
    found: dict[tuple[str | int, ...], tuple[int, ...]] = {}
    for charge in charges:
        if charge.scope != question.scope or not question.start_us <= charge.at_us < question.end_us:
            continue
        if question.customer is not None and charge.customer != question.customer:
            continue
        if question.metric is not None and charge.metric != question.metric:
            continue
        if question.app is not None and charge.app not in (question.app, None):
            continue
        keys = charge.keys(question.order)
        if keys is not None:
            sums = found.get(keys, (0,) * len(SUMS))
            found[keys] = tuple(a + b for a, b in zip(sums, charge.sums, strict=True))
    return sorted(found.items(), key=lambda item: [key.encode() if isinstance(key, str) else key for key in item[0]])


async def answered(
    queries: UsageQueries, question: UsageQuestion
) -> list[tuple[tuple[str | int, ...], tuple[int, ...]]]:
    """All pages of an answer, in the form of `recount`. No group stands on two pages."""
    rows: list[UsageSum] = []
    page = UsagePage([], question.after)
    while page.after is not None:
        page = await queries.ask(replace_after(question, page.after))
        assert len(page.sums) <= question.limit
        rows += page.sums
    found = [
        (tuple(row.keys[group] for group in question.order), tuple(getattr(row, name) for name in SUMS)) for row in rows
    ]
    assert all(one[0] < other[0] for one, other in pairwise(found))  # type: ignore[operator]
    return found


def replace_after(question: UsageQuestion, after: tuple[str | int, ...]) -> UsageQuestion:
    return UsageQuestion(**{**{name: getattr(question, name) for name in question.__struct_fields__}, "after": after})


async def commit(database: Database, *charges: Charge) -> None:
    for charge in charges:
        async with database.write(of(*charge.scope)) as connection:
            await connection.execute(insert(LedgerUsageRow), charge.row)


async def waiting(database: Database, scope: Scope = SCOPE) -> int:
    """How many charges nobody has added up."""
    async with database.read(of(*scope)) as connection:
        query = text("SELECT count(*) FROM ledger_usage WHERE tenant = :tenant AND mode = :mode AND NOT folded")
        return int(await connection.scalar(query, scope._asdict()) or 0)


NAMES = ("c", "plan", "größe", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "long")
VALUES: tuple[Any, ...] = (
    "x",
    "y",
    "ü" * 128,
    "ü" * 129,
    "",
    7,
    "7",
    -1,
    2**63 - 1,
    True,
    False,
    "true",
    1.5,
    None,
    [1],
    {"a": 1},
)
QUANTITIES = (0, 1, 1_500_000, 10**8, -3, 2**31, 2**31 + 1, 2**62)


def random_charge(chance: random.Random, number: int) -> Charge:
    """Anything that the table may hold, within three days, many at the very edges of an hour or a day."""
    hour = MONDAY_US + chance.randrange(72) * HOUR_US
    charged = chance.choice((0, 5, 10**9, 2**31 - 1, 2**62))
    metadata = {name: chance.choice(VALUES) for name in chance.sample(NAMES, chance.choice((0, 0, 1, 3, len(NAMES))))}
    if chance.random() < 0.05:
        metadata["zero"] = "a\x00b"
    return Charge(
        id=f"rsv_{number:06}",
        at_us=hour + chance.choice((0, 1, HOUR_US - 1, chance.randrange(HOUR_US))),
        customer=chance.choice((None, "cus_a", "cus_b", "cus_c", "cus_d")),
        metric=chance.choice((None, "chat", "image")),
        model=chance.choice((None, "small", "large")),
        action=chance.choice((None, "chat.reply")),
        app=chance.choice((None, "app_1", "app_2")),
        units={
            name: chance.choice(QUANTITIES) for name in chance.sample(("microunits", "input", "output", "image"), 2)
        },
        charged=charged,
        markup=chance.choice((0, charged // 3)),
        provider_cost_nanos=chance.choice((0, 17, 2**62)),
        metadata=metadata,
    )


GROUPS = ("day", "metric", "customer", "model", "action", "app", "metadata.c", "metadata.größe", "metadata.long")


def random_question(chance: random.Random, charges: list[Charge]) -> UsageQuestion:
    """Of any period within the three days, often one that begins or ends with a charge."""
    groups = tuple(chance.sample(GROUPS, chance.choice((1, 1, 2, 3))))
    keys = [group for group in groups if group.startswith("metadata.")]
    groups = tuple(group for group in groups if group not in keys[1:])
    instants = sorted(
        chance.choice(
            (
                MONDAY_US,
                MONDAY_US + DAY_US,
                MONDAY_US + 3 * DAY_US,
                MONDAY_US + HOUR_US * chance.randrange(73),
                MONDAY_US + chance.randrange(3 * DAY_US),
                chance.choice(charges).at_us,
                chance.choice(charges).at_us,
            )
        )
        for _ in range(2)
    )
    return UsageQuestion(
        scope=SCOPE,
        groups=groups,
        start_us=instants[0],
        end_us=instants[1] + chance.choice((0, 0, 1)),
        customer=chance.choice((None, None, "cus_b")),
        metric=chance.choice((None, None, "chat")),
        app=chance.choice((None, None, "app_1")),
        limit=chance.choice((1, 2, 3, 50)),
    )


def everything(scope: Scope = SCOPE, **fields: Any) -> UsageQuestion:
    """All of the three days, by day."""
    given = {"groups": ("day",), "start_us": MONDAY_US, "end_us": MONDAY_US + 3 * DAY_US, "limit": 50, **fields}
    return UsageQuestion(scope=scope, **given)


def plain(number: int, **fields: Any) -> Charge:
    """A charge of one metered unit and one credit."""
    charge = Charge(
        id=f"rsv_{number:06}", at_us=MONDAY_US + number, units={"microunits": 10**6}, charged=10**9, markup=10**9
    )
    return replace(charge, **fields)
