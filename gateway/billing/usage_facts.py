"""What a row of the ledger's usage says, in SQL: the same words for adding it up and for asking.

How it works. `facts` reads rows of `ledger_usage` as *facts*: names cut to what an index can hold, and whole numbers.
`sums` adds facts up, `added` adds sums to sums. Amounts are summed in two parts, as `gateway/tables/rollups.py` says.
JSON is read in two dialects, which must come to the same:

- A quantity that is no whole number, or beyond what a request can use, counts as nothing, so that what one tenant may
  have got written down stops nobody's sums.
- Of an event's metadata the first `PAIRS_MAX` keys count, in the order of their bytes, whose value is a text, a whole
  number or a boolean and, like the key, not too long. A zero character anywhere in it, and none counts.
"""

from typing import Final, NamedTuple

LOW_BITS: Final = 31
LOW_MASK: Final = 2**LOW_BITS - 1

HOUR_US: Final = 3_600_000_000
DAY_US: Final = 24 * HOUR_US

MICROUNITS_MAX: Final = 2**62
TOKENS_MAX: Final = 2**31

PAIRS_MAX: Final = 8
KEY_BYTES_MAX: Final = 128
VALUE_BYTES_MAX: Final = 256

NAMES: Final = ("metric", "model", "action", "app")
"""By which every sum is told apart."""

_SPLIT: Final = ("charged", "markup", "provider_cost", "microunits")
_WHOLE: Final = ("input_tokens", "output_tokens")

SUMS: Final = ("events", *(f"{name}_{part}" for name in _SPLIT for part in ("high", "low")), *_WHOLE)
"""The columns of `gateway.tables.rollups.Sums`."""

_UNITS: Final = {
    "microunits": (("microunits",), MICROUNITS_MAX),
    "input_tokens": (("input", "cached_input", "cache_write", "cache_write_1h", "input_audio"), TOKENS_MAX),
    "output_tokens": (("output", "reasoning", "output_audio"), TOKENS_MAX),
}
"""Which units of a usage record each measure adds up, and the most that one of them may be."""


class Dialect(NamedTuple):
    """How a database reads JSON.

    Attributes:
        quantity: the sum of the units whose names stand in {names}, each up to {most}.
        pairs: {fact} with the `key` and `value` of each pair of its metadata that counts.
        unfolded: the usage as ``u``, by the index of what is not added up; only SQLite has to be told.
    """

    quantity: str
    pairs: str
    unfolded: str


SQLITE: Final = Dialect(
    quantity="""(SELECT coalesce(sum(n.value), 0) FROM json_each(u.units) AS n
        WHERE n.key IN ({names}) AND typeof(n.value) = 'integer' AND n.value BETWEEN -{most} AND {most})""",
    pairs=f"""(
        SELECT * FROM (
            SELECT f.*, n.key AS key,
                   CASE WHEN n.type IN ('true', 'false') THEN n.type ELSE CAST(n.value AS TEXT) END AS value,
                   row_number() OVER (PARTITION BY f.reservation, f.part ORDER BY n.key) AS position
            FROM {{fact}} AS f, json_each(f.metadata) AS n
            WHERE f.metadata <> '{{{{}}}}' AND instr(f.metadata, '\\u0000') = 0
              AND (n.type IN ('text', 'true', 'false') OR n.type = 'integer' AND typeof(n.value) = 'integer')
              AND length(CAST(n.key AS BLOB)) BETWEEN 1 AND {KEY_BYTES_MAX}
              AND length(CAST(n.value AS BLOB)) <= {VALUE_BYTES_MAX}
        ) WHERE position <= {PAIRS_MAX})""",  # noqa: S608
    unfolded="ledger_usage AS u INDEXED BY ix_ledger_usage_unfolded",
)

POSTGRESQL: Final = Dialect(
    quantity="""(SELECT coalesce(sum(n.value::numeric), 0)::bigint FROM json_each_text(u.units::json) AS n
        WHERE n.key IN ({names}) AND n.value::numeric % 1 = 0 AND n.value::numeric BETWEEN -{most} AND {most})""",
    pairs=f"""(
        SELECT f.*, pair.key, pair.value FROM {{fact}} AS f CROSS JOIN LATERAL (
            SELECT n.key, n.value #>> '{{{{}}}}' AS value
            FROM json_each(CASE WHEN strpos(f.metadata, '\\u0000') = 0 THEN f.metadata ELSE '{{{{}}}}' END::json) AS n
            WHERE (json_typeof(n.value) IN ('string', 'boolean')
                   OR json_typeof(n.value) = 'number' AND n.value::text !~ '[.eE]')
              AND octet_length(n.key) BETWEEN 1 AND {KEY_BYTES_MAX}
              AND octet_length(n.value #>> '{{{{}}}}') <= {VALUE_BYTES_MAX}
            ORDER BY n.key COLLATE "C" LIMIT {PAIRS_MAX}
        ) AS pair WHERE f.metadata <> '{{{{}}}}')""",  # noqa: S608
    unfolded="ledger_usage AS u",
)


def dialect(name: str) -> Dialect:
    """The dialect of SQLAlchemy's *name* for it."""
    return POSTGRESQL if name == "postgresql" else SQLITE


def facts(speaks: Dialect, rows: str) -> str:
    """A query for the facts of *rows*: what comes after FROM, with the usage rows as ``u``."""
    quantities = ", ".join(
        f"{speaks.quantity.format(names=', '.join(map(repr, units)), most=most)} AS {measure}"
        for measure, (units, most) in _UNITS.items()
    )
    return f"""
        SELECT u.tenant, u.mode, u.reservation, u.part, u.at_us, coalesce(u.customer_id, '') AS customer,
               coalesce(substr(u.metric, 1, 128), '') AS metric, coalesce(substr(u.model, 1, 256), '') AS model,
               coalesce(substr(u.action, 1, 128), '') AS action, coalesce(u.app_id, '') AS app, u.metadata,
               u.charged, u.markup, u.provider_cost_nanos AS provider_cost, {quantities}
        FROM {rows}"""  # noqa: S608


def pairs(speaks: Dialect, fact: str) -> str:
    """What comes after FROM for the facts *fact* (the name of a table), once for each pair of their metadata."""
    return speaks.pairs.format(fact=fact)


def sums_of_fact() -> str:
    """One fact in the columns of `SUMS`."""
    parts = [f"{name} >> {LOW_BITS} AS {name}_high, {name} & {LOW_MASK} AS {name}_low" for name in _SPLIT]
    return ", ".join(["1 AS events", *parts, *_WHOLE])


def totals() -> str:
    """Many rows with the columns of `SUMS`, as one."""
    return ", ".join(f"CAST(sum({name}) AS BIGINT) AS {name}" for name in SUMS)


def amount(row: tuple[int, ...], name: str) -> int:
    """An amount, whole again, of a row in the order of `SUMS`."""
    at = SUMS.index(f"{name}_high")
    return (row[at] << LOW_BITS) + row[at + 1]
