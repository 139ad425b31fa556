"""LLaVA's conversation files: read, checked row by row, and turned into ids, labels and pixels.

    [{"id": "0001", "image": "0001.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                            {"from": "gpt", "value": "A cat."}]}, ...]

The 558K alignment file and LLaVA-Instruct-158K have this form. "image" may be absent (text alone) or a list (several pictures).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llava_drip.assistant.expand import IGNORE_INDEX
from llava_drip.assistant.processing import IMAGE_TOKEN, LlavaDripProcessor
from llava_drip.conversation import PlainText, TemplateFailure
from llava_drip.images import load_image
from llava_drip.instruct.templates import APPENDING, render, text_of
from llava_drip.jsonl import read_jsonl
from llava_drip.training.skips import BadSample

TURNS, PLACEHOLDERS = "roles out of turn", "placeholders"  # kinds of what is wrong with a row
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class CutOffError(ValueError):
    """The length limit leaves a picture's placeholder out."""


def images_of(record: dict) -> list[str]:
    """File names of a row's pictures, in order."""
    image = record.get("image") or []
    return [image] if isinstance(image, str) else list(image)


def check_record(record: dict) -> None:
    """BadSample (a ValueError) saying what is wrong with a row, of one kind or another; the caller adds which row it is."""
    if not isinstance(record, dict):
        raise BadSample("not a row", f"a row must be an object with 'conversations', got {type(record).__name__}")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadSample("no conversation", "has no 'conversations'")
    image = record.get("image")
    if not (
        image is None or isinstance(image, str) or (isinstance(image, list) and all(isinstance(f, str) for f in image))
    ):
        raise BadSample("'image'", f"'image' must be a file name or a list of file names, got {image!r:.80}")
    expected = "human"
    for i, turn in enumerate(turns):
        role, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        system = role == "system" and i == 0
        if role != expected and not system:
            raise BadSample(TURNS, f"turn {i} is from {role!r}, expected {expected!r} (human and gpt alternate)")
        if not isinstance(value, str) or (role == "gpt" and not value.strip()):
            raise BadSample("empty turn", f"turn {i} ({role}) has no text in 'value'")
        if system:
            continue
        if role == "gpt" and IMAGE_TOKEN in value:
            raise BadSample(PLACEHOLDERS, f"turn {i}: {IMAGE_TOKEN} stands in an answer")
        expected = "gpt" if expected == "human" else "human"
    if expected == "gpt":
        raise BadSample(TURNS, "ends with a question; the last turn must be from 'gpt'")
    placeholders = sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)
    if placeholders != len(images_of(record)):
        images = len(images_of(record))
        raise BadSample(PLACEHOLDERS, f"has {placeholders} {IMAGE_TOKEN} and {images} images; they must match")


def missing_images(record: dict, image_folder: str | Path | None = None) -> list[str]:
    """Those of a (checked) row's pictures that are no files, as the row names them."""
    return [image for image in images_of(record) if not os.path.isfile(os.path.join(image_folder or "", image))]


def name_of_row(i: int, record: dict) -> str:
    """For messages: row 7 (id '0007')."""
    return f"row {i}" + (f" (id {record['id']!r})" if isinstance(record, dict) and "id" in record else "")


def read_records(path: str | Path, flag: str = "--data_path") -> list:
    """The rows of a conversation file (.json list, or .jsonl), unchecked.

    flag: by which the file was given, for messages.
    Raises:
        ValueError: naming the file, and the line of a .jsonl that is no JSON.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: no such data file ({flag})")
    try:
        if path.suffix == ".jsonl":
            records = [record for _, record in read_jsonl(path)]
        else:
            records = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: must hold a non-empty list of rows")
    return records


def checked_records(path: str | Path, flag: str = "--data_path") -> list[dict]:
    """Read a conversation file and check every row. The first bad one ends it; data_check finds them all.

    Raises:
        ValueError: naming the file, the row (from 0) and what is wrong with it.
    """
    path = Path(path).expanduser()
    records = read_records(path, flag)
    for i, record in enumerate(records):
        try:
            check_record(record)
        except ValueError as error:
            raise ValueError(f"{path}: {name_of_row(i, record)} {error}") from None
    return records


def load_records(path: str | Path, image_folder: str | Path | None = None) -> list[dict]:
    """checked_records, and every picture file exists.

    Raises:
        ValueError: naming the file, the row (from 0) and what is wrong with it.
    """
    records = checked_records(path)
    for i, record in enumerate(records):
        for image in missing_images(record, image_folder):
            where = f" in --image_folder {image_folder}" if image_folder else ""
            raise ValueError(f"{Path(path).expanduser()}: row {i}: image file {image!r} not found{where}")
    return records


def to_messages(record: dict, plain: Callable[[str], str] = str) -> list[dict]:
    """A row as transformers' chat messages. As in LLaVA, a turn's pictures come before its text.

    plain: what becomes of the texts; PlainText takes special tokens in them apart, as is done with a user's in inference.
    """
    messages = []
    for turn in record["conversations"]:
        parts = [{"type": "image"}] * turn["value"].count(IMAGE_TOKEN)
        text = plain(turn["value"].replace(IMAGE_TOKEN, "").strip())
        messages.append({"role": ROLES[turn["from"]], "content": [*parts, {"type": "text", "text": text}]})
    return messages


def encode_conversation(
    processor: LlavaDripProcessor, messages: list[dict], template: str
) -> tuple[list[int], list[int]]:
    """ids and labels of a conversation; labels are -100 except on what the assistant says, its end mark included.

    The text is tokenized once, whole, as it is at inference; a token is labelled if it lies within an assistant's span.
    """
    rendered = render(processor.tokenizer, messages, template)
    encoded = processor.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    ids, labels = encoded["input_ids"], [IGNORE_INDEX] * len(encoded["input_ids"])
    spans = iter(rendered.spans)
    start, end = next(spans, (0, 0))
    for i, (a, b) in enumerate(encoded["offset_mapping"]):
        while a >= end and (span := next(spans, None)):
            start, end = span
        if start <= a < b <= end:
            labels[i] = ids[i]
    return ids, labels


class ConversationDataset(Dataset):
    """Rows of a conversation file, encoded when asked for.

    Items: {"input_ids": [L] int64, "labels": [L] int64, "pixel_values": [images, 3, h, w] or None}.
    """

    def __init__(
        self,
        records: list[dict],
        processor: LlavaDripProcessor,
        template: str,
        image_folder: str | Path | None = None,
        max_length: int | None = None,
        image_tokens: int = 1,
    ):
        """max_length: positions that a row may take in the language model; its text is cut there (None: never).
        image_tokens: of them, how many an image may take at most.
        """
        if not processor.tokenizer.is_fast:
            raise ValueError(f"{type(processor.tokenizer).__name__}: labels need a fast tokenizer (tokenizer.json)")
        self.records, self.processor, self.template = records, processor, template
        self.image_folder, self.max_length, self.image_tokens = str(image_folder or ""), max_length, image_tokens
        self.plain = PlainText(processor)

    def __len__(self) -> int:
        return len(self.records)

    def name_of(self, i: int) -> str:
        """For messages: row 7 (id '0007')."""
        return name_of_row(i, self.records[i])

    def limits(self, i: int) -> str:
        """For messages: --model_max_length 2048, of which its 1 images may take 576."""
        images = len(images_of(self.records[i]))
        share = f", of which {images} {IMAGE_TOKEN} may take {images * self.image_tokens}" if images else ""
        return f"--model_max_length {self.max_length}{share}"

    def text_limit(self, i: int) -> int | None:
        """Tokens kept of row i, an image counted as one; None: all."""
        if self.max_length is None:
            return None
        return max(0, self.max_length - len(images_of(self.records[i])) * (self.image_tokens - 1))

    def text(self, i: int) -> str:
        """Row i as the template writes it. ValueError naming the row: the template rewrites earlier turns in it."""
        messages = to_messages(self.records[i], self.plain)
        if self.template in APPENDING:
            return text_of(self.processor.tokenizer, messages, self.template)
        # A foreign template may rewrite a turn for what it says, so the answers' spans are looked for in each row.
        with self._naming(i):
            return render(self.processor.tokenizer, messages, self.template).text

    @contextmanager
    def _naming(self, i: int) -> Iterator[None]:
        try:
            yield
        except TemplateFailure as error:
            raise ValueError(f"{self.name_of(i)}: {error}; try --version vicuna_v1, or change the row") from None
        except ValueError as error:
            raise ValueError(f"{self.name_of(i)}: {error}") from None

    def encode(self, i: int, whole: bool = False) -> tuple[list[int], list[int]]:
        """ids and labels of row i, cut to its limit (or whole), one placeholder an image.

        Raises:
            ValueError: naming the row: an image is cut off (CutOffError), or the template leaves one out or rewrites earlier
                turns.
        """
        with self._naming(i):
            messages = to_messages(self.records[i], self.plain)
            ids, labels = encode_conversation(self.processor, messages, self.template)
        image, images = self.processor.image_token_id, len(images_of(self.records[i]))
        if ids.count(image) != images:
            raise ValueError(
                f"{self.name_of(i)}: the chat template writes {ids.count(image)} of {images} {IMAGE_TOKEN}"
            )
        limit = None if whole else self.text_limit(i)
        if ids[:limit].count(image) != images:
            raise CutOffError(f"{self.name_of(i)}: an {IMAGE_TOKEN} is cut off by {self.limits(i)}")
        return ids[:limit], labels[:limit]

    def __getitem__(self, i: int) -> dict:
        ids, labels = self.encode(i)
        files = images_of(self.records[i])
        pixels = None
        if files:
            images = [load_image(os.path.join(self.image_folder, file)) for file in files]
            pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": pixels}


@dataclass
class Collator:
    """Items → a batch padded on the right: input_ids, attention_mask, labels [B, L]; pixel_values [images, 3, h, w]."""

    pad_token_id: int

    def __call__(self, items: list[dict]) -> dict[str, Tensor]:
        def pad(rows: list[Tensor], value: int) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        ids = [item["input_ids"] for item in items]
        batch = {
            "input_ids": pad(ids, self.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
            "labels": pad([item["labels"] for item in items], IGNORE_INDEX),
        }
        pixels = [item["pixel_values"] for item in items if item["pixel_values"] is not None]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        return batch
