"""The facade: small exceptions, what a wallet looks like, receipts, statements, and the sweep."""

from collections.abc import Callable, Sequence

import pytest

from ledger import errors
from ledger import ledger as ledger_module
from ledger.commands import AnyCommand, StoredResponse
from ledger.errors import (
    AlreadyExists,
    InsufficientCredits,
    LedgerError,
    LedgerUnavailable,
    NotFound,
    ReceivableOutstanding,
    ReservationSettled,
    error_of,
)
from ledger.ledger import SWEEP_PAGE, Ledger
from ledger.model import Charge, Funding, ReservationState, Restriction, Settlement, Tags, Wallet
from ledger.outcomes import Outcome, Reason, Rejected, Settled
from ledger.store.protocol import Store, StoreUnavailable
from tests.ledger.rig import RESPONSE, SCOPE, SECOND_US, START_US, Clock, Say, key, reservation, usage, wallet


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_an_exception_of_its_own(reason: Reason) -> None:
    error = error_of(Rejected(reason))
    assert type(error).__name__.lower() == reason.value.replace("_", "")
    assert isinstance(error, LedgerError)
    assert str(error)


def test_exceptions_carry_the_facts_of_the_refusal() -> None:
    for reason in (Reason.INSUFFICIENT_CREDITS, Reason.LIMIT_REACHED, Reason.RECEIVABLE_OUTSTANDING):
        short = error_of(Rejected(reason, needed=7, available=3))
        assert isinstance(short, errors.InsufficientCredits | errors.LimitReached | errors.ReceivableOutstanding)
        assert (short.needed, short.available) == (7, 3)
    exists = error_of(Rejected(Reason.ALREADY_EXISTS, state=ReservationState.OPEN))
    assert isinstance(exists, AlreadyExists)
    assert exists.state is ReservationState.OPEN


async def test_a_settled_reservation_says_how_and_for_what(ledger: Ledger, say: Say) -> None:
    await ledger.execute(say.grant("a", "1", 100))
    await ledger.execute(say.reserve("a", "1", 60))
    await ledger.execute(say.commit("1", 45))
    with pytest.raises(ReservationSettled) as raised:
        await ledger.execute(say.commit("1", 46))
    assert raised.value.state is ReservationState.COMMITTED
    assert isinstance(raised.value.result, Settled)
    assert raised.value.result.charged == (Charge(45),)


async def test_a_refusal_raises_and_changes_nothing(ledger: Ledger, say: Say) -> None:
    await ledger.execute(say.grant("a", "1", 100))
    with pytest.raises(InsufficientCredits, match="101 needed, 100 available"):
        await ledger.execute(say.reserve("a", "1", 101))
    with pytest.raises(NotFound):
        await ledger.execute(say.release("1"))
    view = await ledger.wallet_view(wallet("a"))
    assert view is not None
    assert (view.balance, view.reserved) == (100, 0)


# Reads.


async def test_a_wallet_that_nothing_was_granted_to_is_none(ledger: Ledger) -> None:
    assert await ledger.wallet_view(wallet("nobody")) is None


async def test_the_view_tells_what_could_be_reserved_now(ledger: Ledger, say: Say, clock: Clock) -> None:
    await ledger.execute(say.grant("a", "plain", 100))
    await ledger.execute(say.grant("a", "app", 30, restriction=Restriction(apps=("app_1",))))
    await ledger.execute(say.grant("a", "short", 7, expires_at_us=START_US + 10))
    await ledger.execute(say.grant("a", "later", 1000, effective_at_us=START_US + 20))
    await ledger.execute(say.reserve("a", "1", 25))
    view = await ledger.wallet_view(wallet("a"))
    assert view is not None
    assert (view.balance, view.reserved, view.receivable) == (1137, 25, 0)
    assert view.effective_balance == 107 - 25
    tagged = await ledger.wallet_view(wallet("a"), Tags(app="app_1"))
    assert tagged is not None
    assert tagged.effective_balance == 137 - 25
    clock.us = START_US + 10
    expired = await ledger.wallet_view(wallet("a"))
    assert expired is not None
    assert (expired.balance, expired.effective_balance) == (1130, 100 - 18)
    assert [block.id for block in expired.blocks] == ["blk_plain", "blk_app", "blk_short", "blk_later"]


async def test_what_the_view_promises_can_be_reserved_and_no_more(ledger: Ledger, say: Say) -> None:
    await ledger.execute(say.grant("a", "1", 100))
    await ledger.execute(say.overdraft("a", 40))
    await ledger.execute(say.reserve("a", "1", 110))
    view = await ledger.wallet_view(wallet("a"))
    assert view is not None
    assert (view.effective_balance, view.reserved) == (30, 110)
    with pytest.raises(InsufficientCredits):
        await ledger.execute(say.reserve("a", "2", 31))
    await ledger.execute(say.reserve("a", "2", 30))


async def test_nothing_is_available_in_a_frozen_wallet_or_one_that_owes(ledger: Ledger, say: Say) -> None:
    await ledger.execute(say.grant("a", "1", 100))
    await ledger.execute(say.freeze("a"))
    view = await ledger.wallet_view(wallet("a"))
    assert view is not None
    assert (view.balance, view.effective_balance) == (100, 0)
    await ledger.execute(say.grant("b", "1", 50))
    await ledger.execute(say.debit("b", "1", 50))
    await ledger.execute(say.revoke("b", "1", 20, clawback=True))
    owing = await ledger.wallet_view(wallet("b"))
    assert owing is not None
    assert (owing.balance, owing.effective_balance, owing.receivable) == (-20, 0, 20)
    with pytest.raises(ReceivableOutstanding):
        await ledger.execute(say.reserve("b", "2", 1))


async def test_a_receipt_has_the_reservation_and_its_usage(ledger: Ledger, say: Say) -> None:
    await ledger.execute(say.grant("a", "1", 100))
    await ledger.execute(say.reserve("a", "1", 60))
    held = await ledger.receipt(*SCOPE, "req_1")
    assert held is not None
    assert (held.reservation.held, held.usage) == (60, ())
    await ledger.execute(say.commit("1", 40, 5))
    receipt = await ledger.receipt(*SCOPE, "req_1")
    assert receipt is not None
    assert receipt.reservation.charged == (Charge(40, 5),)
    assert [part.record for part in receipt.usage] == [usage("1")]
    assert await ledger.receipt("ten_b", "live", "req_1") is None


async def test_a_stored_response_is_replayed_byte_for_byte(ledger: Ledger, say: Say) -> None:
    response = StoredResponse(status=200, headers=(("x-a", "1"), ("x-b", "ü")), body=bytes(range(256)))
    await ledger.execute(say.grant("a", "1", 100))
    await ledger.execute(say.reserve("a", "1", 60, key=key("k")))
    assert await ledger.stored_response(SCOPE, "chat", "k") is None
    await ledger.execute(say.commit("1", 40, response=response))
    assert await ledger.stored_response(SCOPE, "chat", "k") == response


async def test_a_statement_in_pages_has_every_line_once(ledger: Ledger, say: Say) -> None:
    for number in range(7):
        await ledger.execute(say.grant("a", f"{number}", number + 1))
    amounts: list[int] = []
    cursor = None
    pages = 0
    while pages == 0 or cursor is not None:
        page = await ledger.transactions(wallet("a"), cursor, limit=3)
        amounts += [line.amount for line in page.transactions]
        cursor = page.cursor
        pages += 1
    assert amounts == [7, 6, 5, 4, 3, 2, 1]
    assert pages == 3


@pytest.mark.parametrize("cursor", ["", "x", "1", "1.", "-1.0", "1.2.3", "9" * 50 + ".1"])
async def test_a_cursor_that_is_not_ours_is_refused(ledger: Ledger, cursor: str) -> None:
    with pytest.raises(ValueError, match="cursor"):
        await ledger.transactions(wallet("a"), cursor)


async def test_the_view_knows_the_line_for_what_the_operator_was_not_paid_for(ledger: Ledger, say: Say) -> None:
    """It promises no more than a reservation that names the line would get."""
    await ledger.execute(say.grant("a", "paid", 10))
    await ledger.execute(say.grant("a", "external", 100, funding=Funding.EXTERNAL))
    await ledger.execute(say.grant("line", "l", 30))
    for line, effective in ((None, 110), (wallet("line"), 40), (wallet("no_line"), 10)):
        view = await ledger.wallet_view(wallet("a"), unfunded=line)
        assert view is not None
        assert (view.balance, view.effective_balance) == (110, effective)
    with pytest.raises(errors.LimitReached):
        await ledger.execute(say.reserve("a", "41", 41, unfunded=wallet("line")))
    await ledger.execute(say.reserve("a", "40", 40, unfunded=wallet("line")))


# The sweep.


async def test_the_sweep_settles_what_has_run_out(ledger: Ledger, say: Say, clock: Clock) -> None:
    await ledger.execute(say.grant("a", "1", 100))
    await ledger.execute(say.grant("b", "2", 50, expires_at_us=START_US + 5 * SECOND_US))
    mark = Settlement((Charge(12),), usage("marked"))
    await ledger.execute(say.reserve("a", "marked", 40, ttl_us=SECOND_US, mark=mark))
    await ledger.execute(say.reserve("a", "plain", 40, ttl_us=SECOND_US))
    await ledger.execute(say.reserve("a", "alive", 10, ttl_us=60 * SECOND_US, key=key("k")))
    await ledger.execute(say.commit("alive", 1, response=RESPONSE, final=False))
    clock.us = START_US + 10 * SECOND_US
    swept = await ledger.sweep(clock.us)
    assert (swept.reservations, swept.wallets, swept.responses, swept.failures) == (2, 1, 0, ())
    view = await ledger.wallet_view(wallet("a"))
    assert view is not None
    assert (view.balance, view.reserved) == (100 - 12 - 1, 9)
    marked = await ledger.reservation(reservation("marked"))
    assert marked is not None
    assert marked.state is ReservationState.EXPIRED
    expired = await ledger.wallet_view(wallet("b"))
    assert expired is not None
    assert expired.blocks == ()
    again = await ledger.sweep(clock.us)
    assert (again.reservations, again.wallets) == (0, 0)
    clock.us += 25 * 3600 * SECOND_US
    assert (await ledger.sweep(clock.us)).responses == 1


async def test_a_sweep_goes_through_all_pages(ledger: Ledger, say: Say, clock: Clock) -> None:
    count = SWEEP_PAGE + 10
    await ledger.execute(say.grant("a", "1", count))
    for number in range(count):
        await ledger.execute(say.reserve("a", f"{number:04d}", 1, ttl_us=1))
    clock.us += 1
    assert (await ledger.sweep(clock.us)).reservations == count


@pytest.mark.parametrize("page", [2, 3, 200])
async def test_candidates_that_fail_stop_no_other(
    store: Store, say: Say, clock: Clock, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    """Not even when they fill the first page."""
    ledger = await Ledger.open(store, clock=clock, new_command_id=say.id)
    await ledger.execute(say.grant("a", "1", 100))
    for name in ("poisoned", "poisoned_too", "1", "2", "3"):
        await ledger.execute(say.reserve("a", name, 10, ttl_us=1))
    clock.us += 1
    run_batch = store.run_batch
    bad = (reservation("poisoned"), reservation("poisoned_too"))

    async def poisoned(commands: Sequence[AnyCommand]) -> list[Outcome]:
        if any(getattr(command, "reservation", None) in bad for command in commands):
            raise ValueError("cannot be settled")
        return await run_batch(commands)

    monkeypatch.setattr(store, "run_batch", poisoned)
    monkeypatch.setattr(ledger_module, "SWEEP_PAGE", page)
    failing = await Ledger.open(store, clock=clock, new_command_id=say.id)
    swept = await failing.sweep(clock.us)
    assert swept.reservations == 3
    assert [type(failure) for failure in swept.failures] == [ValueError] * 2


async def test_a_store_that_cannot_be_read_is_an_unavailable_ledger(
    ledger: Ledger, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*_: object, **__: object) -> Wallet:
        raise StoreUnavailable("disk I/O error")

    names = ("wallet", "reservation", "reservation_of_request", "response", "transactions", "due_reservations")
    for name in names:
        monkeypatch.setattr(store, name, gone)
    reads: list[Callable[[], object]] = [
        lambda: ledger.wallet_view(wallet("a")),
        lambda: ledger.reservation(reservation("1")),
        lambda: ledger.receipt(*SCOPE, "req_1"),
        lambda: ledger.stored_response(SCOPE, "chat", "k"),
        lambda: ledger.transactions(wallet("a")),
        lambda: ledger.sweep(clock.us),
    ]
    for read in reads:
        with pytest.raises(LedgerUnavailable, match="disk I/O error"):
            await read()  # type: ignore[misc]
