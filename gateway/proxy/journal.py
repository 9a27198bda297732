"""The settlement journal: what the ledger could not be told is kept on local disk until it can.

How it works. Each process has a file of its own (``journal_file``), and keeps in memory what is in it. A line is a
command of the ledger; of several lines for one reservation the last one counts. A request that is served while the
ledger is away writes an intent before it is forwarded: what to charge if this process dies. Its settlement, or its
release, takes the intent's place. Replaying is safe at any time and any number of times, because a settlement names
its reservation and its command. A process adopts the files whose lock nobody holds: their owners are dead.
"""

import asyncio
import fcntl
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Final, NamedTuple

import msgspec

from gateway.ids import new_id
from gateway.proxy.doubts import Asked, Doubts
from gateway.proxy.journal_file import SUFFIX, JournalFile
from gateway.proxy.reconcile import Kept, give_back, tell
from ledger.commands import AnyCommand, Debit, Release, Reserve
from ledger.errors import LedgerError, LedgerUnavailable
from ledger.ledger import Ledger
from ledger.model import ReservationRef, Scope
from ledger.outcomes import Applied, Outcome, Reserved

TOLD_AT_ONCE: Final = 128
"""Settlements that the ledger is told together: enough for one batch, and no herd."""

UNWRITTEN_MAX: Final = 10_000
"""Most settlements that are remembered although they are not on disk."""

_DECODER: Final = msgspec.json.Decoder(Kept)


class _Adopted(NamedTuple):
    """A dead process's file, locked as long as something of it has to be told."""

    path: Path
    file: IO[bytes]
    commands: dict[ReservationRef, Kept]


class SettlementJournal:
    """Settlements that wait for the ledger.

    Args:
        folder: where the files are; ``prepare`` makes it.
        name: of this process, for people. A file of that name which is there already is another's.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        report: Callable[[str], None],
        file: JournalFile | None = None,
        doubts: Doubts | None = None,
    ) -> None:
        self._folder = folder
        self._report = report
        self._file = file or JournalFile(folder, name=name)
        self._waiting: dict[ReservationRef, Kept] = {}
        self._intents: dict[ReservationRef, Debit] = {}
        self._unwritten: set[ReservationRef] = set()
        self._doubts = Doubts() if doubts is None else doubts  # An empty one is false.
        self._told: dict[ReservationRef, Callable[[], None]] = {}
        self._adopted: list[_Adopted] = []
        self._adopted_charges: Counter[Scope] = Counter()
        self._replaying = asyncio.Lock()

    def prepare(self) -> None:
        """Make the folder, at start: that the disk refuses should not show when the ledger is away as well.

        Raises:
            OSError: it cannot be made or written to.
        """
        self._file.prepare()

    @property
    def waiting(self) -> int:
        """Settlements kept and not yet replayed."""
        return len(self._waiting)

    def adopted_charges(self, scope: Scope) -> int:
        """What dead processes served to *scope* while the ledger was away, and this one has yet to tell."""
        return self._adopted_charges[scope]

    async def intend(self, debit: Debit, *, forwarded: bool = False) -> None:
        """Write durably what to charge for a request if this process dies before it is settled.

        Repeating it with another settlement replaces the one before.

        Args:
            forwarded: its upstream has been asked already; it will be settled, whatever becomes of this line.

        Raises:
            OSError: the disk refused. What was intended before still is; else nothing may be forwarded.
        """
        before = self._intents.get(debit.reservation)
        self._intents[debit.reservation] = debit
        try:
            await self._file.append(_line(debit))
        except BaseException as error:
            if self._intents.get(debit.reservation) is not debit:
                pass  # Its settlement, or another intent, has taken its place meanwhile.
            elif before is not None:
                self._intents[debit.reservation] = before
            else:
                # The line may be on disk all the same: of what was not done, the ledger has to be told that.
                del self._intents[debit.reservation]
                if not forwarded:
                    self._remember(_release_of(debit), unwritten=isinstance(error, OSError))
            raise

    async def keep(self, command: Kept, *, told: Callable[[], None] | None = None) -> None:
        """Write *command* durably; *told* is called once the ledger knows it.

        Raises:
            OSError: the disk refused. The reservation's mark, or the intent, is what remains if this process dies;
                as long as it lives it will tell the ledger all the same.
        """
        self._intents.pop(command.reservation, None)
        self._remember(command)
        if told is not None:
            self._told[command.reservation] = told
        try:
            await self._file.append(_line(command))
        except OSError:
            self._remember(_without_response(command), unwritten=True)
            raise

    def _remember(self, command: Kept, *, unwritten: bool = False) -> None:
        """Tell the ledger of *command* when it is back. What is on no disk is remembered within a bound."""
        ref = command.reservation
        if unwritten and ref not in self._unwritten:
            if len(self._unwritten) >= UNWRITTEN_MAX:
                self._forget(ref)
                return
            self._unwritten.add(ref)
        self._waiting[ref] = command

    def _forget(self, ref: ReservationRef) -> None:
        self._waiting.pop(ref, None)
        self._unwritten.discard(ref)
        told = self._told.pop(ref, None)
        if told is not None:
            told()

    def undo(self, command: AnyCommand, outcome: Outcome) -> None:
        """Give back what was reserved after its request had stopped waiting for it: nothing was forwarded.

        Not kept on disk: if this process dies first, the reservation is settled for its mark.
        """
        if not isinstance(command, Reserve) or not isinstance(outcome, Applied):
            return
        reserved = outcome.result
        if isinstance(reserved, Reserved) and reserved.reservation == command.reservation.reservation:
            self.withdraw(command)

    def withdraw(self, command: Reserve) -> None:
        """Give back what *command* may have reserved, unless its request was served, and will be charged."""
        ref = command.reservation
        if ref not in self._intents and ref not in self._waiting:
            self._doubts.add(Release(id=new_id("cmd"), scope=command.scope, reservation=ref))

    async def replay(self, ledger: Ledger) -> int:
        """Tell *ledger* all that waits, in order; how much it took. What is told is forgotten on disk.

        A page of which it took nothing says that it is away.
        """
        told = 0
        async with self._replaying:
            await self._doubts.settle(lambda release: self._give_back(ledger, release))
            waiting = list(self._waiting.values())
            for start in range(0, len(waiting), TOLD_AT_ONCE):
                page = waiting[start : start + TOLD_AT_ONCE]
                answered = await asyncio.gather(*(self._tell(ledger, command) for command in page))
                for command, known in zip(page, answered, strict=True):
                    if known and self._waiting.get(command.reservation) is command:
                        self._forget(command.reservation)
                told += sum(answered)
                if not any(answered):
                    break
            if told:
                await self._file.tidy(self._needed)
        return told

    def _needed(self) -> list[bytes]:
        return [_line(command) for command in (*self._waiting.values(), *self._intents.values())]

    async def adopt(self, ledger: Ledger) -> int:
        """Replay the journals of processes that are gone, and remove each that was told in full."""
        async with self._replaying:
            return await self._adopt(ledger)

    async def _adopt(self, ledger: Ledger) -> int:
        known = {adopted.path for adopted in self._adopted}
        found = sorted(self._folder.glob(f"*{SUFFIX}")) if self._folder.is_dir() else []
        for path in found:
            if path in known:
                continue
            try:
                adopted = await asyncio.to_thread(self._take_over, path)
            except OSError as error:
                # One file that cannot be read must not keep the others waiting; it is tried again.
                self._report(f"{path.name} cannot be adopted: {error.strerror}")
                continue
            if adopted is not None:
                self._adopted.append(adopted)
                for command in adopted.commands.values():
                    self._adopted_charges[command.scope] += _charge_of(command)
        told = 0
        for adopted in list(self._adopted):
            told += await self._tell_adopted(ledger, adopted)
            if adopted.commands:
                continue  # The ledger is away, or refuses one of them for a fault of ours.
            adopted.path.unlink(missing_ok=True)
            adopted.file.close()
            self._adopted.remove(adopted)
        return told

    async def _tell_adopted(self, ledger: Ledger, adopted: _Adopted) -> int:
        told = 0
        waiting = list(adopted.commands.values())
        for start in range(0, len(waiting), TOLD_AT_ONCE):
            page = waiting[start : start + TOLD_AT_ONCE]
            answered = await asyncio.gather(*(self._tell(ledger, command) for command in page))
            for command, known in zip(page, answered, strict=True):
                if known:
                    del adopted.commands[command.reservation]
                    self._adopted_charges[command.scope] -= _charge_of(command)
            told += sum(answered)
            if not any(answered):
                break
        return told

    def _take_over(self, path: Path) -> _Adopted | None:
        """The commands of a dead process; None where it lives, or another has adopted it."""
        try:
            file = path.open("r+b")
        except FileNotFoundError:  # Another process adopted it.
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # Its process lives, this one perhaps; or another adopts it now.
            file.close()
            return None
        if not os.fstat(file.fileno()).st_nlink:
            file.close()
            return None
        commands: dict[ReservationRef, Kept] = {}
        for line in file:
            command = self._read(line, path)
            if command is not None:
                commands.pop(command.reservation, None)
                commands[command.reservation] = command
        return _Adopted(path, file, commands)

    def _read(self, line: bytes, path: Path) -> Kept | None:
        try:
            if not line.endswith(b"\n"):
                raise msgspec.DecodeError
            kept: Kept = _DECODER.decode(line)
        except msgspec.DecodeError:
            # The process died while it wrote this line, so it never relied on it.
            self._report(f"an unfinished line in {path.name} was left out")
            return None
        return kept

    async def _give_back(self, ledger: Ledger, release: Release) -> Asked:
        found = False

        async def asked() -> None:
            nonlocal found
            found = await give_back(ledger, release)

        if not await self._done(asked(), release):
            return Asked.AWAY
        return Asked.SETTLED if found else Asked.UNKNOWN

    async def _tell(self, ledger: Ledger, command: Kept) -> bool:
        return await self._done(tell(ledger, command), command)

    async def _done(self, telling: Awaitable[None], command: Kept) -> bool:
        """Whether the ledger has dealt with *command*: applied, now or before, or refused for good."""
        try:
            await telling
        except LedgerUnavailable:
            return False
        except LedgerError as error:
            self._report(f"the ledger refused the settlement of {command.reservation.reservation}: {error}")
        except Exception as error:
            # A bug of ours must not keep the others waiting; this one stays, and is told again. A driver's message may
            # have values in it, which are somebody's.
            self._report(f"the settlement of {command.reservation.reservation} fails: {type(error).__name__}")
            return False
        return True

    def close(self) -> None:
        """Let the files go; what waits in them is adopted by the next process."""
        self._file.close(empty=not self._waiting and not self._intents)
        for adopted in self._adopted:
            adopted.file.close()
        self._adopted.clear()


def _line(command: Kept) -> bytes:
    return msgspec.json.encode(command) + b"\n"


def _release_of(debit: Debit) -> Release:
    return Release(id=new_id("cmd"), scope=debit.scope, reservation=debit.reservation)


def _without_response(command: Kept) -> Kept:
    """What is only in memory must be small: its answer is not replayed."""
    return command if isinstance(command, Release) else msgspec.structs.replace(command, response=None)


def _charge_of(command: Kept) -> int:
    """What was spent of an allowance."""
    return sum(charge.total for charge in command.settlement.charges) if isinstance(command, Debit) else 0
