"""Zero-shot classification by open_clip's own evaluator, and what it cost: the visual tokens of an image."""

from __future__ import annotations

import json
import tarfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.datasets import ImageFolder
from webdataset.shardlists import expand_urls
from webdataset.tariterators import tarfile_samples

from llava_drip.contrastive.compression import TokenCount
from llava_drip.contrastive.evaluator import run
from llava_drip.contrastive.model import encode_image_tokens, patches_of, tower_of
from llava_drip.images import decode_image, load_image

TEMPLATES = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")


def read_class_names(path: str | Path) -> list[str]:
    """Class names in the order of their labels.

    Args:
        path: a text file with one name a line, or JSON: a list of names, a list of objects with "index" and
            "class_name" (or "name"), or an object {"0": name, ...}.
    Raises:
        ValueError: naming the file and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file of class names")
    if path.suffix != ".json":
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    else:
        try:
            names = _names_from_json(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a list of class names ({type(error).__name__}: {error})") from error
    if len(names) < 5:
        raise ValueError(f"{path}: {len(names)} class names; top-5 accuracy needs at least 5")
    return names


def _names_from_json(content) -> list[str]:
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return content
    if isinstance(content, dict):
        by_index = {int(index): name for index, name in content.items()}
    else:
        by_index = {int(row["index"]): row.get("class_name") or row["name"] for row in content}
    if sorted(by_index) != list(range(len(by_index))):
        raise ValueError(f"the indices are not 0 .. {len(by_index) - 1}")
    return [str(by_index[index]) for index in sorted(by_index)]


class LabelledShards(IterableDataset):
    """webdataset shards of pictures (jpg, png, webp) with a .cls file each: the label, a number."""

    def __init__(self, shards: Sequence[str], transform: Callable, num_classes: int):
        self.shards, self.transform, self.num_classes = list(shards), transform, num_classes

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        shards = self.shards if worker is None else self.shards[worker.id :: worker.num_workers]
        for sample in self._samples(shards):
            name = f"{sample['__url__']}: {sample['__key__']}"
            image = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
            if image is None or "cls" not in sample:
                raise ValueError(f"{name} lacks {'a picture' if image is None else 'its .cls label'}")
            try:
                label = int(sample["cls"])
            except ValueError:
                raise ValueError(f"{name}.cls is not a number") from None
            if not 0 <= label < self.num_classes:
                raise ValueError(f"{name}.cls is {label}, there are {self.num_classes} class names")
            yield self.transform(decode_image(image, name)), label

    @staticmethod
    def _samples(shards: Sequence[str]) -> Iterator[dict]:
        for shard in shards:
            try:
                yield from tarfile_samples([{"url": shard}])
            except tarfile.TarError as error:
                raise ValueError(f"{shard}: not a readable tar file ({error.args[0]})") from error


def open_labelled_images(data: str, transform: Callable, num_classes: int):
    """A folder with one sub-folder a class (labels in the order of their names), or webdataset shards ({00..12}, ::).

    Raises:
        ValueError: nothing there, or as many sub-folders as there are not classes.
    """
    if Path(data).is_dir():
        try:
            images = ImageFolder(data, transform, loader=load_image)
        except FileNotFoundError as error:
            raise ValueError(f"{data}: {error}") from error
        if len(images.classes) != num_classes:
            raise ValueError(f"{data}: {len(images.classes)} class folders, but {num_classes} class names")
        return images
    shards = expand_urls(data)
    for shard in shards:
        if not Path(shard).is_file():
            raise ValueError(f"{shard}: no such shard or folder of pictures")
    return LabelledShards(shards, transform, num_classes)


class _CountingImageEncoder(nn.Module):
    """model(image=...) as open_clip's evaluator calls it, counting tokens on the way."""

    def __init__(self, model: nn.Module, device: torch.device | str):
        super().__init__()
        self.model, self.count, self.images = model, TokenCount(device), 0

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        self.images += len(image)
        if tower_of(self.model) is None:
            return {"image_features": self.model.encode_image(image, normalize=True)}
        features, tokens = encode_image_tokens(self.model, image)
        self.count.add(tokens.lengths)
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
    device: str = "cpu",
) -> dict:
    """Top-1 and top-5 accuracy of an open_clip model in eval mode, without training on the classes.

    Args:
        data: see open_labelled_images.
        class_names: by label; each is put into every template, and the texts' features are averaged.
        precision: as in open_clip's trainer ("fp32", "amp", "amp_bf16", ...).
    Returns:
        {"top1", "top5" (shares, 0 .. 1), "images", "classes", "tokens_per_image", "patches_per_image"}; the last two
        are None for a tower that makes no TokenBatch.
    Raises:
        ValueError: unreadable data, naming the file; or no picture at all.
    """
    images = open_labelled_images(data, transform, len(class_names))
    if isinstance(images, LabelledShards):
        workers = min(workers, len(images.shards))
    loader = DataLoader(images, batch_size=batch_size, num_workers=workers)
    counting = _CountingImageEncoder(model.eval(), device)
    args = Namespace(device=device, precision=precision, batch_size=batch_size)
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, list(class_names), templates, device=device)
    try:
        top1, top5 = run(counting, classifier, loader, args)
    except ZeroDivisionError:
        raise ValueError(f"{data}: holds no picture") from None
    tower = tower_of(model)
    return {
        "top1": top1,
        "top5": top5,
        "images": counting.images,
        "classes": len(class_names),
        "tokens_per_image": counting.count.mean() if tower is not None else None,
        "patches_per_image": patches_of(tower) if tower is not None else None,
    }
