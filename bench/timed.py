"""A gateway as one worker serves it, which notes how long each entitlement check took inside the server.

How it works. A check's time runs from when the parser has seen its first byte until its answer has been handed to the
transport: all that the process does for it, and all that it lets it wait for. On SIGUSR2 what was noted is written to
the file that is named on the command line, as microseconds, and forgotten.
"""

import json
import os
import signal
import sys
from array import array
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Final

from gateway import server, supervisor
from gateway.api.entitlements import route_of
from gateway.cli.shared import settings_from

TIMES: Final = array("d")


class Timed(server.Connection):
    _began_s = 0.0

    def on_message_begin(self) -> None:
        self._began_s = perf_counter()
        super().on_message_begin()

    def on_response_complete(self) -> None:
        if route_of(self.cycle.scope):
            TIMES.append((perf_counter() - self._began_s) * 1e6)
        super().on_response_complete()


def main() -> None:
    written = Path(sys.argv[1])

    def write(number: int, frame: FrameType | None) -> None:
        part = written.with_suffix(".part")
        part.write_text(json.dumps(list(TIMES)))
        del TIMES[:]
        os.replace(part, written)

    signal.signal(signal.SIGUSR2, write)
    server.Connection = Timed  # type: ignore[misc]
    settings = settings_from(None)
    listener = supervisor.listen(settings.host, settings.port)
    sys.exit(server.serve_here(settings, listener))


if __name__ == "__main__":
    main()
