"""httpcore over a Unix socket by asyncio's own streams.

anyio's, which httpcore takes, complain on stderr when a read is cancelled in the moment in which something to read has come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import httpcore


class UnixSockets(httpcore.AsyncNetworkBackend):
    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable | None = None
    ) -> httpcore.AsyncNetworkStream:
        """httpcore.ConnectError: nobody listens there."""
        try:
            return _Stream(*await asyncio.open_unix_connection(path))
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error


class _Stream(httpcore.AsyncNetworkStream):
    """Without time limits: the other end is a process of ours, whose end ends it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            return await self.reader.read(max_bytes)
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            self.writer.write(buffer)
            await self.writer.drain()
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error

    async def aclose(self) -> None:
        self.writer.transport.abort()  # also what is still to be sent: nobody waits for its answer

    def get_extra_info(self, info: str) -> object:
        return None
