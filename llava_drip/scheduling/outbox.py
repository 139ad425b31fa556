"""Where a row's events go: kept until they are asked for, or, once somebody listens, handed over as they come."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from llava_drip.scheduling.requests import StreamEvent

Item = StreamEvent | BaseException  # an exception ends the reply


class Outbox:
    """Of one reply. The worker puts, its caller gets or listens."""

    def __init__(self):
        self._kept: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._tell: Callable[[Item], None] | None = None
        self._lock = threading.RLock()  # none is kept behind the back of who begins to listen

    def put(self, item: Item) -> None:
        with self._lock:
            if self._tell is None:
                self._kept.put(item)
                return
        self._tell(item)

    def get(self, timeout: float = 0.0) -> Item:
        """Raises: queue.Empty."""
        return self._kept.get(timeout=timeout) if timeout else self._kept.get_nowait()

    def listen(self, tell: Callable[[Item], None]) -> None:
        """tell: called with what is kept, here, and then with each item, on the worker's thread: it must not wait."""
        with self._lock:
            self._tell = tell  # before: what is kept may be the last
            while not self._kept.empty():
                tell(self._kept.get_nowait())

    def close(self) -> None:
        """Nothing more is told, and who listened is let go."""
        with self._lock:
            if self._tell is not None:
                self._tell = _ignore


def _ignore(item: Item) -> None:
    pass
