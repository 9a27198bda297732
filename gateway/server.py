"""One serving process: uvicorn on a socket that is bound already, and an end in good order.

How it works. SIGTERM or SIGINT says that the process is to go, in steps that lose nobody's request:

1. `/health/ready` answers 503, and every response asks its client to close the connection. New connections and requests
   are still served, for `drain_delay_s`: until the load balancers have noticed.
2. It stops listening. A connection that the kernel has taken already is served like the others. One that is idle
   stays open for LINGER_S after its last response, because the next request may be on its way, and is then served.
3. What is under way finishes, for `shutdown_grace_s`. What is left is cancelled and settled; the process ends with 0.

A worker whose place another has taken gets RETIRE_SIGNAL: it begins at the second step, since its host remains ready.
"""

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final, cast

import uvicorn
from starlette.types import Scope
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable
from uvicorn._types import Scope as UvicornScope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from gateway.api.entitlements import Answer
from gateway.app import Gateway
from gateway.errors import invalid_request
from gateway.ids import new_id
from gateway.logs import AccessLog
from gateway.settings import Settings
from gateway.supervisor import RETIRE_SIGNAL

KEEPALIVE_S: Final = 75
"""Longer than the usual client's, so that it is the client who closes an idle connection."""

LINGER_S: Final = 2.0
"""How long an idle connection is kept open for a request that may be on its way, when the process is to end."""

HEAD_BYTES_MAX: Final = 64 * 1024
"""Of a request's line and headers together, give or take what one read from the socket brings."""

UNREAD_BYTES_MAX: Final = 16 * 1024
"""How much of what was written may wait for the client where an answer is written at once: one more does not fill the
transport's buffer, for which an answer would have to wait."""

POLL_S: Final = 0.05
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, RETIRE_SIGNAL)


class State(ServerState):
    """uvicorn's, which all connections share.

    Attributes:
        draining: responses ask their clients to close the connection.
        answer_at_once: what needs nobody else to be answered.
    """

    draining = False

    def __init__(self, answer_at_once: Callable[[Scope], Answer | None] = lambda scope: None) -> None:
        super().__init__()
        self.answer_at_once = answer_at_once


class Connection(HttpToolsProtocol):
    """uvicorn's, with three changes: it bounds a request's line and headers, it answers with our envelope to what is
    not HTTP, and it ends in such a way that no request is lost."""

    _in_head = False
    _head_bytes = 0
    _idle_since_s = 0.0
    server_state: State

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        if self._head_bytes > HEAD_BYTES_MAX:
            self._in_head = False
            self.send_400_response(f"The request line and the headers have more than {HEAD_BYTES_MAX} bytes.")

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()
        if self.server_state.draining:
            self.cycle.keep_alive = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """A request whose answer is at hand is answered while it is read: a task would wait for its turn, behind all
        that came in with it."""
        answer = None
        # Nothing may have to be waited for, and no further request may begin where this one ends.
        unread = self.flow.write_paused or self.transport.get_write_buffer_size() > UNREAD_BYTES_MAX
        if not (unread or self.pipeline or self.server_state.draining or self.transport.is_closing()):
            answer = self.server_state.answer_at_once(cast(Scope, cycle.scope))
        if answer is None:
            super()._start_asgi_task(cycle, app)
            return
        with suppress(StopIteration):
            cycle.run_asgi(_Written(answer)).send(None)
            raise AssertionError("an answer that was at hand had to wait")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._idle_since_s = self.loop.time()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._idle_since_s = self.loop.time()
        if self.server_state.draining and self._idle:
            self._linger()

    def drain(self) -> None:
        """Ask the client to close the connection, in the response that is under way.

        A response that has begun has told its client that the connection stays open. It does, for a while.
        """
        if not self._idle and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """End soon: at once where nothing is under way and nothing is likely to come, else after the response."""
        self.drain()
        if self._idle and not self._in_head:
            self._linger()

    @property
    def _idle(self) -> bool:
        return (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing()

    def _linger(self) -> None:
        """Close when LINGER_S have passed since the last response, unless a request comes before."""
        self._unset_keepalive_if_required()
        close_at_s = self._idle_since_s + LINGER_S
        self.timeout_keep_alive_task = self.loop.call_at(close_at_s, self.timeout_keep_alive_handler)

    def send_400_response(self, msg: str) -> None:
        body = invalid_request(msg).to_body(new_id("req"))
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()


class _Written:
    """An answer as an application that waits for nothing."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def __call__(self, scope: UvicornScope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._answer.headers, "trailers": False})
        await send({"type": "http.response.body", "body": self._answer.body, "more_body": False})


class Server(uvicorn.Server):
    """uvicorn's server, which ends with 0 when it was asked to stop, and tells when it accepts connections."""

    server_state: State

    def __init__(self, gateway: Gateway, settings: Settings, *, started: Callable[[], None] | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                gateway,
                loop="uvloop",
                http=Connection,
                ws="none",
                lifespan="on",
                access_log=False,
                log_config=None,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=KEEPALIVE_S,
                timeout_graceful_shutdown=max(1, round(settings.shutdown_grace_s)),
            )
        )
        self.server_state = State(gateway.answer_at_once)
        self._gateway = gateway
        self._drain_delay_s = settings.drain_delay_s
        self._on_started = started
        self._retiring = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._on_started is not None:
            self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.server_state.draining = True
        for connection in self.server_state.connections:
            cast(Connection, connection).drain()
        if not self._retiring:
            self._gateway.draining = True
            await self._let_balancers_notice()
        await self._stop_listening(sockets or [])
        await super().shutdown([])

    async def _let_balancers_notice(self) -> None:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._drain_delay_s
        while loop.time() < until_s and not self.force_exit:  # noqa: ASYNC110 - a signal's handler cannot wake it
            await asyncio.sleep(min(POLL_S, self._drain_delay_s))

    async def _stop_listening(self, sockets: list[socket.socket]) -> None:
        """Close the listening sockets, and serve the connections that the kernel has taken for them already.

        Closing a socket resets these; a client would see its request fail that another gateway could have served.
        """
        held = [listener.dup() for listener in sockets]
        for server in self.servers:
            server.close()
        for listener in sockets:
            listener.close()
        taken = []
        for listener in held:
            with listener:
                listener.setblocking(False)
                taken += list(_taken_by(listener))
        loop = asyncio.get_running_loop()
        for connection in taken:
            await loop.connect_accepted_socket(self._connection, connection)

    def _connection(self) -> Connection:
        return Connection(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._retiring = self._retiring or (sig == RETIRE_SIGNAL and not self.should_exit)
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn raises the signal again when it has stopped, and the process would end with -15."""
        before = {number: signal.signal(number, self.handle_exit) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _taken_by(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections that wait to be accepted."""
    while True:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        yield connection


def serve_here(settings: Settings, listener: socket.socket, *, started: Callable[[], None] | None = None) -> int:
    """Serve in this process until asked to stop; the exit code. *started* is called when connections are accepted."""
    gateway = Gateway(settings, access_log=AccessLog().write if settings.access_log else None)
    Server(gateway, settings, started=started).run([listener])
    return 0
