"""Budgets: how much a tenant, an app, a key or a customer may spend in each period, whoever's credits pay."""

from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Path, Request, Response
from pydantic import ConfigDict, Field, model_validator

from gateway.api.access import CatalogWriter, Reader
from gateway.api.customers import Cursor, CustomerName, Limit
from gateway.api.idempotency import key_of, once
from gateway.api.route import ExactRoute
from gateway.api.services import Here, Services
from gateway.api.versions import etag, expected_version
from gateway.api.wire import (
    PAGE_DEFAULT,
    Body,
    Credits,
    Millicredits,
    Page,
    Text,
    Time,
    View,
    Word,
    amounts,
    units_of_millis,
)
from gateway.billing.budget_book import Budget, Subject
from gateway.clock import time_text, time_text_or_none
from gateway.database import Transactions
from gateway.errors import invalid_request, not_found, permission_denied
from gateway.identity.keys import KeyScope
from gateway.identity.principals import Principal
from gateway.tables import NAME_LENGTH_MAX
from ledger.model import Scope
from pricing.periods import Recurrence, Unit

router = APIRouter(prefix="/v1/budgets", tags=["budgets"], route_class=ExactRoute)

THRESHOLDS_MAX: Final = 10
BPS_OF_PERCENT: Final = 100

ANCHORS: Final[dict[Unit, tuple[str, ...]]] = {
    "day": (),
    "week": ("anchor_weekday",),
    "month": ("anchor_day",),
    "year": ("anchor_day", "anchor_month"),
    "never": (),
}
"""What says when a period of each length begins."""

BudgetPath = Annotated[str, Path(max_length=64, examples=["bud_01k7m3v9c2q8x5t4n6r1b0w3ye"])]
Percent = Annotated[int, Field(strict=True, ge=1, le=100)]
Thresholds = Annotated[
    tuple[Percent, ...],
    Field(
        max_length=THRESHOLDS_MAX,
        description="Percent of the credits. When so much is spent, the event `budget.threshold` tells, once a period.",
        examples=[[80, 100]],
    ),
]
Budgeted = Annotated[int, Field(strict=True, ge=0, description="Millicredits that may be spent in each period.")]
Name = Annotated[Text, Field(max_length=NAME_LENGTH_MAX)]


class SubjectBody(View):
    type: Literal["tenant", "app", "key", "customer"]
    id: CustomerName | None = Field(
        default=None,
        min_length=1,
        description="Of the app, of the key (not the key itself), or of the customer, by our id or yours. Default: the "
        "app or the key that asks. A tenant needs none.",
    )


class PeriodBody(View):
    """A period begins at midnight in its time zone."""

    every: Unit = Field(description="`never` is one period without an end.", examples=["month"])
    anchor_day: int | None = Field(
        default=None,
        strict=True,
        ge=1,
        le=31,
        description="Of the month, for months and years. In a shorter month it is the last day. Default: 1.",
    )
    anchor_month: int | None = Field(default=None, strict=True, ge=1, le=12, description="For years. Default: 1.")
    anchor_weekday: int | None = Field(
        default=None, strict=True, ge=1, le=7, description="For weeks; Monday is 1. Default: 1."
    )
    time_zone: Word = Field(default="UTC", description="Its name, as in IANA's list.", examples=["Europe/Berlin"])

    @model_validator(mode="after")
    def _known(self) -> "PeriodBody":
        for name in ("anchor_day", "anchor_month", "anchor_weekday"):
            if getattr(self, name) is not None and name not in ANCHORS[self.every]:
                raise ValueError(f"{name} says nothing of what recurs every {self.every}")
        self.recurrence()
        return self

    def recurrence(self) -> Recurrence:
        anchors = {name: value for name in ANCHORS[self.every] if (value := getattr(self, name)) is not None}
        return Recurrence(unit=self.every, time_zone=self.time_zone, **anchors)


class NewBudget(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "subject": {"type": "customer", "id": "user_12345"},
                    "credits": 20000,
                    "period": {"every": "month", "anchor_day": 1, "time_zone": "Europe/Berlin"},
                    "thresholds": [80, 100],
                }
            ]
        }
    )

    subject: SubjectBody
    credits: Budgeted
    period: PeriodBody
    thresholds: Thresholds = ()
    name: Name = ""


class BudgetChange(Body):
    """What is left out, or null, stays as it is."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"credits": 30000}]})

    credits: Budgeted | None = Field(
        default=None, description="It holds at once; a period keeps at least what is spent and reserved of it."
    )
    thresholds: Thresholds | None = Field(default=None, description="They hold from the next period on.")
    name: Name | None = None


class SubjectView(View):
    type: str = Field(examples=["customer"])
    id: str = Field(description="Our id.", examples=["cus_01k7m3v9c2q8x5t4n6r1b0w3ye"])


class PeriodView(View):
    every: str = Field(examples=["month"])
    anchor_day: int | None
    anchor_month: int | None
    anchor_weekday: int | None
    time_zone: str = Field(examples=["Europe/Berlin"])
    starts_at: Time | None = Field(description="The period that is now; null where it never began.")
    ends_at: Time | None = Field(description="When the credits are there again; null is never.")


class BudgetView(View):
    """What was spent of it, in the period that is now."""

    id: str = Field(examples=["bud_01k7m3v9c2q8x5t4n6r1b0w3ye"])
    name: str
    subject: SubjectView
    credits: Millicredits
    credits_decimal: Credits
    spent: Millicredits
    spent_decimal: Credits
    reserved: Millicredits
    reserved_decimal: Credits
    remaining: Millicredits
    remaining_decimal: Credits
    period: PeriodView
    thresholds: list[int]
    archived: bool = Field(description="An archived budget bounds nothing.")
    version: int
    created_at: Time


async def budget_view(services: Services, principal: Principal, budget: Budget, *, applied: bool = True) -> BudgetView:
    """The budget now. Where its amount is not yet *applied*, what will be left of the period that is under way."""
    state = await services.budgets.state(budget)
    remaining = state.remaining if applied else max(0, budget.amount - state.spent - state.reserved)
    recurrence = budget.recurrence
    named = ANCHORS[recurrence.unit]
    anchors: dict[str, Any] = {
        name: getattr(recurrence, name) if name in named else None
        for name in ("anchor_day", "anchor_month", "anchor_weekday")
    }
    period = PeriodView(
        every=recurrence.unit,
        time_zone=recurrence.time_zone,
        starts_at=None if state.period.end_us is None else time_text(state.period.start_us),
        ends_at=time_text_or_none(state.period.end_us),
        **anchors,
    )
    return BudgetView(
        id=budget.id,
        name=budget.name,
        subject=SubjectView(type=budget.subject.type, id=budget.subject.id),
        period=period,
        thresholds=[threshold_bps // BPS_OF_PERCENT for threshold_bps in budget.thresholds_bps],
        archived=budget.archived,
        version=budget.version,
        created_at=time_text(budget.created_at_us),
        **amounts(
            principal.asset,
            credits=budget.amount,
            spent=state.spent,
            reserved=state.reserved,
            remaining=remaining,
        ),
    )


@router.post("", status_code=201)
async def create_budget(
    body: NewBudget, request: Request, response: Response, principal: CatalogWriter, services: Here
) -> BudgetView:
    """Bound what a tenant, an app, a key or a customer spends in each period.

    It counts from now on. Several budgets on one subject all hold: one a day and one a month, for example.
    """
    amount = units_of_millis(body.credits, principal.asset, param="credits")
    key = key_of(request, body, "budgets.create")
    subject = await _subject(services, principal, body.subject)

    async def act(transactions: Transactions) -> BudgetView:
        budget = await services.budget_book.within(transactions).create(
            _scope(principal),
            subject,
            amount=amount,
            recurrence=body.period.recurrence(),
            thresholds_bps=_bps(body.thresholds),
            name=body.name,
        )
        return await budget_view(services, principal, budget)

    answer = await once(request, response, services, principal, key=key, act=act, view=BudgetView)
    services.changes.announce()
    etag(response, answer.version)
    return answer


@router.get("")
async def list_budgets(
    principal: Reader, services: Here, cursor: Cursor = None, limit: Limit = PAGE_DEFAULT
) -> Page[BudgetView]:
    """All budgets, newest first, the archived ones too."""
    found = await services.budget_book.page(_scope(principal), before=cursor, limit=limit + 1)
    more = len(found) > limit
    return Page(
        data=[await budget_view(services, principal, budget) for budget in found[:limit]],
        has_more=more,
        next_cursor=found[limit - 1].id if more else None,
    )


@router.get("/{budget_id}")
async def get_budget(budget_id: BudgetPath, response: Response, principal: Reader, services: Here) -> BudgetView:
    """One budget, and what is left of it."""
    budget = await services.budget_book.find(_scope(principal), budget_id)
    etag(response, budget.version)
    return await budget_view(services, principal, budget)


@router.patch("/{budget_id}")
async def change_budget(
    budget_id: BudgetPath,
    body: BudgetChange,
    *,
    request: Request,
    response: Response,
    principal: CatalogWriter,
    services: Here,
) -> BudgetView:
    """Change a budget. Its subject and its period stay: archive it and make another."""
    scope, book = _scope(principal), services.budget_book
    amount = None if body.credits is None else units_of_millis(body.credits, principal.asset, param="credits")
    await _refuse_others(services, principal, (await book.find(scope, budget_id)).subject)
    expected = expected_version(request)

    async def act(transactions: Transactions) -> BudgetView:
        budget = await book.within(transactions).change(
            scope,
            budget_id,
            amount=amount,
            thresholds_bps=None if body.thresholds is None else _bps(body.thresholds),
            name=body.name,
            expected_version=expected,
        )
        return await budget_view(services, principal, budget, applied=amount is None)

    key = key_of(request, body, "budgets.change", about=budget_id, change=True)
    answer = await once(request, response, services, principal, key=key, act=act, view=BudgetView)
    services.changes.announce()
    if amount is not None:  # Whoever repeats it may do so because the ledger was away.
        await services.budgets.apply(await book.find(scope, budget_id), principal.asset.code)
    etag(response, answer.version)
    return answer


@router.post("/{budget_id}/archive")
async def archive_budget(
    budget_id: BudgetPath, request: Request, response: Response, principal: CatalogWriter, services: Here
) -> BudgetView:
    """End a budget for good: it bounds nothing any more. Repeating it changes nothing."""
    scope = _scope(principal)
    key = key_of(request, None, "budgets.archive", about=budget_id)
    await _refuse_others(services, principal, (await services.budget_book.find(scope, budget_id)).subject)

    async def act(transactions: Transactions) -> BudgetView:
        book = services.budget_book.within(transactions)
        budget = await book.find(scope, budget_id)
        if not budget.archived:
            budget = await book.change(scope, budget_id, archived=True)
        return await budget_view(services, principal, budget)

    answer = await once(request, response, services, principal, key=key, act=act, view=BudgetView)
    services.changes.announce()
    etag(response, answer.version)
    return answer


def _scope(principal: Principal) -> Scope:
    return Scope(principal.tenant_id, principal.mode)


def _bps(thresholds: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({percent * BPS_OF_PERCENT for percent in thresholds}))


async def _subject(services: Services, principal: Principal, named: SubjectBody) -> Subject:
    """Whose budget it is to be, whom this key may bound. A customer is created if you name them for the first time.

    Raises:
        ApiError: 400 where an id is missing or one too many, 403, 404.
    """
    subject_id = named.id
    if named.type == "tenant":
        if subject_id not in (None, principal.tenant_id):
            raise invalid_request("A tenant's budget is your own: leave subject.id out.", param="subject.id")
        subject_id = principal.tenant_id
    elif named.type == "customer" and subject_id is not None:
        subject_id = await services.customers.named(principal.tenant_id, principal.mode, subject_id, param="subject.id")
    elif subject_id is None and principal.app_id is not None and named.type != "customer":
        subject_id = principal.app_id if named.type == "app" else principal.key_id
    if subject_id is None:
        raise invalid_request(f"Name the {named.type}.", param="subject.id")
    subject = Subject(named.type, subject_id)
    await _refuse_others(services, principal, subject)
    if named.type == "app":
        await services.tenants.app(principal.tenant_id, subject_id)
    return subject


async def _refuse_others(services: Services, principal: Principal, subject: Subject) -> None:
    """An app's key bounds its own app, the keys of that, and customers; the rest is the tenant's.

    Raises:
        ApiError: 403; 404 for a key that there is not.
    """
    app_id: str | None = None
    if subject.type == "customer":
        return
    if subject.type == "app":
        app_id = subject.id
    if subject.type == "key":
        keys = await services.tenants.list_keys(principal.tenant_id)
        key = next((key for key in keys if key.id == subject.id and key.mode == principal.mode), None)
        if key is None:
            raise not_found(f"key {subject.id}")
        app_id = key.app_id
    if KeyScope.ADMIN not in principal.scopes and (app_id is None or app_id != principal.app_id):
        raise permission_denied(f"A budget of this {subject.type} needs a key with the scope admin.")
