"""One serving process: uvicorn on a socket that is bound already, and an end in good order.

SIGTERM or SIGINT stops accepting, lets requests finish for `shutdown_grace_s`, settles what is left, and ends with 0.
"""

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.app import Gateway
from gateway.errors import invalid_request
from gateway.ids import new_id
from gateway.settings import Settings

KEEPALIVE_S: Final = 75
"""Longer than the usual client's, so that it is the client who closes an idle connection."""

HEAD_BYTES_MAX: Final = 64 * 1024
"""Of a request's line and headers together, give or take what one read from the socket brings."""

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class Connection(HttpToolsProtocol):
    """uvicorn's, which bounds a request's line and headers, and answers with our envelope to what is not HTTP."""

    _in_head = False
    _head_bytes = 0

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

    def send_400_response(self, msg: str) -> None:
        body = invalid_request(msg).to_body(new_id("req"))
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, which ends with 0 when it was asked to stop, and tells when it accepts connections."""

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
        self._gateway = gateway
        self._on_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._on_started is not None:
            self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._gateway.draining = True
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn raises the signal again when it has stopped, and the process would end with -15."""
        before = {number: signal.signal(number, self.handle_exit) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve_here(settings: Settings, listener: socket.socket, *, started: Callable[[], None] | None = None) -> int:
    """Serve in this process until asked to stop; the exit code. *started* is called when connections are accepted."""
    Server(Gateway(settings), settings, started=started).run([listener])
    return 0
