"""Labelled pictures: an image folder, Hugging Face parquet files or webdataset shards → training and evaluation loaders."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from timm.data import create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.datasets import ImageFolder

from llava_drip.images import ImageError, decode_image, load_image
from llava_drip.training import units
from llava_drip.training.loader import TrainLoader, batches_of_epoch
from llava_drip.training.rows import RowBatches, shuffled
from llava_drip.training.seeds import seed_of
from llava_drip.training.skips import BadSample, Skips
from llava_drip.training.streams import Batch, ShardBatches, ShardOptions, default_collate

KINDS = ("folder", "parquet", "webdataset")
LABEL_KEYS = ("cls", "label")


@dataclass
class Source:
    """One set of labelled pictures. `names` are the classes by label, None where only their number is known."""

    data: str
    kind: str
    names: list[str] | None
    folder: ImageFolder | None = None
    units: list[str] | None = None
    label_key: str | None = None


def open_source(
    flag: str, data: str, kind: str = "auto", classes: str | None = None, label_key: str | None = None
) -> Source:
    """What `data` names.

    Raises:
        ValueError: with the flag in front: nothing there, no class, or another number of classes than the file has names.
    """
    path = Path(data).expanduser()
    if kind == "auto":
        shards = not path.is_dir() or any(path.glob("*.tar")) or any(path.glob("*.parquet"))
        kind = (
            "folder"
            if not shards
            else "parquet"
            if data.endswith(".parquet") or any(path.glob("*.parquet"))
            else "webdataset"
        )
    names = read_names(classes) if classes else None
    try:
        if kind == "folder":
            folder = ImageFolder(str(path), loader=load_image)
            if names is not None and len(names) != len(folder.classes):
                raise ValueError(f"{data}: {len(folder.classes)} class folders, but --classes has {len(names)} names")
            return Source(data, kind, names or folder.classes, folder=folder)
        found = units.expand(data)
    except (ValueError, FileNotFoundError) as error:  # ImageFolder's own words name the folder
        raise ValueError(f"{flag}: {error}") from error
    if names is None and kind == "parquet":
        names = _names_in_parquet(found[0], label_key)
    return Source(data, kind, names, units=found, label_key=label_key)


def read_names(path: str) -> list[str]:
    """Class names by label: one a line, a JSON list, or JSON rows with "index" and "class_name" or "name"."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"--classes: no file {path}")
    if file.suffix != ".json":
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content and isinstance(content[0], dict):
            content = [row.get("class_name") or row["name"] for row in sorted(content, key=lambda row: row["index"])]
        assert content and all(isinstance(name, str) for name in content)
        return content
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"--classes: {path} is no JSON list of class names") from error


def _names_in_parquet(unit: str, label_key: str | None) -> list[str] | None:
    """Names of Hugging Face's ClassLabel, which `datasets` keeps in the file's schema."""
    with units._parquet(unit.rpartition("#")[0]) as file:
        metadata = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    for key in [label_key] if label_key else LABEL_KEYS:
        if "names" in features.get(key, {}):
            return list(features[key]["names"])
    return None


class Decode:
    """A raw sample of a shard → (pixels [3, h, w], label)."""

    def __init__(self, transform: Callable, num_classes: int, label_key: str | None):
        self.transform, self.num_classes, self.keys = transform, num_classes, (label_key,) if label_key else LABEL_KEYS

    def __call__(self, sample: dict) -> tuple[Tensor, int]:
        name = sample["__key__"]
        label = next((sample[key] for key in self.keys if sample.get(key) is not None), None)
        if label is None:
            raise BadSample("missing label", f"{name}: no {' or '.join(self.keys)}")
        try:
            label = int(label)
        except ValueError:
            raise BadSample("unreadable label", f"{name}: {label[:20]!r} is no number") from None
        if not 0 <= label < self.num_classes:  # wrong classes, not a wrong sample
            raise ValueError(f"{name}: label {label}, but there are {self.num_classes} classes; see --classes")
        return self.transform(decode_image(units.image_bytes(sample), name)), label


class Row:
    """A row of an image folder → (pixels [3, h, w], label)."""

    def __init__(self, folder: ImageFolder, transform: Callable):
        self.samples, self.transform = folder.samples, transform

    def __call__(self, row: int) -> tuple[Tensor, int]:
        path, label = self.samples[row]
        return self.transform(load_image(path)), label


def training_transform(args: Namespace, data_config: dict) -> Callable:
    """timm's augmentation. data_config: timm.data.resolve_model_data_config of the model."""
    return create_transform(
        data_config["input_size"],
        is_training=True,
        scale=tuple(args.scale),
        ratio=tuple(args.ratio),
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.interpolation,
        mean=data_config["mean"],
        std=data_config["std"],
        re_prob=args.reprob,
        re_mode="pixel",
    )


def evaluation_transform(args: Namespace, data_config: dict) -> Callable:
    """timm's resize and centre crop."""
    return create_transform(
        data_config["input_size"],
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"] if args.crop_pct is None else args.crop_pct,
    )


def training_loader(
    args: Namespace, source: Source, transform: Callable, num_classes: int, rank: int, ranks: int, pin: bool
) -> TrainLoader:
    """Batches (pixels [B, 3, h, w] fp32, labels [B] int64) of this rank."""
    if source.folder is not None:
        load, rows = Row(source.folder, transform), len(source.folder.samples)
        order = shuffled(rows, args.seed)
        if args.aug_repeats > 1:
            order = RepeatedOrder(rows, args.aug_repeats, args.seed)
        dataset = RowBatches(
            load, rows, order=order, batch_size=args.batch_size, seed=args.seed, rank=rank, ranks=ranks
        )
        loader = TrainLoader(dataset, args.workers, pin)
        if len(loader) < args.grad_accum_steps:
            raise ValueError(
                f"--train-data: {rows} pictures do not fill a step of {args.batch_size * ranks * args.grad_accum_steps}"
            )
        return loader
    samples = args.train_num_samples or units.count_samples(source.units)
    if samples is None:
        raise ValueError(
            "--train-num-samples is needed: no sizes.json or __len__ lies beside the shards of --train-data"
        )
    batches = batches_of_epoch(samples, args.batch_size, ranks, args.workers)
    options = ShardOptions(
        source.units,
        Decode(transform, num_classes, source.label_key),
        args.seed,
        args.shuffle_buffer,
        copies=args.aug_repeats,
    )
    dataset = ShardBatches(
        options,
        batch_size=args.batch_size,
        batches=max(batches, args.grad_accum_steps),
        workers=args.workers,
        streams=args.data_streams,
        rank=rank,
        ranks=ranks,
    )
    return TrainLoader(dataset, args.workers, pin)


class RepeatedOrder:
    """epoch → rows, each several times in a row; as many in all as there are rows (timm's sampler, from DeiT)."""

    def __init__(self, rows: int, repeats: int, seed: int):
        self.rows, self.repeats, self.seed = rows, repeats, seed

    def __call__(self, epoch: int) -> list[int]:
        sampler = RepeatAugSampler(range(self.rows), num_replicas=1, rank=0, num_repeats=self.repeats)
        sampler.set_epoch(seed_of(self.seed, "repeats", epoch))
        return list(sampler)


class EvalSamples(IterableDataset):
    """Every picture once, divided among ranks and workers; what cannot be read is counted."""

    def __init__(self, source: Source, transform: Callable, num_classes: int, batch_size: int, rank: int, ranks: int):
        super().__init__()
        self.source, self.batch_size, self.rank, self.ranks = source, batch_size, rank, ranks
        self.load = Row(source.folder, transform) if source.folder else Decode(transform, num_classes, source.label_key)

    def __iter__(self) -> Iterator[Batch]:
        worker, skips = get_worker_info(), Skips()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        readers, reader = self.ranks * workers, self.rank * workers + number
        samples = self._decoded(self._raw(reader, readers, skips), skips)
        while batch := list(islice(samples, self.batch_size)):
            yield Batch(default_collate(batch), skips=skips.take())
        if skips.total:
            yield Batch(None, skips=skips.take())

    def _raw(self, reader: int, readers: int, skips: Skips) -> Iterator:
        if self.source.folder is not None:
            yield from range(reader, len(self.source.folder.samples), readers)
        elif len(self.source.units) >= readers:  # each shard is read once
            for unit in self.source.units[reader::readers]:
                yield from units.read(unit, skips)
        else:  # each reader takes its share of all; only one of them counts what is wrong with a shard
            shared = skips if reader == 0 else Skips()
            yield from islice(
                (sample for unit in self.source.units for sample in units.read(unit, shared)), reader, None, readers
            )

    def _decoded(self, raw: Iterator, skips: Skips) -> Iterator[tuple[Tensor, int]]:
        for sample in raw:
            try:
                yield self.load(sample)
            except (BadSample, ImageError) as error:
                skips.add(getattr(error, "cause", "corrupt picture"), str(error))


def evaluation_loader(
    args: Namespace, source: Source, transform: Callable, num_classes: int, rank: int, ranks: int, pin: bool
) -> DataLoader:
    """Batches (streams.Batch) of this rank: data are (pixels, labels), or None at an end that holds only what was skipped."""
    dataset = EvalSamples(source, transform, num_classes, args.batch_size, rank, ranks)
    return DataLoader(dataset, batch_size=None, num_workers=args.workers, pin_memory=pin)
