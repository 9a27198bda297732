"""The accounts of a month: every line ties out, whatever the journal is made of, and each says what it should."""

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Final

import pytest

from gateway.cli.accounting import csv_text
from gateway.clock import time_text
from gateway.payments.accounting import POSITIONS, WALLETS, Accounts, Books, Month, Place, Statement, StatementLine
from gateway.payments.credit_flows import CreditFlows
from gateway.stores import open_store
from ledger.batch import fold
from ledger.commands import AnyCommand
from ledger.model import WALLET_PREFIX, Account, Funding, Scope, WalletRef
from ledger.outcomes import Applied, Outcome, Settled, Transfer
from ledger.state import State
from ledger.store.protocol import JournalEntry
from pricing.money import CREDIT
from tests.conftest import Campaign
from tests.gateway.till import Till, open_till, selected
from tests.ledger.rig import SCOPE, SECOND_US, RandomCommands, Say, wallet

NOVEMBER = Month(2023, 11)
DAY_US = 86_400 * SECOND_US
STRETCH, PAUSE_US = 50, 5 * DAY_US
"""So many commands come one after the other, then nothing happens for a while."""

MIDDLE_US = NOVEMBER.start_us + 14 * DAY_US


def is_limit(ref: WalletRef) -> bool:
    """Those of the made-up commands."""
    return ref.wallet in ("customer:l", "customer:d")


class Journal:
    """Commands that are decided at once, and the journal that they make."""

    def __init__(self, at_us: int = MIDDLE_US) -> None:
        self.state = State()
        self.at_us = at_us
        self.entries: list[JournalEntry] = []

    def do(self, *commands: AnyCommand) -> list[Outcome]:
        outcomes = []
        for command in commands:
            (outcome,), _ = fold(self.state, [command], self.at_us, {})
            if isinstance(outcome, Applied) and outcome.facts and not outcome.replayed:
                self._book(command, outcome)
            outcomes.append(outcome)
        return outcomes

    def must(self, *commands: AnyCommand) -> None:
        before = len(self.entries)
        self.do(*commands)
        assert len(self.entries) == before + len(commands), "one was refused"

    def _book(self, command: AnyCommand, outcome: Applied) -> None:
        transfers = tuple(fact for fact in outcome.facts if isinstance(fact, Transfer))
        self.entries.append(
            JournalEntry(
                seq=len(self.entries) + 1,
                scope=command.scope,
                id=command.id,
                kind=str(type(command).__struct_config__.tag),
                at_us=self.at_us,
                facts=tuple(fact for fact in outcome.facts if not isinstance(fact, Transfer)),
                transfers=transfers,
                transfers_written=len(transfers),
                result=outcome.result,
            )
        )


def accounts(entries: Iterable[JournalEntry], month: Month = NOVEMBER) -> dict[tuple[Place, str], int]:
    books = Books(month, bounds=is_limit)
    for entry in entries:
        books.observe(entry)
    return {(place, line): amount for place, line, amount in books.lines()}


def position(lines: dict[tuple[Place, str], int], name: str, scope: Scope = SCOPE) -> dict[str, int]:
    """The lines of a position that are not nothing."""
    place = (scope, "CREDIT")
    return {
        line.removeprefix(f"{name}."): amount
        for (at, line), amount in lines.items()
        if at == place and line.startswith(f"{name}.") and amount
    }


@pytest.fixture
def journal() -> Journal:
    return Journal()


@pytest.fixture
def say() -> Say:
    return Say()


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happened_the_accounts_tie_out(seed: int, campaign: Campaign) -> None:
    """What is left of each kind is what the blocks have, the wallets are what the accounts say, months join."""
    rounds = campaign.rounds(short=700, long=10_000)
    journal = busy(campaign.seed + seed, rounds)
    flows = CreditFlows(bounds=is_limit)
    for entry in journal.entries:
        list(flows.observe(entry))
    assert {place: parts.total for place, parts in flows.left().items()} == remaining(journal.state)
    assert all(min(held.left) >= 0 for held in flows._blocks.values())
    months = [Month(2023, 11), Month(2023, 12), Month(2024, 1)]
    assert months[0].end_us == months[1].start_us
    each = [accounts(journal.entries, month) for month in months]
    assert len(each[0]) > 20
    for lines in each:
        assert not [key for key, amount in lines.items() if key[1] == "proof.difference" and amount]
        for (place, line), amount in lines.items():
            name, _, last = line.rpartition(".")
            if last == "closing":
                among = [value for (at, of), value in lines.items() if at == place and of.startswith(f"{name}.")]
                assert sum(among) == 2 * amount, line
    for earlier, later in itertools.pairwise(each):
        for (place, line), amount in earlier.items():
            if line.endswith(".closing"):
                assert later[place, f"{line.removesuffix('.closing')}.opening"] == amount


def busy(seed: int, rounds: int) -> Journal:
    """Whatever can happen, over some months."""
    journal, source = Journal(NOVEMBER.start_us), RandomCommands(random.Random(seed))
    rare = Say(_ids=itertools.count(10**7))
    for step in range(rounds):
        journal.at_us += PAUSE_US if step % STRETCH == 0 else 7 * SECOND_US
        if step % (4 * STRETCH) == 3 * STRETCH:
            journal.must(*lost_and_given(rare, f"rare{step}"))
            journal.at_us += PAUSE_US * (step // STRETCH % 3)
            journal.must(rare.reverse("rare", f"rare{step}", 0, 1_000, revision=2))
        source.hear(journal.do(*source.take(1, journal.at_us)))
    return journal


def lost_and_given(say: Say, block: str) -> list[AnyCommand]:
    """A payment that is taken back when a part is used, and free credits of the tenant's that repay that."""
    return [
        say.top_up("rare", block, 1_000),
        say.debit("rare", block, 300),
        say.reverse("rare", block, 1_000, 1_000, revision=1),
        say.grant("rare", f"{block}_free", 500, funding=Funding.EXTERNAL, operator_paid=False),
    ]


LIMITS: Final = frozenset({f"{WALLET_PREFIX}customer:{name}" for name in "ld"})
"""Limits are no credits: what they are filled from and drawn on is nothing to an accountant."""


def test_every_entry_of_every_account_stands_in_a_line(campaign: Campaign) -> None:
    """The lines of a month are what a plain sum over its entries says, of each account and each other side."""
    journal = busy(campaign.seed, campaign.rounds(short=2_000, long=20_000))
    seen: Counter[tuple[str, str]] = Counter()
    for month in (Month(2023, 11), Month(2023, 12), Month(2024, 1), Month(2024, 2), Month(2024, 3)):
        entries = [entry for entry in journal.entries if month.start_us <= entry.at_us < month.end_us]
        assert entries
        summed: Counter[tuple[Place, str]] = Counter()
        for transfer in itertools.chain.from_iterable(entry.transfers for entry in entries):
            sides = named(transfer.debit), named(transfer.credit)
            seen[sides] += 1
            if LIMITS.isdisjoint((transfer.debit, transfer.credit)):
                place = (transfer.scope, transfer.asset)
                summed[place, f"account.{transfer.debit}.out.{sides[1]}"] -= transfer.amount
                summed[place, f"account.{transfer.credit}.in.{sides[0]}"] += transfer.amount
        lines = accounts(journal.entries, month)
        moved = {key: amount for key, amount in lines.items() if amount and (".in." in key[1] or ".out." in key[1])}
        wallets = f"account.{WALLET_PREFIX}"
        assert moved == {key: amount for key, amount in summed.items() if not key[1].startswith(wallets)}
        check_revenue(entries, lines)
    names = {name for key, name in vars(Account).items() if key.isupper()}
    met = set(itertools.chain.from_iterable(seen)) - {WALLETS}
    assert met == names, "one that the campaign leaves out, or a new one that nobody thought of here"
    assert min(seen["revenue", "tenant_due"], seen["tenant_due", "revenue"], seen["external", "tenant_due"]) > 0


def check_revenue(entries: Iterable[JournalEntry], lines: dict[tuple[Place, str], int]) -> None:
    """A month's revenue is what the groups say was used, what was used and is owed, and what nobody could pay, less
    what has become due from tenants.
    """
    there = {line: amount for (place, line), amount in lines.items() if place == (SCOPE, "CREDIT")}
    used = -sum(there[f"{group}.revenue"] for group in POSITIONS.values())
    for transfer in itertools.chain.from_iterable(entry.transfers for entry in entries):
        if transfer.block is None and WALLETS in (named(transfer.debit), named(transfer.credit)):
            used += transfer.amount * ((transfer.credit == Account.REVENUE) - (transfer.debit == Account.REVENUE))
    lost = there.get("account.revenue.in.meter_shortfall", 0)
    due = there.get("account.revenue.out.tenant_due", 0) + there.get("account.revenue.in.tenant_due", 0)
    assert there["account.revenue.closing"] - there["account.revenue.opening"] == used + lost + due


def named(account: str) -> str:
    return WALLETS if account.startswith(WALLET_PREFIX) else account.partition(":")[0]


def remaining(state: State) -> dict[Place, int]:
    sums: dict[Place, int] = defaultdict(int)
    for ref, blocks in state.blocks.items():
        for block in blocks.values():
            if not is_limit(ref):
                sums[ref.scope, state.wallets[ref].asset] += block.remaining
    return dict(sums)


# What each line says.


def test_what_was_paid_for_is_earned_as_it_is_used_or_expires(journal: Journal, say: Say) -> None:
    expires_at_us = journal.at_us + 10 * SECOND_US
    journal.must(
        say.grant("a", "1", 1_000, expires_at_us=expires_at_us),
        say.reserve("a", "1", 400, developer="app_1"),
        say.commit("1", 250, 50),
    )
    journal.at_us = expires_at_us
    journal.must(say.expire("a"))
    lines = accounts(journal.entries)
    assert position(lines, "deferred_revenue") == {
        "brought_in": 1_000,
        "revenue": -250,
        "developer_payable": -50,
        "breakage": -700,
    }
    assert position(lines, "account.clearing") == {"out.wallets": -1_000, "closing": -1_000}
    assert position(lines, "account.revenue") == {"in.wallets": 250, "closing": 250}
    assert position(lines, "account.developer_payable:app_1") == {"in.wallets": 50, "closing": 50}
    assert position(lines, "account.breakage") == {"in.wallets": 700, "closing": 700}


def test_of_a_package_the_spread_is_kept_and_the_bonus_given(journal: Journal, say: Say) -> None:
    journal.must(say.top_up("a", "1", 850, bonus=100, spread=150), say.debit("a", "1", 900))
    lines = accounts(journal.entries)
    assert position(lines, "account.clearing") == {
        "out.wallets": -850,
        "out.package_spread": -150,
        "closing": -1_000,
    }
    assert position(lines, "account.package_spread") == {"in.clearing": 150, "closing": 150}
    assert position(lines, "deferred_revenue") == {"brought_in": 850, "revenue": -850}
    assert position(lines, "given_credits") == {"brought_in": 100, "revenue": -50, "closing": 50}
    assert position(lines, "account.revenue") == {"in.wallets": 900, "closing": 900}


def test_a_payment_that_is_taken_back_leaves_what_was_spent_of_it_owed(journal: Journal, say: Say) -> None:
    journal.must(
        say.top_up("a", "1", 850, spread=150),
        say.debit("a", "1", 300),
        say.reverse("a", "1", 1_000, 1_000, revision=1),
    )
    lines = accounts(journal.entries)
    assert position(lines, "account.clearing") == {
        "out.wallets": -850,
        "out.package_spread": -150,
        "in.wallets": 850,
        "in.package_spread": 150,
    }
    assert position(lines, "account.package_spread") == {"in.clearing": 150, "out.clearing": -150}
    assert position(lines, "deferred_revenue") == {
        "brought_in": 850,
        "revenue": -300,
        "taken_back": -850,
        "debts": 300,
    }
    assert position(lines, "receivables") == {"increase": 300, "closing": 300}


def test_a_dispute_that_is_won_leaves_no_trace_in_what_is_deferred(journal: Journal, say: Say) -> None:
    journal.must(
        say.top_up("a", "1", 850, spread=150),
        say.debit("a", "1", 300),
        say.reverse("a", "1", 1_000, 1_000, revision=1),
    )
    journal.at_us = NOVEMBER.end_us
    journal.must(say.reverse("a", "1", 0, 1_000, revision=2))
    december = accounts(journal.entries, Month(2023, 12))
    assert position(december, "deferred_revenue") == {"taken_back": 850, "debts": -300, "closing": 550}
    assert position(december, "receivables") == {"opening": 300, "decrease": -300}


def test_what_is_not_paid_for_defers_no_revenue(journal: Journal, say: Say) -> None:
    journal.must(
        say.grant("a", "1", 100, funding=Funding.PROMOTIONAL, priority=2),
        say.grant("a", "2", 100, funding=Funding.EXTERNAL, operator_paid=False, priority=1),
        say.debit("a", "1", 150),
    )
    lines = accounts(journal.entries)
    assert position(lines, "deferred_revenue") == {}
    assert position(lines, "given_credits") == {"brought_in": 100, "revenue": -100}
    assert position(lines, "tenant_credits") == {"brought_in": 100, "tenant_due": -50, "closing": 50}


def test_a_month_begins_with_what_the_last_one_left(journal: Journal, say: Say) -> None:
    journal.must(say.grant("a", "1", 1_000), say.debit("a", "1", 300))
    journal.at_us = NOVEMBER.end_us - 1
    journal.must(say.debit("a", "2", 100))
    journal.at_us = NOVEMBER.end_us
    journal.must(say.debit("a", "3", 50))
    assert position(accounts(journal.entries), "deferred_revenue") == {
        "brought_in": 1_000,
        "revenue": -400,
        "closing": 600,
    }
    december = accounts(journal.entries, Month(2023, 12))
    assert position(december, "deferred_revenue") == {"opening": 600, "revenue": -50, "closing": 550}


def test_a_debt_that_is_repaid_was_earned_before(journal: Journal, say: Say) -> None:
    journal.must(say.overdraft("a", 100), say.debit("a", "1", 80), say.grant("a", "1", 500))
    lines = accounts(journal.entries)
    assert position(lines, "account.revenue") == {"in.wallets": 80, "closing": 80}
    assert position(lines, "receivables") == {"increase": 80, "decrease": -80}
    assert position(lines, "deferred_revenue") == {"brought_in": 500, "debts": -80, "closing": 420}


def test_free_credits_that_repay_a_reversed_payment_earn_nothing_and_are_due_from_the_tenant(
    journal: Journal, say: Say
) -> None:
    """What was used of the payment was revenue, and its money is gone: the tenant who gave the credits owes it."""
    journal.must(*lost_and_given(say, "1"))
    lines = accounts(journal.entries)
    assert position(lines, "account.revenue") == {"in.wallets": 300, "out.tenant_due": -300}
    assert position(lines, "account.tenant_due") == {"in.revenue": 300, "closing": 300}
    assert position(lines, "receivables") == {"increase": 300, "decrease": -300}
    assert position(lines, "tenant_credits") == {"brought_in": 500, "debts": -300, "closing": 200}


def test_what_a_tenant_gives_back_of_revenue_is_due_from_it(journal: Journal, say: Say) -> None:
    journal.must(
        say.grant("l", "line", 1_000, funding=Funding.PROMOTIONAL),
        say.grant("a", "1", 500),
    )
    (charged,) = journal.do(say.debit("a", "1", 200))
    assert isinstance(charged, Applied)
    assert isinstance(charged.result, Settled)
    journal.must(say.refund(charged.result, 50, unfunded=wallet("l")))
    lines = accounts(journal.entries)
    assert position(lines, "account.revenue") == {"in.wallets": 200, "out.wallets": -50, "closing": 150}
    assert position(lines, "account.tenant_due") == {"in.external": 50, "closing": 50}
    assert position(lines, "account.external") == {"out.tenant_due": -50, "closing": -50}
    assert position(lines, "deferred_revenue") == {"brought_in": 500, "revenue": -150, "closing": 350}


def test_what_is_given_back_of_a_charge_is_deferred_again(journal: Journal, say: Say) -> None:
    journal.must(say.grant("a", "1", 500))
    (charged,) = journal.do(say.debit("a", "1", 200))
    assert isinstance(charged, Applied)
    assert isinstance(charged.result, Settled)
    journal.must(say.refund(charged.result, 50))
    assert position(accounts(journal.entries), "deferred_revenue") == {
        "brought_in": 500,
        "revenue": -150,
        "closing": 350,
    }


def test_credits_that_are_moved_together_stay_apart_in_the_accounts(journal: Journal, say: Say) -> None:
    """A pool of 300 out of 100 that were paid for and 200 that were given: a third of what it pays was paid for."""
    journal.must(
        say.grant("dev", "1", 100),
        say.grant("dev", "2", 200, funding=Funding.PROMOTIONAL),
        say.grant("pool", "3", 300, source_wallet="dev", funding=Funding.DEVELOPER_GRANT),
        say.grant("a", "4", 60, source_wallet="pool", funding=Funding.DEVELOPER_GRANT),
        say.debit("a", "1", 30),
    )
    lines = accounts(journal.entries)
    assert position(lines, "deferred_revenue") == {"brought_in": 100, "revenue": -10, "closing": 90}
    assert position(lines, "given_credits") == {"brought_in": 200, "revenue": -20, "closing": 180}


def test_a_pack_earns_what_it_costs_beyond_what_it_has(journal: Journal, say: Say) -> None:
    journal.must(say.grant("a", "1", 100), say.purchase("a", "2", 40, 15))
    assert position(accounts(journal.entries), "deferred_revenue") == {
        "brought_in": 100,
        "packs": -25,
        "closing": 75,
    }


def test_what_a_pack_has_beyond_its_price_nobody_paid_for(journal: Journal, say: Say) -> None:
    journal.must(say.grant("a", "1", 100), say.purchase("a", "2", 40, 90))
    lines = accounts(journal.entries)
    assert position(lines, "deferred_revenue") == {"brought_in": 100, "closing": 100}
    assert position(lines, "tenant_credits") == {"packs": 50, "closing": 50}


def test_more_used_than_there_was_is_the_operator_s_loss(journal: Journal, say: Say) -> None:
    journal.must(say.grant("a", "1", 100), say.reserve("a", "1", 100), say.commit("1", 130))
    lines = accounts(journal.entries)
    assert position(lines, "account.revenue") == {"in.wallets": 100, "in.meter_shortfall": 30, "closing": 130}
    assert position(lines, "account.meter_shortfall") == {"out.revenue": -30, "closing": -30}
    assert position(lines, "deferred_revenue") == {"brought_in": 100, "revenue": -100}


def test_tenants_and_modes_have_accounts_of_their_own(journal: Journal) -> None:
    scopes = [Scope(tenant, mode) for tenant in ("ten_a", "ten_b") for mode in ("live", "test")]
    ids = itertools.count()
    for amount, scope in enumerate(scopes, start=1):
        journal.must(Say(scope, ids).grant("a", "1", amount))
    lines = accounts(journal.entries)
    for amount, scope in enumerate(scopes, start=1):
        assert position(lines, "deferred_revenue", scope) == {"brought_in": amount, "closing": amount}


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("2026-11", "2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z"),
        ("2026-12", "2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z"),
        ("2028-02", "2028-02-01T00:00:00Z", "2028-03-01T00:00:00Z"),
    ],
)
def test_a_month_is_half_open_and_utc(text: str, start: str, end: str) -> None:
    month = Month.parse(text)
    assert (time_text(month.start_us), time_text(month.end_us), str(month)) == (start, end, text)


@pytest.mark.parametrize("text", ["2026-13", "2026-00", "2026", "November", "2026-11-01", ""])
def test_what_is_no_month_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"time data|unconverted"):
        Month.parse(text)


# As CSV.


def test_the_export_is_exact_and_no_cell_is_a_formula() -> None:
    lines = (
        StatementLine("ten_a", "live", "credit", "deferred_revenue.revenue", -1_500_000_001, 9, "-0.01500000001"),
        StatementLine("ten_a", "live", "usd", '=HYPERLINK("x")', 5, 2, None),
        StatementLine("ten_a", "live", "jpy", "stripe.charge.fee", -150, 0, None),
    )
    assert csv_text(Statement(Month(2026, 11), lines, 3)) == (
        "month,tenant,mode,asset,line,amount,usd\r\n"
        "2026-11,ten_a,live,credit,deferred_revenue.revenue,-1.500000001,-0.01500000001\r\n"
        '2026-11,ten_a,live,usd,"\'=HYPERLINK(""x"")",0.05,\r\n'
        "2026-11,ten_a,live,jpy,stripe.charge.fee,-150,\r\n"
    )


# Over real stores.


@pytest.fixture
async def till(tmp_path: Path) -> AsyncIterator[Till]:
    async with open_till(tmp_path) as opened:
        yield opened


async def test_the_journal_and_the_processor_stand_in_one_statement(till: Till) -> None:
    """What was paid, less what was refunded, and Stripe's fees; per tenant and mode."""
    services = till.gateway.services
    asset = (await services.tenants.tenant(till.office.tenant)).asset_code
    terms = {"asset": asset, "price_minor": 1_000, "credited": CREDIT.parse("1000"), "spread": 0}
    live, sandbox = await till.sale(**terms), await till.sale(mode="test", **terms)
    for sale in (live, sandbox):
        await till.outcomes(sale.pay())
    await live.spend(CREDIT.parse("250"))
    await till.outcomes(selected(till.stripe.refund(live.payment, 500)))
    month = Month.parse(time_text(services.now_us())[:7])
    await till.payments.reconciler.run(month.start_us, month.end_us)
    store = await open_store(services.settings.database_url, clock=services.now_us)
    books = Accounts(store, services.database, operator=till.office.tenant)
    statement, other = await books.month(month), await books.month(month, tenant="ten_other")
    await store.close()
    scope = live.order.scope
    said = {line.line: (line.decimal, line.usd) for line in statement.lines if (line.tenant, line.mode) == scope}
    assert said["deferred_revenue.brought_in"] == ("1000", "10")
    assert said["deferred_revenue.revenue"] == ("-250", "-2.5")
    assert said["deferred_revenue.taken_back"] == ("-500", "-5")
    assert said["deferred_revenue.closing"] == ("250", "2.5")
    assert said["proof.difference"] == ("0", "0")
    assert statement.amount(sandbox.order.scope, "deferred_revenue.closing", asset) == CREDIT.parse("1000")
    # The processor's account is in its test mode, and serves both of ours.
    assert statement.amount(sandbox.order.scope, "stripe.charge.amount") == 2_000
    assert statement.amount(sandbox.order.scope, "stripe.charge.fee") == -2 * 59
    assert statement.amount(sandbox.order.scope, "stripe.refund.amount") == -500
    assert other.lines == ()
