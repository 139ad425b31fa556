"""Image-text pairs for the trainer: shards and tables, in the order of llava_drip.training, without what cannot be read.

Takes the place of open_clip's own readers (open_clip_train.data.get_wds_dataset, get_csv_dataset): same flags, same tuple of
batches, but the order follows from the seed alone, a killed run finds its place again, and what is left out is counted.
"""

from __future__ import annotations

import json
import logging
import math
import random
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from open_clip_train.data import DataInfo, get_dataset_fn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from llava_drip.images import ImageError, decode_image, load_image
from llava_drip.training import units
from llava_drip.training.loader import TrainLoader, batches_of_epoch
from llava_drip.training.rows import RowBatches, shuffled
from llava_drip.training.seeds import seed_sample
from llava_drip.training.skips import BadSample, Skips
from llava_drip.training.streams import Batch, ShardBatches, ShardOptions

SHUFFLE_BUFFER = 5000  # open_clip's
ROWS_AT_ONCE = 256  # of a table, to one worker


def kind_of(data: str, dataset_type: str) -> str:
    """--dataset-type, or what `auto` makes of the data: "webdataset" (tar and parquet files, folders of either) or "csv".

    Raises:
        ValueError: it cannot be told.
    """
    if dataset_type != "auto":
        return dataset_type
    kinds = {"csv": "csv", "tsv": "csv", "tar": "webdataset", "parquet": "webdataset"}
    ending = data.split(".")[-1]
    if ending in kinds:
        return kinds[ending]
    if Path(data).expanduser().is_dir():
        return "webdataset"
    raise ValueError(f"cannot tell the kind of data from {data!r}; give --dataset-type webdataset or csv")


def dataset_of(data: str | None, dataset_type: str) -> Callable[..., DataInfo]:
    """What makes a data set for the trainer, from (args, transform, is_train, epoch, tokenizer): open_clip's get_dataset_fn."""
    if dataset_type == "synthetic":
        return get_dataset_fn(data, dataset_type)
    return {"webdataset": _shards, "csv": _table}[kind_of(data, dataset_type)]


def caption_of(sample: dict, key: str | None) -> str:
    """The caption of a raw sample; of several, one drawn by Python's `random`.

    Args:
        key: a field of the sample's .json, or a parquet column: a string or a list of strings. None: its .txt.
    Raises:
        BadSample: "missing caption" or "unreadable caption".
    """
    name, value = sample["__key__"], sample.get(key or "txt")
    if key is not None and isinstance(sample.get("json"), bytes):
        try:
            fields = json.loads(sample["json"])
        except ValueError as error:  # also what is not UTF-8
            raise BadSample("unreadable caption", f"{name}: its .json is not JSON ({error})") from error
        value = fields.get(key) if isinstance(fields, dict) else None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise BadSample("unreadable caption", f"{name}: its caption is not UTF-8 ({error})") from error
    captions = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(caption, str) for caption in captions):
        raise BadSample("unreadable caption", f"{name}: {key or 'txt'} is neither a text nor a list of texts")
    captions = [caption for caption in captions if caption.strip()]
    if not captions:
        raise BadSample("missing caption", f"{name}: no caption in {'its .txt' if key is None else repr(key)}")
    return captions[0] if len(captions) == 1 else random.choice(captions)


@dataclass(frozen=True)
class Pair:
    """Raw sample → ([3, height, width] pixels, [context_length] token ids)."""

    transform: Callable
    tokenizer: Callable
    caption_key: str | None = None

    def __call__(self, sample: dict) -> tuple[Tensor, Tensor]:
        encoded = units.image_bytes(sample)
        caption = caption_of(sample, self.caption_key)  # before the costly part
        picture = decode_image(encoded, sample["__key__"])
        return self.transform(picture), self.tokenizer(caption)[0]


class Table:
    """Rows of a csv file with the path of a picture (relative to the working directory) and a caption."""

    def __init__(
        self, path: str, image_key: str, caption_key: str, separator: str, transform: Callable, tokenizer: Callable
    ):
        # A caption such as "NA" or "null" is a caption.
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, usecols=[image_key, caption_key])
        self.path, self.transform, self.tokenizer = path, transform, tokenizer
        self.pictures, self.captions = table[image_key].tolist(), table[caption_key].tolist()

    def __len__(self) -> int:
        return len(self.pictures)

    def __call__(self, row: int) -> tuple[Tensor, Tensor]:
        picture, caption = self.pictures[row], self.captions[row]
        if not caption.strip():
            raise BadSample("missing caption", f"{self.path}: data row {row + 1} has no caption")
        if not Path(picture).is_file():
            raise BadSample("missing picture", f"{self.path}: data row {row + 1}: no picture {picture!r}")
        return self.transform(load_image(picture)), self.tokenizer(caption)[0]


class EverySample(IterableDataset):
    """Every sample once, in its order, in batches of which the last may be short; for evaluation."""

    def __init__(self, parts: Sequence, read: Callable[[object, Skips], Iterator], decode: Callable, batch_size: int):
        """parts: what workers share out. read: part → raw samples. decode: raw sample → a sample that collates."""
        self.parts, self.read, self.decode, self.batch_size = parts, read, decode, batch_size

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        parts = self.parts if worker is None else self.parts[worker.id :: worker.num_workers]
        skips, samples = Skips(), []
        for part in parts:
            for number, sample in enumerate(self.read(part, skips)):
                seed_sample("evaluation", str(part), number)  # which of several captions
                try:
                    samples.append(self.decode(sample))
                except (BadSample, ImageError) as error:
                    skips.add(getattr(error, "cause", "corrupt picture"), str(error))
                if len(samples) == self.batch_size:
                    yield Batch(default_collate(samples), skips=skips.take())
                    samples = []
        yield Batch(default_collate(samples) if samples else None, skips=skips.take())


class EvaluationLoader:
    """The batches of EverySample, as the trainer iterates over them; says in the log what was left out."""

    def __init__(self, dataset: EverySample, flag: str, samples: int, workers: int):
        """samples: how many there are, for the log; 0: not known."""
        workers = min(workers, len(dataset.parts))
        self.loader, self.flag = DataLoader(dataset, batch_size=None, num_workers=workers), flag
        self.num_samples, self.num_batches = samples, math.ceil(samples / dataset.batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        skips, any_batch = Skips(), False
        for batch in self.loader:
            skips.merge(batch.skips)
            if batch.data is not None:
                any_batch = True
                yield batch.data
        if not any_batch:
            raise ValueError(f"{self.flag}: no usable sample: {skips}; {'; '.join(skips.examples)}")
        examples = "".join(f"; {example}" for example in skips.examples)
        logging.info(f"{self.flag}: {skips}{examples}")


class _Epochs:
    """What DataInfo tells of a new epoch."""

    def __init__(self, loader: TrainLoader):
        self.set_value = loader.set_epoch


def _shards(
    args: Namespace, transform: Callable, is_train: bool, epoch: int = 0, tokenizer: Callable | None = None
) -> DataInfo:
    decode = Pair(transform, tokenizer, args.caption_key)
    if not is_train:
        names = units.expand(args.val_data)
        samples = args.val_num_samples or units.count_samples(names) or 0
        every = EverySample(names, units.read, decode, args.batch_size)
        return DataInfo(EvaluationLoader(every, "--val-data", samples, args.workers))
    names, weights = shards_of(args)
    samples = args.train_num_samples or units.count_samples(names)
    dataset = ShardBatches(
        ShardOptions(names, decode, args.seed, args.shuffle_buffer or SHUFFLE_BUFFER, weights),
        batch_size=args.batch_size,
        batches=batches_of_epoch(samples, args.batch_size, args.world_size, args.workers),
        workers=args.workers,
        streams=args.data_streams,
        rank=args.rank,
        ranks=args.world_size,
    )
    return _training(TrainLoader(dataset, args.workers, _pins(args)), args)


def shards_of(args: Namespace) -> tuple[list[str], list[float] | None]:
    """The units of --train-data, and the weight with which each is drawn (None: each is read once before any again)."""
    if args.train_data_upsampling_factors is None:
        names = units.expand(args.train_data)
        return names, [1.0] * len(names) if args.dataset_resampled else None
    names, weights = [], []
    factors = args.train_data_upsampling_factors.split("::")
    for part, factor in zip(args.train_data.split("::"), factors, strict=True):
        found = units.expand(part)
        names += found
        weights += [float(factor)] * len(found)
    return names, weights


def _table(
    args: Namespace, transform: Callable, is_train: bool, epoch: int = 0, tokenizer: Callable | None = None
) -> DataInfo:
    path = args.train_data if is_train else args.val_data
    table = Table(path, args.csv_img_key, args.csv_caption_key, args.csv_separator, transform, tokenizer)
    if not is_train:
        parts = [range(start, min(start + ROWS_AT_ONCE, len(table))) for start in range(0, len(table), ROWS_AT_ONCE)]
        every = EverySample(parts, _rows_of, table, args.batch_size)
        return DataInfo(EvaluationLoader(every, "--val-data", len(table), args.workers))
    dataset = RowBatches(
        table,
        len(table),
        order=shuffled(len(table), args.seed),
        batch_size=args.batch_size,
        seed=args.seed,
        rank=args.rank,
        ranks=args.world_size,
    )
    return _training(TrainLoader(dataset, args.workers, _pins(args)), args)


def _rows_of(part: range, skips: Skips) -> Iterator[int]:
    return iter(part)


def _pins(args: Namespace) -> bool:
    return torch.device(args.device).type == "cuda"


def _training(loader: TrainLoader, args: Namespace) -> DataInfo:
    loader.num_batches = len(loader)  # the trainer's names
    loader.num_samples = len(loader) * args.batch_size * args.world_size
    return DataInfo(loader, shared_epoch=_Epochs(loader))
