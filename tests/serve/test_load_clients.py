"""What the load's clients make of servers that do not answer as they should, over real HTTP."""

from __future__ import annotations

import asyncio
import json

import pytest
from api_server import on_loopback
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from llava_drip.serving_cost.clients import Caller, Got
from llava_drip.serving_cost.workload import Ask

MESSAGES = [{"role": "user", "content": "Which colour?"}]
ASK = Ask("text", MESSAGES, None)
USAGE = {"completion_tokens": 3, "visual_tokens": 17}
WORDS = [
    {"choices": [{"delta": {"content": "red"}, "finish_reason": None}]},
    {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    {"choices": [], "usage": USAGE},
]


def events(*chunks: dict, done: bool = True) -> Response:
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n" * done
    return Response(text, media_type="text/event-stream")


def got(*answers: Response, streamed: bool) -> Got:
    """What a client has after a server gave these, one each time it was asked."""
    app, left = FastAPI(), list(answers)

    @app.get("/v1/models")
    def models() -> dict:
        return {"data": [{"id": "m"}]}

    @app.post("/v1/chat/completions")
    async def answer(request: Request) -> Response:
        assert (await request.json())["messages"] == MESSAGES
        return left.pop(0)

    async def called(url: str) -> Got:
        caller = Caller(url, [ASK])
        await caller.connect()
        caller.turn = iter([(0, streamed)])
        (one,) = await caller.call(1, lambda sent: sent < 1, lambda _: None)
        return one

    with on_loopback(app) as url:
        one = asyncio.run(called(url))
    assert not left
    return one


def busy(**headers: str) -> Response:
    return JSONResponse({"error": {"message": "full"}}, 429, headers)


def test_an_answer_in_pieces():
    one = got(events(*WORDS), streamed=True)
    assert one.answered and (one.text, one.finish, one.tokens, one.visual) == ("red", "stop", 3, 17)
    assert one.sent < one.first < one.ended


def test_a_429_that_says_when_is_obeyed():
    one = got(busy(**{"Retry-After": "0.05"}), busy(**{"Retry-After": "0.05"}), events(*WORDS), streamed=True)
    assert one.answered and one.refused == 2


@pytest.mark.parametrize("streamed", [False, True])
def test_a_429_that_does_not_is_an_error(streamed):
    one = got(busy(), streamed=streamed)
    assert not one.answered and one.refused == 0 and one.error == "429: full"


@pytest.mark.parametrize("chunks, done", [(WORDS, False), (WORDS[:1], True), (WORDS[:2], True)])
def test_a_stream_that_lacks_its_end_is_lost(chunks, done):
    one = got(events(*chunks, done=done), streamed=True)
    assert one.text == "red" and not one.answered and one.error is None


def test_an_error_within_a_stream():
    one = got(events(WORDS[0], {"error": {"message": "the worker went"}}, done=False), streamed=True)
    assert not one.answered and one.error == "200: the worker went"


def test_what_is_no_answer_of_openais():
    one = got(JSONResponse({"choices": []}), streamed=False)
    assert not one.answered and one.error.startswith("ValueError")
