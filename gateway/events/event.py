"""An event of the ledger's outbox, as it was written in the transaction of what it tells."""

from typing import Any

import msgspec


class StoredEvent(msgspec.Struct, frozen=True):
    """*sequence* counts the events of *wallet* without gaps; *body* has amounts in the asset's smallest unit."""

    tenant: str
    mode: str
    wallet: str
    sequence: int
    id: str
    type: str
    at_us: int
    body: dict[str, Any]
