"""Threads of their own for each kind of work that takes long, so that none of it holds up another kind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Threads:
    """So many threads at most; what does not fit waits for one.

    Attributes:
        count: pieces of work that wait or are under way, whoever still wants them: a thread cannot be stopped.
    """

    def __init__(self, most: int, name: str):
        self.pool, self.count, self.counting = ThreadPoolExecutor(most, f"llava_drip {name}"), 0, threading.Lock()

    async def run(self, work: Callable[[], T]) -> T:
        """What it returns. Cancelled, work that has not begun never does. RuntimeError: the server ends."""
        future = self.pool.submit(work)
        with self.counting:
            self.count += 1
        future.add_done_callback(self._one_less)  # at once, if it is done
        return await asyncio.wrap_future(future)

    def _one_less(self, _: Future) -> None:
        with self.counting:
            self.count -= 1

    def close(self) -> None:
        """Takes no more, and waits for nothing."""
        self.pool.shutdown(wait=False, cancel_futures=True)
