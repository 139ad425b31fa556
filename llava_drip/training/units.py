"""Shards → raw samples. A unit is what is read in one go: a webdataset tar, or a row group of a parquet file.

A raw sample is a dictionary of fields by ending ("jpg", "txt", "cls", "json" → bytes; parquet columns → Python values) and
"__key__", its name for errors and seeds: "train-00017.tar: 000170042".
"""

from __future__ import annotations

import ast
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from webdataset.shardlists import expand_urls
from webdataset.tariterators import tarfile_samples

from llava_drip.cli import one_line
from llava_drip.training.skips import BadSample, Skips

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
IMAGE_COLUMNS = ("image", "img")


def expand(data: str) -> list[str]:
    """Shards named by 'train-{00..99}.tar', several of them joined by '::', or a folder of .tar or .parquet files.

    Returns:
        Units: an address for a tar (path, http(s) or pipe:), "FILE.parquet#3" for a row group.
    Raises:
        ValueError: a local shard that is not there or is no parquet file; no shard at all.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        names = sorted(str(file) for ending in ("tar", "parquet") for file in path.glob(f"*.{ending}"))
        if not names:
            raise ValueError(f"{data}: holds neither .tar nor .parquet files")
    else:
        names = [os.path.expanduser(name) for name in expand_urls(data)]
    units = []
    for name in names:
        if is_local(name) and not os.path.isfile(name):
            raise ValueError(f"no shard {name}")
        units += _row_groups(name) if name.endswith(".parquet") else [name]
    return units


def is_local(unit: str) -> bool:
    return "://" not in unit and not unit.startswith("pipe:")


def short_name(unit: str) -> str:
    """A unit without its folder, so that what follows from it stays when the data move."""
    return unit.rsplit("/", 1)[-1]


def _parquet(path: str):
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet files need pyarrow: pip install pyarrow") from error
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's own kinds
        raise ValueError(f"{path}: not a readable parquet file ({one_line(error, 200)})") from error


def _row_groups(path: str) -> list[str]:
    with _parquet(path) as file:
        return [f"{path}#{group}" for group in range(file.num_row_groups)]


def read(unit: str, skips: Skips) -> Iterator[dict]:
    """Raw samples of a unit. What cannot be read (the rest of a truncated tar) is counted, and ends the unit."""
    yield from _read_parquet(unit, skips) if ".parquet#" in unit else _read_tar(unit, skips)


def _read_tar(url: str, skips: Skips) -> Iterator[dict]:
    def handler(error: Exception) -> bool:
        skips.add("unreadable shard", f"{url}: {one_line(error.__class__(*error.args[:1]), 200)}")
        return False  # the position in the file is lost

    name = short_name(url)
    for sample in tarfile_samples([{"url": url}], handler=handler):
        sample["__key__"] = f"{name}: {sample['__key__']}"
        yield sample


def _read_parquet(unit: str, skips: Skips) -> Iterator[dict]:
    path, _, group = unit.rpartition("#")
    name = short_name(unit)
    try:
        with _parquet(path) as file:
            rows = file.read_row_group(int(group)).to_pylist()
    except Exception as error:
        skips.add("unreadable shard", one_line(error, 200))
        return
    for number, row in enumerate(rows):
        yield {**row, "__key__": f"{name}: row {number}"}


def image_bytes(sample: dict) -> bytes:
    """The encoded picture of a raw sample. BadSample: there is none."""
    for key in IMAGE_KEYS:
        if key in sample:
            return sample[key]
    for key in IMAGE_COLUMNS:
        picture = sample.get(key)
        if isinstance(picture, dict):  # Hugging Face's Image feature
            picture = picture.get("bytes")
        if isinstance(picture, bytes):
            return picture
    fields = sorted(key for key in sample if not key.startswith("__"))
    raise BadSample("missing picture", f"{sample['__key__']}: no picture among {', '.join(fields)}")


def count_samples(units: Sequence[str]) -> int | None:
    """Samples of all units: from parquet's own metadata; for tars from sizes.json (by file name) or __len__ beside the first,
    webdataset's conventions. None: not known.

    Raises:
        ValueError: sizes.json or __len__ is there but damaged, or does not list a shard.
    """
    if all(".parquet#" in unit for unit in units):
        total = 0
        for path in dict.fromkeys(unit.rpartition("#")[0] for unit in units):
            with _parquet(path) as file:
                total += file.metadata.num_rows
        return total
    if not is_local(units[0]):
        return None
    folder = Path(units[0]).parent
    sizes, length = folder / "sizes.json", folder / "__len__"
    try:
        if sizes.is_file():
            known = json.loads(sizes.read_text())
            return sum(int(known[short_name(unit)]) for unit in units)
        if length.is_file():
            return int(ast.literal_eval(length.read_text()))
    except KeyError as error:
        raise ValueError(f"{sizes}: has no entry for shard {error}") from error
    except (ValueError, TypeError, AttributeError, SyntaxError) as error:
        raise ValueError(f"{sizes if sizes.is_file() else length}: not readable ({one_line(error)})") from error
    return None


logging.getLogger("webdataset").setLevel(logging.ERROR)
