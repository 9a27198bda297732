"""Which block pays next: higher priority first, then soonest expiry, never-expiring last, then oldest."""

from collections.abc import Iterable

from ledger.model import AMOUNT_MAX, Block, Tags


def burn_order(block: Block) -> tuple[int, int, int]:
    """The sort key of the order in which the blocks of one wallet are used up."""
    expires_at_us = AMOUNT_MAX if block.expires_at_us is None else block.expires_at_us
    return (-block.priority, expires_at_us, block.sequence)


def payable(blocks: Iterable[Block], tags: Tags, now_us: int) -> list[Block]:
    """The blocks that may pay for *tags* at *now_us*, in burn order. Some of them may have nothing free."""
    able = [block for block in blocks if block.pays_at(now_us) and block.restriction.allows(tags)]
    if tags.priority_max is not None:
        able = [block for block in able if block.priority <= tags.priority_max]
    if len(able) > 1:
        able.sort(key=burn_order)
    return able
