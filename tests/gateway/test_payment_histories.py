"""What payments come to in the ledger, by every history and every order in which it is told, with spending between."""

from functools import reduce
from typing import NamedTuple

from gateway.payments.facts import NOTHING, Facts, Target, target
from gateway.payments.observed import facts_of
from ledger.commands import AnyCommand, Debit, ReserveLeg, Reverse, TopUp
from ledger.core import decide
from ledger.model import Charge, ReservationRef, Scope, Settlement, WalletRef
from ledger.outcomes import Applied
from ledger.state import State, evolve
from pricing.money import CREDIT
from tests.gateway.payment_histories import CREDITED, PRICE, Payment, Told, deliveries, histories, order, session_for
from tests.servers.stripe_account import StripeAccount

SCOPE = Scope("ten_1", "live")
WALLET = WalletRef(*SCOPE, "customer:cus_1")
BLOCK = "blk_1"
SPENT = 400_000_000
NOW_US = 1_700_000_000_000_000


class Books(NamedTuple):
    """A ledger of one wallet; *spent* is what it paid for between the news, *steps* how many there were."""

    state: State
    spent: int
    steps: int

    def after(self, goal: Target) -> "Books":
        """Made true, as the settler does; then the customer spends, if they can."""
        step = self.steps + 1
        state = self.state
        if goal.credited:
            if not state.blocks.get(WALLET):
                state = applied(state, top_up(step))
            if goal.touched:
                state = applied(state, reverse(step, goal))
        paid = decide(state, spend(step), NOW_US)
        if not isinstance(paid, Applied):
            return Books(state, self.spent, step)
        return Books(applied(state, spend(step)), self.spent + SPENT, step)


def applied(state: State, command: AnyCommand) -> State:
    """*state* after *command*; it stays as it is."""
    outcome = decide(state, command, NOW_US)
    assert isinstance(outcome, Applied), outcome
    blocks = {ref: dict(there) for ref, there in state.blocks.items()}
    after = State(dict(state.wallets), blocks, dict(state.reservations), dict(state.keys))
    for fact in outcome.facts:
        evolve(after, fact)
    return after


def top_up(step: int) -> TopUp:
    return TopUp(
        id=f"t{step}",
        scope=SCOPE,
        wallet=WALLET,
        asset=CREDIT.code,
        block_id=BLOCK,
        amount=CREDITED,
        payment="ord_1",
    )


def reverse(step: int, goal: Target) -> Reverse:
    return Reverse(
        id=f"r{step}",
        scope=SCOPE,
        wallet=WALLET,
        block_id=BLOCK,
        taken=goal.taken_minor,
        paid=PRICE,
        frozen=goal.frozen,
        revision=step,
    )


def spend(step: int) -> Debit:
    return Debit(
        id=f"d{step}",
        scope=SCOPE,
        reservation=ReservationRef(*SCOPE, f"rsv_{step}"),
        asset=CREDIT.code,
        legs=(ReserveLeg((WALLET,), SPENT, SPENT),),
        settlement=Settlement((Charge(SPENT),)),
    )


def check(books: Books, end: Payment, context: object) -> None:
    """The wallet is as the plain model says that it is."""
    left = 0
    if end.credited:
        left = CREDITED - CREDITED * end.taken // PRICE
        assert books.state.wallets[WALLET].receivable == max(0, books.spent - left), context
        reversal = books.state.blocks[WALLET][BLOCK].reversal
        assert reversal.frozen == end.frozen, context
    else:
        assert not books.state.blocks, context
    assert books.state.balance(WALLET, NOW_US) == left - books.spent, context


def test_every_history_leaves_the_same_wallet_however_it_is_told():
    """Exhaustive, as for the facts; what came to be true on the way has been made true, and spent from, in between."""
    ordered = order()
    # What becomes of the books follows from the targets that were made true, one after the other.
    books: dict[tuple[Target, ...], Books] = {(): Books(State(), 0, 0)}
    tried, spent = 0, set[int]()
    for history, end in histories():
        account = StripeAccount()
        events = Told(account, session_for(account, ordered)).all(history)
        told = [news.facts for event in events if (news := facts_of(event)) is not None]
        assert len(told) == len(history)
        # Facts join to the same in any order: that is what `test_payment_facts` proves.
        goals: dict[frozenset[int], Target] = {}
        checked = set[tuple[Target, ...]]()
        for delivery in deliveries(len(history)):
            path: tuple[Target, ...] = ()
            seen = frozenset[int]()
            for each in delivery:
                seen |= {each}
                if seen not in goals:
                    goals[seen] = target(ordered, reduce(Facts.join, (told[one] for one in seen), NOTHING))
                if path[-1:] != (goals[seen],):
                    path = (*path, goals[seen])
                    if path not in books:
                        books[path] = books[path[:-1]].after(goals[seen])
            tried += 1
            if path not in checked:
                checked.add(path)
                check(books[path], end, (history, delivery))
                spent.add(books[path].spent)
    assert tried > 600_000
    assert spent == {0, SPENT, 2 * SPENT}
