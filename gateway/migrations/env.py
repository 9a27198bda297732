"""What Alembic runs: upgrade on the connection that :func:`gateway.migrations.migrate` has opened."""

from alembic import context
from sqlmodel import SQLModel

import gateway.tables  # noqa: F401  (fills the metadata)
import ledger.store.tables  # noqa: F401  (fills the metadata)
from gateway.migrations import role

connection = context.config.attributes["connection"]
roles = connection.dialect.name == "postgresql"

context.configure(connection=connection, target_metadata=SQLModel.metadata)
with context.begin_transaction():
    if roles:
        role.make(connection)
    context.run_migrations()
    if roles:
        role.allow(connection)
