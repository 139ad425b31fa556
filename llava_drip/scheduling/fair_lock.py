"""A lock that is handed on in the order of asking: whoever steps in a loop cannot keep the others out."""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """As threading.Lock, but first come, first served."""

    def __init__(self):
        self._mutex, self._waiters, self._held = threading.Lock(), deque(), False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """timeout: seconds, negative: for ever. Returns whether it is held now."""
        with self._mutex:
            if not self._held:
                self._held = True
                return True
            if not blocking:
                return False
            ticket = threading.Event()
            self._waiters.append(ticket)
        try:
            if ticket.wait(None if timeout < 0 else timeout):
                return True
        except BaseException:  # Ctrl-C: nobody would ever use this turn
            if not self._withdrawn(ticket):
                self.release()
            raise
        return not self._withdrawn(ticket)

    def _withdrawn(self, ticket: threading.Event) -> bool:
        """Takes a ticket back, unless its turn has come in the meantime."""
        with self._mutex:
            if ticket.is_set():
                return False
            self._waiters.remove(ticket)
            return True

    def release(self) -> None:
        with self._mutex:
            assert self._held
            if self._waiters:
                self._waiters.popleft().set()  # held by that one from now on
            else:
                self._held = False

    def give_way(self) -> None:
        """The holder lets those go first who wait now."""
        if self._waiters:
            self.release()
            self.acquire()

    def locked(self) -> bool:
        return self._held

    def __enter__(self) -> FairLock:
        self.acquire()
        return self

    def __exit__(self, *_) -> None:
        self.release()
