"""The tenants' budgets as they are kept: made, read, changed and archived. Who enforces them is `Budgets`."""

from typing import Any, Final, Literal, cast

import msgspec
from sqlalchemy import Select, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway import errors
from gateway.database import of
from gateway.identity.wallets import limit_wallet
from gateway.records import Records
from gateway.tables import Budget as BudgetRow
from gateway.tables import Tenant
from ledger.commands import Limit, LimitPeriod
from ledger.model import Scope
from pricing.periods import Period, Recurrence, period_at

SubjectType = Literal["tenant", "app", "key", "customer"]

PER_SUBJECT_MAX: Final = 10
"""Budgets in force on one subject: every request under them names each."""

CLOCKS_APART_US: Final = 3600 * 1_000_000
"""How far from a period's end its neighbour is named, too: who asks and the ledger read different clocks."""

_RECURRENCE: Final = tuple(name for name in Recurrence.__struct_fields__)


class Subject(msgspec.Struct, frozen=True):
    """Whose spending is bounded: our id of an app, key or customer, or the tenant's own id."""

    type: SubjectType
    id: str


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """*subject* may spend *amount*, in the asset's smallest unit, in each period of *recurrence*."""

    id: str
    scope: Scope
    name: str
    subject: Subject
    amount: int
    recurrence: Recurrence
    thresholds_bps: tuple[int, ...]
    archived: bool
    version: int
    created_at_us: int

    def limit(self, at_us: int) -> Limit:
        """What a command at about *at_us* says of it."""
        near = (at_us - CLOCKS_APART_US, at_us, at_us + CLOCKS_APART_US)
        periods = dict.fromkeys(period_at(self.recurrence, each) for each in near)
        return Limit(
            wallet=limit_wallet(*self.scope, self.id),
            amount=self.amount,
            periods=tuple([LimitPeriod(self.block_id(period), *period) for period in periods]),
            thresholds_bps=self.thresholds_bps,
        )

    def block_id(self, period: Period) -> str:
        """The ledger's block of *period*."""
        return f"{self.id}_{period.start_us}"


class BudgetBook(Records):
    """Every method is one transaction."""

    async def create(
        self,
        scope: Scope,
        subject: Subject,
        *,
        amount: int,
        recurrence: Recurrence,
        thresholds_bps: tuple[int, ...],
        name: str,
    ) -> Budget:
        """A new budget.

        Raises:
            ApiError: 400 where *subject* has as many as it may.
        """
        budget = Budget(
            id=self._new_id("bud"),
            scope=scope,
            name=name,
            subject=subject,
            amount=amount,
            recurrence=recurrence,
            thresholds_bps=thresholds_bps,
            archived=False,
            version=1,
            created_at_us=self._now_us(),
        )
        in_force = (
            select(func.count())
            .select_from(BudgetRow)
            .where(
                *_mine(scope),
                col(BudgetRow.subject_type) == subject.type,
                col(BudgetRow.subject_id) == subject.id,
                col(BudgetRow.archived).is_(False),
            )
        )
        # Counted one after the other: those who are not committed are in nobody's count.
        turn = select(col(Tenant.id)).where(col(Tenant.id) == scope.tenant).with_for_update(key_share=True)
        async with self._transactions.write(of(*scope)) as connection:
            await connection.execute(turn)
            if (await connection.execute(in_force)).scalar_one() >= PER_SUBJECT_MAX:
                raise errors.invalid_request(
                    f"This {subject.type} has {PER_SUBJECT_MAX} budgets: archive one of them first.", param="subject"
                )
            await connection.execute(insert(BudgetRow).values(**_row(budget)))
        return budget

    async def find(self, scope: Scope, budget_id: str) -> Budget:
        """Raises ApiError 404, also for another tenant's or mode's."""
        async with self._transactions.read(of(*scope)) as connection:
            return await _found(connection, scope, budget_id)

    async def page(self, scope: Scope, *, before: str | None, limit: int) -> list[Budget]:
        """Budgets, newest first, from the one that came just before the id *before*."""
        query = _budgets(scope).order_by(col(BudgetRow.id).desc()).limit(limit)
        if before is not None:
            query = query.where(col(BudgetRow.id) < before)
        async with self._transactions.read(of(*scope)) as connection:
            return [_budget(row) for row in await connection.execute(query)]

    async def change(
        self,
        scope: Scope,
        budget_id: str,
        *,
        amount: int | None = None,
        thresholds_bps: tuple[int, ...] | None = None,
        name: str | None = None,
        archived: bool | None = None,
        expected_version: int | None = None,
    ) -> Budget:
        """Change what is not None.

        Raises:
            ApiError: 404; 412 where it is not at *expected_version*.
        """
        asked = {"amount": amount, "name": name, "archived": archived}
        changes: dict[str, Any] = {column: value for column, value in asked.items() if value is not None}
        if thresholds_bps is not None:
            changes["thresholds_bps"] = list(thresholds_bps)
        async with self._transactions.write(of(*scope)) as connection:
            statement = update(BudgetRow).where(*_mine(scope), col(BudgetRow.id) == budget_id)
            if expected_version is not None:
                statement = statement.where(col(BudgetRow.version) == expected_version)
            changed = await connection.execute(statement.values(**changes, version=col(BudgetRow.version) + 1))
            budget = await _found(connection, scope, budget_id)
            if not changed.rowcount:
                raise errors.version_mismatch(budget.version)
            return budget

    async def in_force(self, scope: Scope, customer_id: str | None) -> tuple[list[Budget], bool]:
        """Those of a customer; or without one those of everybody else, and whether any customer has one."""
        budgets = _budgets(scope).where(col(BudgetRow.archived).is_(False))
        of_customers = col(BudgetRow.subject_type) == "customer"
        async with self._transactions.read(of(*scope)) as connection:
            if customer_id is not None:
                query = budgets.where(of_customers, col(BudgetRow.subject_id) == customer_id)
                return [_budget(row) for row in await connection.execute(query)], True
            others = await connection.execute(budgets.where(col(BudgetRow.subject_type) != "customer"))
            found = [_budget(row) for row in others]
            one = await connection.execute(budgets.where(of_customers).limit(1))
            return found, one.first() is not None


def _mine(scope: Scope) -> tuple[Any, Any]:
    return col(BudgetRow.tenant) == scope.tenant, col(BudgetRow.mode) == scope.mode


def _budgets(scope: Scope) -> Select[Any]:
    columns = (getattr(BudgetRow, name) for name in BudgetRow.__table__.columns.keys())  # type: ignore[attr-defined]  # noqa: SIM118
    return select(*columns).where(*_mine(scope))


async def _found(connection: AsyncConnection, scope: Scope, budget_id: str) -> Budget:
    row = (await connection.execute(_budgets(scope).where(col(BudgetRow.id) == budget_id))).one_or_none()
    if row is None:
        raise errors.not_found(f"budget {budget_id}")
    return _budget(row)


def _row(budget: Budget) -> dict[str, Any]:
    row = msgspec.structs.asdict(budget)
    subject, scope = row.pop("subject"), row.pop("scope")
    return row | {
        **scope._asdict(),
        "subject_type": subject.type,
        "subject_id": subject.id,
        "recurrence": msgspec.to_builtins(budget.recurrence),
        "thresholds_bps": list(budget.thresholds_bps),
    }


def _budget(row: Any) -> Budget:
    return Budget(
        id=row.id,
        scope=Scope(row.tenant, row.mode),
        name=row.name,
        subject=Subject(cast(SubjectType, row.subject_type), row.subject_id),
        amount=row.amount,
        recurrence=msgspec.convert(row.recurrence, Recurrence),
        thresholds_bps=tuple(row.thresholds_bps),
        archived=row.archived,
        version=row.version,
        created_at_us=row.created_at_us,
    )
