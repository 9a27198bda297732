"""`farebox stripe reconcile` and `farebox accounting export`, as who keeps the books runs them."""

import asyncio
import csv
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gateway.cli import cli
from gateway.clock import now_us, time_text
from gateway.installation import Books, opened
from gateway.settings import load
from ledger.commands import Grant
from ledger.model import Funding, Scope, WalletRef
from tests.servers.stripe import FakeStripe

AGO_S = 86_400


class Keeper:
    """Runs commands on an installation in a folder, with a Stripe to ask."""

    def __init__(self, folder: Path, stripe: FakeStripe) -> None:
        self.stripe = stripe
        self.set_up = {
            "FAREBOX_DATABASE_URL": f"sqlite:///{folder / 'farebox.db'}",
            "FAREBOX_JOURNAL_DIR": str(folder / "journal"),
        }
        self.stripe_settings = {
            "FAREBOX_STRIPE_SECRET_KEY": stripe.secret_key,
            "FAREBOX_STRIPE_WEBHOOK_SECRET": stripe.webhook_secret,
            "FAREBOX_STRIPE_API_BASE": stripe.url,
        }
        self.tenant = json.loads(self.run("init", "--json", code=0).stdout)["tenant_id"]

    def run(self, *arguments: str, code: int) -> Result:
        result = CliRunner().invoke(cli, arguments, env={**self.set_up, **self.stripe_settings})
        assert result.exit_code == code, (result.output, result.exception)
        return result

    def grant_as_paid(self) -> None:
        """Credits that say they were paid for, of a payment that there is not."""

        async def work() -> None:
            async with opened(load(None)) as books:
                await _grant(books, self.tenant)

        with pytest.MonkeyPatch.context() as environment:
            for name, value in self.set_up.items():
                environment.setenv(name, value)
            asyncio.run(work())


async def _grant(books: Books, tenant: str) -> None:
    await books.ledger.execute(
        Grant(
            id="cmd_planted",
            scope=Scope(tenant, "live"),
            wallet=WalletRef(tenant, "live", "customer:cus_planted"),
            asset="credit",
            block_id="blk_planted",
            amount=5_000_000_000,
            funding=Funding.PAID,
            operator_paid=True,
            payment_reference="ord_planted",
        )
    )


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with FakeStripe() as stripe:
        yield Keeper(tmp_path, stripe)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def pay(stripe: FakeStripe, metadata: dict[str, str]) -> str:
    made: str = stripe.create_payment({"amount": "500", "currency": "usd", "metadata": metadata})["id"]
    stripe.charge_off_session(made, "pm_card_visa")
    return made


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_books_that_agree_end_with_0(keeper: Keeper) -> None:
    assert "everything agrees" in keeper.run("stripe", "reconcile", code=0).stdout
    (said,) = lines(keeper.run("stripe", "reconcile", "--json", code=0))
    assert (said["ok"], said["payments"], said["differences"]) == (True, 0, 0)


def test_books_that_differ_end_with_1_and_a_line_for_each_difference(keeper: Keeper) -> None:
    keeper.grant_as_paid()
    keeper.stripe.now_s = lambda: now_us() // 1_000_000 - AGO_S
    payment = pay(keeper.stripe, {"farebox_order": "ord_gone", "farebox_tenant": keeper.tenant, "farebox_mode": "live"})
    pay(keeper.stripe, {})
    unknown, doubled, said = lines(keeper.run("stripe", "reconcile", "--json", "--repair", code=1))
    assert (unknown["kind"], unknown["order"], unknown["found_minor"]) == ("unknown_payment", "ord_gone", 500)
    assert (doubled["kind"], doubled["order"], doubled["found"]) == ("doubled_credit", "ord_planted", 5_000_000_000)
    assert (doubled["mended"], unknown["payment_intent"]) == (False, payment)
    assert said | {"since": "", "until": ""} == {
        "ok": False,
        "since": "",
        "until": "",
        "movements": 2,
        "payments": 2,
        "entries": 1,
        "others": 1,
        "in_flight": 0,
        "mended": 0,
        "differences": 2,
    }
    printed = keeper.run("stripe", "reconcile", code=1).stdout
    assert payment in printed
    assert "2 differ." in printed


def test_a_time_that_is_none_is_refused(keeper: Keeper) -> None:
    assert "--since" in keeper.run("stripe", "reconcile", "--since", "yesterday", code=2).output
    backwards = ("--since", "2026-02-01T00:00:00Z", "--until", "2026-01-01T00:00:00Z")
    assert "comes before" in keeper.run("stripe", "reconcile", *backwards, code=2).output


# When nothing can be compared, the exit code is not that of books that differ, and a sentence says what to do.


def nothing_compared(keeper: Keeper) -> str:
    result = keeper.run("stripe", "reconcile", "--json", code=2)
    assert result.stdout == "", "what reads the answer finds none"
    assert result.stderr.startswith("Nothing was compared. ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_without_stripe_there_is_nothing_to_compare(keeper: Keeper) -> None:
    keeper.stripe_settings.clear()
    assert "set stripe_secret_key and stripe_webhook_secret" in nothing_compared(keeper)


@pytest.mark.parametrize(("fault", "advice"), [(401, "stripe_secret_key"), (403, "stripe_secret_key"), (500, "later")])
def test_who_cannot_ask_stripe_does_not_know(keeper: Keeper, fault: Any, advice: str) -> None:
    keeper.stripe.fail_next("/v1/balance_transactions", fault, 9)
    assert advice in nothing_compared(keeper)


def test_a_stripe_that_cannot_be_reached_is_no_difference(keeper: Keeper, unused_port: int) -> None:
    keeper.stripe_settings["FAREBOX_STRIPE_API_BASE"] = f"http://127.0.0.1:{unused_port}"
    assert "later" in nothing_compared(keeper)


def test_before_there_is_a_tenant_nobody_can_have_paid(keeper: Keeper, tmp_path: Path) -> None:
    keeper.set_up["FAREBOX_DATABASE_URL"] = f"sqlite:///{tmp_path / 'new.db'}"
    assert "farebox init" in nothing_compared(keeper)
    keeper.run("migrate", code=0)
    assert "There is no tenant yet: run `farebox init`" in nothing_compared(keeper)


def test_who_cannot_read_the_journal_does_not_know_either(keeper: Keeper) -> None:
    keeper.set_up["FAREBOX_DATABASE_URL"] = "postgresql://farebox@127.0.0.1:1/farebox"
    assert "database" in nothing_compared(keeper)


def test_a_month_is_exported(keeper: Keeper, tmp_path: Path) -> None:
    keeper.grant_as_paid()
    pay(keeper.stripe, {})
    keeper.run("stripe", "reconcile", code=1)
    month = time_text(now_us())[:7]
    file = tmp_path / "accounts.csv"
    assert month in keeper.run("accounting", "export", "--month", month, "--output", str(file), code=0).stdout
    with file.open(newline="") as written:
        rows = list(csv.DictReader(written))
    said = {(row["mode"], row["line"]): row["amount"] for row in rows}
    assert {row["tenant"] for row in rows} == {keeper.tenant}
    assert said["live", "deferred_revenue.brought_in"] == "5"
    assert said["live", "given_credits.brought_in"] == "2000"
    assert said["test", "stripe.charge.amount"] == "5"
    printed = keeper.run("accounting", "export", "--month", month, code=0).stdout_bytes
    assert printed == file.read_bytes()
    before = keeper.run("accounting", "export", "--month", "2020-01", code=0).stdout
    assert before.splitlines() == ["month,tenant,mode,asset,line,amount,usd"]
    as_json = json.loads(keeper.run("accounting", "export", "--month", month, "--json", code=0).stdout)
    assert as_json == rows


def test_a_month_or_a_tenant_that_is_none_is_refused(keeper: Keeper) -> None:
    assert "2026-11" in keeper.run("accounting", "export", "--month", "November", code=2).output
    keeper.run("accounting", "export", "--month", "2026-11", "--tenant", "ten_none", code=1)
