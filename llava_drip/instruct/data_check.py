"""All that is wrong with a conversation file, row by row, by the checks of training, which stops at the first."""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoConfig, CLIPImageProcessor

from llava_drip.assistant.build import check_checkpoint, is_assistant, tokenizer_for
from llava_drip.assistant.expand import IGNORE_INDEX
from llava_drip.assistant.modeling import LlavaDripForConditionalGeneration
from llava_drip.assistant.processing import LlavaDripProcessor
from llava_drip.files import whole
from llava_drip.images import ImageError, load_image
from llava_drip.instruct.data import (
    ConversationDataset,
    CutOffError,
    check_record,
    images_of,
    missing_images,
    name_of_row,
)
from llava_drip.instruct.elastic import ElasticBudget
from llava_drip.instruct.row_check import check_template, most_visual_tokens, resolve_max_length
from llava_drip.instruct.templates import resolve_template
from llava_drip.training.skips import BadSample

MISSING, UNDECODABLE, CUT_OFF = "missing image", "image cannot be decoded", "cut off by the length"
DUPLICATE, SHORTENED = "duplicate id", "shortened by the length"  # notes; training takes such rows


@dataclass(frozen=True)
class Problem:
    """Of one row. kind: a few words that many share."""

    row: int
    kind: str
    message: str


@dataclass
class Report:
    """What a file holds. problems: of bad rows; notes: of rows that training takes as they are.

    lengths: of each row that could be measured: tokens in the language model, visual ones included, where a model was given, else
    words of text.
    """

    path: str
    rows: int
    images: int = 0
    text_only: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    unit: str = "words"

    @property
    def bad_rows(self) -> set[int]:
        return {problem.row for problem in self.problems}

    def counts(self, problems: list[Problem]) -> dict[str, int]:
        """Rows of each kind, the most frequent kind first."""
        rows = defaultdict(set)
        for problem in problems:
            rows[problem.kind].add(problem.row)
        return {kind: len(those) for kind, those in sorted(rows.items(), key=lambda item: -len(item[1]))}

    def record(self) -> dict:
        """For --json."""
        listed = {name: [vars(problem) for problem in getattr(self, name)] for name in ("problems", "notes")}
        counted = {
            "rows": self.rows,
            "bad_rows": len(self.bad_rows),
            "text_only": self.text_only,
            "images": self.images,
        }
        kinds = {**self.counts(self.problems), **self.counts(self.notes)}
        return {"file": self.path, **counted, "counts": kinds, "lengths": quantiles(self.lengths, self.unit), **listed}


def quantiles(lengths: list[int], unit: str) -> dict:
    """Smallest, median, 95th and 99th percentile, largest, mean."""
    if not lengths:
        return {"unit": unit, "rows": 0}
    points = dict(zip(("min", "p50", "p95", "p99", "max"), np.percentile(lengths, [0, 50, 95, 99, 100]).tolist()))
    return {"unit": unit, "rows": len(lengths), **points, "mean": float(np.mean(lengths))}


class _Rows(Dataset):
    """Row i → (kind and message of all that is wrong with it, of what is worth a note, its length or None, its images)."""

    def __init__(self, records: list, image_folder: str | None, decode: bool, encoder: ConversationDataset | None):
        self.records, self.image_folder, self.decode, self.encoder = records, image_folder, decode, encoder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[list, list, int | None, int]:
        record = self.records[i]
        try:
            check_record(record)
        except BadSample as error:
            return [(error.cause, str(error))], [], None, 0
        files, gone = images_of(record), missing_images(record, self.image_folder)
        problems = [(MISSING, f"image file {file!r} not found") for file in gone]
        if self.decode:
            problems += [
                (UNDECODABLE, reason) for file in files if file not in gone and (reason := self._undecodable(file))
            ]
        notes: list = []
        if self.encoder is None:
            length = sum(len(turn["value"].split()) for turn in record["conversations"])
        else:
            length = self._encode(i, problems, notes)
        return problems, notes, length, len(files)

    def _undecodable(self, file: str) -> str | None:
        try:
            load_image(Path(self.image_folder or "", file))
        except ImageError as error:
            return str(error)
        return None

    def _encode(self, i: int, problems: list, notes: list) -> int | None:
        """The row's length; what the length limit does to it is added to the lists."""
        encoder = self.encoder
        try:
            ids, labels = encoder.encode(i, whole=True)
            limit = encoder.text_limit(i)
            length = len(ids) + len(images_of(encoder.records[i])) * (encoder.image_tokens - 1)
            if limit is None or len(ids) <= limit:
                return length
            encoder.encode(i)  # an image that is cut off
        except ValueError as error:
            kind = CUT_OFF if isinstance(error, CutOffError) else "chat template"
            problems.append(
                (kind, str(error).removeprefix(f"{encoder.name_of(i)}: "))
            )  # which comes before every message
            return None
        if all(label == IGNORE_INDEX for label in labels[:limit]):
            problems.append((CUT_OFF, f"nothing of an answer is left within {encoder.limits(i)}"))
        else:
            lost = sum(label != IGNORE_INDEX for label in labels[limit:])
            notes.append((SHORTENED, f"{length} tokens; {lost} of its answers' are lost to {encoder.limits(i)}"))
        return length


def check_rows_of(
    path: str | Path,
    records: list,
    image_folder: str | Path | None = None,
    decode: bool = False,
    encoder: ConversationDataset | None = None,
    workers: int = 0,
    unique_ids: bool = False,
) -> Report:
    """Every row of a file, by `workers` processes.

    Args:
        path: of the file, for the report. records: its rows (data.read_records).
        decode: decode every picture, as training does.
        encoder: measures rows in tokens and finds what its length limit cuts (encoder_for).
        unique_ids: a repeated id makes a bad row; otherwise it is a note: LLaVA's own files repeat them.
    Raises:
        ValueError: the template leaves nothing to learn in any row.
    """
    report = Report(str(path), len(records), unit="tokens" if encoder else "words")
    rows = _Rows(records, None if image_folder is None else str(image_folder), decode, encoder)
    loader = DataLoader(rows, batch_size=64, num_workers=workers, collate_fn=list)
    found = (each for batch in loader for each in batch)
    for i, (problems, notes, length, images) in enumerate(
        tqdm(found, total=len(records), desc="checking rows", delay=2)
    ):
        report.problems += [Problem(i, kind, f"{name_of_row(i, records[i])} {text}") for kind, text in problems]
        report.notes += [Problem(i, kind, f"{name_of_row(i, records[i])} {text}") for kind, text in notes]
        report.images, report.text_only = report.images + images, report.text_only + (images == 0)
        if length is not None:
            report.lengths.append(length)
    repeated = _repeated_ids(records)
    (report.problems if unique_ids else report.notes).extend(repeated)
    return report


def _repeated_ids(records: list) -> list[Problem]:
    first: dict = {}
    found = []
    for i, record in enumerate(records):
        if isinstance(record, dict) and isinstance(record.get("id"), (str, int)):
            before = first.setdefault(record["id"], i)
            if before != i:
                found.append(Problem(i, DUPLICATE, f"{name_of_row(i, record)} has the id of row {before}"))
    return found


def encoder_for(
    records: list,
    model: str,
    version: str | None = None,
    max_length: int | None = None,
    image_tokens: int | None = None,
    elastic: Sequence[float] | None = None,
) -> ConversationDataset:
    """Rows as the tokens that a model reads. No weights are loaded.

    Args:
        model: directory of an assistant, or of a language model (then image_tokens is needed).
        version: chat template, as in training; None: the model's own.
        max_length: positions of a row; None: as training resolves it.
        image_tokens: that a picture takes at most; None: of the assistant's tower, by its own budget, or by `elastic`.
        elastic: (low, high), of --elastic_compression in training.
    Raises:
        ValueError: no model directory, a language model without image_tokens, or a tower that cannot be elastic.
    """
    path = check_checkpoint(model)
    config = AutoConfig.from_pretrained(path)
    if is_assistant(path):
        processor = LlavaDripProcessor.from_pretrained(path, local_files_only=True)
        if image_tokens is None:
            with torch.device("meta"):
                assistant = LlavaDripForConditionalGeneration(config)
            if elastic:
                ElasticBudget(assistant, *elastic, seed=0)  # refuses what training would
            image_tokens = most_visual_tokens(assistant, elastic and elastic[0])
    else:
        if image_tokens is None:
            raise ValueError(
                f"--model_name_or_path {model}: is a language model; say --image_tokens, what a picture takes"
            )
        tokenizer = tokenizer_for(path)
        template = resolve_template(None, tokenizer)
        processor = LlavaDripProcessor(CLIPImageProcessor(), tokenizer, chat_template=template)  # decodes nothing here
    template = resolve_template(version, processor.tokenizer) if version else processor.chat_template
    max_length = resolve_max_length(max_length, config.get_text_config())
    return ConversationDataset(records, processor, template, None, max_length, image_tokens)


def check_template_of(encoder: ConversationDataset) -> None:
    """ValueError: the template makes nothing an answer, of the first rows that are well formed."""
    good = []
    for record in encoder.records[:256]:
        with contextlib.suppress(BadSample):
            check_record(record)
            good.append(record)
    if good:
        parts = (encoder.processor, encoder.template, None, encoder.max_length, encoder.image_tokens)
        check_template(ConversationDataset(good, *parts))


def write_good(records: list, report: Report, path: Path) -> int:
    """The rows without a problem, in the file's order, as .jsonl or a .json list by the ending; how many they are.

    Raises:
        ValueError: no row is good.
    """
    bad = report.bad_rows
    good = [record for i, record in enumerate(records) if i not in bad]
    if not good:
        raise ValueError(f"--write_good {path}: no row is good")
    with whole(path) as partial, open(partial, "w", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(f"{json.dumps(record, ensure_ascii=False)}\n" for record in good)
        else:
            json.dump(good, file, ensure_ascii=False, indent=1)
    return len(good)


def histogram(lengths: list[int], bins: int = 12) -> list[tuple[int, int, int]]:
    """(from, to, rows) of equal bins over the lengths; both ends belong to them."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    step = max(1, -(-(high - low + 1) // bins))
    rows = Counter((length - low) // step for length in lengths)
    return [(low + b * step, min(high, low + (b + 1) * step - 1), rows[b]) for b in range((high - low) // step + 1)]
