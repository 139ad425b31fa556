"""Shards of numbered samples, and loaders over them. A decoded sample is its number and three draws: what "the same" compares."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llava_drip.training.loader import TrainLoader
from llava_drip.training.skips import BadSample
from llava_drip.training.streams import ShardBatches, ShardOptions


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], **options) -> str:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def shards(folder: Path, sizes: Sequence[int], bad: Sequence[int] = ()) -> list[str]:
    """Tars of numbered texts, counted on from shard to shard; the bad ones do not decode."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, number = [], 0
    for shard, size in enumerate(sizes):
        texts = {n: b"bad" if n in bad else str(n).encode() for n in range(number, number + size)}
        paths.append(write_tar(folder / f"{shard:03d}.tar", [(f"{n:06d}.txt", text) for n, text in texts.items()]))
        number += size
    return paths


def truncated(path: str, size: int) -> str:
    Path(path).write_bytes(Path(path).read_bytes()[:size])
    return path


def jpeg(side: int = 8, color: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), color).save(file, "JPEG")
    return file.getvalue()


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def decode(sample: dict) -> torch.Tensor:
    """[4] float64: the number in the text, and one draw from each generator."""
    if sample["txt"] == b"bad":
        raise BadSample("corrupt text", sample["__key__"])
    return torch.tensor([int(sample["txt"]), *draws()], dtype=torch.float64)


def load(row: int) -> torch.Tensor:
    """The same of a row; every seventh cannot be read."""
    if row % 7 == 6:
        raise BadSample("corrupt row", f"row {row}")
    return torch.tensor([row, *draws()], dtype=torch.float64)


def shard_loader(
    units: Sequence[str],
    batch_size: int,
    batches: int,
    workers: int = 0,
    streams: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    **options,
) -> TrainLoader:
    options = ShardOptions(units, options.pop("decode", decode), **{"buffer": 4, **options})
    data = ShardBatches(
        options, batch_size=batch_size, batches=batches, workers=workers, streams=streams, rank=rank, ranks=ranks
    )
    return TrainLoader(data, workers)


def epoch_of(loader: TrainLoader, epoch: int = 0) -> torch.Tensor:
    """[batches, batch size, 4]"""
    loader.set_epoch(epoch)
    return torch.stack(list(loader))


def numbers(batches: torch.Tensor) -> list[int]:
    return batches[..., 0].flatten().long().tolist()


def as_json(state: dict) -> dict:
    return json.loads(json.dumps(state))
