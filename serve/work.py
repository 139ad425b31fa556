"""Blocking streams of the engine → one asynchronous one, which ends its work when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from starlette.responses import StreamingResponse

from llava_drip.scheduling.requests import QueueFull, StreamEvent, WorkFailed
from serve.errors import ApiError, bad_request, busy, log_failure


class Choices:
    """The streams of one request's choices, each in a thread of its own, which the engine's queue bounds in number.

    An asynchronous iterator of (choice, event). The error of one ends all.
    """

    def __init__(self, starts: Sequence[Callable[[], Iterator[StreamEvent]]], cancel: threading.Event):
        """starts: each opens a stream, within its thread; cancel: what they were told to watch."""
        self.cancel, self.loop, self.items = cancel, asyncio.get_running_loop(), asyncio.Queue()
        self.open = len(starts)
        for number, start in enumerate(starts):
            threading.Thread(target=self._work, args=(number, start), name="llava_drip answer", daemon=True).start()

    def _work(self, number: int, start: Callable[[], Iterator[StreamEvent]]) -> None:
        last: BaseException | None = None
        try:
            with contextlib.closing(start()) as events:
                for event in events:
                    self._put((number, event))
        except BaseException as error:
            last = error
        self._put((number, last))

    def _put(self, item: tuple[int, StreamEvent | BaseException | None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator[tuple[int, StreamEvent]]:
        while self.open:
            number, item = await self.items.get()
            if item is None:
                self.open -= 1
            elif isinstance(item, BaseException):
                self.cancel.set()
                raise item
            else:
                yield number, item

    async def begun(self, count: int) -> AsyncIterator[tuple[int, StreamEvent]]:
        """Returns when each of `count` choices has said or ended something, so that a refusal is known before a 200; the
        iterator of everything, from the beginning."""
        events, early, seen = self.__aiter__(), [], set()
        while len(seen) < count:
            item = await anext(events, None)
            if item is None:
                break
            early.append(item)
            seen.add(item[0])

        async def everything() -> AsyncIterator[tuple[int, StreamEvent]]:
            for item in early:
                yield item
            async for item in events:
                yield item

        return everything()


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
