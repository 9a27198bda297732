"""Row-level security of a new table, as revision 0003 gave it to those before: for the migrations that make tables."""

from typing import Final

from alembic import op

_SETTINGS: Final = {"mode": "farebox.scopes", "tenant": "farebox.tenants"}


def protect(table: str, *, by: str = "mode") -> None:
    """Show the rows of *table* to who names them: `tenant/mode`, or with *by* `tenant` the tenant. Not on SQLite."""
    if op.get_bind().dialect.name != "postgresql":
        return
    setting = _SETTINGS[by]
    named = f"(SELECT string_to_array(current_setting('{setting}', true), ','))::text[]"
    rows = f"(tenant || '/' || mode) = ANY ({named})" if by == "mode" else f"tenant = ANY ({named})"
    for statement in (
        f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
        f"CREATE POLICY farebox_named ON {table} USING ({rows}) WITH CHECK ({rows})",
        f"CREATE POLICY farebox_look_up ON {table} FOR SELECT TO CURRENT_USER "
        f"USING ((SELECT current_setting('{setting}', true)) = '*')",
    ):
        op.get_bind().exec_driver_sql(statement)


def look_up(signature: str, columns: str, query: str) -> None:
    """A function that sees all tenants and returns TABLE (*columns*): ids only. Not on SQLite.

    It puts back what its caller had named. Nobody but the gateway's role, which is told so, may call it.
    """
    if op.get_bind().dialect.name != "postgresql":
        return
    schema = op.get_bind().exec_driver_sql("SELECT quote_ident(current_schema())").scalar_one()
    op.get_bind().exec_driver_sql(
        f"""
        CREATE FUNCTION {signature} RETURNS TABLE ({columns}) LANGUAGE plpgsql SECURITY DEFINER
        SET search_path = pg_catalog, {schema}, pg_temp AS $$
        #variable_conflict use_column
        DECLARE
            scopes text := current_setting('farebox.scopes', true);
            tenants text := current_setting('farebox.tenants', true);
        BEGIN
            PERFORM set_config('farebox.scopes', '*', true), set_config('farebox.tenants', '*', true);
            RETURN QUERY {query};
            PERFORM set_config('farebox.scopes', coalesce(scopes, ''), true),
                    set_config('farebox.tenants', coalesce(tenants, ''), true);
            RETURN;
        END $$
        """
    )
    op.get_bind().exec_driver_sql(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
