"""Shards → raw samples. A unit is what is read in one go: a webdataset tar, or a row group of a parquet file.

A raw sample is a dictionary of fields by ending ("jpg", "txt", "cls", "json" → bytes; parquet columns → Python values) and
"__key__", its name for errors and seeds: "train-00017.tar: 000170042".
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from llava_drip.cli import one_line
from llava_drip.images import IMAGE_KEYS
from llava_drip.training.skips import BadSample, Skips

IMAGE_COLUMNS = ("image", "img")
_META = re.compile(r"__[^/]*__($|/)")  # what webdataset keeps for itself


def expand(data: str) -> list[str]:
    """Shards named by 'train-{00..99}.tar', several of them joined by '::', or a folder of .tar files, else of .parquet files.

    Returns:
        Units: an address for a tar (path, http(s) or pipe:), "FILE.parquet#3" for a row group.
    Raises:
        ValueError: a local shard that is not there or is no parquet file; braces that do not match; no shard at all.
    """
    path = os.path.expanduser(data)
    if not data.strip():
        raise ValueError("no shards: an empty name")
    if os.path.isdir(path):  # not Path.is_dir, which fails on a long list of shards
        # Beside tars, .parquet files are img2dataset's notes on them.
        names = sorted(map(str, Path(path).glob("*.tar"))) or sorted(map(str, Path(path).glob("*.parquet")))
        if not names:
            raise ValueError(f"{data}: holds neither .tar nor .parquet files")
    else:
        try:
            names = [os.path.expanduser(name) for name in expand_urls(data)]
        except ValueError as error:
            raise ValueError(f"{data}: {error}") from error
    units = []
    for name in names:
        if is_local(name) and not os.path.isfile(name):
            raise ValueError(f"no shard {name}")
        if name.startswith(("http://", "https://")) and shutil.which("curl") is None:
            raise ValueError(
                f"{name.partition('?')[0]}: webdataset reads addresses through curl, which is not installed"
            )
        units += _row_groups(name) if name.endswith(".parquet") else [name]
    if not units:
        raise ValueError(f"{data}: holds no rows")
    return units


def is_local(unit: str) -> bool:
    return "://" not in unit and not unit.startswith("pipe:")


def file_of(unit: str) -> str:
    """The file that a local unit lies in."""
    return unit.rpartition("#")[0] if ".parquet#" in unit else unit


def short_name(unit: str) -> str:
    """A unit without its folder, so that what follows from it stays when the data move; nor what signs its address."""
    if "://" in unit and not unit.startswith("pipe:"):
        unit = unit.partition("?")[0]
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
        return [f"{path}#{n}" for n in range(file.num_row_groups) if file.metadata.row_group(n).num_rows]


def read(unit: str, skips: Skips) -> Iterator[dict]:
    """Raw samples of a unit, in its order. What cannot be read (the rest of a truncated tar) is counted, and ends the unit."""
    yield from _read_parquet(unit, skips) if ".parquet#" in unit else _read_tar(unit, skips)


class _Member(tarfile.TarInfo):
    """Past the first member, tarfile takes a damaged header for the end of the archive: what follows would be lost unseen."""

    __slots__ = ()

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.SubsequentHeaderError(str(error)) from error


def _read_tar(url: str, skips: Skips) -> Iterator[dict]:
    """Neighbours whose names differ in their endings alone are one sample, as in webdataset; an ending that comes again begins
    the next (as in open_clip: LAION's shards have names twice)."""
    name, sample, samples = short_name(url), {}, 0
    try:
        with (
            _open(url) as file,
            tarfile.open(fileobj=file, mode="r:*" if is_local(url) else "r|*", tarinfo=_Member) as tar,
        ):
            for member in tar:
                tar.members = []  # it keeps them all
                key, ending = base_plus_ext(member.name)
                if key is None or not member.isreg() or _META.match(member.name):
                    continue
                key, ending = f"{name}: {key}", ending.lower()
                if sample and (sample["__key__"] != key or ending in sample):
                    samples += 1
                    yield sample
                    sample = {}
                sample["__key__"] = key
                sample[ending] = tar.extractfile(member).read()
            while not is_local(url) and file.read(2**20):  # to its end, for the exit code of what sends it
                pass
    except Exception as error:  # tarfile's, zlib's, lzma's, the operating system's, a pipe's
        text = one_line(error, 200)
        if ended := re.search(r"exit (-?\d+) \(read\)", str(error)):  # webdataset's words hold the whole command
            text = f"the command that reads it ended with exit code {ended[1]}"
        where = url.partition("?")[0] if "://" in url else url
        after = f" after {samples:,} samples" if samples else ""
        skips.add("unreadable shard", f"{where}: {text}{after}")
        return  # `sample` may lack files
    if sample:
        yield sample


def _open(url: str) -> BinaryIO:
    return open(url, "rb") if is_local(url) else gopen(url, "rb")


def _read_parquet(unit: str, skips: Skips) -> Iterator[dict]:
    path, _, group = unit.rpartition("#")
    name, number = short_name(unit), 0
    try:
        with _parquet(path) as file:
            # A few rows at a time: a row group can hold a gigabyte of pictures.
            for rows in file.iter_batches(64, row_groups=[int(group)], use_threads=False):
                for row in rows.to_pylist():
                    yield {**row, "__key__": f"{name}: row {number}"}
                    number += 1
    except Exception as error:  # pyarrow's own kinds
        text = one_line(error, 200)
        skips.add("unreadable shard", text if path in text else f"{path}: {text}")


def image_bytes(sample: dict) -> bytes:
    """The encoded picture of a raw sample. BadSample: there is none."""
    for key in (*IMAGE_KEYS, *IMAGE_COLUMNS):
        picture = sample.get(key)
        if isinstance(picture, dict):  # Hugging Face's Image feature
            picture = picture.get("bytes")
        if isinstance(picture, bytes):
            return picture
    fields = sorted(key for key in sample if not key.startswith("__"))
    raise BadSample("missing picture", f"{sample['__key__']}: no picture among {', '.join(fields)}")


def count_samples(units: Sequence[str]) -> int | None:
    """Samples of all units: from parquet's own metadata; for tars from sizes.json (by file name) or __len__ (a number, of the
    whole folder) beside them, webdataset's conventions. None: not known.

    Raises:
        ValueError: sizes.json or __len__ is there but damaged, or does not list a shard.
    """
    total, folders, files = 0, {}, {}
    for unit in units:
        path, _, group = unit.rpartition("#")
        if path.endswith(".parquet"):
            files.setdefault(path, []).append(int(group))
        else:
            folders.setdefault(os.path.dirname(unit) if is_local(unit) else None, []).append(unit)
    for path, groups in files.items():
        with _parquet(path) as file:
            total += sum(file.metadata.row_group(group).num_rows for group in groups)
    for folder, shards in folders.items():
        samples = None if folder is None else _count_in_folder(Path(folder), shards)
        if samples is None:
            return None
        total += samples
    return total


def _count_in_folder(folder: Path, shards: Sequence[str]) -> int | None:
    sizes, length = folder / "sizes.json", folder / "__len__"
    try:
        if sizes.is_file():
            known = json.loads(sizes.read_text())
            return sum(int(known[short_name(shard)]) for shard in shards)
        if length.is_file():
            return int(ast.literal_eval(length.read_text()))
    except KeyError as error:
        raise ValueError(f"{sizes}: has no entry for shard {error}") from error
    except (ValueError, TypeError, AttributeError, SyntaxError) as error:
        raise ValueError(f"{sizes if sizes.is_file() else length}: not readable ({one_line(error)})") from error
    return None
