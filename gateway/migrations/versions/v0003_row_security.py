"""PostgreSQL shows a transaction the rows of the tenants that it names, and the journal refuses edits there too.

How it works: a row that is live or test data is seen by who names ``tenant/mode`` in ``farebox.scopes``, a row of a
whole tenant by who names the tenant in ``farebox.tenants``. The sub-select makes PostgreSQL read the setting once a
query. FORCE holds the owner to it. What must be asked before a tenant is known is asked by the look-up functions:
they run as the owner, for whom alone ``*`` opens everything, and return ids. They put back what their caller had
named; as a clause of CREATE FUNCTION the setting would take a superuser.
"""

from collections.abc import Iterator

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_LEDGER = (
    "ledger_command",
    "ledger_transfer",
    "ledger_wallet",
    "ledger_block",
    "ledger_reservation",
    "ledger_key",
    "ledger_response",
    "ledger_event",
    "ledger_usage",
)
_APPEND_ONLY = ("ledger_command", "ledger_transfer")

_SCOPES = "(SELECT string_to_array(current_setting('farebox.scopes', true), ','))::text[]"
_TENANTS = "(SELECT string_to_array(current_setting('farebox.tenants', true), ','))::text[]"
_OF_MODE = f"(tenant || '/' || mode) = ANY ({_SCOPES})"
_OF_TENANT = f"tenant = ANY ({_TENANTS})"

_POLICIES = {
    **dict.fromkeys((*_LEDGER, "customers", "kept_answers"), _OF_MODE),
    **dict.fromkeys(("assets", "apps", "api_keys"), _OF_TENANT),
    "tenants": f"id = ANY ({_TENANTS})",
}

_REFUSE_EDIT = """
CREATE FUNCTION farebox_refuse_edit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the journal is append-only' USING ERRCODE = 'restrict_violation';
END $$
"""

_LOOK_UP = """
CREATE FUNCTION {signature} RETURNS {result} LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, {schema}, pg_temp AS $$
#variable_conflict use_column
DECLARE
    scopes text := current_setting('farebox.scopes', true);
    tenants text := current_setting('farebox.tenants', true);
    answer text;
BEGIN
    PERFORM set_config('farebox.scopes', '*', true), set_config('farebox.tenants', '*', true);
    {asked};
    PERFORM set_config('farebox.scopes', coalesce(scopes, ''), true),
            set_config('farebox.tenants', coalesce(tenants, ''), true);
    RETURN{answered};
END $$
"""

_LOOK_UPS = {
    "farebox_due_reservations(now_us bigint, page bigint)": (
        "TABLE (tenant text, mode text, reservation text)",
        """
        SELECT r.tenant, r.mode, r.reservation FROM ledger_reservation AS r
        WHERE r.state = 'open' AND r.expires_at_us <= now_us ORDER BY r.expires_at_us LIMIT page
        """,
    ),
    "farebox_due_wallets(now_us bigint, page bigint)": (
        "TABLE (tenant text, mode text, wallet text)",
        """
        SELECT DISTINCT due.tenant, due.mode, due.wallet FROM (
            SELECT b.tenant, b.mode, b.wallet FROM ledger_block AS b
            WHERE b.live AND b.expires_at_us IS NOT NULL AND b.expires_at_us <= now_us AND b.remaining > b.reserved
            ORDER BY b.expires_at_us LIMIT page
        ) AS due
        """,
    ),
    "farebox_due_responses(now_us bigint, page bigint)": (
        "TABLE (tenant text, mode text, operation text, key text)",
        """
        SELECT r.tenant, r.mode, r.operation, r.key FROM ledger_response AS r
        WHERE r.expires_at_us <= now_us ORDER BY r.expires_at_us LIMIT page
        """,
    ),
    "farebox_tenant_of_key(key_id text)": ("text", "SELECT k.tenant::text FROM api_keys AS k WHERE k.id = key_id"),
    "farebox_tenants()": ("TABLE (tenant text)", "SELECT t.id::text FROM tenants AS t ORDER BY t.id"),
}


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for statement in _statements():
            op.get_bind().exec_driver_sql(statement)


def _statements() -> Iterator[str]:
    for table, rows in _POLICIES.items():
        yield f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"
        yield f"CREATE POLICY farebox_named ON {table} USING ({rows}) WITH CHECK ({rows})"
        setting = "farebox.scopes" if rows is _OF_MODE else "farebox.tenants"
        yield (
            f"CREATE POLICY farebox_look_up ON {table} FOR SELECT TO CURRENT_USER "
            f"USING ((SELECT current_setting('{setting}', true)) = '*')"
        )
    yield _REFUSE_EDIT
    for table in _APPEND_ONLY:
        for verb in ("update", "delete", "truncate"):
            yield (
                f"CREATE TRIGGER {table}_refuses_{verb} BEFORE {verb.upper()} ON {table} "
                "FOR EACH STATEMENT EXECUTE FUNCTION farebox_refuse_edit()"
            )
    for signature, (result, query) in {**_LOOK_UPS, **_ledger_scopes()}.items():
        yield from _look_up(signature, result, query)


def _look_up(signature: str, result: str, query: str) -> Iterator[str]:
    """A function that sees all tenants. Nobody but who is told so may call it."""
    schema = op.get_bind().exec_driver_sql("SELECT quote_ident(current_schema())").scalar_one()
    rows = result.startswith("TABLE")
    yield _LOOK_UP.format(
        signature=signature,
        result=result,
        schema=schema,
        asked=f"RETURN QUERY {query}" if rows else f"answer := ({query})",
        answered="" if rows else " answer",
    )
    yield f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC"


def _ledger_scopes() -> dict[str, tuple[str, str]]:
    """Every tenant and mode that has a row: in each table from one to the next, along its primary key."""
    walks = (
        f"""
        SELECT walk.tenant, walk.mode FROM (
            WITH RECURSIVE scope AS (
                (SELECT t.tenant, t.mode FROM {table} AS t ORDER BY t.tenant, t.mode LIMIT 1)
                UNION ALL
                SELECT next.tenant, next.mode FROM scope CROSS JOIN LATERAL (
                    SELECT t.tenant, t.mode FROM {table} AS t
                    WHERE (t.tenant, t.mode) > (scope.tenant, scope.mode) ORDER BY t.tenant, t.mode LIMIT 1
                ) AS next
            )
            SELECT scope.tenant, scope.mode FROM scope
        ) AS walk
        """  # noqa: S608
        for table in _LEDGER
    )
    return {"farebox_ledger_scopes()": ("TABLE (tenant text, mode text)", " UNION ".join(walks))}
