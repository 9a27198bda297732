"""The conformance suite of stores: each of them does all of this. A new store is a new name in STORES of conftest."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import msgspec
import pytest

from ledger.batch import RESPONSE_LIFE_US, AppliedBefore, CommandRef, fold, kind_of
from ledger.commands import AnyCommand, Limit, LimitPeriod
from ledger.model import (
    UNRESTRICTED,
    Alert,
    Block,
    Charge,
    Debts,
    Funding,
    Restriction,
    Reversal,
    Settlement,
    Wallet,
    WalletRef,
)
from ledger.outcomes import Applied, Granted, Outcome, Reason, Rejected, Reserved, Revoked, Settled
from ledger.state import State
from ledger.store import postgres_batch
from ledger.store.protocol import Position, Store
from ledger.store.rows import block_from, block_row, wallet_from, wallet_row
from ledger.verify import verify
from tests.conftest import Campaign
from tests.ledger.conftest import NewDatabase
from tests.ledger.rig import (
    RESPONSE,
    SCOPE,
    SECOND_US,
    START_US,
    Clock,
    Database,
    Dump,
    RandomCommands,
    Say,
    key,
    partition,
    reservation,
    usage,
    wallet,
)


@pytest.fixture
async def store(database: Database, clock: Clock) -> AsyncIterator[Store]:
    opened = await database.open(clock)
    yield opened
    assert (await verify(opened)).violations == ()
    await opened.close()


def result_of(outcome: Outcome) -> Any:
    assert isinstance(outcome, Applied), outcome
    return outcome.result


def reason_of(outcome: Outcome) -> Reason:
    assert isinstance(outcome, Rejected), outcome
    return outcome.reason


def without_gaps(dump: Dump) -> Dump:
    """The same rows with the journal's numbers counted from one: a number that was drawn in vain is missing."""
    ranks = {seq: rank for rank, seq in enumerate(sorted(row[3] for row in dump["ledger_command"]), start=1)}
    commands = [(*row[:3], ranks[row[3]], *row[4:]) for row in dump["ledger_command"]]
    transfers = [(*row[:2], ranks[row[2]], *row[3:]) for row in dump["ledger_transfer"]]
    return {**dump, "ledger_command": sorted(commands, key=repr), "ledger_transfer": sorted(transfers, key=repr)}


class Reference:
    """The same commands folded one by one over a state that forgets nothing: what every store must come to."""

    def __init__(self) -> None:
        self.state = State()
        self._known: dict[CommandRef, AppliedBefore] = {}

    def decide(self, command: AnyCommand, now_us: int) -> Outcome:
        (outcome,), _ = fold(self.state, [command], now_us, self._known)
        if isinstance(outcome, Applied) and outcome.facts and not outcome.replayed:
            self._known[command.scope, command.id] = AppliedBefore(kind_of(command), outcome.result)
        return outcome


# A batch.


async def test_a_batch_answers_each_command_and_a_refusal_sinks_nobody(store: Store, say: Say) -> None:
    outcomes = await store.run_batch(
        [
            say.grant("a", "1", 100),
            say.reserve("a", "1", 60),
            say.reserve("a", "2", 60),
            say.commit("1", 45),
            say.reserve("a", "3", 55),
        ]
    )
    granted = result_of(outcomes[0])
    assert isinstance(granted, Granted)
    assert (granted.balance_before, granted.balance_after, granted.at_us) == (0, 100, START_US)
    assert isinstance(result_of(outcomes[1]), Reserved)
    assert outcomes[2] == Rejected(Reason.INSUFFICIENT_CREDITS, needed=60, available=40)
    assert result_of(outcomes[3]).balance == 55
    assert isinstance(result_of(outcomes[4]), Reserved)


async def test_a_batch_that_cannot_be_written_leaves_nothing(database: Database, store: Store, say: Say) -> None:
    await store.run_batch([say.grant("a", "1", 100)])
    before = database.dump()
    with pytest.raises(TypeError):
        await store.run_batch([say.reserve("a", "1", 60), say.grant("a", "2", 5, metadata={"not JSON": object()})])
    assert database.dump() == before
    (outcome,) = await store.run_batch([say.reserve("a", "all", 100)])
    assert isinstance(result_of(outcome), Reserved)


async def test_random_commands_come_to_what_the_pure_fold_says(
    new_database: NewDatabase, clock: Clock, campaign: Campaign
) -> None:
    """Loading only what is named, and keeping some of it, must not show: whoever runs a batch, and after whom."""
    for number in range(campaign.rounds(short=3, long=100)):
        seed = random.Random(campaign.seed + number)
        database = new_database()
        opened, second = await database.open(clock), await database.open(clock)
        reference = Reference()
        source = RandomCommands(seed)
        for _ in range(12):
            clock.us += seed.randint(0, 20) * SECOND_US
            for batch in partition(source.take(30, clock.us), seed, 12):
                expected = [reference.decide(command, clock.us) for command in batch]
                source.hear(expected)
                runs = seed.choice([opened, opened, opened, second])
                assert await runs.run_batch(batch) == expected, f"seed {campaign.seed + number}"
        for ref, known in reference.state.wallets.items():
            found = await opened.wallet(ref)
            assert found is not None
            assert found.wallet == known
            assert found.blocks == tuple(block for block in reference.state.blocks.get(ref, {}).values() if block.live)
        for reservation_ref, known_reservation in reference.state.reservations.items():
            assert await opened.reservation(reservation_ref) == known_reservation
        assert (await verify(opened)).violations == ()
        await opened.close()
        await second.close()


@pytest.mark.parametrize("size_max", [2, 16, 256])
async def test_a_batch_of_n_is_n_batches_of_one(
    new_database: NewDatabase, clock: Clock, campaign: Campaign, size_max: int
) -> None:
    for number in range(campaign.rounds(short=2, long=50)):
        seed = random.Random(campaign.seed + number)
        source = RandomCommands(seed)
        singly, batched = new_database(), new_database()
        one, many = await singly.open(clock), await batched.open(clock)
        for _ in range(4):
            clock.us += 10 * SECOND_US
            commands = source.take(150, clock.us)
            expected = [(await one.run_batch([command]))[0] for command in commands]
            source.hear(expected)
            outcomes = [
                outcome for batch in partition(commands, seed, size_max) for outcome in await many.run_batch(batch)
            ]
            assert outcomes == expected
        assert without_gaps(batched.dump()) == without_gaps(singly.dump()), f"seed {campaign.seed + number}"
        await one.close()
        await many.close()


async def test_stores_on_one_database_see_each_other(database: Database, clock: Clock, say: Say) -> None:
    """What one keeps from its last batches is not used after the other has written."""
    one, other = await database.open(clock), await database.open(clock)
    await one.run_batch([say.grant("a", "1", 100)])
    for round_number in range(4):
        mine, theirs = (one, other) if round_number % 2 else (other, one)
        (held,) = await mine.run_batch([say.reserve("a", f"{round_number}", 20)])
        assert isinstance(result_of(held), Reserved)
        (settled,) = await theirs.run_batch([say.commit(f"{round_number}", 20)])
        assert result_of(settled).balance == 100 - 20 * (round_number + 1)
    (refused,) = await one.run_batch([say.reserve("a", "last", 21)])
    assert reason_of(refused) is Reason.INSUFFICIENT_CREDITS
    assert (await verify(one)).violations == ()
    await one.close()
    await other.close()


# Once only.


async def test_a_command_id_serves_once(store: Store, say: Say) -> None:
    await store.run_batch([say.grant("a", "1", 100), say.reserve("a", "1", 10)])
    extend = say.extend("1", 5)
    first, again = await store.run_batch([extend, extend])
    (later,) = await store.run_batch([extend])
    assert result_of(first).held == (15,)
    assert [result_of(again), result_of(later)] == [result_of(first)] * 2
    assert [first.replayed, again.replayed, later.replayed] == [False, True, True]  # type: ignore[union-attr]
    (other,) = await store.run_batch([say.release("1", id=extend.id)])
    assert reason_of(other) is Reason.KEY_REUSED


async def test_a_refused_command_may_come_again(store: Store, say: Say) -> None:
    reserve = say.reserve("a", "1", 10)
    (refused,) = await store.run_batch([reserve])
    _, applied = await store.run_batch([say.grant("a", "1", 10), reserve])
    assert reason_of(refused) is Reason.INSUFFICIENT_CREDITS
    assert isinstance(result_of(applied), Reserved)


async def test_a_key_has_one_effect_in_a_batch_and_after_it(store: Store, say: Say) -> None:
    first, second, other = await store.run_batch(
        [
            say.grant("a", "1", 100, key=key("k")),
            say.grant("a", "2", 100, key=key("k")),
            say.grant("a", "3", 100, key=key("k", digest="other")),
        ]
    )
    (later,) = await store.run_batch([say.grant("a", "4", 100, key=key("k"))])
    assert result_of(first) == result_of(second) == result_of(later)
    assert reason_of(other) is Reason.KEY_REUSED
    found = await store.wallet(wallet("a"))
    assert found is not None
    assert [block.id for block in found.blocks] == ["blk_1"]


async def test_a_release_frees_the_key(store: Store, say: Say) -> None:
    await store.run_batch([say.grant("a", "1", 100), say.reserve("a", "1", 60, key=key("k"))])
    await store.run_batch([say.release("1")])
    (anew,) = await store.run_batch([say.reserve("a", "2", 70, key=key("k"))])
    assert result_of(anew).reservation == "rsv_2"
    released, again = await store.run_batch([say.release("2"), say.reserve("a", "3", 80, key=key("k"))])
    assert isinstance(result_of(released), Settled)
    assert result_of(again).reservation == "rsv_3"


async def test_a_response_is_kept_for_a_day_under_the_key_of_its_reservation(
    store: Store, say: Say, clock: Clock
) -> None:
    await store.run_batch([say.grant("a", "1", 100), say.reserve("a", "1", 60, key=key("k"))])
    await store.run_batch([say.commit("1", 10, response=RESPONSE)])
    end_us = clock.us + RESPONSE_LIFE_US
    assert await store.response(SCOPE, "chat", "k", now_us=end_us - 1) == RESPONSE
    assert await store.response(SCOPE, "chat", "k", now_us=end_us) is None
    assert await store.response(SCOPE, "other", "k", now_us=clock.us) is None
    assert await store.purge_responses(end_us - 1, limit=10) == 0
    assert await store.purge_responses(end_us, limit=10) == 1
    assert await store.response(SCOPE, "chat", "k", now_us=clock.us) is None


# What is loaded.


async def test_what_is_named_is_loaded_even_when_nothing_is_left_in_it(store: Store, say: Say) -> None:
    await store.run_batch([say.grant("a", "1", 10), say.debit("a", "1", 10)])
    (again,) = await store.run_batch([say.grant("a", "1", 5)])
    assert reason_of(again) is Reason.ALREADY_EXISTS
    (clawed,) = await store.run_batch([say.revoke("a", "1", 4, clawback=True)])
    assert result_of(clawed).receivable == 4
    (frozen,) = await store.run_batch([say.freeze("a", block="1")])
    assert isinstance(frozen, Applied)


async def test_a_refund_finds_blocks_that_are_used_up_and_the_pool_of_their_markup(
    database: Database, clock: Clock, say: Say
) -> None:
    first = await database.open(clock)
    await first.run_batch([say.grant("pool", "p", 50)])
    await first.run_batch(
        [
            say.grant("a", "g", 30, source_wallet="pool", funding=Funding.DEVELOPER_GRANT, priority=1),
            say.grant("a", "1", 20),
            say.overdraft("a", 10),
            say.reserve("a", "1", 60),
        ]
    )
    await first.run_batch([say.debit("pool", "spent", 20)])
    (settled,) = await first.run_batch([say.commit("1", 45, 15)])
    await first.close()
    charged = result_of(settled)
    assert [payment.total for payment in charged.payments] == [30, 20, 10]
    second = await database.open(clock)
    some, rest, too_much = await second.run_batch(
        [say.refund(charged, 15), say.refund(charged), say.refund(charged, 1)]
    )
    assert (result_of(some).amounts, result_of(some).refunded) == ((15,), (15,))
    assert (result_of(rest).amounts, result_of(rest).refunded) == ((45,), (60,))
    assert reason_of(too_much) is Reason.INVALID_AMOUNT
    assert (await verify(second)).violations == ()
    found = await second.wallet(wallet("a"))
    assert found is not None
    assert [(block.id, block.remaining) for block in found.blocks] == [("blk_g", 30), ("blk_1", 20)]
    assert found.wallet.receivable == 0
    await second.close()


async def test_a_reservation_that_another_store_has_settled_meanwhile_is_committed_late(
    database: Database, clock: Clock, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one store keeps of it holds a block of which nothing is left, so that it is not kept."""
    monkeypatch.setattr(postgres_batch, "CONTENDED_S", 0.0)
    one, other = await database.open(clock), await database.open(clock)
    await one.run_batch([say.grant("a", "1", 100)])
    await one.run_batch([say.reserve("a", "1", 100, mark=Settlement((Charge(100),), usage("1")), ttl_us=SECOND_US)])
    clock.us += SECOND_US
    (lapsed,) = await other.run_batch([say.lapse("1")])
    assert result_of(lapsed).charged == (Charge(100),)
    await one.run_batch([say.grant("a", "2", 50)])
    (late,) = await one.run_batch([say.commit("1", 120)])
    assert (result_of(late).late, result_of(late).charged, result_of(late).balance) == (True, (Charge(120),), 30)
    assert (await verify(one)).violations == ()
    await one.close()
    await other.close()


async def test_an_answer_is_kept_with_a_debit_too(store: Store, say: Say, clock: Clock) -> None:
    (debited,) = await store.run_batch([say.debit("a", "1", 10, key=key("k"), beyond="receivable", response=RESPONSE)])
    assert result_of(debited).balance == -10
    assert await store.response(SCOPE, "chat", "k", now_us=clock.us) == RESPONSE
    assert (await verify(store)).violations == ()


async def test_markup_returns_to_a_pool_whose_returned_credits_are_spent(store: Store, say: Say) -> None:
    for number in range(3):
        await store.run_batch(
            [
                say.grant("pool", f"p{number}", 100),
                say.grant("a", f"a{number}", 100, source_wallet="pool", funding=Funding.DEVELOPER_GRANT),
            ]
        )
        await store.run_batch([say.reserve("a", f"{number}", 100), say.commit(f"{number}", 70, 30)])
        found = await store.wallet(wallet("pool"))
        assert found is not None
        assert [(block.id, block.remaining) for block in found.blocks] == [("blk_returns_paid", 30)]
        (spent,) = await store.run_batch([say.debit("pool", f"pool{number}", 30)])
        assert result_of(spent).balance == 0


async def test_a_repaid_debt_comes_back_to_a_block_that_may_be_used_up(
    database: Database, clock: Clock, say: Say
) -> None:
    first = await database.open(clock)
    debts = [say.debit("a", str(number), 30, beyond="receivable") for number in range(3)]
    one, two, three = map(result_of, await first.run_batch(debts))
    await first.run_batch([say.grant("a", "g", 90, funding=Funding.EXTERNAL), say.refund(one)])
    await first.run_batch([say.debit("a", "spent", 30), say.refund(two), say.debit("a", "again", 30)])
    await first.close()
    second = await database.open(clock)
    (refunded,) = await second.run_batch([say.refund(three)])
    assert result_of(refunded).balance == 30
    found = await second.wallet(wallet("a"))
    assert found is not None
    assert [(block.id, block.granted, block.remaining) for block in found.blocks] == [("blk_returns_unpaid", 90, 30)]
    assert (await verify(second)).violations == ()
    await second.close()


async def test_a_reservation_may_be_made_and_settled_in_one_batch_against_an_old_pool(
    database: Database, clock: Clock, say: Say
) -> None:
    """The pool is found though neither the reservation nor its block is stored when the batch begins."""
    first = await database.open(clock)
    await first.run_batch([say.grant("pool", "p", 100), say.debit("pool", "x", 10)])
    await first.close()
    second = await database.open(clock)
    outcomes = await second.run_batch(
        [
            say.grant("a", "a", 80, source_wallet="pool", funding=Funding.DEVELOPER_GRANT),
            say.reserve("a", "1", 80),
            say.commit("1", 50, 30),
        ]
    )
    assert result_of(outcomes[2]).balance == 0
    assert (await verify(second)).violations == ()
    await second.close()


@pytest.mark.parametrize("in_one_batch", [False, True])
async def test_work_done_without_asking_settles_its_reservation_whoever_was_to_pay_for_it(
    database: Database, clock: Clock, say: Say, in_one_batch: bool
) -> None:
    """The pool behind its payer's blocks is loaded, and the payer's time does not go back."""
    first = await database.open(clock)
    for commands in (
        [say.grant("pool", "p", 1000), say.grant("b", "b", 100)],
        [say.grant("a", "a", 100, source_wallet="pool", funding=Funding.DEVELOPER_GRANT)],
    ):
        clock.us += 10 * SECOND_US
        await first.run_batch(commands)
    reserve = say.reserve("a", "1", 10)
    settlement = Settlement((Charge(5, 5),), usage("1"))
    debit = msgspec.structs.replace(say.debit("b", "1", 10, beyond="receivable"), settlement=settlement)
    if not in_one_batch:
        await first.run_batch([reserve])
    await first.close()
    clock.us -= 5 * SECOND_US
    second = await database.open(clock)
    outcomes = await second.run_batch([reserve, debit] if in_one_batch else [debit])
    assert [payment.wallet for payment in result_of(outcomes[-1]).payments] == [wallet("a")]
    pool = await second.wallet(wallet("pool"))
    assert pool is not None
    assert [(block.id, block.remaining) for block in pool.blocks] == [("blk_p", 900), ("blk_returns_paid", 5)]
    assert (await verify(second)).violations == ()
    await second.close()


async def test_a_grant_needs_both_names_of_its_blocks_though_nothing_is_left_in_them(store: Store, say: Say) -> None:
    await store.run_batch([say.grant("pool", "p", 50), say.grant("pool", "x", 50, funding=Funding.EXTERNAL)])
    await store.run_batch([say.grant("a", "1_2", 10), say.debit("a", "1", 10)])
    for grant in (say.grant("a", "1", 80, source_wallet="pool"), say.grant("a", "1", 80)):
        (outcome,) = await store.run_batch([grant])
        assert reason_of(outcome) is Reason.ALREADY_EXISTS


async def test_time_does_not_go_back_for_a_wallet_and_does_not_jump_for_others(
    store: Store, say: Say, clock: Clock
) -> None:
    clock.us = START_US + 3600 * SECOND_US
    await store.run_batch([say.grant("ahead", "1", 100)])
    clock.us = START_US
    await store.run_batch([say.grant("a", "2", 100), say.reserve("ahead", "1", 10), say.reserve("a", "2", 10)])
    ahead, behind = await store.reservation(reservation("1")), await store.reservation(reservation("2"))
    assert ahead is not None
    assert behind is not None
    assert ahead.created_at_us == START_US + 3600 * SECOND_US
    assert behind.created_at_us == START_US


# Limits that are filled each period.


def daily(amount: int = 100) -> Limit:
    end_us = START_US + 10 * SECOND_US
    periods = (LimitPeriod("today", START_US, end_us), LimitPeriod("tomorrow", end_us, end_us + 10 * SECOND_US))
    return Limit(wallet("day"), amount, periods, (5_000,))


async def test_a_limit_that_is_used_up_stays_so_for_every_process(database: Database, say: Say, clock: Clock) -> None:
    """Its block has nothing left, so a store does not keep it with the wallet: it is looked for by its name."""
    stores = [await database.open(clock), await database.open(clock)]
    limited = {"limits": (daily(),)}
    outcomes = await stores[0].run_batch([say.grant("a", "1", 1_000), say.debit("a", "1", 100, **limited)])
    assert isinstance(outcomes[1], Applied)
    for number, store in enumerate([*stores, *stores], start=2):
        (refused,) = await store.run_batch([say.debit("a", str(number), 1, **limited)])
        assert reason_of(refused) is Reason.LIMIT_REACHED
        assert isinstance(refused, Rejected)
        assert refused.limit == wallet("day")
    block = await stores[1].block(wallet("day"), "today")
    assert block is not None
    assert (block.granted, block.consumed, block.live, block.funding) == (100, 100, False, Funding.LIMIT)
    assert await stores[1].block(wallet("day"), "tomorrow") is None
    assert await stores[1].block(wallet("nobody"), "today") is None
    clock.us = START_US + 10 * SECOND_US
    (again,) = await stores[1].run_batch([say.debit("a", "9", 60, **limited)])
    assert isinstance(again, Applied)
    (more,) = await stores[0].run_batch([say.debit("a", "10", 60, **limited)])
    assert reason_of(more) is Reason.LIMIT_REACHED
    assert (await verify(stores[0])).violations == ()
    for store in stores:
        await store.close()


async def test_what_is_named_is_found_even_when_nothing_is_left_in_it(database: Database, say: Say) -> None:
    """A used-up period is not opened again by an extension, nor a used-up block by a purchase."""
    limit = Limit(wallet("day"), 30, (LimitPeriod("today", START_US, START_US + 10 * SECOND_US),))
    first = await database.open(Clock())
    await first.run_batch(
        [say.grant("a", "1", 100), say.grant("b", "1", 10), say.reserve("a", "1", 1, limits=(limit,))]
    )
    await first.run_batch(
        [say.debit("a", "2", 29, limits=(limit,)), say.commit("1", 1, final=False), say.debit("b", "3", 10)]
    )
    await first.close()
    second = await database.open(Clock())
    extended, bought = await second.run_batch(
        [say.extend("1", 1, minimum=1, limits=(limit,)), say.purchase("b", "1", 0, 5)]
    )
    assert reason_of(extended) is Reason.LIMIT_REACHED
    assert reason_of(bought) is Reason.ALREADY_EXISTS
    assert (await verify(second)).violations == ()
    await second.close()


async def test_two_processes_open_one_period(database: Database, say: Say, clock: Clock) -> None:
    """Both think that they are the first. Together they use no more than there is."""
    stores = [await database.open(clock), await database.open(clock)]
    await stores[0].run_batch([say.grant("a", "1", 1_000), say.grant("b", "2", 1_000)])
    commands = [[say.debit(payer, f"{payer}{number}", 30, limits=(daily(),))] for number in range(4) for payer in "ab"]
    outcomes = await asyncio.gather(*(stores[number % 2].run_batch(each) for number, each in enumerate(commands)))
    assert sum(isinstance(outcome, Applied) for (outcome,) in outcomes) == 3
    block = await stores[0].block(wallet("day"), "today")
    assert block is not None
    assert (block.granted, block.consumed) == (100, 90)
    assert (await verify(stores[1])).violations == ()
    for store in stores:
        await store.close()


async def test_an_amount_is_changed_for_every_process(database: Database, say: Say, clock: Clock) -> None:
    stores = [await database.open(clock), await database.open(clock)]
    await stores[0].run_batch([say.grant("a", "1", 1_000), say.debit("a", "1", 90, limits=(daily(),))])
    await stores[1].run_batch([say.limit(daily(150))])
    (fits,) = await stores[0].run_batch([say.debit("a", "2", 50, limits=(daily(),))])
    assert isinstance(fits, Applied)
    await stores[1].run_batch([say.limit(daily(10))])
    (refused,) = await stores[0].run_batch([say.debit("a", "3", 1, limits=(daily(),))])
    assert reason_of(refused) is Reason.LIMIT_REACHED
    assert (await verify(stores[0])).violations == ()
    for store in stores:
        await store.close()


# Reads.


async def test_due_reservations_and_wallets_are_found(store: Store, say: Say, clock: Clock) -> None:
    await store.run_batch(
        [
            say.grant("a", "1", 100, expires_at_us=START_US + 50),
            say.grant("b", "2", 100),
            say.grant("c", "3", 100, expires_at_us=START_US + 50),
            say.reserve("a", "late", 10, ttl_us=40),
            say.reserve("b", "later", 10, ttl_us=60),
            say.reserve("c", "all", 100, ttl_us=1000),
        ]
    )
    assert await store.due_reservations(START_US + 39, limit=10) == []
    assert await store.due_reservations(START_US + 60, limit=10) == [reservation("late"), reservation("later")]
    assert await store.due_reservations(START_US + 60, limit=1) == [reservation("late")]
    assert await store.due_wallets(START_US + 49, limit=10) == []
    assert await store.due_wallets(START_US + 50, limit=10) == [wallet("a")], "c's block is all held"
    clock.us = START_US + 60
    await store.run_batch([say.lapse("late"), say.expire("a")])
    assert await store.due_reservations(START_US + 60, limit=10) == [reservation("later")]
    assert await store.due_wallets(START_US + 60, limit=10) == []


async def test_the_latest_plan_is_found_when_nothing_is_left_of_it(store: Store, say: Say, clock: Clock) -> None:
    assert await store.latest_plan(wallet("a")) is None
    await store.run_batch([say.grant("a", "1", 100), say.grant("b", "1", 100), say.purchase("b", "9", 1, 1)])
    assert await store.latest_plan(wallet("a")) is None
    await store.run_batch([say.purchase("a", "3", 10, 20, duration_us=5), say.purchase("a", "2", 10, 10)])
    await store.run_batch([say.grant("a", "4", 100), say.debit("a", "1", 30)])
    latest = await store.latest_plan(wallet("a"))
    assert latest is not None
    assert (latest.id, latest.remaining) == ("blk_2", 0)
    assert await store.latest_plan(WalletRef("ten_a", "test", "customer:a")) is None


async def test_a_purchase_is_one_entry_of_the_journal(store: Store, say: Say, clock: Clock) -> None:
    await store.run_batch([say.grant("a", "1", 100)])
    bought, again, other = await store.run_batch(
        [
            say.purchase("a", "2", 60, 90, key=key("k1", operation="pack.buy")),
            say.purchase("a", "3", 60, 90, key=key("k1", operation="pack.buy")),
            say.purchase("a", "4", 60, 90),
        ]
    )
    assert result_of(bought) == result_of(again)
    assert reason_of(other) is Reason.INSUFFICIENT_CREDITS
    assert (result_of(bought).balance_after, result_of(bought).at_us) == (130, START_US)
    found = await store.wallet(wallet("a"))
    assert found is not None
    assert [(block.id, block.remaining) for block in found.blocks] == [("blk_1", 40), ("blk_2", 60), ("blk_2_2", 30)]


async def test_the_statement_lists_a_wallets_transfers_newest_first(store: Store, say: Say) -> None:
    await store.run_batch([say.grant("a", "1", 100), say.grant("b", "2", 100)])
    await store.run_batch([say.reserve("a", "1", 60), say.commit("1", 40, 5)])
    lines = await store.transactions(wallet("a"), before=None, limit=10)
    assert [(line.amount, line.counterparty, line.kind, line.block) for line in lines] == [
        (-5, "tenant_margin", "commit", "blk_1"),
        (-40, "revenue", "commit", "blk_1"),
        (100, "clearing", "grant", "blk_1"),
    ]
    older = await store.transactions(wallet("a"), before=Position(lines[0].seq, lines[0].position), limit=1)
    assert older == lines[1:2]
    assert await store.transactions(wallet("nobody"), before=None, limit=10) == []


async def test_a_line_of_the_statement_tells_what_it_was_for(store: Store, say: Say) -> None:
    record = usage("1", model="gpt-4o", metric="chat_message", action="chat.reply")
    await store.run_batch([say.grant("a", "1", 100), say.reserve("a", "1", 60)])
    parts = [say.commit("1", 5, usage=record, final=False), say.commit("1", 10, usage=record)]
    settled = [applied.result for applied in await store.run_batch(parts) if isinstance(applied, Applied)]
    assert isinstance(settled[1], Settled)
    await store.run_batch([say.refund(settled[1], 4)])
    lines = await store.transactions(wallet("a"), before=None, limit=10)
    assert [(line.kind, line.amount) for line in lines] == [
        ("refund", 4),
        ("commit", -10),
        ("commit", -5),
        ("grant", 100),
    ]
    told = ("req_1", "chat_message", "chat.reply", "gpt-4o")
    assert [(line.request_id, line.metric, line.action, line.model) for line in lines[:3]] == [told] * 3
    assert (lines[3].request_id, lines[3].metric) == (None, None)


async def test_a_cap_finds_the_blocks_that_it_takes_from(store: Store, say: Say) -> None:
    await store.run_batch([say.grant("a", "1", 100, source="monthly"), say.grant("a", "2", 50, source="other")])
    await store.run_batch([say.reserve("a", "1", 30)])
    await store.run_batch([say.grant("a", "3", 80, source="monthly", accumulation_cap=120)])
    found = await store.wallet(wallet("a"))
    assert found is not None
    assert [(block.remaining, block.reserved) for block in found.blocks] == [(40, 30), (50, 0), (80, 0)]


async def test_all_of_a_block_is_revoked_though_nothing_is_left_in_it(store: Store, say: Say) -> None:
    await store.run_batch([say.grant("a", "1", 100)])
    await store.run_batch([say.debit("a", "1", 100)])
    (revoked,) = await store.run_batch([say.revoke("a", "1", None, clawback=True)])
    assert isinstance(revoked, Applied)
    assert revoked.result == Revoked(amount=0, receivable=100, balance=-100, owed=100)


async def test_a_request_is_found_with_its_usage(store: Store, say: Say) -> None:
    record = usage(
        "1",
        model="gpt-4o",
        metadata={"k": "v"},
        customer_id="cus_1",
        app_id="app_1",
        ending="finished",
        started_at_us=5,
    )
    await store.run_batch([say.grant("a", "1", 100), say.reserve("a", "1", 60)])
    await store.run_batch([say.commit("1", 10, usage=record, final=False), say.commit("1", 20, 3, usage=record)])
    found = await store.reservation_of_request(SCOPE, "req_1")
    parts = await store.usage_of_request(SCOPE, "req_1")
    assert found == await store.reservation(reservation("1"))
    assert [(part.part, part.charges[0].base, part.charges[0].markup) for part in parts] == [(1, 10, 0), (2, 20, 3)]
    assert parts[0].record == record
    assert await store.reservation_of_request(SCOPE, "req_2") is None


async def test_nothing_of_another_scope_is_found(store: Store, say: Say) -> None:
    await store.run_batch([say.grant("a", "1", 100), say.reserve("a", "1", 60)])
    assert await store.wallet(WalletRef("ten_a", "test", "customer:a")) is None
    assert await store.reservation(reservation("1")._replace(tenant="ten_b")) is None
    (refused,) = await store.run_batch([Say(scope=SCOPE._replace(mode="test")).release("1", id="cmd_x")])
    assert reason_of(refused) is Reason.NOT_FOUND


async def test_a_wallets_events_are_numbered_without_gaps(database: Database, store: Store, say: Say) -> None:
    await store.run_batch([say.grant("a", "1", 100), say.grant("b", "2", 100)])
    await store.run_batch([say.debit("a", "1", 1), say.debit("b", "2", 1), say.debit("a", "3", 1)])
    numbers: dict[str, list[int]] = {}
    for row in database.dump()["ledger_event"]:
        numbers.setdefault(row[2], []).append(row[3])
    assert {name: sorted(found) for name, found in numbers.items()} == {"customer:a": [1, 2, 3], "customer:b": [1, 2]}


async def test_reads_run_beside_each_other_and_a_batch(store: Store, say: Say) -> None:
    await store.run_batch([say.grant("a", "1", 100)])
    reads: list[Awaitable[object]] = [store.wallet(wallet("a")) for _ in range(20)]
    found = await asyncio.gather(store.run_batch([say.reserve("a", "1", 10)]), *reads)
    assert all(each is not None for each in found)


# Rows.


def test_every_field_of_a_wallet_and_a_block_goes_through_its_row() -> None:
    """A new field that no column carries fails here."""
    known = Wallet(
        ref=wallet("a"),
        asset="CREDIT",
        overdraft_limit=1,
        receivable=2,
        overdraft_reserved=3,
        frozen=True,
        version=4,
        last_fact_us=5,
        blocks_opened=6,
        events_raised=7,
        debts=Debts(reversed=1, repaid_paid=2, repaid_due=3),
        alerts=(Alert("low", 50), Alert("exhausted", 1)),
        rung=(Alert("low", 50),),
    )
    amounts = {name: 2 for name in Block.__struct_fields__ if name in {"consumed", "expired", "revoked", "clawed"}}
    block = Block(
        wallet=wallet("a"),
        id="blk_1",
        sequence=1,
        granted=100,
        created_at_us=2,
        effective_at_us=3,
        expires_at_us=4,
        priority=-5,
        reserved=9,
        source="checkout",
        funding=Funding.DEVELOPER_GRANT,
        operator_paid=False,
        frozen=True,
        restriction=Restriction(apps=("app_1",), models=("gpt-4o",)),
        pool=wallet("pool"),
        payment_reference="pi_1",
        metadata={"k": [1, {"deep": None}]},
        reversal=Reversal(free=1, owed=1, lapsed=1, spread=9, spread_taken=3, revision=4, frozen=True),
        **amounts,
    )
    for value in (known, block):
        plain = type(value)(**{name: getattr(value, name) for name in type(value).__struct_fields__[:6]})
        differing = {name for name in value.__struct_fields__[6:] if getattr(value, name) != getattr(plain, name, None)}
        assert differing == set(value.__struct_fields__[6:]), "each field has a value of its own in this test"
    assert wallet_from(wallet_row(known)) == known
    assert block_from(block_row(block)) == block
    bare = msgspec.structs.replace(block, restriction=UNRESTRICTED, pool=None, metadata={}, expires_at_us=None)
    assert block_from(block_row(bare)) == bare
