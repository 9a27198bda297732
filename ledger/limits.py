"""Spend limits: a wallet whose block is filled anew each period, by the first command that draws on it.

How it works. A limit's block is no credit: it comes out of the account ``limit`` and goes back there, used or not. It
is opened in the command that reserves under it, so two commands never open one twice, and a refused one opens none.
"""

from ledger.commands import Limit, LimitPeriod, SetLimit
from ledger.draft import Draft, Source
from ledger.model import AMOUNT_MAX, Account, Block, Funding, Wallet
from ledger.outcomes import Changed, Outcome, Reason, Rejected
from ledger.state import State

BPS = 10_000

_THRESHOLDS = "thresholds_bps"


def sensible(limit: Limit) -> bool:
    """Whether its amount and its periods are within bounds."""
    return 0 <= limit.amount <= AMOUNT_MAX and all(
        period.end_us is None or period.start_us < period.end_us for period in limit.periods
    )


def open_period(draft: Draft, limit: Limit, asset: str, *, reference: str | None = None) -> Block | None:
    """The block of the period that is now, made when it is missing; None when no period is."""
    period = _period_at(limit, draft.now_us)
    return None if period is None else _block_of(draft, limit, period, asset, reference=reference)


def _block_of(draft: Draft, limit: Limit, period: LimitPeriod, asset: str, *, reference: str | None) -> Block:
    known = draft.find_block(limit.wallet, period.block_id)
    if known is not None:
        return known
    wallet = draft.open_wallet(limit.wallet, asset)
    opened = Block(
        wallet=wallet.ref,
        id=period.block_id,
        sequence=draft.next_block_sequence(wallet),
        granted=limit.amount,
        created_at_us=draft.now_us,
        effective_at_us=period.start_us,
        expires_at_us=period.end_us,
        source="limit",
        funding=Funding.LIMIT,
        metadata={_THRESHOLDS: list(limit.thresholds_bps)},
    )
    draft.open_block(opened)
    _fill(draft, wallet, opened, limit.amount, reference)
    return opened


def _period_at(limit: Limit, now_us: int) -> LimitPeriod | None:
    for period in limit.periods:
        if period.start_us <= now_us and (period.end_us is None or now_us < period.end_us):
            return period
    return None


def _fill(draft: Draft, wallet: Wallet, block: Block, amount: int, reference: str | None) -> None:
    draft.transfer(
        amount,
        asset=wallet.asset,
        debit=Account.LIMIT,
        credit=wallet.account,
        block_id=block.id,
        reference=reference,
        scope=wallet.ref.scope,
    )


def set_limit(state: State, command: SetLimit, now_us: int) -> Outcome:
    limit = command.limit
    if not sensible(limit):
        return Rejected(Reason.INVALID_AMOUNT)
    draft = Draft(state, command, now_us)
    wallet = draft.wallet(limit.wallet)
    if wallet is not None and wallet.asset != command.asset:
        return Rejected(Reason.ASSET_MISMATCH)
    if _period_at(limit, now_us) is None:
        return Rejected(Reason.NOT_FOUND)
    for period in limit.periods:
        if period.end_us is None or now_us < period.end_us:
            _set_amount(draft, _block_of(draft, limit, period, command.asset, reference=None), limit.amount)
    return draft.applied(Changed())


def _set_amount(draft: Draft, block: Block, amount: int) -> None:
    wallet = draft.wallet(block.wallet)
    assert wallet is not None, "a block is in a wallet"
    more = max(amount, block.granted - block.free) - block.granted
    if more != 0:
        draft.change_block(block, granted=more)
        _fill(draft, wallet, block, more, None)
        draft.spend(Source(wallet, block, -more), -more, account=Account.LIMIT, reference=None)
        tell_thresholds(draft, block)


def tell_thresholds(draft: Draft, block: Block) -> None:
    """Raise an event for each threshold of *block* that this draft brings it to."""
    after = draft.block_after(block)
    for threshold_bps in block.metadata.get(_THRESHOLDS, ()):
        if _reached(after, threshold_bps) and not _reached(block, threshold_bps):
            draft.raise_block_event("budget.threshold", block, threshold_bps=threshold_bps)


def _reached(block: Block, threshold_bps: int) -> bool:
    return block.granted > 0 and block.consumed * BPS >= threshold_bps * block.granted
