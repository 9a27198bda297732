"""The ledger's batches on PostgreSQL as functions, so that a batch is few round trips; and the events' pending marker.

How it works: rows go in as arrays of composite types, one for each kind of change, and NULL where there are none; to
read them from JSON was measured to cost five times as much. Only names to look up are JSON arrays of objects.
``farebox_load_v1`` locks wallets in the order of their names and returns what a batch is decided on.
``farebox_write_v1`` writes what it came to. ``farebox_apply_v1`` does both for a batch that was decided on what its
process had kept: it locks, sees whether all of that is still so, and writes, or writes nothing and tells which wallets
have moved on. The names carry a version, so that two releases can run on one database: a later one adds functions and
types of its own, and leaves these to the earlier.

The planner settings keep a plan that was made while a table was small from scanning it when it is large.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_PLANS = """SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan SET jit = off"""

_CLOCK_US = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"

# Tells one past from another: a server's start, and the table's place, which is new where a backup was restored.
_SERVER = """concat_ws(
        ' ', pg_postmaster_start_time(), (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database()),
        to_regclass('ledger_wallet')::oid, pg_relation_filenode(to_regclass('ledger_wallet')))"""

_LOCK = """
    WITH named AS (
        SELECT n.tenant, n.mode, n.wallet, n.pools
        FROM json_to_recordset(wallets::json) AS n (tenant text, mode text, wallet text, pools boolean)
    ), locked AS (
        SELECT w.tenant, w.mode, w.wallet
        FROM (
            SELECT n.tenant, n.mode, n.wallet FROM named AS n
            UNION
            SELECT b.pool::json ->> 0, b.pool::json ->> 1, b.pool::json ->> 2
            FROM named AS n JOIN ledger_block AS b USING (tenant, mode, wallet)
            WHERE n.pools AND b.live AND b.pool IS NOT NULL
        ) AS wanted JOIN ledger_wallet AS w USING (tenant, mode, wallet)
        ORDER BY w.tenant COLLATE "C", w.mode COLLATE "C", w.wallet COLLATE "C"
        FOR UPDATE OF w
    )
    SELECT array_agg(l.tenant), array_agg(l.mode), array_agg(l.wallet) INTO locked_tenants, locked_modes, locked_wallets
    FROM locked AS l
"""

_LOAD = f"""
CREATE FUNCTION farebox_load_v1(
    wallets text, blocks text, returned text[], reservations text, keys text, commands text
) RETURNS text LANGUAGE plpgsql {_PLANS} AS $$
#variable_conflict use_column
DECLARE
    locked_tenants text[];
    locked_modes text[];
    locked_wallets text[];
BEGIN
    {_LOCK};
    -- A statement of its own: its snapshot is younger than the locks.
    RETURN (
        WITH locked AS (
            SELECT * FROM unnest(locked_tenants, locked_modes, locked_wallets) AS l (tenant, mode, wallet)
        )
        SELECT json_build_object(
            'now_us', {_CLOCK_US},
            'server', {_SERVER},
            'wallets', (SELECT json_agg(w) FROM locked JOIN ledger_wallet AS w USING (tenant, mode, wallet)),
            'blocks', (
                SELECT json_agg(b) FROM (
                    SELECT b.* FROM locked JOIN ledger_block AS b USING (tenant, mode, wallet) WHERE b.live
                    UNION ALL
                    SELECT b.* FROM locked CROSS JOIN unnest(returned) AS r (id)
                    JOIN ledger_block AS b USING (tenant, mode, wallet, id) WHERE NOT b.live
                    UNION ALL
                    SELECT b.* FROM json_populate_recordset(NULL::ledger_block, blocks::json) AS n
                    JOIN ledger_block AS b USING (tenant, mode, wallet, id) WHERE NOT b.live
                ) AS b
            ),
            'reservations', (
                SELECT json_agg(r.body) FROM json_populate_recordset(NULL::ledger_reservation, reservations::json) AS n
                JOIN ledger_reservation AS r USING (tenant, mode, reservation)
            ),
            'keys', (
                SELECT json_agg(k) FROM json_populate_recordset(NULL::ledger_key, keys::json) AS n
                JOIN ledger_key AS k USING (tenant, mode, operation, key)
            ),
            'commands', (
                SELECT json_agg(json_build_array(c.tenant, c.mode, c.id, c.kind, c.result))
                FROM json_populate_recordset(NULL::ledger_command, commands::json) AS n
                JOIN ledger_command AS c USING (tenant, mode, id)
            )
        )
    );
END $$
"""  # noqa: S608

_WALLET_ROW = """
    tenant text, mode text, wallet text, asset text, overdraft_limit bigint, receivable bigint,
    overdraft_reserved bigint, frozen boolean, version bigint, last_fact_us bigint, blocks_opened bigint,
    events_raised bigint"""

_TYPES = {
    "farebox_kept_wallet_v1": "tenant text, mode text, wallet text, version bigint",
    "farebox_kept_reservation_v1": "tenant text, mode text, reservation text, body text",
    "farebox_wallet_row_v1": _WALLET_ROW,
    "farebox_wallet_change_v1": f"{_WALLET_ROW}, was bigint",
    "farebox_key_name_v1": "tenant text, mode text, operation text, key text",
    "farebox_key_row_v1": "tenant text, mode text, operation text, key text, digest text, result text",
    "farebox_command_row_v1": """
        tenant text, mode text, id text, seq bigint, kind text, at_us bigint, transfers bigint, facts text,
        result text""",
    "farebox_transfer_row_v1": """
        tenant text, mode text, seq bigint, position bigint, debit text, credit text, amount bigint, asset text,
        block text, reference text, at_us bigint""",
    "farebox_block_row_v1": """
        tenant text, mode text, wallet text, id text, sequence bigint, granted bigint, consumed bigint,
        reserved bigint, expired bigint, revoked bigint, clawed bigint, remaining bigint, live boolean,
        frozen boolean, created_at_us bigint, effective_at_us bigint, expires_at_us bigint, priority bigint,
        source text, funding text, operator_paid boolean, restriction text, pool text, payment_reference text,
        metadata text""",
    "farebox_block_change_v1": """
        tenant text, mode text, wallet text, id text, granted bigint, consumed bigint, reserved bigint,
        expired bigint, revoked bigint, clawed bigint, remaining bigint, live boolean, frozen boolean""",
    "farebox_reservation_row_v1": """
        tenant text, mode text, reservation text, state text, expires_at_us bigint, request_id text, body text""",
    "farebox_response_row_v1": """
        tenant text, mode text, operation text, key text, status bigint, headers text, body bytea,
        expires_at_us bigint""",
    "farebox_event_row_v1": """
        tenant text, mode text, wallet text, sequence bigint, id text, type text, at_us bigint, body text""",
    "farebox_usage_row_v1": """
        tenant text, mode text, reservation text, part bigint, request_id text, customer_id text, app_id text,
        key_id text, model text, action text, metric text, units text, provider_cost_nanos bigint, base bigint,
        markup bigint, charged bigint, shortfall bigint, charges text, price_version text, source text, ending text,
        upstream text, started_at_us bigint, at_us bigint, metadata text""",
}
"""Rows as the functions take them: their fields in the order in which the store gives them."""

# What a batch writes, in the order of the parameters.
_WRITES = """
    wallets_opened farebox_wallet_row_v1[], wallets_changed farebox_wallet_change_v1[],
    keys_freed farebox_key_name_v1[], keys_taken farebox_key_row_v1[],
    commands farebox_command_row_v1[], transfers farebox_transfer_row_v1[],
    blocks_opened farebox_block_row_v1[], blocks_changed farebox_block_change_v1[],
    reservations_opened farebox_reservation_row_v1[], reservations_changed farebox_reservation_row_v1[],
    responses farebox_response_row_v1[], events farebox_event_row_v1[], usage farebox_usage_row_v1[]"""

# Both functions have it: one that called the other would set its planner's settings once more.
_WRITE_ROWS = """
    -- New wallets, then keys, are taken in the order of their names. Two batches that want the same ones wait for each
    -- other here, and not in a circle.
    IF wallets_opened IS NOT NULL THEN
        INSERT INTO ledger_wallet (tenant, mode, wallet, asset, overdraft_limit, receivable, overdraft_reserved, frozen,
                                   version, last_fact_us, blocks_opened, events_raised)
        SELECT n.tenant, n.mode, n.wallet, n.asset, n.overdraft_limit, n.receivable, n.overdraft_reserved, n.frozen,
               n.version, n.last_fact_us, n.blocks_opened, n.events_raised
        FROM unnest(wallets_opened) AS n
        ORDER BY n.tenant COLLATE "C", n.mode COLLATE "C", n.wallet COLLATE "C";
    END IF;
    IF keys_freed IS NOT NULL THEN
        DELETE FROM ledger_key AS k USING unnest(keys_freed) AS n
        WHERE k.tenant = n.tenant AND k.mode = n.mode AND k.operation = n.operation AND k.key = n.key;
    END IF;
    IF keys_taken IS NOT NULL THEN
        INSERT INTO ledger_key (tenant, mode, operation, key, digest, result)
        SELECT n.tenant, n.mode, n.operation, n.key, n.digest, n.result
        FROM unnest(keys_taken) AS n
        ORDER BY n.tenant COLLATE "C", n.mode COLLATE "C", n.operation COLLATE "C", n.key COLLATE "C";
    END IF;
    IF commands IS NOT NULL THEN
        -- Numbers come after the locks and the keys. Whatever this batch builds on was committed by then, and so has
        -- smaller numbers: also a key that another batch gave back, on wallets that this one does not touch.
        SELECT array_agg(nextval('farebox_journal')) INTO seqs FROM generate_series(1, cardinality(commands));
        INSERT INTO ledger_command (tenant, mode, id, seq, kind, at_us, transfers, facts, result)
        SELECT n.tenant, n.mode, n.id, seqs[n.seq], n.kind, n.at_us, n.transfers, n.facts, n.result
        FROM unnest(commands) AS n
        ORDER BY n.tenant COLLATE "C", n.mode COLLATE "C", n.id COLLATE "C";
    END IF;
    IF transfers IS NOT NULL THEN
        INSERT INTO ledger_transfer (tenant, mode, seq, position, debit, credit, amount, asset, block, reference, at_us)
        SELECT n.tenant, n.mode, seqs[n.seq], n.position, n.debit, n.credit, n.amount, n.asset, n.block, n.reference,
               n.at_us
        FROM unnest(transfers) AS n;
    END IF;
    IF wallets_changed IS NOT NULL THEN
        UPDATE ledger_wallet AS w
        SET overdraft_limit = n.overdraft_limit, receivable = n.receivable, overdraft_reserved = n.overdraft_reserved,
            frozen = n.frozen, version = n.version, last_fact_us = n.last_fact_us, blocks_opened = n.blocks_opened,
            events_raised = n.events_raised
        FROM unnest(wallets_changed) AS n
        WHERE w.tenant = n.tenant AND w.mode = n.mode AND w.wallet = n.wallet AND w.version = n.was;
        GET DIAGNOSTICS changed = ROW_COUNT;
        IF changed <> cardinality(wallets_changed) THEN
            RAISE EXCEPTION '% wallets of % were as they had been loaded', changed, cardinality(wallets_changed)
                USING ERRCODE = 'FB001';
        END IF;
    END IF;
    IF blocks_opened IS NOT NULL THEN
        INSERT INTO ledger_block (tenant, mode, wallet, id, sequence, granted, consumed, reserved, expired, revoked,
                                  clawed, remaining, live, frozen, created_at_us, effective_at_us, expires_at_us,
                                  priority, source, funding, operator_paid, restriction, pool, payment_reference,
                                  metadata)
        SELECT n.tenant, n.mode, n.wallet, n.id, n.sequence, n.granted, n.consumed, n.reserved, n.expired, n.revoked,
               n.clawed, n.remaining, n.live, n.frozen, n.created_at_us, n.effective_at_us, n.expires_at_us,
               n.priority, n.source, n.funding, n.operator_paid, n.restriction, n.pool, n.payment_reference,
               n.metadata
        FROM unnest(blocks_opened) AS n;
    END IF;
    IF blocks_changed IS NOT NULL THEN
        UPDATE ledger_block AS b
        SET granted = n.granted, consumed = n.consumed, reserved = n.reserved, expired = n.expired,
            revoked = n.revoked, clawed = n.clawed, remaining = n.remaining, live = n.live, frozen = n.frozen
        FROM unnest(blocks_changed) AS n
        WHERE b.tenant = n.tenant AND b.mode = n.mode AND b.wallet = n.wallet AND b.id = n.id;
        GET DIAGNOSTICS changed = ROW_COUNT;
        IF changed <> cardinality(blocks_changed) THEN
            RAISE EXCEPTION '% blocks of % were there', changed, cardinality(blocks_changed) USING ERRCODE = 'FB001';
        END IF;
    END IF;
    IF reservations_opened IS NOT NULL THEN
        INSERT INTO ledger_reservation (tenant, mode, reservation, state, expires_at_us, request_id, body)
        SELECT n.tenant, n.mode, n.reservation, n.state, n.expires_at_us, n.request_id, n.body
        FROM unnest(reservations_opened) AS n;
    END IF;
    IF reservations_changed IS NOT NULL THEN
        UPDATE ledger_reservation AS r
        SET state = n.state, expires_at_us = n.expires_at_us, request_id = n.request_id, body = n.body
        FROM unnest(reservations_changed) AS n
        WHERE r.tenant = n.tenant AND r.mode = n.mode AND r.reservation = n.reservation;
        GET DIAGNOSTICS changed = ROW_COUNT;
        IF changed <> cardinality(reservations_changed) THEN
            RAISE EXCEPTION '% reservations of % were there', changed, cardinality(reservations_changed)
                USING ERRCODE = 'FB001';
        END IF;
    END IF;
    IF responses IS NOT NULL THEN
        INSERT INTO ledger_response (tenant, mode, operation, key, status, headers, body, expires_at_us)
        SELECT n.tenant, n.mode, n.operation, n.key, n.status, n.headers, n.body, n.expires_at_us
        FROM unnest(responses) AS n
        ORDER BY n.tenant COLLATE "C", n.mode COLLATE "C", n.operation COLLATE "C", n.key COLLATE "C"
        ON CONFLICT (tenant, mode, operation, key)
        DO UPDATE SET status = excluded.status, headers = excluded.headers, body = excluded.body,
                      expires_at_us = excluded.expires_at_us;
    END IF;
    IF events IS NOT NULL THEN
        INSERT INTO ledger_event (tenant, mode, wallet, sequence, id, type, at_us, body)
        SELECT n.tenant, n.mode, n.wallet, n.sequence, n.id, n.type, n.at_us, n.body
        FROM unnest(events) AS n;
    END IF;
    IF usage IS NOT NULL THEN
        INSERT INTO ledger_usage (tenant, mode, reservation, part, request_id, customer_id, app_id, key_id, model,
                                  action, metric, units, provider_cost_nanos, base, markup, charged, shortfall, charges,
                                  price_version, source, ending, upstream, started_at_us, at_us, metadata)
        SELECT n.tenant, n.mode, n.reservation, n.part, n.request_id, n.customer_id, n.app_id, n.key_id, n.model,
               n.action, n.metric, n.units, n.provider_cost_nanos, n.base, n.markup, n.charged, n.shortfall, n.charges,
               n.price_version, n.source, n.ending, n.upstream, n.started_at_us, n.at_us, n.metadata
        FROM unnest(usage) AS n;
    END IF;
"""

_WRITE = f"""
CREATE FUNCTION farebox_write_v1({_WRITES}
) RETURNS void LANGUAGE plpgsql {_PLANS} AS $$
#variable_conflict use_column
DECLARE
    seqs bigint[];
    changed bigint;
BEGIN
    {_WRITE_ROWS}
END $$
"""

# A statement of its own for each: to begin one of all of them was a third of a batch of one command.
_ABSENT = "".join(
    f"""
    IF {names} IS NOT NULL THEN
        IF EXISTS (SELECT FROM json_populate_recordset(NULL::{table}, {names}::json) AS n
                   JOIN {table} AS t USING ({key})) THEN
            RETURN json_build_object('now_us', {_CLOCK_US}, 'moved', json_build_array());
        END IF;
    END IF;"""
    for names, table, key in (
        ("wallets_absent", "ledger_wallet", "tenant, mode, wallet"),
        ("blocks_absent", "ledger_block", "tenant, mode, wallet, id"),
        ("reservations_absent", "ledger_reservation", "tenant, mode, reservation"),
        ("keys_absent", "ledger_key", "tenant, mode, operation, key"),
        ("commands_absent", "ledger_command", "tenant, mode, id"),
    )
)

_APPLY = f"""
CREATE FUNCTION farebox_apply_v1(
    scopes text, tenants text, lock_timeout_ms bigint, server text, time_us bigint, skew_us_max bigint,
    wallets_kept farebox_kept_wallet_v1[], reservations_kept farebox_kept_reservation_v1[],
    wallets_absent text, blocks_absent text, reservations_absent text, keys_absent text, commands_absent text,
    {_WRITES}
) RETURNS text LANGUAGE plpgsql {_PLANS} AS $$
#variable_conflict use_column
DECLARE
    moved json;
    kept bigint;
    seqs bigint[];
    changed bigint;
BEGIN
    PERFORM set_config('farebox.scopes', scopes, true), set_config('farebox.tenants', tenants, true),
            set_config('lock_timeout', lock_timeout_ms::text, true);
    SELECT json_agg(json_build_array(l.tenant, l.mode, l.wallet)) FILTER (WHERE l.version <> l.kept) INTO moved
    FROM (
        SELECT w.tenant, w.mode, w.wallet, w.version, n.version AS kept
        FROM unnest(wallets_kept) AS n JOIN ledger_wallet AS w USING (tenant, mode, wallet)
        ORDER BY w.tenant COLLATE "C", w.mode COLLATE "C", w.wallet COLLATE "C"
        FOR UPDATE OF w
    ) AS l;
    IF moved IS NOT NULL THEN
        RETURN json_build_object('now_us', {_CLOCK_US}, 'moved', moved);
    END IF;
    -- From here on nobody else changes these wallets, their blocks, or a reservation that they pay for.
    IF server <> {_SERVER} OR abs({_CLOCK_US} - time_us) > skew_us_max THEN
        RETURN json_build_object('now_us', {_CLOCK_US}, 'moved', json_build_array());
    END IF;
    IF reservations_kept IS NOT NULL THEN
        SELECT count(*) INTO kept
        FROM unnest(reservations_kept) AS n
        JOIN ledger_reservation AS r USING (tenant, mode, reservation) WHERE r.body = n.body;
        IF kept <> cardinality(reservations_kept) THEN
            RETURN json_build_object('now_us', {_CLOCK_US}, 'moved', json_build_array());
        END IF;
    END IF;
    {_ABSENT}
    {_WRITE_ROWS}
    RETURN json_build_object('now_us', {_CLOCK_US});
END $$
"""  # noqa: S608

_READ = """
CREATE FUNCTION farebox_wallet_v1(of_tenant text, of_mode text, of_wallet text, with_blocks boolean)
RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('farebox.scopes', of_tenant || '/' || of_mode, true),
            set_config('farebox.tenants', of_tenant, true);
    RETURN (
        SELECT json_build_object('wallet', w, 'blocks', (
            SELECT json_agg(b ORDER BY b.sequence) FROM ledger_block AS b
            WHERE with_blocks AND b.tenant = w.tenant AND b.mode = w.mode AND b.wallet = w.wallet AND b.live
        ))
        FROM ledger_wallet AS w WHERE w.tenant = of_tenant AND w.mode = of_mode AND w.wallet = of_wallet
    );
END $$
"""


# As the owner, for whom alone «*» opens everything.
_CONTINUE_NUMBERS = """
DO $$
BEGIN
    PERFORM set_config('farebox.scopes', '*', true);
    PERFORM setval('farebox_journal', max(seq)) FROM ledger_command HAVING max(seq) IS NOT NULL;
    PERFORM set_config('farebox.scopes', '', true);
END $$
"""


def upgrade() -> None:
    op.add_column("ledger_event", sa.Column("delivered_at_us", sa.BigInteger(), nullable=True))
    op.create_index(
        "ix_ledger_event_pending",
        "ledger_event",
        ["at_us"],
        unique=False,
        sqlite_where=sa.text("delivered_at_us IS NULL"),
        postgresql_where=sa.text("delivered_at_us IS NULL"),
    )
    # Nobody looks an event up by its id: its wallet and sequence name it.
    op.drop_index("ix_ledger_event_id", table_name="ledger_event")
    if op.get_bind().dialect.name == "postgresql":
        connection = op.get_bind()
        for table in ("ledger_wallet", "ledger_block"):
            # A row that every batch changes stays in its page then, and no index has to learn of it.
            connection.exec_driver_sql(f"ALTER TABLE {table} SET (fillfactor = 50)")
        connection.exec_driver_sql("CREATE SEQUENCE farebox_journal")
        connection.exec_driver_sql(_CONTINUE_NUMBERS)
        for name, fields in _TYPES.items():
            connection.exec_driver_sql(f"CREATE TYPE {name} AS ({fields})")
        for function in (_LOAD, _WRITE, _APPLY, _READ):
            connection.exec_driver_sql(function)
