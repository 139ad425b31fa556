"""What a caller holds while its request waits and runs: an iterator of events."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterator

from llava_drip.scheduling.requests import StreamEvent
from llava_drip.scheduling.row import Row

POLL = 0.05  # seconds: how soon a waiting caller notices that it was cancelled
PATIENCE = 0.5  # seconds that a cancelled one waits for the step in work


class ReplyStream(Iterator[StreamEvent]):
    """Events of one reply. `close`, or letting go of it, cancels the rest."""

    def __init__(self, row: Row, withdraw: Callable[[Row], bool]):
        """withdraw: takes the row out of the queue; False where it does not wait there any more."""
        self._row, self._withdraw, self._ended = row, withdraw, False
        self._last: deque[StreamEvent] = deque()  # of a row that was taken out of the queue

    def __next__(self) -> StreamEvent:
        if self._ended:
            raise StopIteration
        try:
            event = self._get()
        except BaseException:
            self.close()
            raise
        if isinstance(event, BaseException):
            self._ended = True
            raise event
        self._ended = event.usage.finish is not None
        return event

    def _get(self) -> StreamEvent | BaseException:
        request, noticed = self._row.request, None
        while True:
            if self._last:
                return self._last.popleft()
            try:
                return self._row.outbox.get(timeout=POLL)
            except queue.Empty:
                pass
            if (finish := request.over) is None:
                continue
            if self._withdraw(self._row):  # parked, it may have written
                while not self._row.outbox.empty():
                    self._last.append(self._row.outbox.get())
                self._last += self._row.end(finish)
                continue
            noticed = noticed or time.perf_counter()
            if time.perf_counter() - noticed > PATIENCE:  # other work has the model; the worker drops the row after it
                return StreamEvent("", self._row.usage_now(finish))

    def close(self) -> None:
        """Ends the reply, unless it has ended. Does not wait: the caller may be an event loop."""
        if not self._ended:
            self._ended = True
            self._row.request.cancels[0].set()
            self._withdraw(self._row)

    def __del__(self):
        self.close()
