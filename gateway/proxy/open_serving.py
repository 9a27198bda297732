"""Serving while the ledger is away, for tenants that chose it: out of a bounded allowance, journalled, charged later.

How it works. Each process has the tenant's whole allowance, and counts in memory what it sets aside and what it has
spent of it. Before a request is forwarded, the journal has an intent on disk: the debit with which the request will be
charged, for what it is charged if this process dies. At the end the debit for what it really cost takes its place, and
the allowance gets back what was not needed; what was spent comes back when the ledger knows the debit. The debit has
the reservation's own id, so that it settles a reservation that was made although nobody could tell.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
import structlog

from gateway.proxy.hold import GROWTH, Charged, Hold
from gateway.proxy.journal import SettlementJournal
from gateway.proxy.settlement import Ending, UsageSource
from gateway.proxy.shield import Shield
from gateway.proxy.tariff import Tariff
from ledger.commands import Debit, Key, Release, Reserve, ReserveLeg, StoredResponse
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
        self, *, ledger: Ledger, journal: SettlementJournal, shield: Shield, new_id: Callable[[str], str]
    ) -> None:
        self.journal = journal
        self.allowance = Allowance(journal.adopted_charges)
        self._ledger = ledger
        self._shield = shield
        self._new_id = new_id
        self._answers: dict[KeyName, OpenAnswer] = {}

    def answer(self, scope: Scope, key: Key) -> OpenAnswer | None:
        """What this process has served under *key* since the ledger went away."""
        return self._answers.get((scope, key.operation, key.key))

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

    async def hold(
        self,
        command: Reserve,
        *,
        limit: int,
        tariff: Tariff,
        record: UsageRecord,
        prompt_tokens: int,
        prompt_tokens_max: int,
    ) -> "OpenHold | None":
        """Set aside what *command* would have reserved, durably; None when the allowance does not cover its minimum.

        Raises:
            LedgerUnavailable: the journal cannot be written, so nothing is served.
        """
        usage = None if command.mark is None else command.mark.usage
        assert command.mark is not None
        assert usage is not None
        amount = sum(leg.amount for leg in command.legs)
        minimum = sum(leg.minimum for leg in command.legs)
        taken = self.allowance.take(command.scope, amount, minimum=minimum, limit=limit)
        if taken is None:
            return None
        debit = Debit(
            id=self._new_id("cmd"),
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
        if command.key is not None:
            name = (command.scope, command.key.operation, command.key.key)
            self._answers[name] = OpenAnswer(command.key.digest, usage.request_id)
        try:
            await self.journal.intend(debit)
        except BaseException as error:
            self.allowance.settle(command.scope, aside=taken, spent=0)
            self.forget(debit)
            if isinstance(error, OSError):
                raise LedgerUnavailable(f"the settlement journal cannot be written: {error}") from error
            raise
        return OpenHold(
            serving=self,
            debit=debit,
            limit=limit,
            ledger=self._ledger,
            journal=self.journal,
            shield=self._shield,
            new_id=self._new_id,
            reservation=command.reservation,
            tariff=tariff,
            record=msgspec.structs.replace(record, metadata={**record.metadata, **LEDGER_AWAY}),
            prompt_tokens=prompt_tokens,
            prompt_tokens_max=prompt_tokens_max,
            held=_by_leg(command.legs, taken),
            ttl_us=command.ttl_us,
        )


class OpenHold(Hold):
    """A hold on the allowance: settled in the journal, and charged when the ledger is back."""

    dry: Mapping[str, str] = USED_UP

    def __init__(self, *, serving: OpenServing, debit: Debit, limit: int, **hold: Any) -> None:
        super().__init__(**hold)
        self._serving = serving
        self._debit = debit
        self._limit = limit
        self._aside = sum(self.held)

    async def extend(self, tokens: int, *, ceiling: int) -> None:
        wanted = max(tokens, min(tokens * GROWTH, ceiling))
        missing = self.tariff.worst(prompt_tokens=self._prompt_tokens_max, output_tokens=wanted) - self.held[0]
        if missing <= 0:
            return
        taken = self._serving.allowance.take(self._scope, missing, minimum=1, limit=self._limit)
        if taken is None:
            return
        self._aside += taken
        await self.renew()
        self._cover((self.held[0] + taken, *self.held[1:]))

    async def renew(self) -> None:
        """Write down how far the work has come: what is charged for it if this process dies.

        Raises:
            LedgerUnavailable: the journal cannot be written; deliver nothing more.
        """
        mark = self._mark()
        if mark is None or self.settled:
            return
        self._debit = msgspec.structs.replace(self._debit, settlement=mark)
        try:
            await self._journal.intend(self._debit)
        except OSError as error:
            raise LedgerUnavailable(f"the settlement journal cannot be written: {error}") from error

    async def _charge(self, usage: Usage, settlement: Settlement, response: StoredResponse | None) -> Charged:
        serving, scope = self._serving, self._scope
        debit = msgspec.structs.replace(self._debit, settlement=settlement, response=response)
        cost = sum(charge.total for charge in settlement.charges)
        serving.allowance.settle(scope, aside=self._aside, spent=cost)

        def told() -> None:
            serving.allowance.reconciled(scope, cost)
            serving.forget(debit)

        try:
            await self._journal.keep(debit, told=told)
        except OSError as error:
            log.error("a settlement could not be written", request_id=self.record.request_id, error=str(error))
            serving.forget(debit)
            return Charged(usage=usage)
        serving.finish(debit)
        return Charged(usage=usage, cost=settlement.charges[0].total)

    async def _release(self) -> None:
        self._serving.allowance.settle(self._scope, aside=self._aside, spent=0)
        self._serving.forget(self._debit)
        release = Release(id=self._new_id("cmd"), scope=self._scope, reservation=self.reservation)
        try:
            await self._journal.keep(release)
        except OSError as error:
            log.error("a release could not be written", request_id=self.record.request_id, error=str(error))


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
