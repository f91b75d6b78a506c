"""A TCP proxy that does to a connection what networks do: cut it, swallow everything, be slow and lose segments."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

CHUNK_BYTES = 64 << 10
RETRANSMISSION_S = 0.2
"""How much later a lost segment comes, and with it all behind it: what TCP makes of a loss"""


class Proxy:
    """Forwards each connection to ``port``; the faults concern all connections, open and new."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._random = random.Random(5)
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._cut_after_bytes: int | None = None
        self.delay_s = 0.0
        self.loss = 0.0
        """Share of chunks that come a retransmission later"""
        self.forwarded_bytes = 0
        self.cuts = 0
        self.address = ""

    def cut_after(self, size_bytes: int) -> None:
        """Break all connections once so many more bytes went through, wherever in a message that is."""
        self._cut_after_bytes = self.forwarded_bytes + size_bytes

    def swallow(self) -> None:
        """Accept connections and bytes, forward nothing and close nothing, until ``heal``."""
        self._open.clear()

    def heal(self) -> None:
        self._open.set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            await self._open.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._forward(reader, far_writer))
                both.create_task(self._forward(far_reader, writer))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=4096)
        sending = asyncio.create_task(self._send_late(late, writer))
        clock, due = asyncio.get_running_loop().time, 0.0
        try:
            while data := await reader.read(CHUNK_BYTES):
                lost = self._random.random() < self.loss
                due = max(due, clock() + self.delay_s + RETRANSMISSION_S * lost)  # never out of order
                await late.put((due, data))
            await late.put((due, b""))
            await sending
        except OSError:
            pass  # the other direction notices too
        finally:
            sending.cancel()
            self._writers.discard(writer)
            writer.transport.abort()

    async def _send_late(self, late: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while True:
                due, data = await late.get()
                await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
                await self._open.wait()
                if not data:
                    return
                if self._cut_after_bytes is not None and self.forwarded_bytes + len(data) > self._cut_after_bytes:
                    writer.write(data[: self._cut_after_bytes - self.forwarded_bytes])
                    self._cut_after_bytes = None
                    self.cut()
                    return
                self.forwarded_bytes += len(data)
                writer.write(data)
                await writer.drain()

    def cut(self) -> None:
        self.cuts += 1
        for writer in list(self._writers):
            writer.transport.abort()


@asynccontextmanager
async def a_proxy(address: str) -> AsyncIterator[Proxy]:
    """To the hub at ``address``, tcp on loopback."""
    proxy = Proxy(int(address.rsplit(":", 1)[1]))
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
    proxy.address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        proxy.heal()
        proxy.cut()
        await asyncio.sleep(0)
