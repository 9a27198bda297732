"""The credits behind one request: reserved before it is sent, extended while it streams, settled once.

How it works. A hold knows how many output tokens its credits cover, at the prices and the prompt of its request, and
asks the ledger for more by doubling. A process keeps its holds in ``LiveHolds``, whose heartbeat renews them all before
they would lapse; a hold that is not renewed is settled by the sweeper for its last mark, and a commit that comes after
that debits only what is missing.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import msgspec
import structlog

from gateway.billing.budgets import BudgetExceeded
from gateway.billing.charging import Charging, Spender
from gateway.proxy.journal import SettlementJournal
from gateway.proxy.reconcile import give_back
from gateway.proxy.settlement import Action, Ending, UsageSource, settle
from gateway.proxy.shield import Shield
from gateway.proxy.tariff import Tariff
from ledger.commands import Commit, Extend, Release, StoredResponse
from ledger.errors import (
    InsufficientCredits,
    LedgerUnavailable,
    LimitReached,
    NotFound,
    ReceivableOutstanding,
    ReservationSettled,
    WalletFrozen,
)
from ledger.ledger import Ledger
from ledger.model import ReservationRef, Scope, Settlement, UsageRecord
from ledger.outcomes import Reserved, Result, Settled
from pricing.usage import Usage

GROWTH: Final = 2
"""Each extension covers this many times the tokens of the one before, so that there are few of them."""

RENEWALS_AT_ONCE: Final = 128
"""Heartbeats that wait for the ledger at the same time."""

UNLIMITED_TOKENS: Final = 2**62

DRY: Final = {"code": "insufficient_credits", "message": "The wallet affords no more. Top up to continue."}
"""The reason in the last chunk of a stream that we stop."""

OVER_BUDGET: Final = {"code": "budget_exceeded", "message": "A budget leaves no more. Raise it to continue."}
"""The same, where the wallet would afford it."""

_NO_MORE: Final = (InsufficientCredits, LimitReached, WalletFrozen, ReceivableOutstanding, ReservationSettled, NotFound)

log = structlog.get_logger(__name__)


class Hold:
    """One request's reservation.

    Attributes:
        held: what each leg holds, in the asset's smallest unit.
        progress: the usage up to now, cheap to ask; None before anything has come.
        settled: nothing is held any more.
        dry: the reason to give when it can cover no more.
    """

    dry: Mapping[str, str] = DRY

    def __init__(
        self,
        *,
        ledger: Ledger,
        charging: Charging,
        journal: SettlementJournal,
        shield: Shield,
        new_id: Callable[[str], str],
        reservation: ReservationRef,
        tariff: Tariff,
        record: UsageRecord,
        prompt_tokens: int,
        prompt_tokens_max: int,
        held: tuple[int, ...],
        ttl_us: int,
        top_up_url: Callable[[], str | None] = lambda: None,
    ) -> None:
        """The ledger has reserved *held* for a prompt of *prompt_tokens*, which may count *prompt_tokens_max*.

        *top_up_url* is where whoever pays adds credits.
        """
        self.reservation = reservation
        self.tariff = tariff
        self.record = record
        self.prompt_tokens = prompt_tokens
        self.settled = False
        self.progress: Callable[[], Usage] | None = None
        self._ledger = ledger
        self._charging = charging
        self._journal = journal
        self._shield = shield
        self._new_id = new_id
        self._prompt_tokens_max = prompt_tokens_max
        self._ttl_us = ttl_us
        self._top_up_url = top_up_url
        self._cover(held)

    def why_dry(self) -> Mapping[str, str]:
        """The reason to give, with the link to more credits where these are what lacks."""
        url = self._top_up_url() if self.dry is DRY else None
        return self.dry if url is None else {**self.dry, "top_up_url": url}

    def serve(self, tariff: Tariff) -> None:
        """From now on the prices are those of the candidate that serves the request."""
        self.tariff = tariff
        self._cover(self.held)

    def _cover(self, held: tuple[int, ...]) -> None:
        self.held = held
        self._covered: int | None = None
        self._covered_exactly: int | None = None

    @property
    def covered(self) -> int:
        """Output tokens that it pays for in the worst case, the margin on the prompt's count included.

        A product action's price covers any number of them.
        """
        if self._covered is None:
            self._covered = UNLIMITED_TOKENS
            if self.tariff.action is None:
                self._covered = self.tariff.output_within(self.held[0], prompt_tokens=self._prompt_tokens_max)
        return self._covered

    @property
    def covered_exactly(self) -> int:
        """Output tokens that it pays for at our own count, for the last stretch of a wallet."""
        if self._covered_exactly is None:
            self._covered_exactly = UNLIMITED_TOKENS
            if self.tariff.action is None:
                self._covered_exactly = self.tariff.plain_output_within(self.held[0], prompt_tokens=self.prompt_tokens)
        return self._covered_exactly

    async def extend(self, tokens: int, *, ceiling: int) -> None:
        """Try to cover *tokens* of output and, up to *ceiling*, as many again; less is taken where there is less.

        Raises:
            LedgerUnavailable: nobody knows; deliver nothing more.
        """
        missing = self._missing(tokens, ceiling)
        if missing <= 0:
            return
        command = Extend(
            id=self._new_id("cmd"),
            scope=self._scope,
            reservation=self.reservation,
            amount=missing,
            minimum=1,
            ttl_us=self._ttl_us,
            mark=self._mark(),
        )
        try:
            extended = (await self._charging.ask(command, self._spender)).result
        except BudgetExceeded:
            self.dry = OVER_BUDGET
            return
        except _NO_MORE:
            return
        assert isinstance(extended, Reserved)
        self._cover(extended.held)

    def _missing(self, tokens: int, ceiling: int) -> int:
        """What has to come to the hold for it to cover *tokens* of output and, up to *ceiling*, as many again."""
        wanted = max(tokens, min(tokens * GROWTH, ceiling))
        return self.tariff.worst(prompt_tokens=self._prompt_tokens_max, output_tokens=wanted) - self.held[0]

    async def renew(self) -> None:
        """Keep the hold alive, with a mark of how far the work has come."""
        command = Extend(
            id=self._new_id("cmd"),
            scope=self._scope,
            reservation=self.reservation,
            ttl_us=self._ttl_us,
            mark=self._mark(),
        )
        await self._ledger.execute(command)

    def _mark(self) -> Settlement | None:
        """What to charge if this process dies now; None where the reservation's own mark still holds."""
        if self.progress is None:
            return None
        record = msgspec.structs.replace(self.record, source=UsageSource.PARTIAL, ending=Ending.DIED)
        return self.tariff.settlement(self.progress(), record)

    async def settle(
        self,
        ending: Ending,
        *,
        reported: Usage | None,
        counted: Usage,
        delivered: bool = True,
        response: StoredResponse | None = None,
    ) -> "Charged":
        """Charge or release, as the settlement table says, whatever becomes of the request's task meanwhile.

        Being called again, or after the sweeper has settled, charges nothing twice.
        """
        decision = settle(ending=ending, reported=reported, counted=counted, delivered=delivered)
        if decision.action is Action.RELEASE:
            await self.release()
            return Charged(usage=decision.usage)
        assert decision.source is not None
        record = msgspec.structs.replace(self.record, source=decision.source, ending=ending)
        settlement = self.tariff.settlement(decision.usage, record)
        self.settled = True
        return await self._shield.run(self._charge(decision.usage, settlement, response))

    async def _charge(self, usage: Usage, settlement: Settlement, response: StoredResponse | None) -> "Charged":
        command = Commit(
            id=self._new_id("cmd"),
            scope=self._scope,
            reservation=self.reservation,
            settlement=settlement,
            response=response,
        )
        result: Result | None
        try:
            result = (await self._ledger.execute(command)).result
        except ReservationSettled as error:
            result = error.result
        except LedgerUnavailable:
            return await self._charge_later(command, usage)
        assert isinstance(result, Settled)
        return Charged(usage=usage, cost=result.charged[0].total, balance=result.balance)

    async def _charge_later(self, command: Commit, usage: Usage) -> "Charged":
        await self._keep(command)
        return Charged(usage=usage)

    async def release(self) -> None:
        """Give everything back. Where the ledger cannot be reached, the journal does it later."""
        self.settled = True
        await self._shield.run(self._release())

    async def _release(self) -> None:
        command = Release(id=self._new_id("cmd"), scope=self._scope, reservation=self.reservation)
        try:
            await give_back(self._ledger, command)
        except LedgerUnavailable:
            await self._keep(command)

    async def _keep(self, command: Commit | Release) -> None:
        """Have the journal do it later. If even the disk refuses, and this process dies, the mark is what remains."""
        try:
            await self._journal.keep(command)
        except OSError as error:
            log.error("a settlement could not be written", request_id=self.record.request_id, error=str(error))

    @property
    def _spender(self) -> Spender:
        return Spender(self.record.app_id, self.record.key_id or "", self.record.customer_id)

    @property
    def _scope(self) -> Scope:
        return Scope(self.reservation.tenant, self.reservation.mode)


class Charged(NamedTuple):
    """How a hold was settled: for which usage, what that cost the payer, and what is left of the wallet.

    *cost* is None when nothing was charged, or when nobody can say yet what was. *balance* is None when the charge is
    certain but the ledger has still to book it.
    """

    usage: Usage
    cost: int | None = None
    balance: int | None = None


class LiveHolds:
    """The holds of this process, renewed together: the ledger's batches make one transaction of a heartbeat."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._holds: dict[ReservationRef, Hold] = {}

    def __len__(self) -> int:
        return len(self._holds)

    @property
    def held(self) -> int:
        """What all of them hold together, in the assets' smallest units."""
        return sum(sum(hold.held) for hold in self._holds.values() if not hold.settled)

    def add(self, hold: Hold) -> None:
        self._holds[hold.reservation] = hold

    def remove(self, hold: Hold) -> None:
        self._holds.pop(hold.reservation, None)

    async def heartbeat(self) -> None:
        """Renew every hold once. One that is settled already, or a ledger that is away, is the journey's own matter.

        So many at a time that the ledger has room for others.
        """
        holds = list(self._holds.values())
        for start in range(0, len(holds), RENEWALS_AT_ONCE):
            renewals = [self._renew(hold) for hold in holds[start : start + RENEWALS_AT_ONCE]]
            await asyncio.gather(*renewals, return_exceptions=True)

    async def _renew(self, hold: Hold) -> None:
        if not hold.settled:
            await hold.renew()
