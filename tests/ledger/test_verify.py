"""``farebox verify`` finds what is wrong: one test for each damage, done behind the ledger's back."""

import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ledger.commands import Watch
from ledger.erasable import bare
from ledger.invariants import Audit, violations
from ledger.ledger import Ledger
from ledger.model import Alert, Charge, Funding, Scope, Settlement
from ledger.outcomes import Settled, Transfer
from ledger.state import State, evolve
from ledger.store.protocol import JournalEntry, Store
from ledger.store.statements import columns
from ledger.verify import Verified, verify
from tests.ledger.rig import SECOND_US, Clock, Database, RandomCommands, Say, key, partition, usage, wallet

Damage = Callable[[str], Awaitable[Verified]]


@pytest.fixture
async def damage(ledger: Ledger, store: Store, database: Database, say: Say) -> Damage:
    """A ledger with something of everything in it; calling it does SQL to it and verifies."""
    await ledger.execute(say.grant("a", "1", 100, metadata={"note": "x"}))
    await ledger.execute(say.grant("pool", "p", 100))
    await ledger.execute(say.grant("a", "g", 30, source_wallet="pool", funding=Funding.DEVELOPER_GRANT))
    await ledger.execute(say.overdraft("b", 40))
    await ledger.execute(say.reserve("a", "open", 25, mark=Settlement((Charge(3),), usage("open"))))
    await ledger.execute(say.reserve("b", "below", 20))
    await ledger.execute(say.reserve("a", "done", 20, key=key("k")))
    await ledger.execute(say.commit("done", 10, 5))
    await ledger.execute(say.debit("b", "over", 15))
    await ledger.execute(say.grant("c", "c", 10))
    await ledger.execute(say.reserve("c", "short", 10))
    await ledger.execute(say.commit("short", 12))
    await ledger.execute(say.revoke("c", "c", 5, clawback=True))
    await ledger.execute(say.debit("c", "away", 9, beyond="receivable"))
    await ledger.execute(say.grant("d", "d", 40))
    back = (await ledger.execute(say.debit("d", "back", 40))).result
    assert isinstance(back, Settled)
    await ledger.execute(say.refund(back, 12))
    await ledger.execute(say.refund(back, 7))
    await ledger.execute(say.top_up("h", "t", 100, spread=20))
    await ledger.execute(say.debit("h", "bought", 100))
    await ledger.execute(say.reverse("h", "t", 5, 10, revision=1))
    await ledger.execute(say.grant("h", "gift", 30, funding=Funding.EXTERNAL))
    await ledger.execute(say.grant("line", "line", 50, funding=Funding.PROMOTIONAL))
    await ledger.execute(say.top_up("f", "given", 100))
    given = (await ledger.execute(say.debit("f", "given", 40))).result
    assert isinstance(given, Settled)
    await ledger.execute(say.refund(given, 15, unfunded=wallet("line")))
    await ledger.execute(say.grant("e", "e", 40))
    watched = Watch(wallet("e"), (Alert("low", 30), Alert("exhausted", 1)))
    await ledger.execute(say.debit("e", "low", 20, watches=(watched,)))
    assert (await verify(store)).violations == ()

    async def do(sql: str) -> Verified:
        before = database.dump()
        database.damage(sql)
        assert database.dump() != before, "the damage was done"
        return await verify(store)

    return do


def in_facts(kind: str, before: str, after: str) -> str:
    """Forge what the journal says."""
    return f"UPDATE ledger_command SET facts = replace(facts, '{before}', '{after}') WHERE kind = '{kind}'"


def in_reservation(name: str, before: str, after: str) -> str:
    return f"UPDATE ledger_reservation SET body = replace(body, '{before}', '{after}') WHERE reservation = '{name}'"


LAST = "(SELECT max(seq) FROM ledger_command)"


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        # Stored balances.
        (
            "UPDATE ledger_block SET granted = granted + 1000, remaining = remaining + 1000 WHERE id = 'blk_1'",
            "a block is stored otherwise",
        ),
        ("UPDATE ledger_block SET reserved = 0 WHERE id = 'blk_1'", "a block is stored otherwise"),
        (
            f"INSERT INTO ledger_block SELECT tenant, mode, 'customer:b', {', '.join(columns('ledger_block')[3:])}"
            " FROM ledger_block WHERE id = 'blk_1'",
            "a block is stored that the journal does not have",
        ),
        ("UPDATE ledger_block SET source = 'other' WHERE id = 'blk_1'", "a block is stored otherwise"),
        ("UPDATE ledger_block SET metadata = '{' WHERE id = 'blk_1'", "a row is damaged"),
        ("UPDATE ledger_wallet SET receivable = 0 WHERE wallet = 'customer:b'", "a wallet is stored otherwise"),
        ("UPDATE ledger_wallet SET version = version + 1 WHERE wallet = 'customer:b'", "a wallet is stored otherwise"),
        ("UPDATE ledger_wallet SET rung = NULL WHERE wallet = 'customer:e'", "a wallet is stored otherwise"),
        ("UPDATE ledger_wallet SET alerts = '{' WHERE wallet = 'customer:e'", "a row is damaged"),
        ("DELETE FROM ledger_wallet WHERE wallet = 'customer:b'", "the journal has a wallet that is not stored"),
        ("DELETE FROM ledger_block WHERE id = 'blk_1'", "the journal has a block that is not stored"),
        (
            "UPDATE ledger_block SET id = 'blk_other' WHERE id = 'blk_1'",
            "a block is stored that the journal does not have",
        ),
        # Stored reservations, keys and usage.
        (in_reservation("rsv_open", '"amount":25', '"amount":1'), "a reservation is stored otherwise"),
        (in_reservation("rsv_done", '"base":10', '"base":11'), "a reservation is stored otherwise"),
        (
            "DELETE FROM ledger_reservation WHERE reservation = 'rsv_open'",
            "the journal has a reservation that is not stored",
        ),
        ("UPDATE ledger_key SET digest = 'other'", "a key is stored otherwise"),
        ("DELETE FROM ledger_key", "the journal has a key that is not stored"),
        (
            "UPDATE ledger_usage SET provider_cost_nanos = 12 WHERE reservation = 'rsv_done'",
            "the stored usage is not the journal's",
        ),
        ("UPDATE ledger_usage SET charged = charged + 1 WHERE reservation = 'rsv_done'", "a row is damaged"),
        ("UPDATE ledger_reservation SET state = 'committed' WHERE reservation = 'rsv_open'", "a row is damaged"),
        ("UPDATE ledger_block SET live = FALSE WHERE id = 'blk_1'", "a row is damaged"),
        ("DELETE FROM ledger_usage WHERE reservation = 'rsv_done'", "the stored usage is not the journal's"),
        # The journal.
        ("DELETE FROM ledger_transfer WHERE credit = 'wallet:customer:a'", "an entry's transfers must all be there"),
        (
            "DELETE FROM ledger_transfer WHERE debit = 'provider_cost'",
            "the provider's cost is booked as the usage tells it",
        ),
        (
            "UPDATE ledger_transfer SET amount = amount + 1 WHERE credit = 'revenue'",
            "a wallet's account is what its blocks have left",
        ),
        ("UPDATE ledger_transfer SET amount = -amount WHERE credit = 'revenue'", "an entry must move something"),
        (
            "UPDATE ledger_transfer SET credit = 'tenant_margin' WHERE credit = 'revenue'",
            "a charge is booked as its reservation tells it",
        ),
        (
            "UPDATE ledger_transfer SET block = 'blk_other' WHERE credit = 'revenue'",
            "a charge is booked as its reservation tells it",
        ),
        (
            "UPDATE ledger_transfer SET amount = amount + 1 WHERE debit = 'meter_shortfall'",
            "a charge is booked as its reservation tells it",
        ),
        (
            "UPDATE ledger_transfer SET amount = amount + 1 WHERE credit = 'package_spread'",
            "clearing has of a payment what was not taken back of it",
        ),
        (
            "UPDATE ledger_transfer SET amount = amount - 1 WHERE debit = 'package_spread'",
            "clearing has of a payment what was not taken back of it",
        ),
        (
            in_facts("reverse", '"spread":20', '"spread":5'),
            "what a reversal has taken of a block was there to be taken",
        ),
        (in_facts("reverse", '"reversed":50', '"reversed":51'), "what is owed of reversed payments is a part of"),
        (in_facts("reverse", '"reversed":50', '"reversed":49'), "what reversals have left owed is owed still, or was"),
        (
            "UPDATE ledger_transfer SET amount = amount + 1 WHERE debit = 'revenue' AND credit = 'tenant_due'",
            "what free credits repaid of reversed payments is due from the tenant",
        ),
        (
            "UPDATE ledger_transfer SET amount = amount + 1 WHERE debit = 'external' AND credit = 'tenant_due'",
            "a tenant owes the revenue that it gives back",
        ),
        ("UPDATE ledger_block SET reversal = NULL WHERE id = 'blk_t'", "a block is stored otherwise"),
        ("UPDATE ledger_wallet SET debts = NULL WHERE wallet = 'customer:h'", "a wallet is stored otherwise"),
        ("UPDATE ledger_block SET clawed = -1 WHERE id = 'blk_1'", "a block is stored otherwise"),
        (in_facts("revoke", '"clawed":5', '"clawed":-5'), "a block's amounts are not negative"),
        (
            "UPDATE ledger_transfer SET asset = 'EUR' WHERE credit = 'wallet:customer:a'",
            "an entry is in another asset than its wallet",
        ),
        (
            "UPDATE ledger_transfer SET debit = 'wallet:customer:nobody' WHERE debit = 'clearing'",
            "an entry names a wallet that does not exist",
        ),
        ("UPDATE ledger_transfer SET mode = 'test' WHERE credit = 'revenue'", "a fact crosses scopes"),
        (
            "UPDATE ledger_transfer SET seq = seq + 1000 WHERE credit = 'revenue'",
            "an entry's transfers must all be there",
        ),
        ("DELETE FROM ledger_command WHERE seq = 1", "a block changes after it was opened"),
        (f"DELETE FROM ledger_command WHERE seq = {LAST}", "an entry's transfers must all be there"),
        ("UPDATE ledger_command SET facts = '[' WHERE seq = 1", "a row is damaged"),
        (
            "INSERT INTO ledger_command SELECT tenant, mode, 'cmd_again', 1000, kind, at_us, transfers, facts, result"
            " FROM ledger_command WHERE seq = 1",
            "a block is opened once",
        ),
        (
            "INSERT INTO ledger_command SELECT tenant, mode, 'cmd_again', 1000, kind, at_us, 0, facts, result"
            " FROM ledger_command WHERE kind = 'commit' LIMIT 1",
            "a settled reservation stays settled",
        ),
        (
            "INSERT INTO ledger_command SELECT tenant, mode, 'cmd_again', 1000, kind, at_us, 0, facts, result"
            " FROM ledger_command WHERE facts LIKE '%key_taken%'",
            "a key has one effect",
        ),
        (in_facts("commit", '"at_us":17', '"at_us":16'), "a wallet's facts are in the order of time"),
        (in_facts("debit", '"receivable":15', '"receivable":115'), "a wallet goes below zero only as far as agreed"),
        (
            in_facts("debit", '"rung":[{"kind":"low","below":30}]', '"rung":[]'),
            "what has rung is what the balance is below",
        ),
        (in_facts("debit", '"below":30}]', '"below":29}]'), "a wallet rings only what it is watched for"),
        (in_facts("debit", '"owed":[9]', '"owed":[8]'), "a wallet goes below zero only as far as agreed"),
        (in_facts("refund", '"base":19', '"base":41'), "no more is given back than was paid"),
        (in_facts("refund", '"base":19', '"base":18'), "a charge is booked as its reservation tells it"),
        (in_facts("refund", '"charged":[{"base":40', '"charged":[{"base":39'), "a settled reservation stays settled"),
        (
            "UPDATE ledger_transfer SET amount = amount + 1 WHERE debit = 'revenue'",
            "a charge is booked as its reservation tells it",
        ),
        (in_facts("commit", '"consumed":15', '"consumed":999'), "a block's amounts are not negative"),
        (in_facts("reserve", '"reserved":25', '"reserved":24'), "what open reservations hold is what is reserved"),
        (
            in_facts("reserve", '"overdraft_reserved":20', '"overdraft_reserved":19'),
            "what open reservations hold is what is reserved",
        ),
        (in_facts("commit", '"charged":[{"base":10', '"charged":[{"base":9'), "what was charged is what was paid"),
        ("UPDATE ledger_command SET seq = 0 WHERE seq = 1", "an entry's transfers must all be there"),
        ("UPDATE ledger_command SET kind = 'revoke' WHERE seq = 1", "a command answers with what its kind does"),
        (
            "UPDATE ledger_command SET at_us = at_us + 1 WHERE kind = 'set_overdraft'",
            "an entry's facts are of its time",
        ),
        (
            "UPDATE ledger_command SET result = replace(result, '20', '19') WHERE facts LIKE '%key_taken%'",
            "a key answers with its command's result",
        ),
        ("UPDATE ledger_command SET id = 'x' || id WHERE kind = 'commit'", "a reservation tells what settled it"),
        (
            "UPDATE ledger_transfer SET reference = NULL WHERE credit = 'revenue'",
            "a transfer refers to its reservation",
        ),
        ("UPDATE ledger_transfer SET at_us = at_us + 1 WHERE seq = 1", "its place or its time is not its command's"),
        ("UPDATE ledger_transfer SET position = 9 WHERE seq = 1", "its place or its time is not its command's"),
    ],
)
async def test_damage_is_found(damage: Damage, sql: str, message: str) -> None:
    verified = await damage(sql)
    found = [f"{violation.message}: {violation.facts.get('row')}" for violation in verified.violations]
    assert any(message in each for each in found), found


async def test_a_ledger_with_a_long_past_is_found_whole(store: Store, clock: Clock, campaign: Any) -> None:
    seed = random.Random(campaign.seed)
    source = RandomCommands(seed)
    for _ in range(10):
        clock.us += 15 * SECOND_US
        for batch in partition(source.take(100, clock.us), seed, 64):
            await store.run_batch(batch)
    verified = await verify(store)
    assert verified.violations == ()
    assert verified.entries > 300


async def test_replay_is_identity(store: Store, clock: Clock, campaign: Any) -> None:
    """Folding the journal's facts gives the very values that are stored, but for metadata; and the invariants hold."""
    seed = random.Random(campaign.seed + 1)
    source = RandomCommands(seed)
    for _ in range(5):
        clock.us += 15 * SECOND_US
        for batch in partition(source.take(60, clock.us), seed, 32):
            await store.run_batch(batch)
    state = State()
    transfers: list[Transfer] = []
    async with store.snapshot() as snapshot:
        async for entry in snapshot.journal():
            for fact in entry.facts:
                evolve(state, fact)
            transfers += entry.transfers
        assert {wallet.ref: wallet async for wallet in snapshot.wallets()} == state.wallets
        stored = {(block.wallet, block.id): bare(block) async for block in snapshot.blocks()}
        assert stored == {(ref, block.id): block for ref, all_of in state.blocks.items() for block in all_of.values()}
        reservations = {reservation.ref: bare(reservation) async for reservation in snapshot.reservations()}
        assert reservations == state.reservations
        keys = [taken async for taken in snapshot.keys()]  # noqa: SIM118  (not a mapping)
        assert {(taken.scope, taken.operation, taken.key): taken for taken in keys} == state.keys
    assert violations(state, transfers) == []
    assert violations(state, transfers[1:]) != []


async def test_verify_sees_one_moment_of_a_ledger_in_use(store: Store, say: Say) -> None:
    await store.run_batch([say.grant("a", "1", 100)])
    async with store.snapshot() as snapshot:
        await store.run_batch([say.grant("a", "2", 100)])
        assert [block.id async for block in snapshot.blocks()] == ["blk_1"]
        assert [entry.kind async for entry in snapshot.journal()] == ["grant"]


def test_the_audit_lets_the_operators_wallets_pay_for_others() -> None:
    entry = JournalEntry(
        seq=1,
        scope=Scope("ten_a", "live"),
        id="cmd_1",
        kind="commit",
        at_us=1,
        facts=(),
        transfers=(Transfer(scope=Scope("ten_op", "live"), debit="x", credit="y", amount=1, asset="CREDIT"),),
        transfers_written=1,
        result=None,
    )
    strict, lenient = Audit(), Audit(operator="ten_op")
    strict.observe(entry)
    lenient.observe(entry)
    assert [violation.message for violation in strict.found] == ["a fact crosses scopes"]
    assert lenient.found == []
