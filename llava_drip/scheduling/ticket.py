"""What a caller holds while its request waits and runs: an iterator of events, for a thread, or to be listened to."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterator

from llava_drip.scheduling.outbox import Item
from llava_drip.scheduling.requests import StreamEvent
from llava_drip.scheduling.row import Row

POLL = 0.05  # seconds: how soon a waiting caller notices that it was cancelled
PATIENCE = 0.5  # seconds that a cancelled one waits for the step in work


class ReplyStream(Iterator[StreamEvent]):
    """Events of one reply. `close` cancels the rest, and so does letting go of it, unless it is listened to."""

    def __init__(self, row: Row, withdraw: Callable[[Row], bool]):
        """withdraw: takes the row out of the queue; False where it does not wait there any more."""
        self._row, self._withdraw, self._ended = row, withdraw, False
        self._noticed: float | None = None  # when it was first seen to be over
        self._last: deque[StreamEvent] = deque()

    def __next__(self) -> StreamEvent:
        if self._ended:
            raise StopIteration
        try:
            event = self._get()
        except BaseException:
            self.close()
            raise
        self._note(event)
        if isinstance(event, BaseException):
            raise event
        return event

    def _note(self, item: Item) -> None:
        if isinstance(item, BaseException) or item.usage.finish is not None:
            self._ended = True
            self._row.outbox.close()  # else row and stream would hold each other until the collector comes by

    def _get(self) -> Item:
        while True:
            try:
                return self._row.outbox.get(0.0 if self._last else POLL)
            except queue.Empty:
                if self._last:
                    return self._last.popleft()
            self._last += self.overdue()  # and what came meanwhile comes first

    def listen(self, tell: Callable[[Item], None]) -> None:
        """Instead of iterating: `tell` is called with each event as it comes, or with the exception that ends the reply, on the
        worker's thread, which must not be made to wait. `overdue` has what the worker does not come to tell."""

        def note_and_tell(item: Item) -> None:
            tell(item)
            self._note(item)

        self._row.outbox.listen(note_and_tell)

    def overdue(self) -> list[StreamEvent]:
        """The last events of a reply that is over, cancelled or late, while other work has the model; to be asked for now and
        then until they come. What the worker still tells is to be ignored, but for what it told before this."""
        if self._ended or (finish := self._row.request.over) is None:
            return []
        if self._withdraw(self._row):
            return self._row.end(finish)  # parked, it may have written
        now = time.perf_counter()
        self._noticed = self._noticed or now
        return [StreamEvent("", self._row.usage_now(finish))] if now - self._noticed > PATIENCE else []

    def close(self) -> None:
        """Ends the reply, unless it has ended. Does not wait: the caller may be an event loop."""
        if not self._ended:
            self._ended = True
            self._row.request.cancels[0].set()
            self._withdraw(self._row)
            self._row.outbox.close()

    def __del__(self):
        self.close()
