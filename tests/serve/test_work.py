"""From the engine's thread to the event loop: order, ends, what is let go."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref

import httpx
import numpy as np
import pytest
import torch
from api_server import MODEL, chat
from transformers import GenerationConfig

from llava_drip.engine import Engine
from llava_drip.scheduling.line import WaitingLine
from llava_drip.scheduling.prefixes import Sequence
from llava_drip.scheduling.requests import StreamEvent, WorkFailed
from llava_drip.scheduling.row import Request, Row
from llava_drip.scheduling.ticket import ReplyStream
from serve.api import make_app
from serve.service import STARTERS, Settings
from serve.work import Choices, Mailbox


def parked(tokenizer, seconds: float) -> tuple[Row, WaitingLine]:
    """A row that holds words back that may become its stop string, and waits for a place."""
    nothing = torch.zeros(3, dtype=torch.int64)
    generation, end = GenerationConfig(max_new_tokens=50), time.perf_counter() + seconds
    row = Row(
        Request(nothing, [], [], 0, None, generation, None, ("The circle is blue",), [threading.Event()], end),
        tokenizer,
    )
    row.started, row.budget, row.sequence = time.perf_counter(), 50, Sequence(np.zeros(3, np.int64))
    for token in tokenizer("The circle is")["input_ids"]:
        row.push(token)
    line = WaitingLine(1)
    line.park(row)
    return row, line


def said(row: Row, text: str) -> StreamEvent:
    return StreamEvent(text, row.usage_now())


async def all_of(choices: Choices) -> list[tuple[int, str, str | None]]:
    return [(number, event.text, event.usage.finish) async for number, event in choices]


@pytest.mark.parametrize("whole", [False, True])
def test_an_end_comes_after_what_was_told_before_it(tiny_tokenizer, whole):
    async def events():
        row, line = parked(tiny_tokenizer, 0.2)
        row.outbox.put(said(row, "A "))  # before anybody listens
        choices = Choices(Mailbox(asyncio.get_running_loop()), whole)
        choices.add(ReplyStream(row, line.leave))
        row.outbox.put(said(row, "B "))
        time.sleep(0.7)  # the loop is late: the look for what is overdue and the mailbox are both due
        try:
            return await all_of(choices)
        finally:
            choices.close()

    told = asyncio.run(events())
    assert "".join(text for _, text, _ in told) == "A B The circle is"
    assert [finish for *_, finish in told] == [None] * (len(told) - 1) + ["timeout"]


def test_choices_end_each_by_itself_and_an_error_ends_all(tiny_tokenizer):
    async def events(fail: bool):
        rows = [parked(tiny_tokenizer, 60) for _ in range(2)]
        choices = Choices(Mailbox(asyncio.get_running_loop()), whole=False)
        for row, line in rows:
            choices.add(ReplyStream(row, line.leave))
        first, second = (row for row, _ in rows)
        first.outbox.put(StreamEvent("", first.usage_now("stop")))
        second.outbox.put(WorkFailed("of the test") if fail else said(second, "x"))
        if not fail:
            second.outbox.put(StreamEvent("", second.usage_now("length")))
        try:
            await choices.begun()
            return await all_of(choices)
        finally:
            choices.close()
            assert all(row.request.over is None or fail for row, _ in rows)

    assert asyncio.run(events(fail=False)) == [(0, "", "stop"), (1, "x", None), (1, "", "length")]
    with pytest.raises(WorkFailed, match="of the test"):
        asyncio.run(events(fail=True))


def test_an_error_at_an_end_that_is_overdue_is_told(tiny_tokenizer, monkeypatch):
    async def events():
        row, line = parked(tiny_tokenizer, 0.1)
        monkeypatch.setattr(row, "end", lambda finish: 1 / 0)
        choices = Choices(Mailbox(asyncio.get_running_loop()), whole=False)
        choices.add(ReplyStream(row, line.leave))
        try:
            return await asyncio.wait_for(all_of(choices), 5)
        finally:
            choices.close()

    with pytest.raises(ZeroDivisionError):
        asyncio.run(events())


@pytest.mark.parametrize("end", ["told", "closed"])
def test_nothing_holds_what_has_ended(tiny_tokenizer, end):
    """Pixels and tokens of a request must not wait for the collector."""

    async def listened() -> weakref.ref:
        row, line = parked(tiny_tokenizer, 60)
        choices = Choices(Mailbox(asyncio.get_running_loop()), whole=False)
        choices.add(ReplyStream(row, line.leave))
        if end == "told":
            row.outbox.put(StreamEvent("", row.usage_now("stop")))
            await all_of(choices)
            line.leave(row)
        choices.close()
        return weakref.ref(row)

    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(listened())() is None
    finally:
        gc.enable()


def test_one_app_in_one_loop_after_another(checkpoint):
    app = make_app(Engine.load(checkpoint, device="cpu"), Settings(MODEL))

    async def ask() -> int:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.post("/v1/chat/completions", json=chat("Hello"))).status_code

    assert [asyncio.run(ask()) for _ in range(2)] == [200, 200]


def test_the_time_limit_counts_from_the_request(checkpoint):
    """Also where all the threads that make prompts ready are taken."""
    app = make_app(Engine.load(checkpoint, device="cpu"), Settings(MODEL, time_limit=0.3))
    service, free = app.state.service, threading.Event()

    async def ask() -> httpx.Response:
        for _ in range(STARTERS):
            service.starters.pool.submit(free.wait, 20)
        asyncio.get_running_loop().call_later(0.6, free.set)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.post("/v1/chat/completions", json=chat("Hello"))

    reply = asyncio.run(ask())
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "timeout"


def test_what_comes_after_the_loop_has_ended_is_let_go():
    loop = asyncio.new_event_loop()
    mailbox = Mailbox(loop)
    loop.close()
    mailbox.put(print, "x")
    assert not mailbox.items and not mailbox.woken
