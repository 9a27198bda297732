"""Random commands on several wallets, tenants and modes: whatever happens, the rules hold.

After every step the oracle's invariants hold and replay gives the state (``Case.run`` sees to both), and a second,
naive ledger, written without the core, has foretold the answer and has the same balances, holds and accounts. A failure
prints the table that leads to it. ``FAREBOX_SOAK=1`` runs many more and longer ones.
"""

import os
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from msgspec.structs import asdict

from ledger.commands import Extend, Hold
from ledger.core import decide
from ledger.model import Block, ReservationState, Scope, WalletRef
from ledger.outcomes import Applied, Outcome, Rejected, Settled, Transfer
from tests.ledger import oracle
from tests.ledger.naive import Naive, Prediction
from tests.ledger.spec import RESULT_WORDS, Case, check, command, reservation_ref

SOAK = os.environ.get("FAREBOX_SOAK") == "1" or os.environ.get("FAREBOX_TEST_CAMPAIGN") == "long"
SEED = int(os.environ.get("FAREBOX_TEST_SEED", "20250115"))
SETTINGS = settings(
    max_examples=4_000 if SOAK else 150,
    stateful_step_count=150 if SOAK else 50,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)

AMOUNT = st.one_of(st.integers(0, 60), st.sampled_from([1, 2, 3, 7, 30]))
SCOPES = st.sampled_from(["", "", "", "", "", "", "", "@t2", "@t1/test"])
CHAINS = st.sampled_from(["w1", "w1", "w2", "w1,w2", "w2,w1", "w1,uni", "u1,w1", "u1", "dev", "w1,w1", "u1,pool", "w3"])
APPS = st.sampled_from(["", "", " app=a1", " app=a2"])
KEYS = st.sampled_from([*[""] * 12, " key=k1", " key=k2", " key=k2 digest=other"])
LIKELY = st.sampled_from([True, True, True, True, False])
GRANTED = st.integers(1, 300)
WATCHES = st.sampled_from(
    [*[""] * 4, " watch=low:60,exhausted:1", " watch=low:60,exhausted:1", " watch=top_up:90,low:60,low:150", " watch="]
)


@st.composite
def charges(draw: st.DrawFn, legs: int = 1) -> str:
    return "|".join(f"{draw(AMOUNT)}+{draw(st.integers(0, 20))}" for _ in range(legs))


@st.composite
def holds(draw: st.DrawFn) -> tuple[str, str, str, int]:
    """Scope, wallets, amounts with their minimums, number of legs; the operator's wallet pays in live data alone."""
    scope = draw(SCOPES)
    chains = [draw(CHAINS) for _ in range(draw(st.sampled_from([1, 1, 1, 2])))]
    amounts = []
    for _ in chains:
        most = draw(AMOUNT)
        amounts.append(f"{most}..{draw(st.sampled_from([most, most, 0, most // 2]))}")
    named = []
    for chain in chains:
        wallets = [name for name in chain.split(",") if name != "uni" or "/test" not in scope]
        named.append(",".join("uni@op" if name == "uni" else name + scope for name in wallets))
    return scope, "|".join(named), "|".join(amounts), len(chains)


@st.composite
def refilled_limits(draw: st.DrawFn, scope: str, now_us: int) -> str:
    """A limit with periods of 20 us; who asks may think that it is a little earlier or later."""
    start = max(0, now_us + draw(st.sampled_from([0, 0, 0, -15, 15]))) // 20 * 20
    amount = draw(st.sampled_from([60, 60, 60, 90, 0]))
    return f"quota{scope}:{amount}:{start}..{start + 20}:{start + 20}..{start + 40}"


@st.composite
def bounds(draw: st.DrawFn, scope: str, now_us: int) -> str:
    refilled = draw(refilled_limits(scope, now_us))
    fixed = [f"day{scope}", f"day{scope},month{scope}", f"month{scope},{refilled}"]
    limits = draw(st.sampled_from(["", "", "", *[f" limits={names}" for names in fixed], f" limits={refilled}"]))
    line = draw(st.sampled_from(["", "", f" unfunded=line{scope}"]))
    developer = draw(st.sampled_from(["", " developer=d1"]))
    highest = draw(st.sampled_from(["", "", "", " max=0", " max=1"]))
    return f"{limits}{line}{developer}{draw(APPS)}{highest}{draw(WATCHES)}"


class Ledgers(RuleBasedStateMachine):
    """The core and the naive ledger, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.case = Case()
        self.naive = Naive()
        self.table: list[str] = []
        self.reservations: list[tuple[str, int]] = []
        self.blocks: list[tuple[str, str]] = []
        self.payments: list[tuple[str, str]] = []
        self.frozen: list[str] = []
        self.first_results: dict[Any, Any] = {}

    def step(self, line: str) -> Outcome:
        self.table.append(line)
        try:
            return self._step(line)
        except Exception as failure:
            table = "\n".join(self.table)
            raise AssertionError(f"{failure}\nat {self.case.now_us}, the end of:\n{table}") from failure

    def _step(self, line: str) -> Outcome:
        asked = self.case.complete(command(line, command_id=f"cmd_{len(self.table):04d}"))
        free = self._free_in_all()
        predicted = self.naive.predict(asked, self.case.now_us)
        outcome = self.case.run(asked)
        _agree(predicted, outcome)
        if isinstance(asked, Hold | Extend) and isinstance(outcome, Applied) and not outcome.replayed:
            gained = {ref: free[ref] - left for ref, left in self._free_in_all().items()}
            assert all(gained[ref] <= free[ref] for ref in gained), "nobody gets more than was free"
        self._one_key_one_outcome(asked, outcome)
        self._same_balances()
        return outcome

    def _one_key_one_outcome(self, asked: Any, outcome: Outcome) -> None:
        if asked.key is None or not isinstance(outcome, Applied):
            return
        name = (asked.scope, asked.key.operation, asked.key.key)
        if name in self.first_results and name in self.case.state.keys and outcome.replayed:
            assert outcome.result == self.first_results[name]
        elif name in self.case.state.keys:
            self.first_results[name] = outcome.result

    def _free_in_all(self) -> dict[WalletRef, int]:
        """What could be had of each wallet at most, its overdraft included."""
        found: dict[WalletRef, int] = defaultdict(int)
        for ref, wallet in self.case.state.wallets.items():
            blocks = self.case.state.blocks.get(ref, {}).values()
            free = sum(block.free for block in blocks if block.pays_at(self.case.now_us))
            found[ref] = free + max(0, wallet.overdraft_limit - wallet.receivable - wallet.overdraft_reserved)
        return found

    def _same_balances(self) -> None:
        state, naive = self.case.state, self.naive
        assert set(state.wallets) == set(naive.wallets)
        for ref, wallet in state.wallets.items():
            assert state.balance(ref, self.case.now_us) == naive.balance(ref), ref
            assert wallet.receivable == naive.wallets[ref]["owed"], ref
            assert asdict(wallet.debts) == {name: naive.wallets[ref][name] for name in asdict(wallet.debts)}, ref
            assert wallet.overdraft_reserved == naive.pinned(ref, None), ref
            left = {
                block.id: (block.remaining, block.reserved, block.clawed, _gone(block))
                for block in state.blocks.get(ref, {}).values()
            }
            expected = {
                block["name"]: (block["left"], naive.pinned(ref, block["name"]), block["clawed"], block["gone"])
                for block in naive.wallets[ref]["blocks"]
            }
            assert left == expected, ref
        accounts = oracle.account_balances(self.case.facts)
        for (scope, account, asset), balance in accounts.items():
            assert asset == "credit"
            if account.startswith("wallet:"):
                expected_balance = naive.journal_balance(WalletRef(*scope, account.removeprefix("wallet:")))
            else:
                expected_balance = naive.accounts[scope.tenant, scope.mode, account]
            assert balance == expected_balance, account
        for (tenant, mode, account), balance in naive.accounts.items():
            assert accounts.get((Scope(tenant, mode), account, "credit"), 0) == balance, account

    # What may happen.

    @initialize(scope=SCOPES, funding=st.sampled_from(["paid", "external"]))
    def there_are_some_credits(self, scope: str, funding: str) -> None:
        for name in ("w1", "w2", "dev", "pool", "day", "month", "line"):
            self._grant(f"{name}{scope}", 100, f"funding={funding}")
        self._grant("uni@op", 50, "")
        self._grant(f"u1{scope}", 40, f"from=pool{scope} funding=developer_grant priority=1")

    def _grant(self, wallet: str, amount: int, options: str) -> None:
        block = f"b{len(self.blocks)}"
        self.blocks.append((wallet, block))
        self.step(f"grant {wallet} {block} {amount} {options}")

    @rule(microseconds=st.integers(1, 15))
    def time_passes(self, microseconds: int) -> None:
        self._wait_until(self.case.now_us + microseconds)

    def _wait_until(self, now_us: int) -> None:
        self.case.now_us = max(self.case.now_us, now_us)
        self.table.append(f"at {self.case.now_us}")

    @rule(
        data=st.data(),
        name=st.sampled_from(["w1", "w1", "w1", "w2", "u1", "dev", "pool", "day", "month", "line", "uni"]),
        scope=SCOPES,
        key=KEYS,
    )
    def grant(self, data: st.DataObject, name: str, scope: str, key: str) -> None:
        options = [f"funding={data.draw(st.sampled_from(['paid', 'paid', 'external', 'promotional', 'plan']))}{key}"]
        now = self.case.now_us
        if data.draw(st.booleans()):
            options.append(f"priority={data.draw(st.integers(-1, 2))}")
        if data.draw(st.integers(0, 2)) == 0:
            options.append(f"expires={now + data.draw(st.integers(0, 40))}")
        if data.draw(st.integers(0, 5)) == 0:
            options.append(f"effective={now + data.draw(st.integers(-5, 20))}")
        options += data.draw(st.sampled_from([[], [], [], ["app=a1"], ["app=a1,a2"], ["unpaid"]]))
        options += data.draw(st.sampled_from([[], [], [], ["source=plan"], ["source=plan", "cap=150"], ["cap=90"]]))
        self._grant("uni@op" if name == "uni" else name + scope, data.draw(GRANTED), " ".join(options))

    @rule(
        users=st.sampled_from([("pool", "dev"), ("u1", "pool"), ("u1", "pool"), ("w1", "dev")]),
        scope=SCOPES,
        amount=st.integers(1, 60),
        key=KEYS,
    )
    def grant_out_of_a_wallet(self, users: tuple[str, str], scope: str, amount: int, key: str) -> None:
        funding = "paid" if users[0] == "pool" else "developer_grant"
        self._grant(users[0] + scope, amount, f"from={users[1]}{scope} funding={funding} priority=1{key}")

    @rule(data=st.data(), name=st.sampled_from(["w1", "w1", "w2", "u1", "w3"]), scope=SCOPES, key=KEYS)
    def purchase(self, data: st.DataObject, name: str, scope: str, key: str) -> None:
        block = f"p{len(self.blocks)}"
        options = [f"priority={data.draw(st.integers(-1, 2))}{data.draw(APPS)}{key}"]
        if data.draw(LIKELY):
            options.append(f"duration={data.draw(st.integers(0, 30))}")
        if data.draw(st.booleans()):
            options.append("unless_active")
        self.blocks.append((name + scope, block))
        self.step(f"purchase {name}{scope} {block} {data.draw(AMOUNT)} {data.draw(AMOUNT)} {' '.join(options)}")

    @rule(data=st.data(), hold=holds(), ttl=st.integers(1, 40), key=KEYS, again=st.integers(0, 9))
    def reserve(self, data: st.DataObject, hold: tuple[str, str, str, int], ttl: int, key: str, again: int) -> None:
        scope, wallets, amounts, legs = hold
        number = len(self.reservations) if again else max(0, len(self.reservations) - 1)
        name = f"r{number}{scope}"
        options = data.draw(bounds(scope, self.case.now_us))
        if data.draw(st.booleans()):
            options += f" mark={data.draw(charges(legs))}"
        options += data.draw(st.sampled_from(["", "", " keystays"]))
        outcome = self.step(f"reserve {wallets} {name} {amounts} ttl={ttl}{options}{key} request=q{number}")
        if isinstance(outcome, Applied) and not outcome.replayed:
            self.reservations.append((name, legs))

    @rule(data=st.data(), hold=holds(), key=KEYS)
    def debit(self, data: st.DataObject, hold: tuple[str, str, str, int], key: str) -> None:
        scope, wallets, amounts, legs = hold
        name = f"d{len(self.table)}{scope}"
        charge = data.draw(charges(legs))
        beyond = data.draw(st.sampled_from(["", " beyond", " overage tells"]))
        options = data.draw(bounds(scope, self.case.now_us))
        outcome = self.step(f"debit {wallets} {name} {charge} hold={amounts}{options}{key}{beyond}")
        if isinstance(outcome, Applied) and not outcome.replayed:
            self.reservations.append((name, legs))

    @precondition(lambda self: self.reservations)
    @rule(data=st.data())
    def debit_what_may_be_reserved(self, data: st.DataObject) -> None:
        """The work was done without knowing whether its reservation was made."""
        name, legs = self._one_of(data, ReservationState.OPEN, ReservationState.EXPIRED)
        known = self.case.state.reservations[reservation_ref(name)]
        wallets = "|".join(",".join(map(_name_of, leg.wallets)) for leg in known.legs)
        request = known.request_id if data.draw(LIKELY) else "another"
        self.step(f"debit {wallets} {name} {data.draw(charges(legs))} beyond request={request}")

    @precondition(lambda self: self.reservations)
    @rule(data=st.data(), whole=LIKELY)
    def refund(self, data: st.DataObject, whole: bool) -> None:
        name, legs = self._one_of(data, ReservationState.COMMITTED, ReservationState.EXPIRED)
        amounts = "" if whole and data.draw(st.booleans()) else "|".join(str(data.draw(AMOUNT)) for _ in range(legs))
        _, at, scope = name.partition("@")
        line = data.draw(st.sampled_from(["", f"unfunded=line{at}{scope}"]))
        self.step(f"refund {name} {amounts} {line}")

    def _one_of(self, data: st.DataObject, *states: ReservationState) -> tuple[str, int]:
        """Some reservation, most likely one in these states."""
        known = self.case.state.reservations
        fitting = [made for made in self.reservations if known[reservation_ref(made[0])].state in states]
        return data.draw(st.sampled_from((fitting or self.reservations) if data.draw(LIKELY) else self.reservations))

    @precondition(lambda self: self.reservations)
    @rule(data=st.data(), most=AMOUNT, ttl=st.integers(0, 30))
    def extend(self, data: st.DataObject, most: int, ttl: int) -> None:
        name, legs = self._one_of(data, ReservationState.OPEN)
        least = data.draw(st.sampled_from([most, 0, most // 2]))
        mark = f" mark={data.draw(charges(legs))}" if data.draw(st.booleans()) else ""
        _, at, scope = name.partition("@")
        limit = f" limits={data.draw(refilled_limits(at + scope, self.case.now_us))}" if data.draw(LIKELY) else ""
        self.step(f"extend {name} {most}..{least} ttl={ttl}{mark}{limit}")

    @precondition(lambda self: self.reservations)
    @rule(
        data=st.data(),
        partial=st.sampled_from(["", " partial"]),
        beyond=st.sampled_from(["", "", " waive", " beyond"]),
        key=KEYS,
    )
    def commit(self, data: st.DataObject, partial: str, beyond: str, key: str) -> None:
        name, legs = self._one_of(data, ReservationState.OPEN, ReservationState.EXPIRED)
        self.step(f"commit {name} {data.draw(charges(legs))}{partial}{beyond}{key}")

    @precondition(lambda self: self.reservations)
    @rule(data=st.data(), lapses=LIKELY)
    def release_or_lapse(self, data: st.DataObject, lapses: bool) -> None:
        name, _ = self._one_of(data, ReservationState.OPEN)
        if lapses and data.draw(LIKELY):
            self._wait_until(self.case.state.reservations[reservation_ref(name)].expires_at_us)
        self.step(f"lapse {name}" if lapses else f"release {name}")

    @precondition(lambda self: self.reservations)
    @rule(data=st.data())
    def commit_late(self, data: st.DataObject) -> None:
        name, legs = self._one_of(data, ReservationState.EXPIRED)
        self.step(f"commit {name} {data.draw(charges(legs))}")

    @rule(
        data=st.data(),
        verb=st.sampled_from(["revoke", "clawback"]),
        amount=st.one_of(st.integers(1, 90), st.just("all")),
    )
    def take_back(self, data: st.DataObject, verb: str, amount: int | str) -> None:
        wallet, block = data.draw(st.sampled_from(self.blocks))
        self.step(f"{verb} {wallet} {block} {amount}")

    @rule(
        name=st.sampled_from(["w1", "w1", "w1", "w2", "u1", "dev"]),
        scope=SCOPES,
        amount=st.integers(1, 200),
        extras=st.tuples(st.sampled_from([0, 0, 1, 30]), st.sampled_from([0, 0, 1, 17])),
        key=KEYS,
    )
    def top_up(self, name: str, scope: str, amount: int, extras: tuple[int, int], key: str) -> None:
        block = f"t{len(self.blocks)}"
        self.blocks += [(name + scope, block), (name + scope, f"{block}_bonus")]
        self.payments.append((name + scope, block))
        self.step(f"topup {name}{scope} {block} {amount} bonus={extras[0]} spread={extras[1]}{key}")

    @precondition(lambda self: self.payments)
    @rule(data=st.data(), taken=st.integers(0, 7), revision=st.integers(1, 40), frozen=st.sampled_from(["", " frozen"]))
    def reverse(self, data: st.DataObject, taken: int, revision: int, frozen: str) -> None:
        """Any part of any payment, up and down; news of it may come too late."""
        wallet, block = data.draw(st.sampled_from(self.payments if data.draw(LIKELY) else self.blocks))
        self.step(f"reverse {wallet} {block} {taken}/7 rev={revision}{frozen}")

    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        self.step(f"expire {data.draw(st.sampled_from(self.blocks))[0]}")

    @rule(data=st.data(), whole=st.booleans())
    def freeze_or_thaw(self, data: st.DataObject, whole: bool) -> None:
        """One thing at a time is frozen, else soon nothing would move."""
        if self.frozen:
            self.step(f"unfreeze {self.frozen.pop()}")
        else:
            wallet, block = data.draw(st.sampled_from(self.blocks))
            self.frozen.append(wallet if whole else f"{wallet} {block}")
            outcome = self.step(f"freeze {self.frozen[0]}")
            if isinstance(outcome, Rejected):
                self.frozen.clear()

    @rule(name=st.sampled_from(["w1", "w2", "dev"]), scope=SCOPES, limit=st.integers(0, 50))
    def set_overdraft(self, name: str, scope: str, limit: int) -> None:
        self.step(f"overdraft {name}{scope} {limit}")

    @rule(data=st.data(), scope=SCOPES)
    def set_limit(self, data: st.DataObject, scope: str) -> None:
        self.step(f"limit {data.draw(refilled_limits(scope, self.case.now_us))}")


def _gone(block: Block) -> dict[str, int]:
    """What a reversed payment has taken of a block."""
    return {name: getattr(block.reversal, name) for name in ("free", "owed", "clawed", "lapsed")}


def _name_of(ref: WalletRef) -> str:
    return f"{ref.wallet}@{ref.tenant}/{ref.mode}"


def _agree(predicted: Prediction, outcome: Outcome) -> None:
    """The naive ledger foretold the answer, and every fact that it names."""
    if isinstance(outcome, Rejected):
        found: Any = outcome
        word: str = outcome.reason
    else:
        found = outcome.result
        word = found.state if isinstance(found, Settled) else RESULT_WORDS[type(found)]
    assert word == predicted["word"], f"foretold {predicted}, found {outcome}"
    for name in set(predicted) - {"word", "refused", "again"}:
        assert getattr(found, name) == predicted[name], f"{name}: foretold {predicted}, found {outcome}"


@pytest.mark.campaign
def test_random_commands_keep_every_rule() -> None:
    run_state_machine_as_test(seed(SEED)(Ledgers), settings=SETTINGS)


# Shares of a charge.


@settings(SETTINGS, max_examples=20_000 if SOAK else 500)
@seed(SEED)
@given(
    blocks=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    base=st.integers(0, 200),
    markup=st.integers(0, 200),
)
def test_shares_are_never_negative_and_add_up(blocks: list[int], base: int, markup: int) -> None:
    """Whatever the blocks are cut into, and whether they cover the charge or not."""
    case = Case()
    for number, amount in enumerate(blocks):
        check(f"grant w1 b{number} {amount}", case)
    check(f"reserve w1 r1 {base + markup}..0 \n commit r1 {base}+{markup}", case)
    (reservation,) = case.state.reservations.values()
    covered = min(base + markup, sum(blocks))
    assert all(paid.base >= 0 and paid.markup >= 0 for paid in reservation.payments)
    assert sum(paid.base + paid.markup for paid in reservation.payments) == covered
    assert reservation.charged[0].base == (base * covered // (base + markup) if covered else 0)
    assert reservation.shortfall == base + markup - covered
    if covered == base + markup:
        assert reservation.charged[0].base == base


@settings(SETTINGS, max_examples=5_000 if SOAK else 200)
@seed(SEED)
@given(
    actual=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    mark=st.none() | st.tuples(st.integers(0, 60), st.integers(0, 60)),
    there=st.integers(0, 150),
)
def test_a_late_commit_charges_what_a_timely_one_would_or_what_the_lapse_did(
    actual: tuple[int, int], mark: tuple[int, int] | None, there: int
) -> None:
    """max(0, actual - charged): together never less than either, never more than the dearer of the two."""
    marked = "" if mark is None else f"mark={mark[0]}+{mark[1]}"
    grant = f"grant w1 b1 {there}" if there else ""
    case = check(f"""
        {grant}
        reserve w1 r1 60..0 ttl=5 {marked}
        at 5
        lapse r1
        commit r1 {actual[0]}+{actual[1]}
    """)
    (reservation,) = case.state.reservations.values()
    asked = max(sum(actual), sum(mark or (0, 0)))
    assert reservation.charged[0].total == min(there, asked)
    assert reservation.charged[0].total + reservation.shortfall == asked


def test_the_core_needs_the_clock_once_and_changes_nothing_itself() -> None:
    """Deciding at another time, or again, reads the same state: only ``evolve`` writes."""
    case = check("grant w1 b1 100 \n reserve w1 r1 50 ttl=10")
    before = oracle.replayed(case.facts)
    for now_us in (5, 50, 5, 0):
        for line in ("commit r1 45+5 request=q cost=1", "lapse r1", "reserve w1 r2 10", "expire w1"):
            decide(case.state, command(line), now_us)
    assert case.state == before


def test_entries_of_every_command_balance() -> None:
    """One transfer is one debit and one credit: an asset's accounts always add up to nothing."""
    case = check("""
        grant w1 b1 100
        grant w2 g1 7 asset=gold
        debit w1 r1 30+3 request=q cost=11
    """)
    totals: dict[str, int] = defaultdict(int)
    for (_, _, asset), balance in oracle.account_balances(case.facts).items():
        totals[asset] += balance
    assert totals == {"credit": 0, "gold": 0, "USD": 0}
    assert sum(isinstance(fact, Transfer) for fact in case.facts) == 5
