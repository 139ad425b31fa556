"""How much of one app is under way, and whether it takes more: what its guard and its server look at."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from typing import Protocol

from serve.settings import Settings


class RequestMetrics(Protocol):
    def request(self, route: str, method: str, status: int, seconds: float) -> None: ...


class Intake(ABC):
    """What a guard counts and a server drains.

    Attributes:
        running: requests under way, probes not counted.
        held_bytes: of bodies.
        draining: no new requests are taken.
    """

    metrics: RequestMetrics

    def __init__(self, settings: Settings):
        self.settings = settings
        self.running, self.held_bytes, self.draining = 0, 0, False

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, waits for those under way, so long, and then cuts off what still runs."""
        self.draining = True
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self.cut()

    @abstractmethod
    def cut(self) -> None:
        """Ends every answer at its next token; its client is told that the server shuts down."""
