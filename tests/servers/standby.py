"""A primary PostgreSQL and its synchronous standby: what the primary has confirmed, the standby has on disk."""

from typing import Self

import psycopg

from tests.servers.postgres import DURABLE, PostgresServer, until


class Pair:
    """Two durable servers; `fail_over` makes the second the only one.

    Attributes:
        primary, standby: they keep these names when the standby has taken over.
    """

    def __init__(self) -> None:
        self.primary = PostgresServer(settings=DURABLE)
        self.standby = PostgresServer(settings=DURABLE)

    def start(self) -> Self:
        self.primary.create().start()
        self.standby.copy_of(self.primary).start()
        with psycopg.connect(self.primary.url, autocommit=True) as connection:
            # Only now: before the standby is there, a commit would wait for it. The standby has no such line.
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            connection.execute("SELECT pg_reload_conf()")
            until(
                lambda: connection.execute("SELECT sync_state FROM pg_stat_replication").fetchall() == [("sync",)],
                what="synchronous standby",
            )
        return self

    def url_of(self, database: str, *, user: str = "postgres") -> str:
        """Both servers; whoever connects finds the one that takes writes."""
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in (self.primary, self.standby))
        return f"postgresql://{user}@{hosts}/{database}?target_session_attrs=read-write"

    def promote(self) -> None:
        """Make the standby a primary; it takes writes when this returns."""
        with psycopg.connect(self.standby.url, autocommit=True) as connection:
            assert connection.execute("SELECT pg_promote()").fetchone() == (True,)
            assert connection.execute("SELECT pg_is_in_recovery()").fetchone() == (False,)

    def close(self) -> None:
        self.standby.close()
        self.primary.close()
