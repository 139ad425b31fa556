"""Asking a judge behind an OpenAI-compatible endpoint, by OpenAI's own client: many at once, again where it fails, all kept.

Two kinds of failing are repeated. What the wire does (429, 5xx, time-outs, broken connections) the client repeats, waiting as
long as Retry-After says or twice as long each time. A reply that is no review (unreadable scores, cut off) is asked for again by
tenacity. Every reply, good or bad, is a line of the file of replies at once; what is found there is not asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit, urlunsplit

from tqdm import tqdm

from llava_drip.cli import one_line
from llava_drip.evaluation.judging import Comparison, Unusable, parse_scores
from llava_drip.evaluation.record import text_hash
from llava_drip.evaluation.resumable import cut, torn_tail
from llava_drip.jsonl import read_jsonl

SCORED = "scored"  # the outcome of a reply that counts
HOPELESS = 5  # so many questions that fail before any succeeds end the run


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

    def request(self, comparison: Comparison) -> dict:
        """Arguments of chat.completions.create."""
        own = {"model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens, **self.options}
        return {
            "messages": comparison.messages,
            **{key: value for key, value in own.items() if value is not None},
        }

    @property
    def most_tokens(self) -> int:
        """The most that a review may have."""
        limits = (self.options.get("max_completion_tokens"), self.options.get("max_tokens"), self.max_tokens)
        return next(limit for limit in limits if limit is not None)


class Judge:
    """A judge and the file of its replies. ValueError: the openai package or the key is missing, or the file is none of these."""

    def __init__(self, settings: JudgeSettings, replies: Path):
        try:
            import openai  # late, and optional: the eval extra brings it
        except ImportError as error:
            raise ValueError("--judge MODEL needs the openai package: pip install 'llava_drip[eval]'") from error
        self.openai, self.settings, self.path = openai, settings, replies
        key = os.environ.get(settings.key_env)
        base_url = settings.base_url or os.environ.get("OPENAI_BASE_URL")
        if not key and not base_url:
            raise ValueError(
                f"--judge {settings.model}: no key in the environment variable {settings.key_env} (--judge-key-env), and no "
                "--judge-base-url of an endpoint that needs none"
            )
        # Servers that ask for no key still get a header, as vLLM's documentation does it.
        self.client = openai.AsyncOpenAI(
            api_key=key or "EMPTY", base_url=base_url, max_retries=settings.retries, timeout=settings.timeout
        )
        self.endpoint = without_secrets(str(self.client.base_url))

    def hash_of(self, comparison: Comparison) -> str:
        """Of everything that shapes the review: a reply counts for this request and for no other."""
        request = self.settings.request(comparison)
        return text_hash([self.endpoint, json.dumps(request, sort_keys=True)])

    def replies(self) -> list[dict]:
        """All that was kept. A torn last line is cut off. ValueError names a line that is no reply."""
        if not self.path.is_file() or not self.path.stat().st_size:
            return []
        torn, rows = torn_tail(self.path, b'{"request"', "a reply", "--reviews-output"), []
        for where, row in read_jsonl(self.path, torn):
            if not isinstance(row.get("request"), str) or "outcome" not in row:
                raise ValueError(
                    f"{where}: not a judge's reply (no request or outcome); choose another --reviews-output"
                )
            rows.append(row)
        cut(self.path, torn)
        return rows

    def ask(self, comparisons: list[Comparison], file: BinaryIO) -> dict[str, str]:
        """Asks for the reviews and appends every reply to the file; returns hash → why, of those that failed for good.

        Raises:
            ValueError: the endpoint refuses altogether (key, model, address), or the first questions all fail.
        """
        return asyncio.run(self._ask_all(comparisons, file))

    async def _ask_all(self, comparisons: list[Comparison], file: BinaryIO) -> dict[str, str]:
        free, failed, scored = asyncio.Semaphore(self.settings.in_flight), {}, 0
        async with self.client:
            tasks = [asyncio.create_task(self._one(comparison, free, file)) for comparison in comparisons]
            try:
                with tqdm(total=len(tasks), desc=f"judge {self.settings.model}", unit="review") as bar:
                    for task in asyncio.as_completed(tasks):
                        name, request, reason = await task
                        bar.update()
                        if reason is None:
                            scored += 1
                        else:
                            failed[request] = reason
                            bar.write(f"no review of {name}: {reason}", file=sys.stderr)
                        if len(failed) >= HOPELESS and not scored:
                            raise ValueError(f"the first {len(failed)} questions all failed; the last: {reason}")
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return failed

    async def _one(
        self, comparison: Comparison, free: asyncio.Semaphore, file: BinaryIO
    ) -> tuple[str, str, str | None]:
        """(the comparison's name, its hash, why it failed)."""
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

        request, openai, reason = self.hash_of(comparison), self.openai, None
        again = AsyncRetrying(
            retry=retry_if_exception_type(Unusable),
            stop=stop_after_attempt(1 + self.settings.retries),
            wait=wait_random_exponential(multiplier=0.5, max=8),
            reraise=True,
        )
        async with free:
            try:
                async for attempt in again:
                    with attempt:
                        await self._attempt(comparison, request, attempt.retry_state.attempt_number, file)
            except Unusable as error:
                reason = str(error)
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise ValueError(f"{self.endpoint}: {one_line(error)}") from error
            except openai.OpenAIError as error:
                reason = one_line(error)
        return comparison.name, request, reason

    async def _attempt(self, comparison: Comparison, request: str, number: int, file: BinaryIO) -> None:
        """One reply, recorded whatever it is. Unusable if it is no review; openai's errors once the client gives up."""
        start, row = time.perf_counter(), {"request": request, "question_id": comparison.question_id}
        row |= {"order": comparison.order, "attempt": number, "outcome": "error", "reason": None, "scores": None}
        try:
            raw = await self.client.chat.completions.with_raw_response.create(**self.settings.request(comparison))
            row |= {"retries": raw.retries_taken, "raw": raw.text}
            row["scores"] = list(review(raw.text, comparison, row))
            row["outcome"] = SCORED
        except Unusable as error:
            row |= {"outcome": error.outcome, "reason": str(error)}
            raise
        except self.openai.OpenAIError as error:
            response = getattr(error, "response", None)
            row |= {"reason": one_line(error), "raw": getattr(response, "text", None), "retries": None}
            raise
        finally:
            if row["outcome"] != "error" or row["reason"]:  # else it was interrupted
                row["seconds"] = round(time.perf_counter() - start, 3)
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()


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
    total = {"read": 0, "written": 0}
    for row in rows:
        usage = row.get("usage") if isinstance(row.get("usage"), dict) else {}
        for name, key in (("read", "prompt_tokens"), ("written", "completion_tokens")):
            with contextlib.suppress(TypeError, ValueError):
                total[name] += int(usage.get(key) or 0)
    return total
