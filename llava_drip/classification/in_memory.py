"""Small labelled data sets held in memory: decoded once, kept as uint8, augmented as whole batches of tensors.

For comparisons of many short runs, where decoding would take longer than the steps. timm's transforms and data workers (data.py)
are for data that do not fit.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from llava_drip.classification.data import EvalSamples
from llava_drip.classification.sources import Source, check_same_classes, open_source
from llava_drip.training import units
from llava_drip.training.skips import Skips
from llava_drip.training.streams import Batch

MAX_BYTES = 8 * 2**30  # of all pictures of a source, decoded; while they are read, twice as much is in use
_RATIO = math.log(4 / 3)  # of a random crop's sides at most, as in torchvision's RandomResizedCrop
_CHUNK = 512


@dataclass
class Pictures:
    """pixels [N, 3, S, S] uint8, labels [N] int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Pictures:
        return Pictures(self.pixels.to(device), self.labels.to(device))


def load_pictures(flag: str, source: Source, size: int, num_classes: int, max_bytes: int = MAX_BYTES) -> Pictures:
    """All pictures of a source, shorter side resized to `size` (bicubic, antialiased; not if it has that size), centre-cropped.

    Raises:
        ValueError: with the flag in front: more than max_bytes of them, a picture or shard that cannot be read (a comparison on
            other pictures than it says would be no comparison), or none at all.
    """

    def check(pictures: int) -> None:
        if pictures * 3 * size * size > max_bytes:
            raise ValueError(
                f"{flag} {source.data}: {pictures:,} pictures or more of {size} x {size} px need over {max_bytes / 2**30:.3g} "
                "GiB, too much to hold in memory; lower img_size, or train by scripts/train_imagenet.py"
            )

    count = len(source.folder.samples) if source.folder else units.count_samples(source.units)
    check(count or 0)
    transform = v2.Compose(
        [v2.PILToTensor(), v2.Resize(size, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)]
    )
    pixels, labels, read, skips = [], [], 0, Skips()
    with tqdm(total=count, desc=f"reading {flag}", unit=" images", leave=False, disable=None) as bar:
        for batch in EvalSamples(source, transform, num_classes, _CHUNK, 0, 1):
            skips.merge(batch.skips)
            if batch.data is not None:
                pixels.append(batch.data[0])
                labels.append(batch.data[1])
                read += len(labels[-1])
                check(read)
                bar.update(len(labels[-1]))
    if skips.total:
        raise ValueError(f"{flag}: {skips}; {'; '.join(skips.examples)}")
    if not read:
        raise ValueError(f"{flag}: {source.data} holds no picture")
    return Pictures(torch.cat(pixels), torch.cat(labels))


def pixel_statistics(pictures: Pictures) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [3] of each channel over all pixels, of values in 0 .. 1."""
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for part in pictures.pixels.cpu().split(4096):
        for channel in range(3):
            counts[channel] += torch.bincount(part[:, channel].flatten(), minlength=256)
    shares = counts / counts.sum(1, keepdim=True)
    mean = shares @ values
    std = (shares @ values.square() - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)  # pictures of one colour
    return mean.float(), std.float()


class Normalize:
    """uint8 [B, 3, S, S] → fp32 (x / 255 - mean) / std, in one multiplication and one addition."""

    def __init__(self, mean: Tensor, std: Tensor, device: torch.device | str = "cpu"):
        self.scale = (1 / (255 * std)).view(1, 3, 1, 1).to(device)
        self.offset = (-mean / std).view(1, 3, 1, 1).to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.float().mul_(self.scale).add_(self.offset)


@dataclass(frozen=True)
class Augmentation:
    """flip: half of the pictures are mirrored. shift: moved by up to so many pixels each way, black where nothing was.
    scale: or a random crop of this share of the area (lowest, highest), sides up to 4:3, enlarged to the whole (bilinear)."""

    flip: bool = False
    shift: int = 0
    scale: tuple[float, float] | None = None

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 [B, 3, S, S] → uint8 or, after crops, fp32 0 .. 255, of the same shape. generator: of the CPU, so that the same
        numbers are drawn on every device."""
        batch = len(pixels)
        flips = (torch.rand(batch, generator=generator) < 0.5) if self.flip else torch.zeros(batch, dtype=torch.bool)
        if self.scale is not None:
            return random_crops(pixels, flips, self.scale, generator)
        shifts = torch.randint(0, 2 * self.shift + 1, (2, batch), generator=generator)
        return shifted(pixels, flips, shifts, self.shift)


def shifted(pixels: Tensor, flips: Tensor, shifts: Tensor, padding: int) -> Tensor:
    """Windows of the padded pictures, mirrored where `flips`. shifts: [2, B] first row and column of each, 0 .. 2 * padding."""
    batch, _, height, width = pixels.shape
    padded = F.pad(pixels, (padding,) * 4)
    rows = shifts[0][:, None] + torch.arange(height)
    columns = shifts[1][:, None] + torch.arange(width)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    # One gather over the flat planes: rows and columns of each picture are its own.
    flat = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).view(batch, 1, -1).to(pixels.device)
    return padded.flatten(2).gather(2, flat.expand(-1, 3, -1)).view_as(pixels)


def random_crops(pixels: Tensor, flips: Tensor, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Crops of a random place, area and ratio of sides, enlarged: no detail is lost to aliasing. fp32 [B, 3, S, S]."""
    area, ratio, y, x = torch.rand(4, len(pixels), generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * area
    root = torch.exp((ratio - 0.5) * _RATIO)  # root of a ratio that is uniform on a logarithmic scale
    height, width = (area.sqrt() / root).clamp(max=1), (area.sqrt() * root).clamp(max=1)
    theta = torch.zeros(len(pixels), 2, 3)  # where the output's -1 .. 1 lies in the input's
    theta[:, 0, 0] = torch.where(flips, -width, width)
    theta[:, 0, 2] = (2 * x - 1) * (1 - width)
    theta[:, 1, 1] = height
    theta[:, 1, 2] = (2 * y - 1) * (1 - height)
    grid = F.affine_grid(theta.to(pixels.device), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class Data:
    """Pictures on the device, normalised by the training pictures' own mean and deviation: models' own differ."""

    train: Pictures
    val: Pictures
    names: list[str]
    normalize: Normalize

    def record(self) -> dict:
        return {"train": len(self.train), "val": len(self.val), "classes": self.names}


def load_data(args: Namespace, img_size: int, device: torch.device) -> Data:
    """--train-data and --val-data, decoded.

    args: train_data, val_data, dataset_type, classes, label_key.
    Raises:
        ValueError: what open_source and load_pictures say of them, other classes in each, or nobody knows the classes.
    """
    train, val = (
        open_source(flag, data, args.dataset_type, args.classes, args.label_key)
        for flag, data in (("--train-data", args.train_data), ("--val-data", args.val_data))
    )
    if train.names is None:
        raise ValueError("--classes is needed: --train-data does not tell the names of its classes")
    check_same_classes(train, val)
    pictures = load_pictures("--train-data", train, img_size, len(train.names))
    normalize = Normalize(*pixel_statistics(pictures), device)
    evaluated = load_pictures("--val-data", val, img_size, len(train.names))
    return Data(pictures.to(device), evaluated.to(device), train.names, normalize)


def evaluation_batches(pictures: Pictures, normalize: Normalize, size: int = 250) -> Iterator[Batch]:
    """Every picture once, in order, as evaluate.evaluate reads them."""
    for pixels, labels in zip(pictures.pixels.split(size), pictures.labels.split(size), strict=True):
        yield Batch((normalize(pixels), labels))
