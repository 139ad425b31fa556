"""POST /v1/chat/completions: OpenAI's request → the engine's conversation; its events → OpenAI's answer, whole or in chunks."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator

import anyio
from fastapi import APIRouter, Request
from PIL import Image
from starlette.responses import Response

from llava_drip.engine import Usage as EngineUsage
from llava_drip.scheduling.row import Picture
from llava_drip.scheduling.ticket import ReplyStream
from serve.errors import ApiError, bad_request, busy, late, log_failure
from serve.leaving import ClientGone, unless_gone
from serve.openai_types import MAX_PICTURES, MAX_TEXT, ChatRequest
from serve.reply_types import ChatCompletion, Choice, ErrorBody, Said, Usage
from serve.service import Service
from serve.service_routes import Here
from serve.work import Choices, EventStream, refusals

router = APIRouter()
ERRORS = {status: {"model": ErrorBody} for status in (400, 401, 404, 413, 429, 500, 503)}
GONE = Response(status_code=499)  # nobody reads it; the log does


@router.post(
    "/v1/chat/completions",
    tags=["OpenAI"],
    response_model=ChatCompletion,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}, **ERRORS},
)
async def chat_completions(request: Request, body: ChatRequest, service: Here):
    """An answer about texts and pictures; with stream, as server-sent events that end with [DONE]."""
    service.check_model(body.model)
    with contextlib.ExitStack() as done:
        cancel = threading.Event()
        service.cancels.add(cancel)
        done.callback(service.cancels.discard, cancel)
        done.callback(cancel.set)
        answer = Answer(service, body)
        try:
            await unless_gone(request, answer.begin(done, cancel))
            if body.stream:
                return EventStream(answer.chunks(), done.pop_all())
            return await unless_gone(request, answer.whole())
        except ClientGone:
            return GONE


class Answer:
    """One request on its way."""

    def __init__(self, service: Service, body: ChatRequest):
        self.service, self.body, self.count = service, body, body.n or 1
        self.arrived = time.perf_counter()
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.usages: list[EngineUsage | None] = [None] * self.count

    async def begin(self, done: contextlib.ExitStack, cancel: threading.Event) -> None:
        """Reads the pictures and starts the work, up to its first sign. ApiError for what is refused."""
        body, limit = self.body, self.service.settings.time_limit
        options = {
            "max_new_tokens": self._most_tokens(),
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "compression": body.compression,
            "max_visual_tokens": body.max_visual_tokens,
            "stop": body.stop or (),
            "time_limit": limit,
            "cancel": cancel,
        }
        self.events = choices = Choices(self.service.mailbox, whole=not body.stream)
        done.callback(choices.close)
        try:
            with anyio.fail_after(limit):  # a client's pictures may be long in coming
                await self._submit(options)
        except TimeoutError:
            raise late(limit) from None
        with refusals(self.id):
            await choices.begun()

    def _most_tokens(self) -> int:
        """That it may write. ApiError: more than the server allows."""
        body, settings = self.body, self.service.settings
        name = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        asked, most = getattr(body, name), settings.most_new_tokens or 2**31
        if asked and asked > most:
            raise bad_request(f"{name}: this server writes at most {most:,} tokens", name)
        return asked or min(settings.max_new_tokens, most)

    async def _submit(self, options: dict) -> None:
        """All choices into the queue. When this returns, nobody has the pictures but the engine, which has made them small."""
        messages, images = await self._conversation()
        starters, engine = self.service.starters, self.service.engine
        with refusals(self.id):
            if self.count > 1 and images:  # once, not for each choice
                images = await starters.run(functools.partial(engine.prepared, images))
            for number in range(self.count):
                seed = None if self.body.seed is None else (self.body.seed + number + 2**63) % 2**64 - 2**63
                start = functools.partial(self._start, messages, images, seed=seed, **options)
                self.events.add(await starters.run(start))

    def _start(
        self, messages: list[dict], pictures: list[Image.Image | Picture], time_limit: float, **options
    ) -> ReplyStream:
        """In a thread, for which it may have waited: the limit counts from the request."""
        left = time_limit - (time.perf_counter() - self.arrived)
        if left <= 0:
            raise late(self.service.settings.time_limit)
        return self.service.engine.stream(messages, pictures, time_limit=left, **options)

    async def _conversation(self) -> tuple[list[dict], list[Image.Image]]:
        """The engine's messages, and the pictures in the order of their parts."""
        messages, places, length = [], [], 0
        for number, message in enumerate(self.body.messages):
            content = []
            given = message.content
            for place, part in enumerate(given if isinstance(given, list) else ()):
                if part.type == "image_url":
                    places.append((part.image_url.url, f"messages[{number}].content[{place}].image_url.url"))
                    content.append({"type": "image"})
                else:
                    content.append({"type": "text", "text": part.text})
            if isinstance(given, str):
                content.append({"type": "text", "text": given})
            length += sum(len(part.get("text", "")) for part in content)
            role = "system" if message.role == "developer" else message.role
            messages.append({"role": role, "content": content})
        if length > MAX_TEXT:
            text = f"messages: the texts have {length:,} characters; at most {MAX_TEXT:,} are read"
            raise bad_request(text, "messages", "context_length_exceeded")
        if len(places) > MAX_PICTURES:
            text = f"messages: {len(places)} pictures; a request may have {MAX_PICTURES}"
            raise bad_request(text, "messages", "too_many_images")
        return messages, [await self.service.pictures.decode(url, param) for url, param in places]

    async def whole(self) -> ChatCompletion:
        texts = [""] * self.count
        with refusals(self.id):
            async for number, event in self._noted():
                texts[number] += event.text
        if not any(texts) and any(usage.finish == "timeout" for usage in self.usages):
            raise late(self.service.settings.time_limit)
        choices = [
            Choice(index=number, message=Said(content=text), finish_reason=finish_reason(usage))
            for number, (text, usage) in enumerate(zip(texts, self.usages))
        ]
        return ChatCompletion(
            id=self.id, created=self.created, model=self.body.model, choices=choices, usage=total(self.usages)
        )

    async def chunks(self) -> AsyncIterator[str]:
        """Server-sent events, those that come together in one piece. An error after the first is an event of its own, as
        OpenAI's are; nothing follows it."""
        with_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        roles = ({"role": "assistant", "content": ""}, None, with_usage)
        ready = "".join(self._chunk(number, *roles) for number in range(self.count))
        try:
            with refusals(self.id):
                async for number, event in self._noted():
                    if event.usage.finish == "timeout" and not event.usage.new_tokens:
                        raise late(self.service.settings.time_limit)
                    if event.text:
                        ready += self._chunk(number, {"content": event.text}, None, with_usage)
                    if event.usage.finish:
                        ready += self._chunk(number, {}, finish_reason(event.usage), with_usage)
                    if self.events.waiting and not self.events.over:
                        yield ready
                        ready = ""
        except ApiError as error:
            yield ready + error.event()
            return
        except Exception as error:
            log_failure(self.id, error)
            yield ready + ApiError(500, "the server failed").event()
            return
        if with_usage:
            ready += self._event([], total(self.usages).model_dump())
        yield f"{ready}data: [DONE]\n\n"

    async def _noted(self):
        async for number, event in self.events:
            if event.usage.finish:
                self.usages[number] = event.usage
                self.service.metrics.answer(event.usage)
            if event.usage.finish == "cancelled":  # not by a client, which would not be listening
                raise busy("the server is shutting down; try again", 5, 503, "shutting_down")
            yield number, event

    def _chunk(self, index: int, delta: dict, finish: str | None, with_usage: bool) -> str:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._event([choice], None) if with_usage else self._event([choice])

    def _event(self, choices: list[dict], *usage: dict | None) -> str:
        chunk = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.body.model}
        chunk["choices"] = choices
        if usage:
            chunk["usage"] = usage[0]
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def finish_reason(usage: EngineUsage) -> str:
    """OpenAI knows no time limit; what it ended is cut like what became too long."""
    return "stop" if usage.finish == "stop" else "length"


def total(usages: list[EngineUsage]) -> Usage:
    """Of all choices, which share the prompt."""
    first, written = usages[0], sum(usage.new_tokens for usage in usages)
    return Usage(
        prompt_tokens=first.prompt_tokens,
        completion_tokens=written,
        total_tokens=first.prompt_tokens + written,
        prompt_tokens_details={"cached_tokens": first.cached_tokens},
        visual_tokens=first.visual_tokens,
        patches=first.patches,
        first_token_ms=None if first.first_token_ms is None else round(first.first_token_ms, 3),
    )
