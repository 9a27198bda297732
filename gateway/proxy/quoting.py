"""The quote of a request: its prompt counted, its worst case priced, and how much of it to reserve.

Two policies. A stream of a model whose tokens all show reserves its prompt and a first slice of output, and extends
the reservation as it goes. Everything else reserves the worst case; where the wallet affords less, the output limit is
lowered to what it affords, unless the client refuses that.
"""

import asyncio
from decimal import Decimal
from functools import partial
from typing import Final

import msgspec

from gateway.billing.catalog import Catalog, MetricNotFound, MetricNotPriced
from gateway.errors import ApiError, invalid_request
from gateway.identity.principals import Principal
from gateway.proxy.payer import Payer
from gateway.proxy.request import ChatRequest
from gateway.proxy.routing import Candidate, Route
from gateway.proxy.tariff import Action, Tariff
from gateway.settings import Settings
from ledger.commands import ReserveLeg
from ledger.model import Tags
from pricing.charge import Charge, ChargeTooLarge
from pricing.metering import cost
from pricing.quote import Quote, affordable_ceiling, dearest, expected_output, prompt_with_margin, worst_charge
from pricing.tokens import PromptCounter, RequestInvalid, needs_thread
from pricing.usage import Usage

PROMPT_PARTS: Final = ("tools", "functions", "response_format")
"""Fields beside the messages that count as prompt."""

ONE: Final = Decimal(1)
"""An action is one unit of its metric."""

OUTPUT_TOKENS_LEAST: Final = 16
"""An answer is not clamped to fewer tokens than this: the request is refused instead."""


class Plan(msgspec.Struct, frozen=True):
    """A request, quoted.

    Attributes:
        candidate: of the route's candidates the dearest: what is reserved covers any of them.
        tariff: of that candidate.
        prompt_tokens_max: the prompt with the margin on our own count.
        ceiling: the most output tokens of all choices together.
        extends: reserve a first slice and extend it, rather than reserve the worst case.
        legs: what to reserve.
        expected: the usage of a typical answer; what an unanswered call is charged if nobody comes back to it.
    """

    request: ChatRequest
    route: Route
    candidate: Candidate
    tariff: Tariff
    quote: Quote
    prompt_tokens: int
    prompt_tokens_max: int
    ceiling: int
    extends: bool
    legs: tuple[ReserveLeg, ...]
    expected: Usage

    def tags(self, app_id: str | None) -> Tags:
        """What the charge is for, as blocks can be restricted by it."""
        metric = None if self.tariff.action is None else self.tariff.action.metric
        if metric is None:
            return Tags(app=app_id, model=self.request.model)
        return msgspec.structs.replace(metric.tags(app_id), model=self.request.model)

    def clamped(self, budget: int) -> int | None:
        """The output limit of each choice that *budget* affords, None where it affords the worst case."""
        if self.extends or budget >= sum(leg.amount for leg in self.legs):
            return None
        affords = min(
            affordable_ceiling(
                candidate.card,
                prompt_tokens=self.prompt_tokens,
                budget=budget,
                markup_bps=self.tariff.markup_bps if self.tariff.action is None else 0,
                asset=self.tariff.asset,
                output_audio=self.request.audio,
            )
            for candidate in self.route.candidates
        )
        return max(1, affords // self.request.choices)


class Quoter:
    """Turns requests into plans."""

    def __init__(self, settings: Settings, counter: PromptCounter, catalog: Catalog) -> None:
        self._settings = settings
        self._counter = counter
        self._catalog = catalog
        self._actions = {action.key: action.credits for action in settings.actions}

    async def plan(
        self,
        request: ChatRequest,
        route: Route,
        *,
        principal: Principal,
        payer: Payer,
        at_us: int,
        action: str | None = None,
        clamping: bool = True,
        max_cost: str | None = None,
    ) -> Plan:
        """Quote *request*.

        Args:
            at_us: the time at whose prices it is charged.

        Raises:
            ApiError: 400 where the request cannot be counted or priced, names an action that there is not, or could
                cost more than *max_cost*, decimal credits.
            DatabaseUnavailable: nobody can say what the action costs.
        """
        prompt_tokens = await self._count(request, route)
        ceiling = request.output_tokens_max or route.output_ceiling(prompt_tokens)
        try:
            card, worst = dearest(
                [candidate.card for candidate in route.candidates],
                prompt_tokens=prompt_tokens,
                output_tokens_max=ceiling,
                n=request.choices,
                markup_bps=payer.markup_bps,
                asset=principal.asset,
                margin_bps=self._settings.count_margin_bps,
                output_audio=request.audio,
            )
        except ChargeTooLarge:
            raise invalid_request("This request could cost more than any account holds.", param="max_tokens") from None
        candidate = next(candidate for candidate in route.candidates if candidate.card is card)
        tariff = Tariff(
            card=card,
            markup_bps=payer.markup_bps,
            asset=principal.asset,
            action=None if action is None else await self._action(action, principal, at_us),
        )
        extends = request.stream and clamping and tariff.action is None
        extends = extends and not (route.hidden_reasoning or request.audio)
        plan = Plan(
            request=request,
            route=route,
            candidate=candidate,
            tariff=tariff,
            quote=worst,
            prompt_tokens=prompt_tokens,
            prompt_tokens_max=prompt_with_margin(prompt_tokens, margin_bps=self._settings.count_margin_bps),
            ceiling=ceiling * request.choices,
            extends=extends,
            legs=(),
            expected=Usage(input=prompt_tokens, output=expected_output(ceiling, request.choices)),
        )
        _require_max_cost(plan, max_cost)
        return msgspec.structs.replace(plan, legs=self._legs(plan, payer, clamping=clamping))

    async def _count(self, request: ChatRequest, route: Route) -> int:
        counter, model = self._counter, route.candidates[0].model
        count = partial(
            counter.count_messages,
            request.messages,
            request.part("tools"),
            model,
            functions=request.part("functions"),
            response_format=request.part("response_format"),
        )
        beside = sum(len(bytes(request.part(name) or b"")) for name in PROMPT_PARTS)
        try:
            if needs_thread(counter.uncounted_bytes(request.messages, model) + beside):
                return await asyncio.to_thread(count)
            return count()
        except RequestInvalid as error:
            raise invalid_request(str(error), param=error.param) from None

    async def _action(self, key: str, principal: Principal, at_us: int) -> Action:
        """The product action *key*: the tenant's metric of that name, or else the installation's."""
        asset, tenant, mode = principal.asset, principal.tenant_id, principal.mode
        served_in_outage = principal.open_allowance > 0
        try:
            metric = await self._catalog.priced(tenant, mode, key, at_us=at_us, through_outage=served_in_outage)
        except MetricNotPriced:
            message = f"The product action {key[:64]!r} has no metering rule in force."
            raise invalid_request(message, param="X-Quota-Action") from None
        except MetricNotFound:
            if key not in self._actions:
                raise invalid_request(f"There is no product action {key[:64]!r}.", param="X-Quota-Action") from None
            return Action(key=key, price=asset.parse(self._actions[key]))
        return Action(key=key, price=cost(metric.rule, ONE, asset), metric=metric)

    def _legs(self, plan: Plan, payer: Payer, *, clamping: bool) -> tuple[ReserveLeg, ...]:
        """What to reserve: an amount, and the least that the request is served with."""
        least_output = min(plan.ceiling, OUTPUT_TOKENS_LEAST * plan.request.choices)
        if plan.extends:
            first = min(plan.ceiling, self._settings.first_slice_tokens * plan.request.choices)
            amount = self._worst(plan, first).total
            least = plan.tariff.total(Usage(input=plan.prompt_tokens, output=least_output))
            return (ReserveLeg(wallets=payer.wallets, amount=amount, minimum=min(least, amount)),)
        amount = plan.quote.worst.total
        least = amount if not clamping else self._worst(plan, least_output).total
        if plan.tariff.action is None:
            return (ReserveLeg(wallets=payer.wallets, amount=amount, minimum=min(least, amount)),)
        price = plan.tariff.action.price
        subsidy = max(0, plan.quote.worst.base - price)
        subsidy_least = subsidy if not clamping else max(0, self._worst(plan, least_output).base - price)
        return (
            ReserveLeg(wallets=payer.wallets, amount=price, minimum=price),
            ReserveLeg(wallets=(payer.developer_wallet,), amount=subsidy, minimum=min(subsidy_least, subsidy)),
        )

    def _worst(self, plan: Plan, output_tokens: int) -> Charge:
        """The most that *output_tokens* of all choices together can cost."""
        return worst_charge(
            plan.tariff.card,
            prompt_tokens=plan.prompt_tokens,
            output_tokens=output_tokens,
            markup_bps=plan.tariff.markup_bps,
            asset=plan.tariff.asset,
            margin_bps=self._settings.count_margin_bps,
            output_audio=plan.request.audio,
        )


def _require_max_cost(plan: Plan, max_cost: str | None) -> None:
    if max_cost is None:
        return
    asset, name = plan.tariff.asset, "X-Quota-Max-Cost"
    try:
        most = asset.parse(max_cost)
    except ValueError:
        raise invalid_request(f"{name} must be decimal credits, such as 0.5.", param=name) from None
    action = plan.tariff.action
    worst = plan.quote.worst.total if action is None else action.price
    if worst > most:
        facts = {"needed": asset.to_millis(worst), "needed_decimal": asset.format(worst)}
        message = f"This request could cost {asset.format(worst)} credits, more than {name} allows. Lower max_tokens."
        raise ApiError("invalid_request", message, param=name, facts=facts)
