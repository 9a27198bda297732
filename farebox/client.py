"""The client for code that waits for answers where it asks."""

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

import httpx

from farebox import calls, catalog_calls, payment_calls
from farebox.call import Again, Answer, Call, Exchange, Page, Pages, Retries
from farebox.connection import CLOSED, TIMEOUT_S, Access, Body, repeatable
from farebox.errors import FareboxError, ReservationSettled
from farebox.methods import shown_as
from farebox.values import ReservationState, Settled

P = ParamSpec("P")
T = TypeVar("T")


def sending(build: Callable[P, Call[T]]) -> "Callable[Concatenate[Client, P], T]":
    """A method that sends what *build* makes."""

    @shown_as(build)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(build(*args, **kwargs))

    return method


def iterating(build: Callable[P, Pages[T]]) -> "Callable[Concatenate[Client, P], Iterator[T]]":
    """A method that reads the pages of what *build* makes, each when it is reached."""

    @shown_as(build)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self.iterate(build(*args, **kwargs))

    return method


def reserving(build: Callable[P, Call[ReservationState]]) -> "Callable[Concatenate[Client, P], Reservation]":
    @shown_as(build)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> "Reservation":
        return Reservation(self, self.send(build(*args, **kwargs)))

    return method


def of_reservation(build: Callable[Concatenate[str, P], Call[T]]) -> "Callable[Concatenate[Reservation, P], T]":
    """A method that sends what *build* makes for its reservation."""

    @shown_as(build, given=1)
    def method(self: "Reservation", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(build(self.id, *args, **kwargs))

    return method


class Client:
    """Farebox. One is enough for all threads; close it, or use it with `with`.

    Args:
        base_url: ends in `/v1`; by default FAREBOX_BASE_URL.
        api_key: `fb_live_…` or `fb_test_…`; by default FAREBOX_API_KEY.
        timeout_s: for each attempt: so long nothing may come.
        retries: how often and how soon a call is sent again.
        transport: instead of httpx's own.

    Raises:
        ValueError: for an address or a key that nobody gives.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: Retries | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._access = Access.of(base_url, api_key)
        self._retries = retries or Retries()
        self._http = httpx.Client(transport=transport, **self._access.options(timeout_s))

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

    def send(self, call: Call[T]) -> T:
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
                outcome = exchange.heard(self._attempt(call))
            except httpx.RequestError as error:
                outcome = exchange.failed(error, repeatable=repeatable(error))
            if not isinstance(outcome, Again):
                return outcome.value
            time.sleep(outcome.after_s)

    def iterate(self, pages: Pages[T]) -> Iterator[T]:
        """Everything in a list, from page to page."""
        call: Call[Page[T]] | None = pages.first
        while call is not None:
            page = self.send(call)
            yield from page.data
            call = pages.after(page)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._access.base_url!r})"

    def _attempt(self, call: Call[T]) -> Answer:
        url = f"{self._access.base_url}/{call.path}"
        with self._http.stream(
            call.method, url, params=call.query or None, content=call.body, headers=call.headers
        ) as response:
            body = Body()
            for chunk in response.iter_bytes():
                body.add(chunk)
            return Answer(response.status_code, response.headers, body.whole())


class Reservation:
    """Credits that are held for a task.

    With `with`, leaving the block without a final commit releases what is held, and so does an exception.

    Attributes:
        state: as it was when it was made; `Client.get_reservation` tells how it is.
    """

    def __init__(self, client: Client, state: ReservationState) -> None:
        self._client = client
        self._settled = False
        self.state = state

    @property
    def id(self) -> str:
        return self.state.id

    commit = of_reservation(calls.commit)
    release = of_reservation(calls.release)
    extend = of_reservation(calls.extend)

    def send(self, call: Call[T]) -> T:
        """Send a call about this reservation."""
        answer = self._client.send(call)
        self._settled = self._settled or settles(answer)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._settled:
            return
        try:
            self.release()
        except ReservationSettled:
            pass  # By somebody else: nothing is held any more.
        except FareboxError as failure:
            if error is None:
                raise
            error.add_note(NOT_RELEASED.format(id=self.id, failure=failure))

    def __repr__(self) -> str:
        return f"Reservation({self.id!r})"


NOT_RELEASED = "The reservation {id} could not be released, and is until its time runs out: {failure}"


def settles(answer: object) -> bool:
    """Whether nothing is held after this answer."""
    return isinstance(answer, Settled) and answer.status != "active"
