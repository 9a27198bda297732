"""The listening socket, and the processes that share it.

How it works. The socket is bound before anything else, so that a busy port is known at once and a port 0 is resolved.
One process serves it itself; with more, a supervisor forks them, and each accepts from the same socket. A worker that
died is started anew. At the start, one that does not come up stops all, because the next one would not come up
either; once all have served, it is tried again and again, because what is away then comes back. SIGHUP reads the
settings anew and replaces the workers one by one: the next is ready before the last one goes, so that no request is
refused. What is slow to import is imported here only where it is needed: the counters that workers share must know of
each other before the first of them is made.
"""

import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from gateway.multiprocess import MULTIPROCESS_DIR
from gateway.settings import Settings, SettingsInvalid

BACKLOG: Final = 2048
RESTART_PAUSE_S: Final = 0.5
NOT_UP_PAUSE_S: Final = 2.0
"""After a worker that did not come up: starting one costs a second of a core."""

READY_POLL_S: Final = 0.01
WATCH_POLL_S: Final = 0.05
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
RETIRE_SIGNAL: Final = signal.SIGUSR1
"""Tells a worker that another has taken its place."""

ROLL_SIGNAL: Final = signal.SIGHUP
HANDLED: Final = (*STOP_SIGNALS, ROLL_SIGNAL)
READY: Final = b"1"


class CannotListen(Exception):
    """The address cannot be listened on; the message says why, and what to do."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; *port* 0 takes a free one.

    Raises:
        CannotListen
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise CannotListen(f"The address {host} is not usable: {error.strerror}.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise CannotListen(
            f"Port {port} on {host} cannot be listened on: {error.strerror}. Choose another with --port."
        ) from None
    listener.setblocking(False)
    return listener


def exit_on_sigterm() -> None:
    """End in good order when asked to stop before anything is served: what was opened is closed on the way out."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)


def serve(
    settings: Settings,
    listener: socket.socket,
    *,
    started: Callable[[], None] | None = None,
    reload: Callable[[], Settings] | None = None,
) -> int:
    """Serve until asked to stop; the exit code. *started* is called when connections are accepted.

    *reload* gives the settings of the workers that SIGHUP starts; by default these have the same ones.
    """
    if settings.workers > 1:
        return Supervisor(settings, listener, started=started, reload=reload).run()
    return _serve_here(settings, listener, started)


def _serve_here(settings: Settings, listener: socket.socket, started: Callable[[], None] | None) -> int:
    from gateway.logs import configure_logging, secrets_of  # noqa: PLC0415 - see above
    from gateway.server import serve_here  # noqa: PLC0415

    configure_logging(settings.log_level, secrets=secrets_of(settings))
    return serve_here(settings, listener, started=started)


class Supervisor:
    """Several processes on one socket."""

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        *,
        started: Callable[[], None] | None = None,
        reload: Callable[[], Settings] | None = None,
    ) -> None:
        self._settings = settings
        self._reload = reload
        self._listener = listener
        self._started = started
        self._workers: dict[int, int] = {}
        self._newest = 0
        self._ready: set[int] = set()
        self._stopping = False
        self._serving = False
        self._roll_asked = False
        self._roll: Roll | None = None
        self._retired: set[int] = set()
        # The supervisor alone holds the other end open: when it is gone, however it went, its workers read the end.
        self._lifeline, self._held = os.pipe()

    def run(self) -> int:
        """Until asked to stop and every worker has; 0, or 1 when a worker could not start in the beginning."""
        with tempfile.TemporaryDirectory(prefix="farebox-metrics-") as folder:
            os.environ[MULTIPROCESS_DIR] = folder
            before = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}
            before[ROLL_SIGNAL] = signal.signal(ROLL_SIGNAL, self._ask_for_roll)
            try:
                for _ in range(self._settings.workers):
                    self._fork()
                self._serving = self._all_came_up()
                if self._serving and self._started is not None:
                    self._started()
                return self._watch()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
                del os.environ[MULTIPROCESS_DIR]

    def _ask_for_roll(self, number: int, frame: FrameType | None) -> None:
        self._roll_asked = True

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        # Nobody accepts here: while this one is open, the kernel would take connections that nobody will serve.
        self._listener.close()
        for worker in self._workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGTERM)

    def _fork(self) -> None:
        """One more worker, unless they are to stop."""
        # A signal between the fork and the note of it would leave a worker that nobody stops.
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        try:
            if self._stopping:
                return
            ready, tell = os.pipe()
            os.set_blocking(ready, False)
            worker = os.fork()
            if worker == 0:
                self._work(ready, tell)
            os.close(tell)
            self._workers[worker] = ready
            self._newest = worker
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)

    def _work(self, ready: int, tell: int) -> None:
        """The whole life of a worker; it never returns."""
        code = 1
        try:
            os.close(ready)
            os.close(self._held)
            threading.Thread(target=_stop_when_orphaned, args=(self._lifeline,), daemon=True).start()
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(ROLL_SIGNAL, signal.SIG_IGN)  # A terminal sends it to all; the supervisor deals with it.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
            code = _serve_here(self._settings, self._listener, lambda: _tell(tell))
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _all_came_up(self) -> bool:
        """Whether every worker accepts connections; waits until all do, one has ended, or they are to stop."""
        while not self._stopping and not any(_ended(worker) for worker in self._workers):
            if all(map(self._came_up, self._workers)):
                return True
            time.sleep(READY_POLL_S)
        return False

    def _came_up(self, worker: int) -> bool:
        """Whether the worker has told that it accepts connections."""
        if worker not in self._ready and _told(self._workers[worker]):
            self._ready.add(worker)
        return worker in self._ready

    def _watch(self) -> int:
        code = 0
        while self._workers:
            worker, status = os.waitpid(-1, os.WNOHANG)
            if worker == 0:
                self._go_on_with_roll()
                time.sleep(WATCH_POLL_S)
            elif worker in self._workers:
                code = self._ended(worker, status) or code
        return code

    def _ended(self, worker: int, status: int) -> int:
        """Deal with a worker's end; 1 where it makes all of us fail."""
        came_up = self._came_up(worker)
        os.close(self._workers.pop(worker))
        _forget_gauges(worker)
        if self._stopping:
            return 0 if status == 0 or _stopped_early(status, came_up) else 1
        retired = worker in self._retired
        self._retired.discard(worker)
        if not retired or status != 0:
            _say(f"worker {worker} ended with {os.waitstatus_to_exitcode(status)}")
        if retired:
            return 0
        if self._roll is not None and worker == self._roll.newest and not came_up:
            self._roll = None
            _say("the new worker did not come up, so the others stay as they are")
            return 0
        if not came_up and not self._serving:
            self._stop(signal.SIGTERM, None)
            return 1
        if self._roll is not None:
            self._roll.old.discard(worker)
        time.sleep(RESTART_PAUSE_S if came_up else NOT_UP_PAUSE_S)
        self._fork()
        return 0

    def _go_on_with_roll(self) -> None:
        """Begin to replace the workers, or replace the next one whose successor is ready."""
        if self._stopping:
            return
        roll = self._roll
        if roll is None:
            if self._roll_asked:
                self._roll_asked = False
                self._roll = self._begin_roll()
        elif self._came_up(roll.newest):
            if roll.old:
                self._retire(roll.old.pop())
            if roll.old:
                self._fork()
                roll.newest = self._newest
            else:
                self._roll = None
                _say("all workers were replaced")

    def _begin_roll(self) -> "Roll | None":
        try:
            if self._reload is not None:
                self._settings = self._reload()
        except SettingsInvalid as error:
            _say(f"the workers stay as they are. {error}")
            return None
        old = set(self._workers) - self._retired
        self._fork()
        return Roll(old=old, newest=self._newest)

    def _retire(self, worker: int) -> None:
        self._retired.add(worker)
        with suppress(ProcessLookupError):
            os.kill(worker, RETIRE_SIGNAL)


@dataclass(slots=True)
class Roll:
    """A replacement of the workers that is under way: those to be replaced, and the newest of the new ones."""

    old: set[int]
    newest: int


def _say(what: str) -> None:
    print(f"farebox: {what}", file=sys.stderr, flush=True)  # noqa: T201


def _stop_when_orphaned(lifeline: int) -> None:
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _stopped_early(status: int, came_up: bool) -> bool:
    """Whether a worker was asked to stop before it could serve anything: there was nothing to finish."""
    return not came_up and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


def _forget_gauges(worker: int) -> None:
    """Take a dead worker's gauges out of the sum."""
    for file in Path(os.environ[MULTIPROCESS_DIR]).glob(f"gauge_live*_{worker}.db"):
        file.unlink(missing_ok=True)


def _tell(pipe: int) -> None:
    os.write(pipe, READY)


def _told(pipe: int) -> bool:
    try:
        return os.read(pipe, 1) == READY
    except BlockingIOError:
        return False


def _ended(worker: int) -> bool:
    return os.waitid(os.P_PID, worker, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
