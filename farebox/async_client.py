"""The client for code under asyncio: the same calls, awaited."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import httpx

from farebox import calls, catalog_calls, payment_calls
from farebox.call import Again, Answer, Call, Exchange, Page, Pages, Retries
from farebox.client import NOT_RELEASED, settles
from farebox.connection import CLOSED, TIMEOUT_S, Access, Body, repeatable
from farebox.errors import FareboxError, ReservationSettled
from farebox.methods import shown_as
from farebox.values import ReservationState

P = ParamSpec("P")
T = TypeVar("T")


def sending(build: Callable[P, Call[T]]) -> "Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]":
    """A method that sends what *build* makes."""

    @shown_as(build)
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.send(build(*args, **kwargs))

    return method


def iterating(build: Callable[P, Pages[T]]) -> "Callable[Concatenate[AsyncClient, P], AsyncIterator[T]]":
    """A method that reads the pages of what *build* makes, each when it is reached."""

    @shown_as(build)
    def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return self.iterate(build(*args, **kwargs))

    return method


def reserving(build: Callable[P, Call[ReservationState]]) -> "Callable[Concatenate[AsyncClient, P], Reserving]":
    @shown_as(build)
    def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> "Reserving":
        return Reserving(self, build(*args, **kwargs))

    return method


def of_reservation(
    build: Callable[Concatenate[str, P], Call[T]],
) -> "Callable[Concatenate[AsyncReservation, P], Coroutine[Any, Any, T]]":
    """A method that sends what *build* makes for its reservation."""

    @shown_as(build, given=1)
    async def method(self: "AsyncReservation", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.send(build(self.id, *args, **kwargs))

    return method


class AsyncClient:
    """Farebox, for one event loop. Close it, or use it with `async with`. Its arguments are those of `Client`."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: Retries | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._access = Access.of(base_url, api_key)
        self._retries = retries or Retries()
        self._http = httpx.AsyncClient(transport=transport, **self._access.options(timeout_s))

    create_customer = sending(calls.create_customer)
    get_customer = sending(calls.get_customer)
    customers = iterating(calls.customers)
    update_customer = sending(calls.update_customer)
    delete_customer = sending(calls.delete_customer)

    grant = sending(calls.grant)
    credits = sending(calls.credits)
    transactions = iterating(calls.transactions)
    revoke = sending(calls.revoke)
    refund = sending(calls.refund)
    buy_pack = sending(calls.buy_pack)

    check_entitlement = sending(calls.check_entitlement)
    record_usage = sending(calls.record_usage)
    record_usage_batch = sending(calls.record_usage_batch)
    usage = iterating(calls.usage)

    reserve = reserving(calls.reserve)
    get_reservation = sending(calls.get_reservation)
    commit = sending(calls.commit)
    release = sending(calls.release)
    extend = sending(calls.extend)

    events = iterating(calls.events)
    get_event = sending(calls.get_event)
    redeliver_event = sending(calls.redeliver_event)

    packages = iterating(payment_calls.packages)
    create_checkout = sending(payment_calls.create_checkout)
    get_order = sending(payment_calls.get_order)
    orders = iterating(payment_calls.orders)

    create_metric = sending(catalog_calls.create_metric)
    metrics = iterating(catalog_calls.metrics)
    archive_metric = sending(catalog_calls.archive_metric)
    create_rule = sending(catalog_calls.create_rule)
    rules = iterating(catalog_calls.rules)
    archive_rule = sending(catalog_calls.archive_rule)
    create_pack = sending(catalog_calls.create_pack)
    packs = iterating(catalog_calls.packs)
    create_budget = sending(catalog_calls.create_budget)
    budgets = iterating(catalog_calls.budgets)
    archive_budget = sending(catalog_calls.archive_budget)
    create_webhook_endpoint = sending(catalog_calls.create_webhook_endpoint)
    webhook_endpoints = iterating(catalog_calls.webhook_endpoints)
    delete_webhook_endpoint = sending(catalog_calls.delete_webhook_endpoint)

    async def send(self, call: Call[T]) -> T:
        """Send a call until it is answered.

        Raises:
            FareboxError: what the answer says, or that there is none.
            RuntimeError: the client is closed.
        """
        exchange = Exchange(call, self._retries)
        while True:
            if self._http.is_closed:
                raise RuntimeError(CLOSED)
            try:
                outcome = exchange.heard(await self._attempt(call))
            except httpx.RequestError as error:
                outcome = exchange.failed(error, repeatable=repeatable(error))
            if not isinstance(outcome, Again):
                return outcome.value
            await asyncio.sleep(outcome.after_s)

    async def iterate(self, pages: Pages[T]) -> AsyncIterator[T]:
        """Everything in a list, from page to page."""
        call: Call[Page[T]] | None = pages.first
        while call is not None:
            page = await self.send(call)
            for each in page.data:
                yield each
            call = pages.after(page)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self._access.base_url!r})"

    async def _attempt(self, call: Call[T]) -> Answer:
        url = f"{self._access.base_url}/{call.path}"
        async with self._http.stream(
            call.method, url, params=call.query or None, content=call.body, headers=call.headers
        ) as response:
            body = Body()
            async for chunk in response.aiter_bytes():
                body.add(chunk)
            return Answer(response.status_code, response.headers, body.whole())


class AsyncReservation:
    """As `Reservation`, for `async with`."""

    def __init__(self, client: AsyncClient, state: ReservationState) -> None:
        self._client = client
        self._settled = False
        self.state = state

    @property
    def id(self) -> str:
        return self.state.id

    commit = of_reservation(calls.commit)
    release = of_reservation(calls.release)
    extend = of_reservation(calls.extend)

    async def send(self, call: Call[T]) -> T:
        """Send a call about this reservation."""
        answer = await self._client.send(call)
        self._settled = self._settled or settles(answer)
        return answer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._settled:
            return
        try:
            await self.release()
        except ReservationSettled:
            pass  # By somebody else: nothing is held any more.
        except FareboxError as failure:
            if error is None:
                raise
            error.add_note(NOT_RELEASED.format(id=self.id, failure=failure))

    def __repr__(self) -> str:
        return f"AsyncReservation({self.id!r})"


class Reserving(Awaitable[AsyncReservation]):
    """A reservation to come: `await` it, or enter it at once with `async with`."""

    def __init__(self, client: AsyncClient, call: Call[ReservationState]) -> None:
        self._client = client
        self._call = call
        self._made: AsyncReservation | None = None

    def __await__(self) -> Generator[Any, None, AsyncReservation]:
        return self._make().__await__()

    async def __aenter__(self) -> AsyncReservation:
        self._made = await self._make()
        return self._made

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._made is not None
        await self._made.__aexit__(kind, error, trace)

    async def _make(self) -> AsyncReservation:
        return AsyncReservation(self._client, await self._client.send(self._call))
