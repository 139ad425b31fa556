"""Asking a judge behind an OpenAI-compatible endpoint, by OpenAI's own client: many at once, again where it fails, all kept.

Two kinds of failing are repeated. What the wire does (429, 5xx, time-outs, broken connections) the client repeats, waiting as
long as Retry-After says or twice as long each time. A reply that is no review (unreadable scores, cut off) is asked for again by
tenacity. Every reply, good or bad, is a line of the file of replies at once; what is found there is not asked again.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit, urlunsplit

from tqdm import tqdm

from llava_drip.cli import one_line
from llava_drip.evaluation.judging import Comparison, Unusable, parse_scores
from llava_drip.evaluation.resumable import cut, torn_tail
from llava_drip.jsonl import read_jsonl
from llava_drip.record import text_hash

SCORED = "scored"  # the outcome of a reply that counts
HOPELESS = 5  # so many reviews that fail before any succeeds end the run
_ABOUT: ContextVar[dict] = ContextVar("about")  # what the request of this task is for


@dataclass(frozen=True)
class JudgeSettings:
    """Who is asked, and how.

    Attributes:
        model, base_url, temperature, max_tokens, options: make the request; `options` go into it as they are, and None takes
            one out (max_tokens=None with max_completion_tokens=1024, for models that want that).
        key_env: the environment variable that holds the key.
        retries: how often the client repeats a request, and how often a reply that is no review is asked for again.
        in_flight: requests at once.
        timeout: seconds for one request.
    """

    model: str
    base_url: str | None = None
    temperature: float = 0.2
    max_tokens: int = 1024
    options: dict = field(default_factory=dict)
    key_env: str = "OPENAI_API_KEY"
    retries: int = 5
    in_flight: int = 4
    timeout: float = 120.0

    def __post_init__(self):
        for name, value in self.options.items():
            if name in ("model", "messages", "stream", "n"):
                raise ValueError(f"--judge-options: {name} is not to be changed")
            if name in ("max_tokens", "max_completion_tokens") and value is not None and type(value) is not int:
                raise ValueError(f"--judge-options: {name}={value!r} is no whole number")

    @property
    def parameters(self) -> dict:
        """What is sent beside the messages."""
        own = {"model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens, **self.options}
        return {name: value for name, value in own.items() if value is not None}

    def request(self, comparison: Comparison) -> dict:
        """Arguments of chat.completions.create, which knows OpenAI's parameters by name and takes others so too."""
        parameters = self.parameters
        return {"model": parameters.pop("model"), "messages": comparison.messages, "extra_body": parameters}

    @property
    def endpoint(self) -> str:
        """Where requests go, as OpenAI's client makes it out, without user, password and query."""
        url = self.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        return without_secrets(f"{url.rstrip('/')}/")

    def hash_of(self, comparison: Comparison) -> str:
        """Of everything that shapes the review: a reply counts for this request and for no other."""
        told = json.dumps([comparison.messages, self.parameters], sort_keys=True)
        return text_hash([self.endpoint, comparison.name, told])

    @property
    def most_tokens(self) -> int:
        """The most that a review may have."""
        limits = (self.options.get("max_completion_tokens"), self.options.get("max_tokens"), self.max_tokens)
        return next(limit for limit in limits if limit is not None)


class Judge:
    """A judge behind an endpoint, to be asked once. ValueError: a package of the eval extra or the key is missing."""

    def __init__(self, settings: JudgeSettings):
        try:
            import openai  # late, and optional: the eval extra brings both
            import tenacity
        except ImportError as error:
            raise ValueError(f"--judge MODEL: {error}; pip install -e '.[eval]' in the repository brings it") from error
        self.openai, self.tenacity, self.settings = openai, tenacity, settings
        key = os.environ.get(settings.key_env)
        base_url = settings.base_url or os.environ.get("OPENAI_BASE_URL")
        if not key and not base_url:
            raise ValueError(
                f"--judge {settings.model}: no key in the environment variable {settings.key_env} (--judge-key-env), and no "
                "--judge-base-url of an endpoint that needs none"
            )
        hooks = {"response": [self._keep_refusal]}
        self.client = openai.AsyncOpenAI(
            api_key=key or "EMPTY",  # servers that need none take any
            base_url=base_url,
            max_retries=settings.retries,
            timeout=settings.timeout,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks=hooks),
        )
        self.file: BinaryIO | None = None

    def ask(self, comparisons: list[Comparison], file: BinaryIO, hopeful: bool = False) -> dict[str, str]:
        """Asks for the reviews and appends every reply to the file; returns hash → why, of those that failed for good.

        hopeful: the judge is known to have answered before, so that many failures are those of the questions.

        Raises:
            ValueError: the endpoint refuses altogether (key, model, address), or the first questions all fail.
        """
        self.file = file
        return asyncio.run(self._ask_all(comparisons, hopeful))

    async def _ask_all(self, comparisons: list[Comparison], hopeful: bool) -> dict[str, str]:
        free, failed = asyncio.Semaphore(self.settings.in_flight), {}
        async with self.client:
            tasks = [asyncio.create_task(self._one(comparison, free)) for comparison in comparisons]
            try:
                with tqdm(total=len(tasks), desc=f"judge {self.settings.model}", unit="review") as bar:
                    for task in asyncio.as_completed(tasks):
                        comparison, reason = await task
                        bar.update()
                        if reason is None:
                            hopeful = True
                            continue
                        failed[self.settings.hash_of(comparison)] = reason
                        bar.write(f"no review of {comparison.name}: {reason}", file=sys.stderr)
                        if len(failed) >= HOPELESS and not hopeful:
                            raise ValueError(f"the first {len(failed)} reviews all failed; the last: {reason}")
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return failed

    async def _one(self, comparison: Comparison, free: asyncio.Semaphore) -> tuple[Comparison, str | None]:
        """The comparison, and why there is no review of it."""
        openai, tenacity, reason = self.openai, self.tenacity, None
        again = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Unusable),
            stop=tenacity.stop_after_attempt(1 + self.settings.retries),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=8),
            reraise=True,
        )
        async with free:
            try:
                async for attempt in again:
                    with attempt:
                        await self._attempt(comparison, attempt.retry_state.attempt_number)
            except Unusable as error:
                reason = str(error)
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise ValueError(f"{self.settings.endpoint}: {one_line(error)}") from error
            except openai.OpenAIError as error:
                reason = one_line(error)
        return comparison, reason

    async def _attempt(self, comparison: Comparison, number: int) -> None:
        """One reply, kept whatever it is. Unusable if it is no review; openai's errors once the client gives up."""
        start = time.perf_counter()
        about = {"request": self.settings.hash_of(comparison), "question_id": comparison.question_id}
        about |= {"order": comparison.order, "attempt": number}
        _ABOUT.set(about)
        try:
            raw = await self.client.chat.completions.with_raw_response.create(**self.settings.request(comparison))
        except self.openai.OpenAIError as error:
            self._keep(about, outcome="error", reason=one_line(error), seconds=time.perf_counter() - start)
            raise
        seen = {"retries": raw.retries_taken, "seconds": time.perf_counter() - start, "raw": raw.text}
        try:
            scores = review(raw.text, comparison, seen)
        except Unusable as error:
            self._keep(about, outcome=error.outcome, reason=str(error), **seen)
            raise
        self._keep(about, outcome=SCORED, scores=list(scores), **seen)

    async def _keep_refusal(self, response) -> None:
        """Called by the client with each response: 429s and the like are kept too, though it repeats them by itself."""
        if response.status_code >= 400:
            await response.aread()
            self._keep(_ABOUT.get(), outcome="http error", status=response.status_code, raw=response.text)

    def _keep(self, about: dict, **more) -> None:
        line = json.dumps({**about, **more}, ensure_ascii=False)
        self.file.write(line.encode(errors="backslashreplace") + b"\n")  # lone halves of pairs, as JSON escapes them
        self.file.flush()


def read_replies(path: Path) -> list[dict]:
    """All replies that a file keeps. A torn last line is cut off. ValueError names a line that is no reply."""
    if not path.is_file() or not path.stat().st_size:
        return []
    torn, rows = torn_tail(path, b'{"request"', "a reply", "--reviews-output"), []
    for where, row in read_jsonl(path, torn):
        if not isinstance(row.get("request"), str) or "outcome" not in row:
            raise ValueError(f"{where}: not a judge's reply (no request or outcome); choose another --reviews-output")
        rows.append(row)
    cut(path, torn)
    return rows


def review(raw: str, comparison: Comparison, row: dict) -> tuple[float, float]:
    """(reference's, model's) score of a reply's body; what else it tells goes into `row`. Unusable if it is no whole review."""
    try:
        body = json.loads(raw)
        choice = body["choices"][0]
        row["content"] = choice["message"].get("content")
        row |= {"finish": choice.get("finish_reason"), "model": body.get("model"), "usage": body.get("usage")}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Unusable(
            "malformed", f"the reply is no chat completion ({type(error).__name__}: {raw[:60]!r})"
        ) from error
    if row["finish"] != "stop":
        why = "cut off at the most tokens it may have" if row["finish"] == "length" else f"ended by {row['finish']!r}"
        raise Unusable("cut off" if row["finish"] == "length" else "malformed", f"the review was {why}")
    if not isinstance(row["content"], str):
        raise Unusable("malformed", "the reply has no text")
    return parse_scores(row["content"], comparison.order)


def without_secrets(url: str) -> str:
    """The address without user, password and query."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def usage_of(rows: Iterable[dict]) -> dict[str, int]:
    """Tokens that replies say they took, {"read", "written"}."""
    usages = [row["usage"] for row in rows if isinstance(row.get("usage"), dict)]
    keys = {"read": "prompt_tokens", "written": "completion_tokens"}
    return {name: sum(usage.get(key) or 0 for usage in usages) for name, key in keys.items()}
