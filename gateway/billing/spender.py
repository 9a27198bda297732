"""On whose account something is asked for."""

import msgspec


class Spender(msgspec.Struct, frozen=True):
    """The command's scope has tenant and mode. `customer_id` is the user whom the request names, whoever pays."""

    app_id: str | None
    key_id: str
    customer_id: str | None
