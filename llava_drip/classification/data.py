"""Labelled pictures → training and evaluation loaders, with timm's augmentation."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import islice

from timm.data import create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from torchvision.datasets import ImageFolder

from llava_drip.classification.sources import LABEL_KEYS, Source
from llava_drip.cli import one_line
from llava_drip.images import ImageError, decode_image, load_image
from llava_drip.training import units
from llava_drip.training.loader import TrainLoader, batches_of_epoch
from llava_drip.training.rows import RowBatches, shuffled
from llava_drip.training.seeds import seed_of
from llava_drip.training.skips import BadSample, Skips
from llava_drip.training.streams import Batch, ShardBatches, ShardOptions


class Decode:
    """A raw sample of a shard → (pixels [3, h, w], label); without classes (None) no label is asked for, and it is 0."""

    def __init__(self, transform: Callable, num_classes: int | None, label_key: str | None):
        self.transform, self.num_classes, self.keys = transform, num_classes, (label_key,) if label_key else LABEL_KEYS

    def __call__(self, sample: dict) -> tuple[Tensor, int]:
        name = sample["__key__"]
        if self.num_classes is None:
            return self.transform(decode_image(units.image_bytes(sample), name)), 0
        value = next((sample[key] for key in self.keys if sample.get(key) is not None), None)
        if value is None:
            raise BadSample("missing label", f"{name}: no {' or '.join(self.keys)}")
        try:
            label = int(value)
        except (TypeError, ValueError):
            label = None
        if label is None or (isinstance(value, float) and value != label):
            raise BadSample("unreadable label", f"{name}: {str(value)[:20]!r} is no whole number")
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
    """timm's augmentation. data_config: model.data_config_of. ValueError for an --aa that timm does not know."""
    try:
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
    except (AssertionError, ValueError) as error:
        raise ValueError(f"--aa {args.aa}: timm makes no augmentation of it ({one_line(error, 200)})") from error


def evaluation_transform(data_config: dict) -> Callable:
    """timm's resize and centre crop."""
    return create_transform(
        data_config["input_size"],
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"],
    )


def training_loader(
    args: Namespace, source: Source, transform: Callable, num_classes: int | None, rank: int, ranks: int, pin: bool
) -> TrainLoader:
    """Batches (pixels [B, 3, h, w] fp32, labels [B] int64) of this rank. ValueError: too few pictures for a step, or not known
    how many there are."""
    if source.folder is not None:
        return _loader_of_folder(args, source.folder, transform, rank, ranks, pin)
    samples = args.train_num_samples or units.count_samples(source.units)
    if samples is None:
        raise ValueError(
            "--train-num-samples is needed: no sizes.json or __len__ lies beside the shards of --train-data"
        )
    batches = batches_of_epoch(samples, args.batch_size, ranks, args.workers)
    decode = Decode(transform, num_classes, source.label_key)
    options = ShardOptions(source.units, decode, args.seed, args.shuffle_buffer, copies=args.aug_repeats)
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


def _loader_of_folder(
    args: Namespace, folder: ImageFolder, transform: Callable, rank: int, ranks: int, pin: bool
) -> TrainLoader:
    for flag in ("train_num_samples", "data_streams"):
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')}: of shards; {args.train_data} is an image folder")
    rows = len(folder.samples)
    order = RepeatedOrder(rows, args.aug_repeats, args.seed) if args.aug_repeats > 1 else shuffled(rows, args.seed)
    load = Row(folder, transform)
    dataset = RowBatches(load, rows, order=order, batch_size=args.batch_size, seed=args.seed, rank=rank, ranks=ranks)
    loader = TrainLoader(dataset, args.workers, pin)
    if len(loader) < args.grad_accum_steps:
        step = args.batch_size * ranks * args.grad_accum_steps
        raise ValueError(f"--train-data: {rows} pictures do not fill a step of {step}")
    return loader


class RepeatedOrder:
    """epoch → rows, each several times in a row, as many in all as there are rows: an epoch shows 1 / repeats of the pictures.

    timm's sampler, from DeiT (Hoffer et al., CVPR 2020; Touvron et al., ICML 2021), but without rounding down to 256.
    """

    def __init__(self, rows: int, repeats: int, seed: int):
        self.rows, self.repeats, self.seed = rows, repeats, seed

    def __call__(self, epoch: int) -> list[int]:
        sampler = RepeatAugSampler(range(self.rows), num_replicas=1, rank=0, num_repeats=self.repeats, selected_round=0)
        sampler.set_epoch(seed_of(self.seed, "repeats", epoch))
        return list(sampler)


class EvalSamples(IterableDataset):
    """Every picture once, divided among ranks and workers; what cannot be read is counted."""

    def __init__(
        self, source: Source, transform: Callable, num_classes: int | None, batch_size: int, rank: int, ranks: int
    ):
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
    args: Namespace, source: Source, transform: Callable, num_classes: int | None, rank: int, ranks: int, pin: bool
) -> DataLoader:
    """Batches (streams.Batch) of this rank: data are (pixels, labels), or None at an end that holds only what was skipped."""
    dataset = EvalSamples(source, transform, num_classes, args.batch_size, rank, ranks)
    return DataLoader(dataset, batch_size=None, num_workers=args.workers, pin_memory=pin)
