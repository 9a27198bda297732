"""Serving while the ledger is away, for tenants that chose it: out of a bounded allowance, journalled, charged later.

How it works. Each process has the tenant's whole allowance, and counts in memory what it sets aside and what it has
spent of it. Before a request is forwarded, the journal has an intent on disk: the debit with which the request will be
charged, for what it is charged if this process dies. At the end the debit for what it really cost takes its place, and
the allowance gets back what was not needed; what was spent comes back when the ledger knows the debit. The debit has
the reservation's own id, so that it settles a reservation that was made although nobody could tell, or one that its
stream had before the ledger went away.
"""

from collections.abc import Callable
from typing import Any, Final

import msgspec
import structlog

from gateway.billing.charging import Charging
from gateway.proxy.hold import Charged, Hold
from gateway.proxy.journal import SettlementJournal
from gateway.proxy.quoting import Plan
from gateway.proxy.settlement import Ending, UsageSource
from gateway.proxy.shield import Shield
from ledger.commands import Commit, Debit, Key, Release, Reserve, ReserveLeg, StoredResponse
from ledger.errors import LedgerUnavailable
from ledger.ledger import Ledger
from ledger.model import Scope, Settlement, UsageRecord
from pricing.usage import Usage

LEDGER_AWAY: Final = {"ledger": "away"}
"""In the metadata of a usage record: it was served without the ledger, and charged afterwards."""

USED_UP: Final = {
    "code": "ledger_unavailable",
    "message": "The ledger cannot be reached, and what may be served without it is used up. Try again shortly.",
}
"""The reason in the last chunk of a stream that we stop."""

log = structlog.get_logger(__name__)


class _Spending(msgspec.Struct):
    aside: int = 0
    spent: int = 0


class Allowance:
    """What this process may serve to each scope before the ledger is back.

    Args:
        adopted: what dead processes have spent for a scope, and this one has yet to tell.
    """

    def __init__(self, adopted: Callable[[Scope], int]) -> None:
        self._adopted = adopted
        self._spending: dict[Scope, _Spending] = {}

    def used(self, scope: Scope) -> int:
        """What is set aside, and what is spent and not reconciled."""
        spending = self._spending.get(scope, _Spending())
        return spending.aside + spending.spent + self._adopted(scope)

    def take(self, scope: Scope, amount: int, *, minimum: int, limit: int) -> int | None:
        """Set *amount* aside, or what is left of *limit*; None when that is under *minimum*."""
        left = limit - self.used(scope)
        if left <= 0 or left < minimum:
            return None
        taken = min(amount, left)
        self._book(scope, aside=taken)
        return taken

    def settle(self, scope: Scope, *, aside: int, spent: int) -> None:
        """Put what was spent in the place of what was set aside."""
        self._book(scope, aside=-aside, spent=spent)

    def reconciled(self, scope: Scope, spent: int) -> None:
        """The ledger knows of so much."""
        self._book(scope, spent=-spent)

    def _book(self, scope: Scope, *, aside: int = 0, spent: int = 0) -> None:
        """Change the two. A scope that has nothing of either is forgotten, though some of its requests cost nothing."""
        spending = self._spending.pop(scope, None) or _Spending()
        spending.aside += aside
        spending.spent += spent
        if spending.aside or spending.spent:
            self._spending[scope] = spending


class OpenAnswer(msgspec.Struct):
    """What became of a request under its idempotency key, until the ledger knows.

    *cost* is None while it is under way; *response* where there is none to give again.
    """

    digest: str
    request_id: str
    cost: int | None = None
    response: StoredResponse | None = None


KeyName = tuple[Scope, str, str]


class OpenServing:
    """What this process serves while the ledger is away."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        charging: Charging,
        journal: SettlementJournal,
        shield: Shield,
        new_id: Callable[[str], str],
    ) -> None:
        self.journal = journal
        self.allowance = Allowance(journal.adopted_charges)
        self._ledger = ledger
        self._charging = charging
        self._shield = shield
        self._new_id = new_id
        self._answers: dict[KeyName, OpenAnswer] = {}

    def answer(self, scope: Scope, key: Key) -> OpenAnswer | None:
        """What this process has served under *key* since the ledger went away."""
        return self._answers.get((scope, key.operation, key.key))

    def begin(self, debit: Debit) -> None:
        """The request that *debit* would charge is under way under its key."""
        usage = debit.settlement.usage
        if debit.key is not None and usage is not None:
            name = (debit.scope, debit.key.operation, debit.key.key)
            self._answers.setdefault(name, OpenAnswer(debit.key.digest, usage.request_id))

    def finish(self, debit: Debit) -> None:
        """Keep the answer of *debit* until the ledger has it."""
        answer = self._answer_of(debit)
        if answer is not None:
            answer.cost = debit.settlement.charges[0].total
            answer.response = debit.response

    def forget(self, debit: Debit) -> None:
        """The key of *debit* is the ledger's now, or free for another attempt."""
        answer = self._answer_of(debit)
        if answer is not None and debit.key is not None:
            del self._answers[debit.scope, debit.key.operation, debit.key.key]

    def _answer_of(self, debit: Debit) -> OpenAnswer | None:
        if debit.key is None:
            return None
        answer = self._answers.get((debit.scope, debit.key.operation, debit.key.key))
        usage = debit.settlement.usage
        return answer if answer is not None and usage is not None and answer.request_id == usage.request_id else None

    async def hold(self, command: Reserve, *, plan: Plan, record: UsageRecord, limit: int) -> "OpenHold | None":
        """Set aside what *command* would have reserved, durably; None when the allowance does not cover its minimum.

        Raises:
            LedgerUnavailable: the journal cannot be written, so nothing is served.
        """
        amount = sum(leg.amount for leg in command.legs)
        minimum = sum(leg.minimum for leg in command.legs)
        taken = self.allowance.take(command.scope, amount, minimum=minimum, limit=limit)
        if taken is None:
            return None
        debit = _debit_of(command, self._new_id("cmd"))
        self.begin(debit)
        try:
            await self.journal.intend(debit)
        except BaseException as error:
            self.allowance.settle(command.scope, aside=taken, spent=0)
            self.forget(debit)
            if isinstance(error, OSError):
                raise _unwritable(error) from error
            raise
        held = _by_leg(command.legs, taken)
        return self._made(command, debit, held, plan=plan, record=record, limit=limit, aside=taken)

    def on_reservation(
        self, command: Reserve, held: tuple[int, ...], *, plan: Plan, record: UsageRecord, limit: int
    ) -> "OpenHold":
        """The hold of a request for which the ledger has reserved *held*, and may go away before its end."""
        debit = _debit_of(command, self._new_id("cmd"))
        return self._made(command, debit, held, plan=plan, record=record, limit=limit, aside=None)

    def _made(
        self,
        command: Reserve,
        debit: Debit,
        held: tuple[int, ...],
        *,
        plan: Plan,
        record: UsageRecord,
        limit: int,
        aside: int | None,
    ) -> "OpenHold":
        return OpenHold(
            serving=self,
            debit=debit,
            limit=limit,
            aside=aside,
            ledger=self._ledger,
            charging=self._charging,
            journal=self.journal,
            shield=self._shield,
            new_id=self._new_id,
            reservation=command.reservation,
            tariff=plan.tariff,
            record=record,
            prompt_tokens=plan.prompt_tokens,
            prompt_tokens_max=plan.prompt_tokens_max,
            held=held,
            ttl_us=command.ttl_us,
        )


class OpenHold(Hold):
    """A hold of a tenant that is served without the ledger: on a reservation while the ledger answers, if it did.

    From when it does not, the hold is on the allowance: it is settled in the journal, and charged when the ledger is
    back. What the reservation holds pays first, so that the allowance gives only what is needed beyond it.
    """

    def __init__(self, *, serving: OpenServing, debit: Debit, limit: int, aside: int | None, **hold: Any) -> None:
        """*aside* has been taken from the allowance; None where the ledger has reserved."""
        super().__init__(**hold)
        self._serving = serving
        self._debit = debit
        self._limit = limit
        self._away = False
        self._aside = aside or 0
        self._reserved = sum(self.held) - self._aside
        if aside is not None:
            self._leave_ledger()

    def _leave_ledger(self) -> None:
        """The ledger is away, and this request goes on without it, to its end."""
        self._away = True
        self.dry = USED_UP
        self.record = msgspec.structs.replace(self.record, metadata={**self.record.metadata, **LEDGER_AWAY})
        self._serving.begin(self._debit)

    async def extend(self, tokens: int, *, ceiling: int) -> None:
        if not self._away:
            try:
                await super().extend(tokens, ceiling=ceiling)
                return
            except LedgerUnavailable:
                self._reserved = sum(self.held)
                self._leave_ledger()
        missing = self._missing(tokens, ceiling)
        if missing <= 0:
            return
        taken = self._serving.allowance.take(self._scope, missing, minimum=1, limit=self._limit)
        if taken is None:
            return
        self._aside += taken
        await self.renew()
        self._cover((self.held[0] + taken, *self.held[1:]))

    async def renew(self) -> None:
        """Keep the hold alive, or without the ledger write down how far the work has come: what is charged for it if
        this process dies.

        Raises:
            LedgerUnavailable: the journal cannot be written; deliver nothing more.
        """
        if not self._away:
            await super().renew()
            return
        mark = self._mark()
        if mark is None or self.settled:
            return
        self._debit = msgspec.structs.replace(self._debit, settlement=mark)
        try:
            await self._journal.intend(self._debit, forwarded=True)
        except OSError as error:
            raise _unwritable(error) from error

    async def _charge(self, usage: Usage, settlement: Settlement, response: StoredResponse | None) -> Charged:
        if not self._away:
            return await super()._charge(usage, settlement, response)
        debit = msgspec.structs.replace(self._debit, settlement=settlement, response=response)
        spent = max(0, sum(charge.total for charge in settlement.charges) - self._reserved)
        self._serving.allowance.settle(self._scope, aside=self._aside, spent=spent)
        return await self._kept(debit, debit, usage, spent=spent)

    async def _charge_later(self, command: Commit, usage: Usage) -> Charged:
        self._serving.begin(self._debit)
        debit = msgspec.structs.replace(self._debit, settlement=command.settlement, response=command.response)
        return await self._kept(command, debit, usage, spent=0)

    async def _kept(self, command: Commit | Debit, debit: Debit, usage: Usage, *, spent: int) -> Charged:
        """Have the journal charge *command*; until the ledger knows, the key's answer is what *debit* says."""
        serving, scope = self._serving, self._scope

        def told() -> None:
            serving.allowance.reconciled(scope, spent)
            serving.forget(debit)

        try:
            await self._journal.keep(command, told=told)
        except OSError as error:
            log.error("a settlement could not be written", request_id=self.record.request_id, error=str(error))
            serving.finish(msgspec.structs.replace(debit, response=None))  # The journal keeps none in memory alone.
            return Charged(usage=usage)
        serving.finish(debit)
        return Charged(usage=usage, cost=debit.settlement.charges[0].total)

    async def _release(self) -> None:
        if not self._away:
            await super()._release()
            return
        self._serving.allowance.settle(self._scope, aside=self._aside, spent=0)
        self._serving.forget(self._debit)
        release = Release(id=self._new_id("cmd"), scope=self._scope, reservation=self.reservation)
        try:
            await self._journal.keep(release)
        except OSError as error:
            log.error("a release could not be written", request_id=self.record.request_id, error=str(error))


def _debit_of(command: Reserve, command_id: str) -> Debit:
    """What charges for the work that *command* would have reserved for; at first, for what it is worth if we die."""
    assert command.mark is not None
    return Debit(
        id=command_id,
        scope=command.scope,
        key=command.key,
        reservation=command.reservation,
        asset=command.asset,
        legs=command.legs,
        limits=command.limits,
        unfunded=command.unfunded,
        developer=command.developer,
        tags=command.tags,
        settlement=_marked_away(command.mark),
        beyond="receivable",
    )


def _unwritable(error: OSError) -> LedgerUnavailable:
    return LedgerUnavailable(f"the settlement journal cannot be written: {error}")


def _marked_away(mark: Settlement) -> Settlement:
    assert mark.usage is not None
    usage = msgspec.structs.replace(
        mark.usage,
        source=UsageSource.PARTIAL,
        ending=Ending.DIED,
        metadata={**mark.usage.metadata, **LEDGER_AWAY},
    )
    return msgspec.structs.replace(mark, usage=usage)


def _by_leg(legs: tuple[ReserveLeg, ...], taken: int) -> tuple[int, ...]:
    """Divide what was taken among the legs: the first comes first, down to its own amount."""
    held = []
    for number, leg in enumerate(legs):
        part = taken if number == len(legs) - 1 else min(taken, leg.amount)
        held.append(part)
        taken -= part
    return tuple(held)
