"""What a wallet's balance is watched for, and when it rings. Pure.

How it works. A wallet remembers its alerts, and which of them have rung: those that its balance is below of. After each
command that touches a watched wallet the two are compared with what its balance has come to. An alert that it has sunk
below of rings, with an event in that command's own transaction; one that it is no longer below of may ring again. So an
alert rings once a crossing, whatever crossed it, however many ask at once, and however often a command is repeated.

The balance is that of `State.balance`: what is reserved still counts, so it is the charge that rings. Credits that
expire ring with the command that notices, `Expire` at the latest.

Commands that ask for credits say what a wallet is to be watched for (:class:`~ledger.commands.Watch`). Where that is
news, an alert that the wallet was below of before counts as rung, in silence: it is its threshold that has moved.
"""

from collections.abc import Mapping
from typing import Any, Final

from ledger.model import AMOUNT_MAX, Alert, AlertKind

ALERTS_MAX: Final = 8
"""Of a wallet. Each is compared with every command."""

EVENTS: Final[Mapping[AlertKind, str]] = {
    "low": "credit.low",
    "exhausted": "credit.exhausted",
    "top_up": "topup.due",
}
"""What an alert of this kind raises."""

EXHAUSTED: Final = Alert("exhausted", 1)
"""Nothing is left, or less."""


def sensible(alerts: tuple[Alert, ...]) -> bool:
    """Whether they are few enough, different, and each of a threshold that can be crossed."""
    return (
        len(alerts) <= ALERTS_MAX
        and len(set(alerts)) == len(alerts)
        and all(0 < alert.below <= AMOUNT_MAX for alert in alerts)
    )


def below(alerts: tuple[Alert, ...], balance: int) -> tuple[Alert, ...]:
    """Those that *balance* is below of."""
    return tuple([alert for alert in alerts if balance < alert.below])


def carried(
    alerts: tuple[Alert, ...], known: tuple[Alert, ...], rung: tuple[Alert, ...], balance: int
) -> tuple[Alert, ...]:
    """Which of the new *alerts* of a wallet have rung, or count as if they had.

    Args:
        known: what the wallet was watched for before, of which those in *rung* have rung.
        balance: of the wallet before the command.
    """
    return tuple([alert for alert in alerts if (alert in rung if alert in known else balance < alert.below)])


def facts(alert: Alert, balance: int) -> dict[str, Any]:
    """What the event of *alert* tells. Of what is exhausted, the threshold says nothing."""
    return {"balance": balance} if alert.kind == "exhausted" else {"threshold": alert.below, "balance": balance}
