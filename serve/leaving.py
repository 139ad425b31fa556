"""Clients that leave before their answer is there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from starlette.requests import Request

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection before its answer was there."""


async def unless_gone(request: Request, work: Coroutine[None, None, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client has gone.

    Raises:
        ClientGone: it has.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for future in (task, watch):
            future.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
        # An error would hold this frame and the frame the error, with all that the work had.
        del task, watch, future, work
