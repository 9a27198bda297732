"""A TCP proxy on loopback that delays, hangs and cuts what goes through it, when a test says so.

How it works. It has an event loop in a thread of its own, so that neither a test that blocks nor the load of one holds
it up. Every connection to it is a conversation with one to the server; two pumps pass bytes on through a gate.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Final, Self

from tests.servers.ports import free_port

CHUNK_BYTES: Final = 2**16
STOP_S: Final = 10.0


class Proxy:
    """Between the clients of `port` and the server on *server_port*, from `start` to `close`."""

    def __init__(self, server_port: int) -> None:
        self.port = free_port()
        self.server_port = server_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._listening = threading.Event()
        self._stop = asyncio.Event()
        self._flowing = asyncio.Event()
        self._hung_until_s = 0.0
        self._delay_s = 0.0
        self._conversations: set[Conversation] = set()

    def start(self) -> Self:
        self._thread.start()
        assert self._listening.wait(STOP_S), "the proxy did not start"
        return self

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(STOP_S)
        assert not self._thread.is_alive(), "the proxy did not stop"

    @property
    def connections(self) -> int:
        return len(self._conversations)

    @property
    def hanging(self) -> bool:
        return not self._flowing.is_set()

    def hang(self, *, for_s: float) -> None:
        """Pass nothing on for so long, and cut nothing: whoever waits may wait."""
        self._tell(self._hang, for_s)

    def slow(self, *, by_s: float) -> None:
        """Pass each piece on so much later, in both directions; 0 is as quick as ever."""
        self._tell(setattr, self, "_delay_s", by_s)

    def cut(self) -> None:
        """End every connection that there is."""
        self._tell(self._cut)

    async def gate(self) -> None:
        """What each piece waits for before it is passed on."""
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        await self._flowing.wait()

    def conversation(
        self,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> "Conversation":
        return Conversation(self, client, server)

    def _tell(self, what: Callable[..., Any], *arguments: Any) -> None:
        """Do it in the proxy's thread; it has been done when this returns."""
        done = threading.Event()

        def do() -> None:
            what(*arguments)
            done.set()

        self._loop.call_soon_threadsafe(do)
        assert done.wait(STOP_S), "the proxy does not answer"

    def _hang(self, for_s: float) -> None:
        self._flowing.clear()
        until_s = self._hung_until_s = self._loop.time() + for_s

        def go_on() -> None:
            if until_s == self._hung_until_s:
                self._flowing.set()

        self._loop.call_at(until_s, go_on)

    def _cut(self) -> None:
        for conversation in self._conversations:
            conversation.cut()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._flowing.set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self._listening.set()
        await self._stop.wait()
        server.close()
        self._cut()
        await server.wait_closed()
        await asyncio.gather(*(conversation.ended.wait() for conversation in self._conversations))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server = await asyncio.open_connection("127.0.0.1", self.server_port)
        except OSError:
            writer.transport.abort()
            return
        conversation = self.conversation((reader, writer), server)
        self._conversations.add(conversation)
        try:
            await conversation.run()
        finally:
            self._conversations.discard(conversation)
            conversation.ended.set()


class Conversation:
    """One connection through the proxy."""

    def __init__(
        self,
        proxy: Proxy,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self._proxy = proxy
        self._from_client, self._to_client = client
        self._from_server, self._to_server = server
        self.ended = asyncio.Event()

    async def run(self) -> None:
        """Until either side ends it, or it is cut."""
        pumps = {asyncio.create_task(self.upwards()), asyncio.create_task(self.downwards())}
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for writer in (self._to_client, self._to_server):
                writer.close()

    def cut(self) -> None:
        """End it in both directions; what is on its way is lost."""
        for writer in (self._to_client, self._to_server):
            writer.transport.abort()

    async def upwards(self) -> None:
        """Pass on what the client says."""
        while data := await self._from_client.read(CHUNK_BYTES):
            await self._proxy.gate()
            await self.to_server(data)

    async def downwards(self) -> None:
        """Pass on what the server says."""
        while data := await self._from_server.read(CHUNK_BYTES):
            await self._proxy.gate()
            await self.to_client(data)

    async def to_server(self, data: bytes) -> None:
        self._to_server.write(data)
        await self._to_server.drain()

    async def to_client(self, data: bytes) -> None:
        self._to_client.write(data)
        await self._to_client.drain()
