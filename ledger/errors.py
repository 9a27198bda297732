"""What can go wrong for who uses the ledger: one small exception for each reason, with its facts."""

from collections.abc import Callable

from ledger.model import ReservationState, WalletRef
from ledger.outcomes import Reason, Rejected, Result


class LedgerError(Exception):
    """Base of all that the ledger raises on purpose. Nothing has changed."""


class KeyReused(LedgerError):
    """The idempotency key, or the command's id, came before with other input: use a new one."""


class InvalidAmount(LedgerError):
    """An amount, or a time, is out of its bounds."""


class NotFound(LedgerError):
    """There is no such wallet, block or reservation."""


class AlreadyExists(LedgerError):
    """The block or reservation is there already. *state* is the reservation's."""

    def __init__(self, message: str, state: ReservationState | None) -> None:
        super().__init__(message)
        self.state = state


class AssetMismatch(LedgerError):
    """The wallet holds another asset."""


class PlanActive(LedgerError):
    """A plan of the wallet still pays, and none was to be bought while one does."""


class TooManyBlocks(LedgerError):
    """The wallet has as many blocks with something left as it may: grant fewer, larger ones, or let some expire."""


class ReservationSettled(LedgerError):
    """The reservation was settled before: *state* tells how, *result* for what."""

    def __init__(self, message: str, state: ReservationState | None, result: Result | None) -> None:
        super().__init__(message)
        self.state = state
        self.result = result


class WalletFrozen(LedgerError):
    """The wallet may not be reserved from until it is unfrozen."""


class _Short(LedgerError):
    def __init__(self, message: str, needed: int, available: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available


class ReceivableOutstanding(_Short):
    """The wallet owes more than was agreed: it pays nothing until a grant has repaid that."""


class InsufficientCredits(_Short):
    """There is not enough: *needed* and *available* are in the asset's smallest unit."""


class LimitReached(_Short):
    """A limit leaves *available*, and *needed* was asked for. *limit* is its wallet."""

    def __init__(self, message: str, needed: int, available: int, limit: WalletRef | None) -> None:
        super().__init__(message, needed, available)
        self.limit = limit


class LedgerUnavailable(LedgerError):
    """The ledger cannot answer now: its database fails or is too slow. The command may be tried again as it is.

    *in_doubt* tells that it may have happened, or may still happen; else it has not, and will not.
    """

    def __init__(self, message: str, *, in_doubt: bool = False) -> None:
        super().__init__(message)
        self.in_doubt = in_doubt


_ERRORS: dict[Reason, Callable[[Rejected], LedgerError]] = {
    Reason.KEY_REUSED: lambda no: KeyReused("the key was used before with other input"),
    Reason.INVALID_AMOUNT: lambda no: InvalidAmount("an amount or a time is out of bounds"),
    Reason.NOT_FOUND: lambda no: NotFound("there is no such wallet, block or reservation"),
    Reason.ALREADY_EXISTS: lambda no: AlreadyExists("it exists already", no.state),
    Reason.ASSET_MISMATCH: lambda no: AssetMismatch("the wallet holds another asset"),
    Reason.PLAN_ACTIVE: lambda no: PlanActive("a plan of the wallet still pays"),
    Reason.TOO_MANY_BLOCKS: lambda no: TooManyBlocks("the wallet has too many blocks that are not used up"),
    Reason.RESERVATION_SETTLED: lambda no: ReservationSettled("the reservation is settled", no.state, no.result),
    Reason.WALLET_FROZEN: lambda no: WalletFrozen("the wallet is frozen"),
    Reason.RECEIVABLE_OUTSTANDING: lambda no: ReceivableOutstanding(
        "the wallet owes more than was agreed", no.needed, no.available
    ),
    Reason.INSUFFICIENT_CREDITS: lambda no: InsufficientCredits(
        f"{no.needed} needed, {no.available} available", no.needed, no.available
    ),
    Reason.LIMIT_REACHED: lambda no: LimitReached(
        f"{no.needed} needed, the limit leaves {no.available}", no.needed, no.available, no.limit
    ),
}


def error_of(rejected: Rejected) -> LedgerError:
    """The exception that tells why a command was refused."""
    return _ERRORS[rejected.reason](rejected)
