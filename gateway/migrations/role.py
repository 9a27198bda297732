"""The role that the gateway works as on PostgreSQL: made before a migration, told what it may after each.

A role belongs to the whole cluster: it is made where it is missing, and another database may be making it now. Where it
may not be made, the owner of the tables works itself; FORCE holds it to the policies.
"""

from collections.abc import Iterator
from typing import Final

from sqlalchemy import Connection

from ledger.store.row_security import GATEWAY_ROLE

# Of two databases that are migrated at once, the later one waits for the other's role or member, then finds it there.
_MAKE: Final = f"""
DO $$
DECLARE
    since_16 boolean := current_setting('server_version_num')::int >= 160000;
    may_become text := CASE WHEN since_16 THEN 'SET' ELSE 'MEMBER' END;
    terms text := CASE WHEN since_16 THEN ' WITH SET TRUE, INHERIT FALSE' ELSE '' END;
BEGIN
    BEGIN
        IF to_regrole('{GATEWAY_ROLE}') IS NULL THEN
            CREATE ROLE {GATEWAY_ROLE} NOLOGIN NOSUPERUSER NOBYPASSRLS;
        END IF;
    EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
    END;
    BEGIN
        IF NOT pg_has_role(current_user, '{GATEWAY_ROLE}', may_become) THEN
            EXECUTE format('GRANT {GATEWAY_ROLE} TO %I', current_user) || terms;
        END IF;
    EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
    END;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE NOTICE 'the role {GATEWAY_ROLE} cannot be made: the owner of the tables works itself';
END $$
"""

_OWNED_TABLES: Final = """
SELECT c.oid::regclass::text, c.relrowsecurity,
       EXISTS (SELECT FROM pg_trigger AS t WHERE t.tgrelid = c.oid AND t.tgname = c.relname || '_refuses_update')
FROM pg_class AS c
WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'r' AND pg_has_role(c.relowner, 'USAGE')
      AND (c.relrowsecurity OR c.relname = 'alembic_version')
"""

_OWNED_FUNCTIONS: Final = r"""
SELECT p.oid::regprocedure::text FROM pg_proc AS p
WHERE p.pronamespace = current_schema()::regnamespace AND p.proname LIKE 'farebox\_%'
      AND p.prorettype <> 'trigger'::regtype AND pg_has_role(p.proowner, 'USAGE')
"""

_OWNED_SEQUENCES: Final = r"""
SELECT c.oid::regclass::text FROM pg_class AS c
WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'S' AND pg_has_role(c.relowner, 'USAGE')
      AND c.relname LIKE ANY (ARRAY['ledger\_%', 'farebox\_%'])
"""


def make(connection: Connection) -> None:
    """Make the role and the current user a member of it, where that is allowed and still to do."""
    connection.exec_driver_sql(_MAKE)


def allow(connection: Connection) -> None:
    """Let the role do its work on what the current user owns, where there is the role.

    What a later migration forgets to mention is included: every table with policies, and every look-up function.
    """
    if connection.exec_driver_sql(f"SELECT to_regrole('{GATEWAY_ROLE}') IS NOT NULL").scalar_one():
        for statement in _grants(connection):
            connection.exec_driver_sql(statement)


def _grants(connection: Connection) -> Iterator[str]:
    schema, seen = connection.exec_driver_sql(
        f"SELECT quote_ident(current_schema()), has_schema_privilege('{GATEWAY_ROLE}', current_schema(), 'USAGE')"
    ).one()
    if not seen:
        yield f"GRANT USAGE ON SCHEMA {schema} TO {GATEWAY_ROLE}"
    for table, has_policies, append_only in connection.exec_driver_sql(_OWNED_TABLES).all():
        verbs = "SELECT, INSERT, UPDATE, DELETE"
        if not has_policies:
            verbs = "SELECT"
        elif append_only:
            verbs = "SELECT, INSERT"
        yield f"REVOKE ALL ON {table} FROM {GATEWAY_ROLE}"
        yield f"GRANT {verbs} ON {table} TO {GATEWAY_ROLE}"
    for function in connection.exec_driver_sql(_OWNED_FUNCTIONS).scalars().all():
        yield f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC"
        yield f"GRANT EXECUTE ON FUNCTION {function} TO {GATEWAY_ROLE}"
    for sequence in connection.exec_driver_sql(_OWNED_SEQUENCES).scalars().all():
        yield f"GRANT USAGE, SELECT ON SEQUENCE {sequence} TO {GATEWAY_ROLE}"
