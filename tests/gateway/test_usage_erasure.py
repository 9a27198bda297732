"""What is erased of a customer's usage: their metadata, in the rows and in the sums, and nothing else."""

from dataclasses import replace

import pytest
from sqlalchemy import text

from gateway.billing.rollups import Rollups
from gateway.billing.usage_erasure import erase_metadata
from gateway.billing.usage_queries import UsageQueries
from gateway.database import Database, of
from tests.conftest import Campaign
from tests.gateway.usage_events import (
    SCOPE,
    answered,
    commit,
    everything,
    plain,
    random_charge,
    random_question,
    recount,
)


@pytest.mark.campaign
async def test_after_an_erasure_every_answer_is_a_recount_without_it(database: Database, campaign: Campaign):
    chance = campaign.random()
    charges = [random_charge(chance, number) for number in range(120)]
    await commit(database, *charges)
    rollups = Rollups(database, page_rows=25)
    for _ in range(3):
        await rollups.fold()
    noted = sum(bool(charge.metadata) for charge in charges if charge.customer == "cus_b")
    assert await erase_metadata(database, SCOPE, "cus_b", page_rows=4) == noted > 8
    charges = [replace(charge, metadata={}) if charge.customer == "cus_b" else charge for charge in charges]
    for _ in range(2):
        for _ in range(25):
            question = random_question(chance, charges)
            assert await answered(UsageQueries(database), question) == recount(charges, question), question
        while await rollups.fold():
            pass
    assert await erase_metadata(database, SCOPE, "cus_b") == 0


async def test_a_value_that_nobody_else_has_is_nowhere_any_more(database: Database):
    shared, own = {"plan": "free"}, {"plan": "free", "name": "Alice Liddell"}
    await commit(database, plain(1, customer="cus_a", metadata=own), plain(2, customer="cus_b", metadata=shared))
    await Rollups(database).fold()
    await commit(database, plain(3, customer="cus_a", metadata=own))
    assert await erase_metadata(database, SCOPE, "cus_a") == 2
    await Rollups(database).fold()
    async with database.read(of(*SCOPE)) as connection:
        for table in ("usage_by_metadata", "ledger_usage"):
            rows = (await connection.execute(text(f"SELECT * FROM {table}"))).all()
            assert "Liddell" not in str(rows)
            assert "free" in str(rows)
    (row,) = await answered(UsageQueries(database), everything(groups=("metadata.plan",)))
    assert row[0] == ("free",)
    assert row[1][0] == 1
    (row,) = await answered(UsageQueries(database), everything())
    assert row[1][0] == 3, "the charges are still there"
