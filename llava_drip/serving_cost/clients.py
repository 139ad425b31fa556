"""Clients of an OpenAI-compatible API, one or many at once, by OpenAI's own: what each request got, and when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import httpx
import openai

from llava_drip.cli import one_line
from llava_drip.serving_cost.workload import MOST_TOKENS, Ask

TIMEOUT = httpx.Timeout(300, connect=10)
MOST_TRIES = 50  # of one request that is told to come again


@dataclass
class Got:
    """What became of one request.

    Attributes:
        number: of its Ask. streamed: or whole.
        sent, first, ended: perf_counter of the last try, of its first text (streamed), of its end.
        text, finish, tokens, visual: the answer, why it ended, tokens written, and visual tokens read; None: it was lost.
        refused: how often it was told to come again (429).
        error: what it failed with in the end.
    """

    number: int
    streamed: bool
    sent: float = 0.0
    first: float | None = None
    ended: float = 0.0
    text: str = ""
    finish: str | None = None
    tokens: int | None = None
    visual: int | None = None
    refused: int = 0
    error: str | None = None

    @property
    def answered(self) -> bool:
        return self.error is None and self.finish is not None and self.tokens is not None


class Caller:
    """Sends the requests of a pool in turn, for as long as it is asked to."""

    def __init__(self, url: str, asks: Sequence[Ask], key: str = "none", most_clients: int = 64):
        """url: of the server, without /v1. ValueError: it does not answer, or serves other than one model."""
        limits = httpx.Limits(max_connections=most_clients + 8, max_keepalive_connections=most_clients + 8)
        self.http = httpx.AsyncClient(limits=limits, timeout=TIMEOUT, trust_env=False)
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=self.http)
        self.url, self.asks, self.model, self.turn = url, asks, "", self._turns()

    async def __aenter__(self) -> Caller:
        try:
            models = [model.id async for model in self.client.models.list()]
        except (openai.OpenAIError, httpx.HTTPError) as error:
            await self.http.aclose()
            raise ValueError(f"--url {self.url}: {one_line(error)}") from error
        if len(models) != 1:
            await self.http.aclose()
            raise ValueError(f"--url {self.url}: it serves {len(models)} models; a server of llava_drip has one")
        self.model = models[0]
        return self

    async def __aexit__(self, *_) -> None:
        await self.http.aclose()

    def _turns(self) -> Iterator[tuple[int, bool]]:
        """Numbers of the pool, round and round, every second one streamed, and the others the next time."""
        cycle = 0
        while True:
            yield from ((number, (number + cycle) % 2 == 0) for number in range(len(self.asks)))
            cycle += 1

    async def call(self, clients: int, more: Callable[[int], bool], tell: Callable[[Got], None]) -> list[Got]:
        """Requests by so many clients at once, in the order of their ends.

        more: asked before each, with how many were sent: whether another is to be. tell: called with each that has ended.
        """
        done: list[Got] = []
        sent = 0

        async def client() -> None:
            nonlocal sent
            while more(sent):
                sent += 1
                got = Got(*next(self.turn))
                await self._ask(got)
                done.append(got)
                tell(got)

        await asyncio.gather(*(client() for _ in range(clients)))
        return done

    async def _ask(self, got: Got) -> None:
        """Until it is answered or fails with something other than a 429."""
        while True:
            got.sent, got.first, got.text = time.perf_counter(), None, ""
            try:
                await (self._stream(got) if got.streamed else self._whole(got))
            except openai.RateLimitError as error:
                got.refused += 1
                wait = error.response.headers.get("retry-after")
                if wait is not None and got.refused < MOST_TRIES:  # declared: come again then
                    await asyncio.sleep(float(wait))
                    continue
                got.error = one_line(error)
            except (openai.OpenAIError, httpx.HTTPError) as error:
                got.error = f"{type(error).__name__}: {one_line(error)}"
            got.ended = time.perf_counter()
            return

    def _body(self, got: Got) -> dict:
        ask = self.asks[got.number]
        return {"model": self.model, "messages": ask.messages, "temperature": 0, "max_completion_tokens": MOST_TOKENS}

    async def _whole(self, got: Got) -> None:
        reply = await self.client.chat.completions.create(**self._body(got))
        got.text, got.finish = reply.choices[0].message.content, reply.choices[0].finish_reason
        self._count(got, reply.usage)

    async def _stream(self, got: Got) -> None:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        async with await self.client.chat.completions.create(**self._body(got), **options) as chunks:
            async for chunk in chunks:
                if chunk.choices and chunk.choices[0].delta.content:
                    got.first = got.first or time.perf_counter()
                    got.text += chunk.choices[0].delta.content
                if chunk.choices and chunk.choices[0].finish_reason:
                    got.finish = chunk.choices[0].finish_reason
                if chunk.usage is not None:
                    self._count(got, chunk.usage)

    @staticmethod
    def _count(got: Got, usage) -> None:
        got.tokens, got.visual = usage.completion_tokens, getattr(usage, "visual_tokens", None)
