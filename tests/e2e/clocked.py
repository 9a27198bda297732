"""`farebox …` with a clock that is off from the machine's by what FILE says: `python -m tests.e2e.clocked FILE …`.

Only the time of day steps. What measures a wait has a clock of its own, which never does, on real machines too.
"""

import mmap
import sys
import time
from collections.abc import Callable
from pathlib import Path

OFFSET_BYTES = 8


def stepped(file: Path) -> Callable[[], int]:
    """The time of day in nanoseconds, off by the number in *file*."""
    with file.open("rb") as opened:
        offset = mmap.mmap(opened.fileno(), OFFSET_BYTES, prot=mmap.PROT_READ)
    real_ns = time.time_ns
    return lambda: real_ns() + int.from_bytes(offset[:OFFSET_BYTES], "little", signed=True)


def main() -> None:
    _, file, *arguments = sys.argv
    time_ns = stepped(Path(file))
    time.time_ns = time_ns
    time.time = lambda: time_ns() / 10**9
    sys.argv = ["farebox", *arguments]
    from gateway.cli import main  # noqa: PLC0415 - after the clock

    main()


if __name__ == "__main__":
    main()
