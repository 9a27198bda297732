"""Whose money pays for the work: whatever a tenant does, the operator is paid for it, or knows who owes it.

The operator has worked, and owes work for every credit that counts as paid. Behind that stands what the payment
processor has, what he gave away himself, what was drawn on the tenant's line, what the tenant owes for reversed
payments that gifts made good, and what customers still owe for reversed payments: nothing else may. A tenant that pays
with cheap cards, disputes, gives credits away, claws them back and refunds charges must not get more work than that.
"""

import random

import msgspec
import pytest

from ledger.commands import AnyCommand, Refund
from ledger.model import Block, Funding
from tests.ledger.spec import Case, command

LINE = 100_000
STEPS = 14
WALLETS = ("w1", "w1", "w2")


class Tenant:
    """One who tries things out at random, in halves and wholes, so that the same amounts meet often."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.case = Case()
        self.table: list[str] = []
        self.payments: list[tuple[str, str]] = []
        self.blocks: list[tuple[str, str]] = []
        self.reservations: list[str] = []
        self.run(f"grant line l1 {LINE} funding=promotional")

    def run(self, line: str) -> None:
        self.table.append(line)
        asked: AnyCommand = command(line)
        if isinstance(asked, Refund):
            known = self.case.state.reservations.get(asked.reservation)
            asked = msgspec.structs.replace(asked, payments=() if known is None else known.payments)
        self.case.run(asked)

    def step(self, number: int) -> None:
        chance = self.chance
        wallet, amount, part = chance.choice(WALLETS), chance.choice([50, 100]), chance.choice(["all", "50"])
        beyond = chance.choice(["", "", "overage", "beyond"])
        payer, payment = chance.choice(self.payments or [("w1", "none")])
        owner, block = chance.choice(self.blocks or [("w1", "none")])
        charge = chance.choice(self.reservations or ["none"])
        self.run(
            chance.choice(
                [
                    f"topup {wallet} t{number} {amount} bonus={chance.choice([0, 0, 10])}",
                    f"debit {wallet} r{number} {amount} {beyond} unfunded=line",
                    f"debit u1 r{number} 50 unfunded=line",
                    f"reserve {wallet} r{number} {amount} unfunded=line",
                    f"commit {charge} {chance.choice([0, 30])} {chance.choice(['', 'partial'])}",
                    f"release {charge}",
                    f"grant {wallet} g{number} {amount} funding=external",
                    f"grant {chance.choice(['w2', 'u1'])} x{number} {amount} from=w1 funding=developer_grant",
                    f"purchase {wallet} p{number} 50 {chance.choice([50, 80])} priority=1",
                    f"reverse {payer} {payment} {chance.choice([0, 5, 10])}/10 rev={number}",
                    f"reverse {payer} {payment} {chance.choice([0, 5, 10])}/10 rev={number}",
                    f"refund {charge} {chance.choice(['', '50', '30'])} unfunded=line",
                    f"clawback {owner} {block} {part}",
                    f"revoke {owner} {block} {part}",
                ]
            )
        )
        for ref, blocks in self.case.state.blocks.items():
            if ref.wallet != "line":
                known = [(ref.wallet, name) for name in blocks if not name.startswith("blk_returns")]
                self.blocks += [each for each in known if each not in self.blocks]
        self.payments = [each for each in self.blocks if each[1].startswith("t") and not each[1].endswith("_bonus")]
        self.reservations = [ref.reservation for ref in self.case.state.reservations]

    def unpaid(self) -> int:
        """What the operator has worked, or owes work for, that nothing stands behind."""
        case = self.case
        blocks = [block for of in case.state.blocks.values() for block in of.values() if block.wallet.wallet != "line"]
        (line,) = [block for of in case.state.blocks.values() for block in of.values() if block.id == "l1"]
        debts = [wallet.debts for wallet in case.state.wallets.values()]
        worked = sum(part.total for each in case.state.reservations.values() for part in each.charged)
        still_paid = sum(block.remaining for block in blocks if block.operator_paid)
        received = -case.account("clearing")
        lost = sum(each.reversed + each.repaid_due for each in debts)
        return worked + still_paid - received - sum(map(_given, blocks)) - (LINE - line.remaining) - lost


def _given(block: Block) -> int:
    return block.granted - block.reversal.taken if block.funding is Funding.PROMOTIONAL else 0


@pytest.mark.parametrize("seed", range(4))
def test_nobody_gets_more_work_than_somebody_pays_or_owes(seed: int) -> None:
    for number in range(250):
        tenant = Tenant(seed * 1_000 + number)
        for step in range(1, STEPS + 1):
            tenant.step(step)
            assert tenant.unpaid() <= 0, "\n".join(tenant.table)
