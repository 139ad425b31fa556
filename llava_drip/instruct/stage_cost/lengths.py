"""How long real samples are: from a conversation file, or a list of lengths that can be passed on without any text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer, CLIPImageProcessor, PreTrainedTokenizerBase

from llava_drip.assistant.expand import IGNORE_INDEX
from llava_drip.assistant.processing import LlavaDripProcessor, add_image_token
from llava_drip.cli import one_line
from llava_drip.instruct.data import ConversationDataset, checked_records, images_of
from llava_drip.instruct.templates import resolve_template


@dataclass(frozen=True)
class Sample:
    """text: positions that are no visual tokens. learned: of them, those with a label. images: how many."""

    text: int
    learned: int
    images: int

    def cut(self, positions: int, image_tokens: int) -> Sample:
        """As training cuts a row: to so many positions, an image counted as image_tokens; answers are taken to stand last."""
        text = min(self.text, positions - self.images * image_tokens)
        return Sample(text, self.learned - (self.text - text), self.images)


def read_samples(file: str | Path, stage: str, tokenizer: str | Path | None = None) -> tuple[Sample, ...]:
    """Samples of a file: LLaVA's conversations (.json, .jsonl), encoded as the stage does by default, or lengths,
    [{"text": 61, "learned": 35, "images": 1}, ...].

    tokenizer: directory; needed for conversations.
    Raises:
        ValueError: naming the file and the row.
    """
    path = Path(file).expanduser()
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" and path.is_file() else None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--lengths {path}: not valid JSON ({error})") from error
    if isinstance(rows, list) and rows and isinstance(rows[0], dict) and "text" in rows[0]:
        return tuple(_sample(row, f"--lengths {path}: row {i}") for i, row in enumerate(rows))
    records = checked_records(path, "--lengths")
    if tokenizer is None:
        raise ValueError(f"--lengths {path}: conversations need --tokenizer DIR (or lengths: see --help)")
    return _encoded(records, path, stage, _tokenizer(tokenizer))


def _sample(row: object, where: str) -> Sample:
    if not isinstance(row, dict) or set(row) != {"text", "learned", "images"}:
        raise ValueError(f'{where}: must be {{"text": .., "learned": .., "images": ..}}, got {row!r:.80}')
    if not all(type(value) is int and value >= 0 for value in row.values()):
        raise ValueError(f"{where}: must be whole numbers of at least 0, got {row}")
    if not 0 < row["learned"] < row["text"] + row["images"] or row["learned"] > row["text"]:
        raise ValueError(
            f"{where}: learned must be at least 1, at most text, and something must stand before it: {row}"
        )
    return Sample(**row)


def _tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    path = Path(directory).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # a tokenizer's own
        raise ValueError(f"--tokenizer {path}: cannot be loaded: {one_line(error)}") from error
    add_image_token(tokenizer)
    return tokenizer


def _encoded(records: list[dict], path: Path, stage: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Sample, ...]:
    template = resolve_template("plain" if stage == "pretrain" else None, tokenizer)
    processor = LlavaDripProcessor(CLIPImageProcessor(), tokenizer)  # no picture is read
    dataset, samples = ConversationDataset(records, processor, template), []
    for i in tqdm(range(len(records)), desc="lengths", unit=" rows", delay=2, leave=False, disable=None):
        try:
            _, labels = dataset.encode(i)
        except ValueError as error:
            raise ValueError(f"--lengths {path}: {error}") from None
        images, learned = len(images_of(records[i])), sum(label != IGNORE_INDEX for label in labels)
        if not learned:
            raise ValueError(f"--lengths {path}: {dataset.name_of(i)}: nothing of an answer is left by the template")
        samples.append(Sample(len(labels) - images, learned, images))
    return tuple(samples)
