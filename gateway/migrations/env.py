"""What Alembic runs: upgrade on the connection that :func:`gateway.migrations.migrate` has opened."""

from alembic import context
from sqlmodel import SQLModel

import gateway.tables  # noqa: F401  (fills the metadata)
import ledger.store.tables  # noqa: F401  (fills the metadata)

context.configure(connection=context.config.attributes["connection"], target_metadata=SQLModel.metadata)
with context.begin_transaction():
    context.run_migrations()
