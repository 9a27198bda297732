"""What payments come to in the ledger, by every history and every order in which it is told, with spending between."""

import json
from typing import Any, NamedTuple

import msgspec

from gateway.payments.facts import NOTHING, Facts, Target, target
from gateway.payments.observed import facts_of
from ledger.commands import AnyCommand, Debit, ReserveLeg, Reverse, TopUp
from ledger.core import decide
from ledger.model import Charge, ReservationRef, Scope, Settlement, WalletRef
from ledger.outcomes import Applied
from ledger.state import State, evolve
from tests.gateway.payment_histories import CREDITED, PRICE, Payment, Told, deliveries, histories, order, session_for
from tests.servers.stripe_account import StripeAccount

SCOPE = Scope("ten_1", "live")
WALLET = WalletRef(*SCOPE, "customer:cus_1")
SPENT = 400_000_000
NOW_US = 1_700_000_000_000_000


class Books(NamedTuple):
    """A ledger of one wallet; *spent* is what it paid for between the news."""

    state: State
    spent: int
    commands: int

    def after(self, goal: Target) -> "Books":
        """Made true, as the settler does; then the customer spends, if they can."""
        state = msgspec.json.decode(msgspec.json.encode(0)) if False else _copy(self.state)
        number = self.commands + 1
        if goal.credited:
            if not state.blocks.get(WALLET):
                run(state, TopUp(id=f"t{number}", scope=SCOPE, wallet=WALLET, asset="CREDIT", block_id="blk_1",
                                 amount=CREDITED, payment="ord_1"))
            if goal.touched:
                run(state, Reverse(id=f"r{number}", scope=SCOPE, wallet=WALLET, block_id="blk_1",
                                   taken=goal.taken_minor, paid=PRICE, frozen=goal.frozen, revision=number))
        spent = isinstance(decide(state, spend(number), NOW_US), Applied)
        if spent:
            run(state, spend(number))
        return Books(state, self.spent + SPENT * spent, number)
