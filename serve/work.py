"""The engine's streams → one asynchronous iterator, which ends their work when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import deque
from collections.abc import AsyncIterator, Callable

from starlette.responses import StreamingResponse

from llava_drip.scheduling.outbox import Item
from llava_drip.scheduling.requests import QueueFull, StreamEvent, WorkFailed
from llava_drip.scheduling.ticket import ReplyStream
from serve.errors import ApiError, bad_request, busy, log_failure

LOOK = 0.25  # seconds between looks at whether a reply is over that the engine does not come to end


class Mailbox:
    """What other threads have for callbacks of one event loop, which is woken once for all that has come until it looks."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop, self.items, self.woken = loop, deque(), False

    def put(self, take: Callable[[Item], None], item: Item) -> None:
        self.items.append((take, item))
        if not self.woken:
            self.woken = True
            try:
                self.loop.call_soon_threadsafe(self._hand_out)
            except RuntimeError:  # the loop has been closed: nobody listens
                self.items.clear()
                self.woken = False

    def _hand_out(self) -> None:
        self.woken = False  # before the look: what comes during it wakes again
        while self.items:
            take, item = self.items.popleft()
            take(item)


class Choices:
    """The streams of one request's choices. An asynchronous iterator of (choice, event), once. The error of one ends all."""

    def __init__(self, mailbox: Mailbox, whole: bool):
        """whole: nobody looks at the events of a choice before it has ended."""
        self.mailbox, self.whole = mailbox, whole
        self.held: list[tuple[int, Item]] = []
        self.streams: list[ReplyStream] = []
        self.items: asyncio.Queue[tuple[int, Item]] = asyncio.Queue()
        self.early: deque[tuple[int, StreamEvent]] = deque()  # what `begun` has seen
        self.ended: set[int] = set()
        self.told_late: set[int] = set()  # choices whose end did not come from the worker
        self.timer: asyncio.TimerHandle | None = None

    def add(self, stream: ReplyStream) -> None:
        take = functools.partial(self._take, len(self.streams))
        self.streams.append(stream)
        stream.listen(functools.partial(self.mailbox.put, take))
        if self.timer is None:
            self._look()

    def _take(self, number: int, item: Item) -> None:
        if number in self.ended:  # an overdue one may be told of twice
            return
        self.held.append((number, item))
        if self.whole and isinstance(item, StreamEvent) and item.usage.finish is None:
            return
        for one in self.held:
            self.items.put_nowait(one)
        self.held.clear()

    def _look(self) -> None:
        for number, stream in enumerate(self.streams):
            try:
                events = [] if number in self.told_late else stream.overdue()
            except Exception as error:
                events = [error]
            if events:
                self.told_late.add(number)
            for event in events:  # behind what the worker has told already
                self.mailbox.put(functools.partial(self._take, number), event)
        if not self.over:
            self.timer = self.mailbox.loop.call_later(LOOK, self._look)

    def close(self) -> None:
        """Ends what runs. To be called whatever happens."""
        if self.timer is not None:
            self.timer.cancel()
        for stream in self.streams:
            stream.close()

    @property
    def waiting(self) -> bool:
        """Whether the next event has still to come."""
        return not self.early and self.items.empty()

    @property
    def over(self) -> bool:
        """Whether no event is to come."""
        return not self.early and len(self.ended) == len(self.streams)

    async def begun(self) -> None:
        """Returns when each choice has said or ended something, so that a refusal is known before a 200."""
        seen: set[int] = set()
        while len(seen) < len(self.streams):
            event = await self._next()
            self.early.append(event)
            seen.add(event[0])

    async def __aiter__(self) -> AsyncIterator[tuple[int, StreamEvent]]:
        while not self.over:
            yield self.early.popleft() if self.early else await self._next()

    async def _next(self) -> tuple[int, StreamEvent]:
        while True:
            number, item = await self.items.get()
            if isinstance(item, BaseException):
                self.close()
                raise item
            if number in self.ended:  # an overdue one may be told of twice
                continue
            if item.usage.finish is not None:
                self.ended.add(number)
            return number, item


@contextlib.contextmanager
def refusals(name: str):
    """What the engine refuses or fails at, as an error for the client. name: of the answer, for the log."""
    try:
        yield
    except QueueFull as error:
        raise busy("too many requests wait already; try again later", error.retry_after) from error
    except WorkFailed as error:
        log_failure(name, error.__cause__ or error)
        raise ApiError(500, "the work failed; the request may be sent again", code="work_failed") from error
    except ValueError as error:
        text = str(error)
        first = text.partition(" ")[0].rstrip(":")
        if "too long" in text:
            raise bad_request(f"messages: {text}", "messages", "context_length_exceeded") from error
        raise bad_request(text, first if first in ("compression", "max_visual_tokens") else None) from error


class EventStream(StreamingResponse):
    """Server-sent events. However the response ends, `done` is closed: asynchronous generators are not, where the task that
    reads them is cancelled between two of their items."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], done: contextlib.ExitStack):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.done = done

    async def __call__(self, scope, receive, send) -> None:
        with self.done:
            await super().__call__(scope, receive, send)
