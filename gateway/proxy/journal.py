"""The settlement journal: what the ledger could not be told is kept on local disk until it can.

How it works. One file for each process, appended to and synced before anybody relies on it, and locked for the life of
the process. Replaying is safe at any time and any number of times, because a settlement names its reservation and
its command. At start a process adopts the files whose lock nobody holds: their owners are dead.
"""

import asyncio
import fcntl
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

import msgspec

from gateway.ids import new_id
from ledger.commands import AnyCommand, Commit, Release, Reserve
from ledger.errors import LedgerError, LedgerUnavailable
from ledger.ledger import Ledger
from ledger.outcomes import Applied, Outcome, Reserved

Kept = Commit | Release

SUFFIX: Final = ".settlements"

_DECODER: Final = msgspec.json.Decoder(Kept)


class SettlementJournal:
    """Settlements that wait for the ledger.

    Args:
        folder: where the files are; ``prepare`` makes it.
        name: of this process, for people. A file of that name which is there already is another's.
    """

    def __init__(self, folder: Path, *, name: str, report: Callable[[str], None]) -> None:
        self._folder = folder
        self._name = name
        self._report = report
        self._file: IO[bytes] | None = None
        self._waiting: list[Kept] = []
        self._writing = asyncio.Lock()
        self._replaying = asyncio.Lock()

    def prepare(self) -> None:
        """Make the folder, at start: that the disk refuses should not show when the ledger is away as well.

        Raises:
            OSError: it cannot be made or written to.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise PermissionError(f"journal_dir {self._folder} cannot be written to")

    @property
    def waiting(self) -> int:
        """Settlements kept and not yet replayed."""
        return len(self._waiting)

    async def keep(self, command: Kept) -> None:
        """Write *command* durably.

        Raises:
            OSError: the disk refused; the reservation's mark is what remains.
        """
        async with self._writing:
            await asyncio.to_thread(self._append, command)
            self._waiting.append(command)

    def _append(self, command: Kept) -> None:
        if self._file is None:
            self.prepare()
            self._file = self._open()
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self._file.write(msgspec.json.encode(command) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _open(self) -> IO[bytes]:
        """A new file, locked: not one that a dead process of our name left behind, which is adopted like any other."""
        for number in itertools.count():
            path = self._folder / f"{self._name}{f'-{number}' if number else ''}{SUFFIX}"
            try:
                file = path.open("xb")
            except FileExistsError:
                continue
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                return file
            file.close()  # Somebody took it for a dead one's before it was locked, and removed it.
        raise AssertionError("there is always one more number")

    def undo(self, command: AnyCommand, outcome: Outcome) -> None:
        """Give back what was reserved after its request had stopped waiting for it: nothing was forwarded.

        Not kept on disk: if this process dies first, the reservation is settled for its mark.
        """
        if not isinstance(command, Reserve) or not isinstance(outcome, Applied):
            return
        reserved = outcome.result
        if isinstance(reserved, Reserved) and reserved.reservation == command.reservation.reservation:
            self._waiting.append(Release(id=new_id("cmd"), scope=command.scope, reservation=command.reservation))

    async def replay(self, ledger: Ledger) -> int:
        """Tell *ledger* all that waits; how much it took. The file is emptied once nothing waits."""
        told = 0
        async with self._replaying:
            while self._waiting and await self._tell(ledger, self._waiting[0]):
                self._waiting.pop(0)
                told += 1
        async with self._writing:
            if told and not self._waiting and self._file is not None:
                await asyncio.to_thread(self._empty, self._file)
        return told

    def _empty(self, file: IO[bytes]) -> None:
        file.truncate(0)
        file.seek(0)

    async def adopt(self, ledger: Ledger) -> int:
        """Replay the journals of processes that are gone, and remove each that was told in full."""
        told = 0
        for path in sorted(self._folder.glob(f"*{SUFFIX}")) if self._folder.is_dir() else ():
            try:
                file = path.open("r+b")
            except FileNotFoundError:  # Another process adopted it.
                continue
            with file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # Its process lives, this one perhaps; or another adopts it now.
                    continue
                if not os.fstat(file.fileno()).st_nlink:
                    continue
                commands = [command for line in file if (command := self._read(line, path)) is not None]
                answered = [await self._tell(ledger, command) for command in commands]
                told += sum(answered)
                if all(answered):
                    path.unlink()
        return told

    def _read(self, line: bytes, path: Path) -> Kept | None:
        try:
            kept: Kept = _DECODER.decode(line)
        except msgspec.DecodeError:
            # The process died while it wrote this line, so it never relied on it.
            self._report(f"an unfinished line in {path.name} was left out")
            return None
        return kept

    async def _tell(self, ledger: Ledger, command: Kept) -> bool:
        """Whether the ledger has dealt with *command*: applied, now or before, or refused for good."""
        try:
            await ledger.execute(command)
        except LedgerUnavailable:
            return False
        except LedgerError as error:
            self._report(f"the ledger refused the settlement of {command.reservation.reservation}: {error}")
        return True

    def close(self) -> None:
        """Let the file go; what waits in it is adopted by the next process."""
        if self._file is not None:
            if not self._waiting:
                Path(self._file.name).unlink(missing_ok=True)
            self._file.close()
