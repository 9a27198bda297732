"""Which rows of PostgreSQL a transaction may see and write: those of the scopes that it names first.

Every tenant table has a policy against two settings of the transaction, which are lists with commas between:
``farebox.scopes`` of ``tenant/mode``, and ``farebox.tenants`` of tenants for rows that belong to both modes. A
transaction that names none sees nothing.
"""

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from ledger.model import Scope

GATEWAY_ROLE: Final = "farebox_gateway"
"""The role that the gateway works as: it owns no table and bypasses no policy. ``farebox migrate`` makes it."""

BECOME_GATEWAY: Final = f"""
SELECT set_config('role', '{GATEWAY_ROLE}', false) FROM pg_roles AS login, pg_roles AS gateway
WHERE login.rolname = session_user AND gateway.rolname = '{GATEWAY_ROLE}' AND login.oid <> gateway.oid
      AND pg_has_role(login.oid, gateway.oid, 'MEMBER')
      AND (login.rolsuper OR login.rolbypassrls
           OR EXISTS (SELECT FROM pg_class AS t
                      WHERE t.oid = to_regclass('ledger_command') AND pg_has_role(login.oid, t.relowner, 'USAGE')))
"""  # noqa: S608
"""Once a connection: one whose login owns the tables or bypasses policies works as the gateway's role from here on.

A login that is neither stays what it is, and so does an owner where the role could not be made: FORCE holds it.
"""

BYPASSES: Final = "SELECT NOT coalesce(row_security_active(to_regclass('ledger_command')), true)"
"""Whether the connection would see everything after all: a superuser where the role is missing. It may not work so."""

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")


class Names(NamedTuple):
    """The values of the two settings."""

    scopes: str
    tenants: str


def names(scopes: Iterable[Scope]) -> Names:
    """What a transaction on *scopes* sets.

    Raises:
        ValueError: a tenant or mode that could be read as something else.
    """
    named = sorted(set(scopes))
    pairs = ",".join(f"{checked(scope.tenant)}/{checked(scope.mode)}" for scope in named)
    return Names(pairs, ",".join(sorted({scope.tenant for scope in named})))


def naming(scopes: Iterable[Scope]) -> str:
    """The statement that opens *scopes* to the rest of the transaction.

    It has its values in its text, so that it can share a round trip with BEGIN.

    Raises:
        ValueError: as :func:`names`.
    """
    pairs, tenants = names(scopes)
    return f"SELECT set_config('farebox.scopes', '{pairs}', true), set_config('farebox.tenants', '{tenants}', true)"


def checked(name: str) -> str:
    """The name of a tenant or a mode, which can be read as nothing else.

    Raises:
        ValueError
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a tenant or a mode")
    return name
