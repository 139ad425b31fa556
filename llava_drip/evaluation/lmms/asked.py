"""Requests of lmms-eval: which document of which task, what the task says to the model, and which of them share a batch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from PIL import Image

from llava_drip.engine import Reply
from llava_drip.evaluation.lmms.settings import Generation
from llava_drip.images import ImageError, load_image, rgb_image

MOST_ROUNDS = 100  # of a task that asks in several; one that gives a text each time never ends by itself


@dataclass
class Asked:
    """A request.

    Attributes:
        task, split, doc: the document, by its number in the split.
        attempt: which of the answers to the same document this is, from 0 (--repeats).
        messages: document → the task's messages; from the second round on with round_idx, previous_output and
            previous_round_info, → (messages, whether it has ended, outputs, the next previous_round_info).
        generation: how it is answered.
        counts: False for a copy, by which lmms-eval gives all ranks as many requests.
        replies: so far, one a round.
        note: the task's last previous_round_info.
    """

    task: str
    split: str
    doc: int
    attempt: int
    messages: Callable
    generation: Generation
    counts: bool = True
    replies: list[Reply] = field(default_factory=list)
    note: object = None

    @property
    def where(self) -> str:
        return f"{self.task}, {self.split} {self.doc}"

    @property
    def said(self) -> list[str]:
        """The answer of each round."""
        return [self.generation.ended(reply.text) for reply in self.replies]

    def next_messages(self, document: dict) -> list | None:
        """What the task says next; None: it has ended. ValueError: it does not end."""
        number = len(self.replies)
        if number == 0:
            return self.messages(document)
        if number == MOST_ROUNDS:
            raise ValueError(f"{self.where}: the task does not end after {MOST_ROUNDS} rounds")
        more = {"round_idx": number, "previous_output": self.said, "previous_round_info": self.note}
        given = self.messages(document, **more)
        if not isinstance(given, tuple) or len(given) != 4:
            return None
        messages, ended, _, self.note = given
        return None if ended else messages


def in_batches(asked: Sequence[Asked], size: int) -> Iterator[list[Asked]]:
    """Up to `size` at once that are made in one way; sampled ones one by one, since a batch shares its random numbers."""
    groups: dict[Generation, list[Asked]] = {}
    for turn in asked:
        groups.setdefault(turn.generation, []).append(turn)
    for generation, group in groups.items():
        step = 1 if generation.temperature else size
        for start in range(0, len(group), step):
            yield group[start : start + step]


def read_messages(raw: Sequence[dict], where: str) -> tuple[list[dict], list[Image.Image]]:
    """A task's messages, in the form of lmms_eval.protocol.ChatMessages → those of `Engine.answer_batch`, and their pictures.

    Args:
        raw: [{"role", "content": [{"type": "text", "text"} or {"type": "image", "url": a PIL image or a file's path}]}].
    Raises:
        ValueError: naming the document: a video or sound, or a picture that cannot be read.
    """
    messages, images = [], []
    for message in raw:
        parts = []
        for part in message["content"]:
            if part["type"] == "text":
                parts.append(part)
                continue
            url, name = part.get("url"), f"{where}, picture {len(images) + 1}"
            if part["type"] != "image" or not isinstance(url, (Image.Image, str, os.PathLike)):
                raise ValueError(
                    f"{where}: a part of type {part['type']!r}: the assistant takes text and pictures alone"
                )
            try:
                images.append(rgb_image(url, name) if isinstance(url, Image.Image) else load_image(url))
            except ImageError as error:
                raise ValueError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error
            parts.append({"type": "image"})
        messages.append({"role": message["role"], "content": parts})
    return messages, images


def entry(turn: Asked, messages: list[dict], images: list[Image.Image], seconds: float) -> dict:
    """What the record says of an answer; "prompt" and "pictures" are for its hashes."""
    usage, sha = turn.replies[-1].usage, hashlib.sha256()
    for image in images:
        sha.update(f"{image.size}".encode() + image.tobytes())
    return {
        "task": turn.task,
        "split": turn.split,
        "doc_id": turn.doc,
        "attempt": turn.attempt,
        "round": len(turn.replies) - 1,
        "images": len(images),
        "visual_tokens": usage.visual_tokens,
        "patches": usage.patches,
        "prompt_tokens": usage.prompt_tokens,
        "new_tokens": usage.new_tokens,
        "finish": usage.finish,
        "seconds": round(seconds, 4),
        "prompt": json.dumps(messages, ensure_ascii=False),
        "pictures": sha.hexdigest(),
    }
