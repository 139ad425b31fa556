"""Threads of their own for each kind of work that takes long, so that none of it holds up another kind; and what counts work and
pictures until they are let go, by whomever.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Share:
    """So much of a tally, as long as anybody holds it."""

    def __init__(self, amount: int, gone: deque[int]):
        self.amount, self.gone = amount, gone

    def __del__(self):
        self.gone.append(self.amount)


class Tally:
    """Taken from on one thread; what is let go may be on any."""

    def __init__(self):
        self.taken = 0
        # Not a number behind a lock: the collector, which lets go too, may come while the lock is held.
        self.gone: deque[int] = deque()

    def take(self, amount: int) -> Share:
        while self.gone:
            self.taken -= self.gone.popleft()
        self.taken += amount
        return Share(amount, self.gone)

    @property
    def total(self) -> int:
        return self.taken - sum(self.gone.copy())  # a copy is made in one go, whatever is let go meanwhile


class Threads:
    """So many threads at most; what does not fit waits for one."""

    def __init__(self, most: int, name: str):
        self.pool, self.tally = ThreadPoolExecutor(most, f"llava_drip {name}"), Tally()

    @property
    def count(self) -> int:
        """Pieces of work that wait or are under way, whoever still wants them: a thread cannot be stopped."""
        return self.tally.total

    async def run(self, work: Callable[[], T]) -> T:
        """What it returns. Cancelled, work that has not begun never does. RuntimeError: the server ends."""
        future = self.pool.submit(_counted, self.tally.take(1), work)
        try:
            return await asyncio.wrap_future(future)
        finally:
            # An error would hold this frame and the frame the error, with all that the work had.
            del future, work

    def close(self) -> None:
        """Takes no more, and waits for nothing."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def _counted(share: Share, work: Callable[[], T]) -> T:
    return work()
