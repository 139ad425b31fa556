"""Who waits: a bounded queue, first come, first served, that anybody may leave."""

from __future__ import annotations

import threading
import time
from collections import deque
from itertools import islice

from llava_drip.scheduling.requests import Finish, QueueFull
from llava_drip.scheduling.row import Row


class WaitingLine:
    """Rows that wait for a place: fresh ones, and parked ones with their keys and values. For several threads.

    `changed` guards it, and what its owner changes together with it; it may be held while these are called.
    """

    def __init__(self, max_fresh: int):
        self.max_fresh, self.changed = max_fresh, threading.Condition()
        self.rows: deque[Row] = deque()
        self.ended: deque[float] = deque(maxlen=32)  # when the last replies did

    def __len__(self) -> int:
        return len(self.rows)

    def check_room(self, places: int) -> None:
        """places: of the batch that nobody has; who gets one of them at the next step does not wait. Raises: QueueFull."""
        with self.changed:
            parked = sum(row.parked for row in self.rows)
            fresh = len(self.rows) - parked
            if fresh >= self.max_fresh + max(0, places - parked):
                raise QueueFull(fresh, self._retry_after(fresh))

    def enter(self, row: Row, places: int) -> None:
        """As check_room. Raises: QueueFull."""
        with self.changed:
            self.check_room(places)
            self.rows.append(row)
            self.changed.notify_all()

    def take_all(self) -> list[Row]:
        with self.changed:
            rows, self.rows = list(self.rows), deque()
        return rows

    def _retry_after(self, waiting: int) -> float:
        """Seconds until half of the line is gone, at the pace of the last replies."""
        pace = (self.ended[-1] - self.ended[0]) / (len(self.ended) - 1) if len(self.ended) > 1 else 1.0
        return min(60.0, max(1.0, pace * waiting / 2))

    def park(self, row: Row) -> None:
        """At the end, and never refused."""
        row.parked = True
        with self.changed:
            self.rows.append(row)

    def leave(self, row: Row) -> bool:
        """Whether it was still there."""
        with self.changed:
            if row not in self.rows:
                return False
            self.rows.remove(row)
            return True

    @property
    def head(self) -> Row | None:
        with self.changed:
            return self.rows[0] if self.rows else None

    def first(self, count: int) -> list[Row]:
        with self.changed:
            return list(islice(self.rows, count))

    @property
    def parked_tokens(self) -> int:
        with self.changed:
            return sum(row.length for row in self.rows if row.kept is not None)

    def take_those_that_are_over(self) -> list[tuple[Row, Finish]]:
        with self.changed:
            over = [(row, finish) for row in self.rows if (finish := row.request.over)]
            for row, _ in over:
                self.rows.remove(row)
        return over

    def is_idle(self) -> None:
        """The pace of what comes after a pause says nothing of the pause."""
        self.ended.clear()

    def reply_ended(self) -> None:
        self.ended.append(time.perf_counter())
