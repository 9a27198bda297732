"""The file behind a process's settlement journal: locked, appended to, and synced before anybody relies on it.

How it works. All lines that wait are written with one write and one sync, while the next ones gather. A write that
fails leaves the file as long as it was, so that no line is ever the continuation of another. Where that cannot be made
sure, or a sync has failed, after which nobody knows what is on disk, the file is left as it is and a new one begun; the
old one stays locked until everything in it is dealt with.
"""

import asyncio
import errno
import fcntl
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

SUFFIX: Final = ".settlements"

BYTES_MAX: Final = 256 * 2**20
"""Most that a process's journal holds; more is refused as by a full disk."""

LINES_WAITING_MAX: Final = 10_000
"""Most lines that wait for the disk."""

WAIT_S: Final = 10.0
"""How long a line waits for the disk before it is taken for one that could not be written."""

LEFT_MAX: Final = 16
"""Most files that are left as they are before all they hold is dealt with: a disk whose every sync fails must not take
all the descriptors that a process may have."""

COMPACT_BYTES: Final = 2**20
"""A journal of this size is written anew when less than half of it is still needed."""


class JournalFile:
    """Lines, durable when ``append`` returns.

    Args:
        name: of this process, for people. A file of that name which is there already is another's.
        write, sync: as in ``os``; tests put a failing disk in their place.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        bytes_max: int = BYTES_MAX,
        wait_s: float = WAIT_S,
        write: Callable[[int, bytes], int] = os.write,
        sync: Callable[[int], None] = os.fsync,
    ) -> None:
        self._folder = folder
        self._name = name
        self._bytes_max = bytes_max
        self._wait_s = wait_s
        self._write = write
        self._sync = sync
        self._path: Path | None = None
        self._descriptor: int | None = None
        self._left: list[tuple[Path, int]] = []
        self._length = 0
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._waiting_bytes = 0
        self._working: asyncio.Task[None] | None = None
        self._disk = asyncio.Lock()

    @property
    def length(self) -> int:
        """Bytes in the file that is written to."""
        return self._length

    def prepare(self) -> None:
        """Make the folder, and see that a file can be made in it.

        Raises:
            OSError: it cannot be made or written to.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            probe = self._folder / f"{self._name}.probe"
            descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.close(descriptor)
            probe.unlink()
        except OSError as error:
            raise OSError(error.errno, f"journal_dir {self._folder} cannot be written to: {error.strerror}") from error

    async def append(self, line: bytes) -> None:
        """Write *line* durably, together with all others that wait.

        Raises:
            OSError: the disk refused, is too slow, or the journal is full. The line may be there all the same.
        """
        full = self._length + self._waiting_bytes + len(line) > self._bytes_max
        if full or len(self._waiting) >= LINES_WAITING_MAX:
            raise OSError(errno.ENOSPC, "the settlement journal is full")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((line, done))
        self._waiting_bytes += len(line)
        if self._working is None:
            self._working = asyncio.create_task(self._work(), name="journal-writer")
        try:
            async with asyncio.timeout(self._wait_s):
                await done
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, f"the disk took longer than {self._wait_s} s") from None

    async def _work(self) -> None:
        try:
            while self._waiting:
                async with self._disk:
                    lines, self._waiting = self._waiting, []
                    self._waiting_bytes = 0
                    await self._write_lines(lines)
        finally:
            self._working = None

    async def _write_lines(self, lines: list[tuple[bytes, asyncio.Future[None]]]) -> None:
        failure: OSError | None = None
        try:
            await asyncio.to_thread(self._put, b"".join(line for line, _ in lines))
        except OSError as error:
            failure = error
        for _, done in lines:
            if done.done():
                continue
            if failure is None:
                done.set_result(None)
            else:
                done.set_exception(failure)

    def _put(self, data: bytes) -> None:
        if self._descriptor is None:
            if len(self._left) >= LEFT_MAX:
                raise OSError(errno.EIO, "the disk has failed too often")
            self.prepare()
            self._path, self._descriptor = self._create()
            self._length = 0
        try:
            self._write_all(self._descriptor, data)
        except OSError:
            try:
                os.ftruncate(self._descriptor, self._length)
                os.lseek(self._descriptor, self._length, os.SEEK_SET)
            except OSError:
                self._leave()
            raise
        try:
            self._sync(self._descriptor)
        except OSError:
            self._leave()
            raise
        self._length += len(data)

    def _write_all(self, descriptor: int, data: bytes) -> None:
        while data:
            data = data[self._write(descriptor, data) :]

    def _leave(self) -> None:
        """Write no more to this file. What it holds still counts, and its lock says that its process lives."""
        assert self._path is not None
        assert self._descriptor is not None
        self._left.append((self._path, self._descriptor))
        self._path = self._descriptor = None
        self._length = 0

    def _create(self) -> tuple[Path, int]:
        """A new file, locked: not one that a dead process of our name left behind, which is adopted like any other."""
        for number in itertools.count():
            path = self._folder / f"{self._name}{f'-{number}' if number else ''}{SUFFIX}"
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileExistsError:
                continue
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                self._sync_folder()
                return path, descriptor
            os.close(descriptor)  # Somebody took it for a dead one's before it was locked, and removed it.
        raise AssertionError("there is always one more number")

    def _sync_folder(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    async def tidy(self, needed: Callable[[], Sequence[bytes]]) -> None:
        """Forget what is not *needed* any more, all lines that are: all files at once when there are none.

        Raises:
            OSError: the disk refused; the files are as they were, or there is one more of them.
        """
        async with self._disk:
            if self._descriptor is None and not self._left:
                return
            lines = needed()
            if not lines:
                await asyncio.to_thread(self._empty)
            elif self._length > COMPACT_BYTES and sum(map(len, lines)) * 2 < self._length:
                await asyncio.to_thread(self._rewrite, b"".join(lines))

    def _empty(self) -> None:
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            self._length = 0
        self._remove_left()

    def _rewrite(self, data: bytes) -> None:
        """Write what is needed to a new file before the old ones go: a crash in between leaves both, no harm."""
        self._leave()
        self._put(data)
        self._remove_left()

    def _remove_left(self) -> None:
        while self._left:
            path, descriptor = self._left.pop()
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def close(self, *, empty: bool) -> None:
        """Let the files go. What is in them is adopted by the next process, unless they are *empty*."""
        if self._path is not None and self._descriptor is not None:
            self._leave()
        if empty:
            self._remove_left()
        for _, descriptor in self._left:
            os.close(descriptor)
        self._left.clear()
