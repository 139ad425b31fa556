"""Requests of the rendered world for an API: questions about pictures with known answers, descriptions, words alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from llava_drip.world.dataset import CAPTION_PROMPTS
from llava_drip.world.scenes import render, scene_at
from llava_drip.world.texts import describe, questions

Kind = Literal["question", "description", "text"]
KINDS: tuple[Kind, ...] = ("question", "description", "text")
MOST_TOKENS = 48  # of an answer; the longest description has three shapes


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        kind: "question" about a picture; "description" of one, some 8 tokens a shape; "text": either without its picture.
        messages: as OpenAI's API has them, the picture a data URL.
        truth: what would be right: of a description its parts, in any order; None where there is no picture.
    """

    kind: Kind
    messages: list[dict]
    truth: frozenset[str] | None

    def is_right(self, answer: str) -> bool | None:
        """None where there is no right answer."""
        if self.truth is None:
            return None
        return {part.strip().lower() for part in answer.split(",")} == self.truth


def make_asks(count: int, shares: Sequence[float], seed: int = 0) -> list[Ask]:
    """Requests about different scenes, of the test split: each has its own.

    shares: of KINDS, weights of any sum above 0.
    """
    weights = np.asarray(shares, dtype=float)
    kinds = np.random.default_rng(seed).choice(len(KINDS), size=count, p=weights / weights.sum())
    return [_make(KINDS[kind], seed, number) for number, kind in enumerate(kinds)]


def _make(kind: Kind, seed: int, number: int) -> Ask:
    scene, chance = scene_at(seed, "test", number), np.random.default_rng([seed, number])
    if kind == "description" or (kind == "text" and number % 2):
        text, truth = str(chance.choice(CAPTION_PROMPTS)), frozenset(map(describe, scene.objects))
    else:
        (question,) = questions(scene, chance, 1)
        text, truth = question.text, frozenset([question.answer])
    if kind == "text":
        return Ask(kind, [{"role": "user", "content": text}], None)
    picture = {"type": "image_url", "image_url": {"url": _data_url(render(scene)[0])}}
    return Ask(kind, [{"role": "user", "content": [picture, {"type": "text", "text": text}]}], truth)


def _data_url(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
