"""Zero-shot classification by open_clip's own evaluator, and what it cost: the visual tokens of an image."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info
from torchvision.datasets import ImageFolder

from llava_drip.contrastive.evaluator import TokenUse, evaluation, run
from llava_drip.contrastive.model import encode_image_tokens, tower_of
from llava_drip.images import ImageError, decode_image, load_image
from llava_drip.training import units
from llava_drip.training.class_names import read_names
from llava_drip.training.skips import BadSample, Skips

TEMPLATES = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}


def read_class_names(path: str | Path) -> list[str]:
    """Class names by label (training/class_names.py), as many as top-5 accuracy needs. ValueError names the file."""
    names = read_names(path)
    if len(names) < 5:
        raise ValueError(f"{path}: {len(names)} class names; top-5 accuracy needs at least 5")
    return names


class LabelledFolder(Dataset):
    """A folder with one sub-folder a class; labels in the order of their names. Gives (pixels, label) or a BadSample."""

    def __init__(self, folder: str, transform: Callable, num_classes: int):
        try:
            self.folder = ImageFolder(folder)
        except FileNotFoundError as error:
            raise ValueError(f"{folder}: {error}") from error
        if len(self.folder.classes) != num_classes:
            raise ValueError(f"{folder}: {len(self.folder.classes)} class folders, but {num_classes} class names")
        self.transform = transform

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | BadSample:
        path, label = self.folder.samples[index]
        try:
            return self.transform(load_image(path)), label
        except ImageError as error:
            return BadSample("corrupt picture", str(error))


class LabelledShards(IterableDataset):
    """Shards (training/units.py) of pictures with a .cls file, or parquet column "cls" or "label", each: a number."""

    def __init__(self, shards: Sequence[str], transform: Callable, num_classes: int):
        self.shards, self.transform, self.num_classes = list(shards), transform, num_classes

    def __iter__(self) -> Iterator[tuple[Tensor, int] | BadSample]:
        worker = get_worker_info()
        for shard in self.shards if worker is None else self.shards[worker.id :: worker.num_workers]:
            skips = Skips()
            for sample in units.read(shard, skips):
                label, name = self._label(sample), sample["__key__"]
                try:
                    picture = units.image_bytes(sample)
                except BadSample as error:
                    raise ValueError(str(error)) from None
                try:
                    yield self.transform(decode_image(picture, name)), label
                except ImageError as error:
                    yield BadSample("corrupt picture", str(error))
            if skips.total:  # a score over what happens to be left of a data set would mislead
                raise ValueError(skips.examples[0])

    def _label(self, sample: dict) -> int:
        name, value = sample["__key__"], sample.get("cls", sample.get("label"))
        if value is None:
            raise ValueError(f"{name}: lacks its label (.cls, or a column cls or label)")
        try:
            label = int(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name}: the label {value!r} is not a number") from None
        if not 0 <= label < self.num_classes:
            raise ValueError(f"{name}: the label is {label}, there are {self.num_classes} class names")
        return label


def _is_folder_of_classes(folder: Path) -> bool:
    return os.path.isdir(folder) and not any(file.suffix in (".tar", ".parquet") for file in folder.iterdir())


def open_labelled_images(data: str, transform: Callable, num_classes: int) -> LabelledFolder | LabelledShards:
    """A folder with one sub-folder a class (labels in the order of their names), or shards: 'val-{00..12}.tar', several joined
    by '::', .parquet files, or a folder of either.

    Raises:
        ValueError: nothing there, or as many sub-folders as there are not classes.
    """
    folder = Path(data).expanduser()
    if _is_folder_of_classes(folder):
        return LabelledFolder(str(folder), transform, num_classes)
    return LabelledShards(units.expand(data), transform, num_classes)


def labelled_files(data: str) -> list[str]:
    """The files of what open_labelled_images reads, but those behind an address."""
    folder = Path(data).expanduser()
    if _is_folder_of_classes(folder):
        return [str(file) for file in folder.rglob("*") if file.is_file()]
    return sorted({units.file_of(unit) for unit in units.expand(data) if units.is_local(unit)})


class _Batches:
    """What open_clip's evaluator iterates over: batches of the pictures that could be read. Counts the others in `skips`."""

    def __init__(self, images: LabelledFolder | LabelledShards, batch_size: int, workers: int):
        if isinstance(images, LabelledShards):
            workers = min(workers, len(images.shards))
        self.loader = DataLoader(images, batch_size, num_workers=workers, collate_fn=_collate)
        self.skips = Skips()

    def __len__(self) -> int:  # TypeError for shards: not known before they are read
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch, bad in self.loader:
            for error in bad:
                self.skips.add(*error)
            if batch is not None:
                yield batch


def _collate(samples: list) -> tuple[list[Tensor] | None, list[tuple[str, str]]]:
    good = [sample for sample in samples if not isinstance(sample, BadSample)]
    bad = [(error.cause, str(error)) for error in samples if isinstance(error, BadSample)]
    return default_collate(good) if good else None, bad


class _CountingImageEncoder(nn.Module):
    """model(image=...) as open_clip's evaluator calls it, counting images and tokens on the way."""

    def __init__(self, model: nn.Module, device: torch.device | str):
        super().__init__()
        self.model, self.use, self.images = model, TokenUse(model, device), 0

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        self.images += len(image)
        if tower_of(self.model) is None:
            return {"image_features": self.model.encode_image(image, normalize=True)}
        features, tokens = encode_image_tokens(self.model, image)
        self.use.add(tokens.lengths)
        return {"image_features": features}


def classify(
    model: nn.Module,
    transform: Callable,
    tokenizer: Callable,
    data: str,
    class_names: Sequence[str],
    *,
    templates: Sequence[Callable] = open_clip.OPENAI_IMAGENET_TEMPLATES,
    batch_size: int = 64,
    workers: int = 2,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> dict:
    """Top-1 and top-5 accuracy of an open_clip model in eval mode, without training on the classes, on this process alone.

    The model's mode and torch's randomness are put back.

    Args:
        data: see open_labelled_images.
        class_names: by label; each is put into every template, and the texts' features are averaged.
        precision: as in open_clip's trainer ("fp32", "amp", "amp_bf16", ...).
    Returns:
        {"top1", "top5" (shares, 0 .. 1), "images", "classes", "tokens_per_image", "patches_per_image", "compression",
        "compression_p5", "compression_p95", "skipped"}; tokens and compression are None for a tower that makes no TokenBatch.
        "skipped": {"counts", "examples"}, corrupt pictures, which do not count as images.
    Raises:
        ValueError: an unreadable shard or a label that cannot be, naming it; or no readable picture at all.
    """
    batches = _Batches(open_labelled_images(data, transform, len(class_names)), batch_size, workers)
    args = Namespace(device=device, precision=precision, batch_size=batch_size)
    with evaluation(model):
        counting = _CountingImageEncoder(model, device)
        classifier = open_clip.build_zero_shot_classifier(model, tokenizer, list(class_names), templates, device=device)
        try:
            top1, top5 = run(counting, classifier, batches, args)
        except ZeroDivisionError:
            why = f": {batches.skips}; {'; '.join(batches.skips.examples)}" if batches.skips.total else ""
            raise ValueError(f"{data}: holds no readable picture{why}") from None
    return {
        "top1": top1,
        "top5": top5,
        "images": counting.images,
        "classes": len(class_names),
        **counting.use.summary(),
        "skipped": batches.skips.state(),
    }
