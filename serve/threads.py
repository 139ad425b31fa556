"""Threads of their own for each kind of work that takes long, so that none of it holds up another kind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Threads:
    """So many threads at most; what does not fit waits for one.

    Attributes:
        count: pieces of work that wait or are under way, whoever still wants them: a thread cannot be stopped.
    """

    def __init__(self, most: int, name: str):
        self.pool, self.count = ThreadPoolExecutor(most, f"llava_drip {name}"), 0

    async def run(self, work: Callable[[], T]) -> T:
        """What it returns. Cancelled, work that has not begun never does."""
        loop = asyncio.get_running_loop()
        self.count += 1
        try:
            future = self.pool.submit(work)
        except RuntimeError:  # the server ends
            self.count -= 1
            raise
        future.add_done_callback(lambda _: soon(loop, self._one_less))
        return await asyncio.wrap_future(future)

    def _one_less(self) -> None:
        self.count -= 1

    def close(self) -> None:
        """Takes no more, and waits for nothing."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def soon(loop: asyncio.AbstractEventLoop, call: Callable, *args: object) -> None:
    """`call` on the loop's thread, from any other, unless the loop has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *args)
