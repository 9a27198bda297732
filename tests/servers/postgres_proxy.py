"""A proxy that reads PostgreSQL's wire protocol, and cuts a connection at a chosen place of a chosen transaction.

How it works. It looks at message boundaries, at the text of each statement that is executed, and at the transaction
status that the server gives with ReadyForQuery. A transaction counts when it executes a watched statement. It closes
with COMMIT; or, of statements without BEGIN, with the Sync or the Query that they come with: before such a Sync the
server is asked to flush instead, so that the statement has run and nothing is committed when the connection is cut.
Encryption is declined.

Source: https://www.postgresql.org/docs/18/protocol-message-formats.html
"""

import asyncio
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from tests.servers.proxy import CHUNK_BYTES, STOP_S, Conversation, Proxy

WRITES: Final = re.compile(r"\b(insert\s+into|update|delete\s+from)\b", re.IGNORECASE)
CLOSES: Final = re.compile(r"(^|;)\s*(commit|end)\b", re.IGNORECASE)
BEGINS: Final = re.compile(r"^\s*(begin|start\s+transaction)\b", re.IGNORECASE)

SSL_REQUEST: Final = 80877103
GSS_REQUEST: Final = 80877104
EXECUTED: Final = (b"C", b"E", b"s")
"""What the server says of a statement that it has run: complete, an error, or as many rows as were wanted."""

FLUSH: Final = b"H\x00\x00\x00\x04"


class Spot(StrEnum):
    """Where a transaction's connection is cut."""

    BEFORE_STATEMENT = "the watched statement never reaches the server"
    BEFORE_COMMIT = "the statement has run, and the server does not hear of the commit"
    AFTER_COMMIT = "the server has committed, and the client does not hear of it"


class Message(NamedTuple):
    """One message as it is on the wire; *kind* is empty for the first of a connection, which has none."""

    kind: bytes
    raw: bytes

    def strings(self) -> list[str]:
        """The first two zero-terminated strings that it begins with, and whatever follows."""
        return [part.decode(errors="replace") for part in self.raw[5:].split(b"\0", 2)]


class Splitter:
    """Bytes in, whole messages out. *typed* is false until a client's first message has passed."""

    def __init__(self, *, typed: bool) -> None:
        self.typed = typed
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> Message | None:
        start = 1 if self.typed else 0
        if len(self._buffer) < start + 4:
            return None
        length = start + int.from_bytes(self._buffer[start : start + 4])
        if len(self._buffer) < length:
            return None
        raw = bytes(self._buffer[:length])
        del self._buffer[:length]
        return Message(raw[:start], raw)


@dataclass(slots=True)
class _Plan:
    """Cut at *spot* of the *every*-th watched transaction, so many *times*."""

    spot: Spot
    every: int
    times: int
    passed: int = 0

    def due(self) -> bool:
        """Count one transaction; whether it is one to cut."""
        if not self.times:
            return False
        self.passed += 1
        if self.passed % self.every:
            return False
        self.times -= 1
        return True


class PostgresProxy(Proxy):
    """A proxy to a PostgreSQL.

    Attributes:
        cuts: connections cut by a plan.
        transactions: watched transactions that closed, cut or not.
    """

    def __init__(self, server_port: int, *, watched: re.Pattern[str] = WRITES) -> None:
        super().__init__(server_port)
        self.watched = watched
        self.cuts = 0
        self.transactions = 0
        self._plan: _Plan | None = None

    def url_of(self, url: str) -> str:
        """The same database through the proxy."""
        return url.replace(f":{self.server_port}/", f":{self.port}/")

    def cut_at(self, spot: Spot, *, every: int = 1, times: int = 1) -> None:
        """From now on cut the connection of the *every*-th watched transaction, so many *times*."""
        self._tell(setattr, self, "_plan", _Plan(spot, every, times))

    def due(self, spot: Spot) -> bool:
        return self._plan is not None and self._plan.spot is spot and self._plan.due()

    def conversation(
        self,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> Conversation:
        return _PostgresConversation(self, client, server)


class _PostgresConversation(Conversation):
    _proxy: PostgresProxy

    def __init__(
        self,
        proxy: PostgresProxy,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        super().__init__(proxy, client, server)
        self._statements: dict[str, str] = {}
        self._portals: dict[str, str] = {}
        self._in_transaction = False
        self._watched = False
        self._answers_lost = False
        """Nothing that the server says reaches the client any more; its next ReadyForQuery is the end."""
        self._completed = asyncio.Event()

    async def upwards(self) -> None:
        splitter = Splitter(typed=False)
        while data := await self._from_client.read(CHUNK_BYTES):
            splitter.feed(data)
            await self._proxy.gate()
            out = bytearray()
            while (message := splitter.next()) is not None:
                if not splitter.typed:
                    if int.from_bytes(message.raw[4:8]) in (SSL_REQUEST, GSS_REQUEST):
                        await self.to_client(b"N")
                        continue
                    splitter.typed = True
                elif await self._cut_here(message, bytes(out)):
                    return
                out += message.raw
            await self.to_server(bytes(out))

    async def downwards(self) -> None:
        splitter = Splitter(typed=True)
        while data := await self._from_server.read(CHUNK_BYTES):
            splitter.feed(data)
            await self._proxy.gate()
            out = bytearray()
            while (message := splitter.next()) is not None:
                if message.kind in EXECUTED:
                    self._completed.set()
                elif message.kind == b"Z":
                    self._in_transaction = message.raw[5:6] != b"I"
                    if self._answers_lost:
                        self._end()
                        return
                out += message.raw
            if not self._answers_lost:
                await self.to_client(bytes(out))

    async def _cut_here(self, message: Message, before: bytes) -> bool:
        """Whether the connection was cut at *message*; *before* is what came with it and was not passed on yet."""
        executed = self._executed(message)
        if executed is not None and self._proxy.watched.search(executed) and not self._watched:
            self._watched = True
            if self._proxy.due(Spot.BEFORE_STATEMENT):
                self._end()
                return True
        if not self._watched or not self._closes(message, executed):
            return False
        self._watched = False
        self._proxy.transactions += 1
        if self._proxy.due(Spot.BEFORE_COMMIT):
            if message.kind == b"S":
                self._completed.clear()
                self._answers_lost = True
                await self.to_server(before + FLUSH)
                await asyncio.wait_for(self._completed.wait(), STOP_S)
            self._end()
            return True
        # From here on the client must not hear that it is done.
        self._answers_lost = self._proxy.due(Spot.AFTER_COMMIT)
        return False

    def _executed(self, message: Message) -> str | None:
        """The text of the statement that *message* executes; it is remembered by the names that it goes by."""
        if message.kind == b"Q":
            return message.strings()[0]
        if message.kind == b"P":
            name, text, *_ = message.strings()
            self._statements[name] = text
        elif message.kind == b"B":
            portal, name, *_ = message.strings()
            self._portals[portal] = self._statements.get(name, "")
        elif message.kind == b"E":
            return self._portals.get(message.strings()[0], "")
        return None

    def _closes(self, message: Message, executed: str | None) -> bool:
        """Whether the server commits when it gets *message*."""
        if executed is not None and CLOSES.search(executed):
            return True
        if self._in_transaction:
            return False
        if message.kind == b"Q":
            return not BEGINS.match(executed or "")
        return message.kind == b"S"

    def _end(self) -> None:
        self._proxy.cuts += 1
        self.cut()
