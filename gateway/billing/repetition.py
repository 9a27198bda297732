"""What a repeated request came to, where it cannot be asked for again: its metric is gone, or its price too high.

How it works. The ledger looks at a command's key before it looks at the command. One that releases what nobody reserved
changes nothing, so all that it can come to is what the key stands for.
"""

from collections.abc import Callable

from ledger.commands import Key, Release
from ledger.errors import NotFound
from ledger.ledger import Ledger
from ledger.model import ReservationRef, Scope
from ledger.outcomes import Applied


async def earlier(ledger: Ledger, scope: Scope, key: Key | None, *, new_id: Callable[[str], str]) -> Applied | None:
    """What came of the command that *key* stands for; None when there is none.

    Raises:
        KeyReused: the key is another request's.
        LedgerUnavailable
    """
    if key is None:
        return None
    nobodys = ReservationRef(*scope, new_id("rsv"))
    try:
        return await ledger.execute(Release(id=new_id("cmd"), scope=scope, key=key, reservation=nobodys))
    except NotFound:
        return None
