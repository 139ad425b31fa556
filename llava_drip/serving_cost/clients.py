"""Clients of an OpenAI-compatible API, one or many at once: what each request got, and when.

Plain HTTP in place of OpenAI's own client, whose reading of a reply would take as much of the machine as the server that is to be
measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import httpx

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


class Refused(Exception):
    """A status other than 200, or an error within a stream.

    Attributes:
        retry_after: seconds, of a 429 that says when to come again.
    """

    def __init__(self, status: int, text: str, retry_after: float | None = None):
        super().__init__(f"{status}: {text}")
        self.retry_after = retry_after


class Caller:
    """Sends the requests of a pool in turn, for as long as it is asked to. Each client has a connection of its own."""

    def __init__(self, url: str, asks: Sequence[Ask], key: str = "none"):
        """url: of the server, without /v1."""
        self.url, self.asks, self.model, self.turn = url, asks, "", self._turns()
        self.headers, self.context = {"Authorization": f"Bearer {key}"}, ssl.create_default_context()

    def _connection(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=f"{self.url}/v1", headers=self.headers, timeout=TIMEOUT, trust_env=False, verify=self.context
        )

    async def connect(self) -> None:
        """Asks which model there is. ValueError: the server does not answer, or serves not just one."""
        try:
            async with self._connection() as http:
                reply = await http.get("/models")
                _check(reply)
                models = [model["id"] for model in reply.json()["data"]]
        except (httpx.HTTPError, httpx.InvalidURL, Refused, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--url {self.url}: {one_line(error)}") from error
        if len(models) != 1:
            raise ValueError(f"--url {self.url}: it serves {len(models)} models; a server of llava_drip has one")
        self.model = models[0]

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
            async with self._connection() as http:
                while more(sent):
                    sent += 1
                    got = Got(*next(self.turn))
                    await self._ask(http, got)
                    done.append(got)
                    tell(got)

        await asyncio.gather(*(client() for _ in range(clients)))
        return done

    async def _ask(self, http: httpx.AsyncClient, got: Got) -> None:
        """Until it is answered or fails with something other than a 429."""
        while True:
            got.sent, got.first, got.text = time.perf_counter(), None, ""
            try:
                await (self._stream(http, got) if got.streamed else self._whole(http, got))
            except Refused as error:
                if error.retry_after is not None:  # declared: come again then
                    got.refused += 1
                    if got.refused < MOST_TRIES:
                        await asyncio.sleep(error.retry_after)
                        continue
                got.error = one_line(error)
            except (
                httpx.HTTPError,
                ValueError,
                KeyError,
                IndexError,
                TypeError,
            ) as error:  # no answer, or none of OpenAI's
                got.error = f"{type(error).__name__}: {one_line(error)}"
            got.ended = time.perf_counter()
            return

    def _body(self, got: Got) -> dict:
        ask = self.asks[got.number]
        return {"model": self.model, "messages": ask.messages, "temperature": 0, "max_completion_tokens": MOST_TOKENS}

    async def _whole(self, http: httpx.AsyncClient, got: Got) -> None:
        response = await http.post("/chat/completions", json=self._body(got))
        _check(response)
        reply = response.json()
        (choice,) = reply["choices"]
        got.text, got.finish = choice["message"]["content"], choice["finish_reason"]
        self._count(got, reply["usage"])

    async def _stream(self, http: httpx.AsyncClient, got: Got) -> None:
        """It is answered only if it ends as it should, with [DONE]."""
        body = self._body(got) | {"stream": True, "stream_options": {"include_usage": True}}
        finish, usage = None, None
        async with http.stream("POST", "/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
            _check(response)
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    got.finish = finish
                    if usage is not None:
                        self._count(got, usage)
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise Refused(200, chunk["error"]["message"])
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    finish = choice["finish_reason"] or finish
                    if text := choice["delta"].get("content"):
                        got.first = got.first or time.perf_counter()
                        got.text += text

    @staticmethod
    def _count(got: Got, usage: dict) -> None:
        got.tokens, got.visual = usage["completion_tokens"], usage.get("visual_tokens")


def _check(response: httpx.Response) -> None:
    """Raises: Refused."""
    if response.status_code == 200:
        return
    text, wait = response.text[:200], None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = response.json()["error"]["message"]
    if response.status_code == 429:
        with contextlib.suppress(ValueError):
            wait = float(response.headers.get("retry-after", "none"))
    raise Refused(response.status_code, text, wait)
