"""The one statement that answers a question about usage.

How it works. A period is covered by whole days, and where nothing wider is grouped by also by whole hours, whose sums
are kept (`gateway/billing/rollups.py`); its ragged edges are read from the usage rows themselves. Beside that the tail
is read: what nobody has added up yet. One statement sees one moment, in which each charge stands in exactly one place.

There may be millions of customers, or of values of a key, so a page of them begins with its leads: the next few that
have anything at all. All else is read for these alone; one that comes to nothing in the period is left out.

The names that a statement is put together of are our own; whatever a client sent is a value beside it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from gateway.billing.usage_facts import DAY_US, HOUR_US, SUMS, Dialect, facts, pairs, sums_of_fact, totals
from ledger.model import Scope

RAW_ROWS_MAX: Final = 100_000
"""How many usage rows one answer may be read from, of the tail and of the edges each."""

DAY: Final = "day"
CUSTOMER: Final = "customer"
METADATA: Final = "metadata."
GROUPS: Final = (DAY, "metric", CUSTOMER, "model", "action", "app")
"""What usage can be grouped by, beside `metadata.` with a key."""

GROUPS_MAX: Final = 3

Key = str | int
"""A value of a group: a day as the microsecond that it begins with, anything else as a text, empty for none."""


class UsageQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """Which usage, and how to group it.

    Attributes:
        groups: one to GROUPS_MAX different ones, at most one of them a key of the metadata.
        start_us, end_us: the period, without its end.
        customer: of this customer alone, by our id. metric: of this metric alone. app: of this app, and of none.
        after: where the page before ended: the keys of its last row, or the first few of them; in the order of `order`.
    """

    scope: Scope
    groups: tuple[str, ...]
    start_us: int
    end_us: int
    customer: str | None = None
    metric: str | None = None
    app: str | None = None
    after: tuple[Key, ...] = ()
    limit: int

    @property
    def order(self) -> tuple[str, ...]:
        """By which keys the rows are sorted: customers and the metadata's values before the others."""
        return tuple(sorted(self.groups, key=lambda group: group != CUSTOMER and not group.startswith(METADATA)))

    @property
    def metadata_key(self) -> str | None:
        return next((group.removeprefix(METADATA) for group in self.groups if group.startswith(METADATA)), None)


def cover(start_us: int, end_us: int, grains: Sequence[int]) -> list[tuple[int, int, int]]:
    """The period as (grain, start, end), in order: whole *grains*, the widest first, and grain 0 for what is left."""
    if start_us >= end_us:
        return []
    if not grains:
        return [(0, start_us, end_us)]
    grain, *finer = grains
    first, last = -(-start_us // grain) * grain, end_us // grain * grain
    if first >= last:
        return cover(start_us, end_us, finer)
    return [*cover(start_us, first, finer), (grain, first, last), *cover(last, end_us, finer)]


class Statement(NamedTuple):
    sql: str
    values: dict[str, Any]


_GRAIN_NAMES: Final = {HOUR_US: "hour", DAY_US: "day"}


class _Source(NamedTuple):
    """Where the sums for a question are kept, in which grains, and the column that a page is a range of."""

    table: str
    grains: tuple[int, ...]
    lead: str | None


def _source(question: UsageQuestion) -> _Source | None:
    """None where no sums are kept: what a customer used by a key of the metadata is read from the usage itself."""
    by_customer = CUSTOMER in question.groups or question.customer is not None
    if question.metadata_key is not None:
        return None if by_customer else _Source("usage_by_metadata", (DAY_US,), "value")
    if by_customer:
        return _Source("usage_by_customer", (DAY_US,), CUSTOMER if question.customer is None else None)
    return _Source("usage_rollups", (DAY_US, HOUR_US), None)


def statement(question: UsageQuestion, speaks: Dialect) -> Statement:
    """The one statement that answers *question*: see «How it works» above."""
    source = _source(question)
    lead = None if source is None else source.lead
    segments = cover(question.start_us, question.end_us, () if source is None else source.grains)
    values: dict[str, Any] = {
        "tenant": question.scope.tenant,
        "mode": question.scope.mode,
        "start": question.start_us,
        "end": question.end_us,
        "rows": RAW_ROWS_MAX + 1,
        "limit": question.limit,
        **{f"after_{number}": key for number, key in enumerate(question.after)},
        **{f"start_{number}": start for number, (_, start, _) in enumerate(segments)},
        **{f"end_{number}": end for number, (_, _, end) in enumerate(segments)},
    }
    named = {"customer": question.customer, "metric": question.metric, "app": question.app}
    values |= {name: value for name, value in named.items() if value is not None}
    if question.metadata_key is not None:
        values["key"] = question.metadata_key
    if lead is not None:
        values["first_day"] = question.start_us // DAY_US * DAY_US
        values["lead"] = question.after[0] if question.after else ""
        values["lead_rows"] = question.limit + 1
    keys = [f"k{number}" for number in range(len(question.order))]
    kept = () if source is None else _kept(question, source, segments)
    cursor = ", ".join(keys[: len(question.after)])
    reached = ", ".join(f":after_{number}" for number in range(len(question.after)))
    sql = f"""
        WITH tail AS MATERIALIZED ({_tail(question, speaks)}),
        leads AS MATERIALIZED ({_leads(question, source, speaks)}),
        edge AS MATERIALIZED ({_edges(question, lead, segments, speaks)}),
        raw AS MATERIALIZED (SELECT * FROM tail UNION ALL SELECT * FROM edge),
        part AS ({" UNION ALL ".join((*kept, _unkept(question, lead, speaks)))})
        SELECT n.*, g.* FROM (
            SELECT (SELECT count(*) FROM tail) AS tails, (SELECT count(*) FROM edge) AS edges,
                   (SELECT count(*) FROM leads) AS lead_count, (SELECT max(lead) FROM leads) AS last_lead
        ) AS n LEFT JOIN (
            SELECT {", ".join(keys)}, {totals()} FROM part
            WHERE {f"({cursor}) > ({reached})" if question.after else "true"}
            GROUP BY {", ".join(keys)} ORDER BY {", ".join(keys)} LIMIT :limit
        ) AS g ON true ORDER BY {", ".join(f"g.{key}" for key in keys)}"""  # noqa: S608
    return Statement(sql, values)


def _tail(question: UsageQuestion, speaks: Dialect) -> str:
    """The facts that nobody has added up."""
    rows = f"{speaks.unfolded} WHERE u.tenant = :tenant AND u.mode = :mode AND NOT u.folded"
    rows += " AND u.at_us >= :start AND u.at_us < :end"
    if question.customer is not None:
        rows += " AND u.customer_id = :customer"
    return facts(speaks, f"{rows} LIMIT :rows")


def _leads(question: UsageQuestion, source: _Source | None, speaks: Dialect) -> str:
    """The next few customers, or values of the key, that have anything in the days that the period touches."""
    if source is None or source.lead is None:
        return "SELECT '' AS lead WHERE false"
    of_key = "AND r.key = :key" if question.metadata_key is not None else ""
    in_tail = "tail AS f WHERE true" if not of_key else f"{pairs(speaks, 'tail')} AS f WHERE f.key = :key"
    return f"""
        SELECT lead FROM (
            SELECT * FROM (
                SELECT DISTINCT r.{source.lead} AS lead FROM {source.table} AS r
                WHERE r.tenant = :tenant AND r.mode = :mode {of_key} AND r.{source.lead} >= :lead
                      AND r.starts_at_us >= :first_day AND r.starts_at_us < :end {_only(question, "r")}
                ORDER BY r.{source.lead} LIMIT :lead_rows
            ) AS kept
            UNION
            SELECT f.{source.lead} FROM {in_tail} AND f.{source.lead} >= :lead {_only(question, "f")}
        ) AS either ORDER BY lead LIMIT :lead_rows"""  # noqa: S608


def _edges(question: UsageQuestion, lead: str | None, segments: Iterable[tuple[int, int, int]], speaks: Dialect) -> str:
    """The facts that are added up, where the period has a part of their hour or day only."""
    rows = []
    for number, (grain, _, _) in enumerate(segments):
        if grain:
            continue
        period = (
            "u.tenant = :tenant AND u.mode = :mode AND u.folded "
            f"AND u.at_us >= :start_{number} AND u.at_us < :end_{number}"
        )
        if question.customer is not None:
            rows.append(f"ledger_usage AS u WHERE {period} AND u.customer_id = :customer LIMIT :rows")
        elif lead == CUSTOMER:
            nobody = "EXISTS (SELECT 1 FROM leads AS c WHERE c.lead = '')"
            rows.append(
                f"leads AS c CROSS JOIN ledger_usage AS u WHERE {period} AND u.customer_id = c.lead LIMIT :rows"
            )
            rows.append(f"ledger_usage AS u WHERE {period} AND u.customer_id IS NULL AND {nobody} LIMIT :rows")
        else:
            rows.append(f"ledger_usage AS u WHERE {period} LIMIT :rows")
    if not rows:
        return "SELECT * FROM tail WHERE false"
    return " UNION ALL ".join(f"SELECT * FROM ({facts(speaks, each)}) AS edge_{n}" for n, each in enumerate(rows))  # noqa: S608


def _kept(question: UsageQuestion, source: _Source, segments: Iterable[tuple[int, int, int]]) -> Iterable[str]:
    """What whole hours and days come to, by the keys of the question."""
    for number, (grain, _, _) in enumerate(segments):
        if not grain:
            continue
        rows = f"{source.table} AS r WHERE r.tenant = :tenant AND r.mode = :mode"
        if source.lead is not None:
            rows = f"leads AS c CROSS JOIN {rows} AND r.{source.lead} = c.lead"
        elif question.customer is not None:
            rows += " AND r.customer = :customer"
        if question.metadata_key is not None:
            rows += " AND r.key = :key"
        if source.table == "usage_rollups":
            rows += f" AND r.grain = '{_GRAIN_NAMES[grain]}'"
        rows += f" AND r.starts_at_us >= :start_{number} AND r.starts_at_us < :end_{number}"
        sums = ", ".join(f"r.{name}" for name in SUMS)
        yield f"SELECT {_keys(question, 'r', 'starts_at_us')}, {sums} FROM {rows} {_only(question, 'r')}"  # noqa: S608


def _unkept(question: UsageQuestion, lead: str | None, speaks: Dialect) -> str:
    """The same of the facts of the tail and the edges."""
    rows = "raw AS f WHERE true"
    if question.metadata_key is not None:
        rows = f"{pairs(speaks, 'raw')} AS f WHERE f.key = :key"
    if lead is not None:
        rows += f" AND f.{lead} IN (SELECT c.lead FROM leads AS c)"  # noqa: S608
    return f"SELECT {_keys(question, 'f', 'at_us')}, {sums_of_fact()} FROM {rows} {_only(question, 'f')}"  # noqa: S608


def _only(question: UsageQuestion, row: str) -> str:
    """The conditions on names that every sum and every fact has."""
    metric = "" if question.metric is None else f"AND {row}.metric = :metric"
    return metric + ("" if question.app is None else f" AND {row}.app IN (:app, '')")


def _keys(question: UsageQuestion, row: str, at: str) -> str:
    def column(group: str) -> str:
        if group == DAY:
            return f"{row}.{at} - {row}.{at} % {DAY_US}"
        return f"{row}.{'value' if group.startswith(METADATA) else group}"

    return ", ".join(f"{column(group)} AS k{number}" for number, group in enumerate(question.order))
