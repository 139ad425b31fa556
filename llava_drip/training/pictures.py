"""Where a picture of an evaluation set lies: a file, a member of a tar, or a row of a parquet file. Read when it is needed."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image
from webdataset.tariterators import base_plus_ext

from llava_drip.cli import one_line
from llava_drip.images import IMAGE_KEYS, ImageError, decode_image, load_image
from llava_drip.training import units
from llava_drip.training.skips import BadSample, Skips


@dataclass(frozen=True)
class File:
    """A picture file. `load` of this and the others: an RGB image; ImageError or BadSample names one that cannot be had.
    `file`: which file it lies in."""

    path: str

    @property
    def file(self) -> str:
        return self.path

    def read(self) -> bytes:
        """The encoded file; of `Member` too."""
        return Path(self.path).read_bytes()

    def load(self) -> Image.Image:
        if not Path(self.path).is_file():
            raise BadSample("missing picture", f"{self.path}: no such picture")
        return load_image(self.path)


@dataclass(frozen=True)
class Member:
    """A picture inside an uncompressed tar."""

    tar: str
    name: str
    offset: int
    size: int

    @property
    def file(self) -> str:
        return self.tar

    def read(self) -> bytes:
        return read_member(self.tar, self.offset, self.size)

    def load(self) -> Image.Image:
        return decode_image(self.read(), f"{units.short_name(self.tar)}: {self.name}")


@dataclass(frozen=True)
class ParquetRow:
    """A picture in a row group of a parquet file."""

    unit: str
    row: int

    @property
    def file(self) -> str:
        return units.file_of(self.unit)

    def load(self) -> Image.Image:
        sample = _row_group(self.unit)[self.row]
        return decode_image(units.image_bytes(sample), sample["__key__"])


@dataclass(frozen=True)
class Missing:
    """A picture that is named and is not there."""

    message: str
    file = None

    def load(self) -> Image.Image:
        raise BadSample("missing picture", self.message)


Picture = File | Member | ParquetRow | Missing


@lru_cache(maxsize=1)  # neighbours are asked for one after another
def _row_group(unit: str) -> list[dict]:
    skips = Skips()
    rows = list(units.read(unit, skips))
    if skips.total:
        raise ImageError("; ".join(skips.examples))
    return rows


def read_member(tar: str, offset: int, size: int) -> bytes:
    with open(tar, "rb") as file:
        file.seek(offset)
        return file.read(size)


def local_units(data: str) -> list[str]:
    """units.expand, for files that can be read in any order.

    Raises:
        ValueError: also for a shard behind an address.
    """
    found = units.expand(data)
    for unit in found:
        if not units.is_local(unit):
            raise ValueError(f"{unit}: evaluation reads local shards only; download it first")
    return found


@dataclass
class TarSample:
    """Members of a tar that share a key: ending → (offset, size)."""

    tar: str
    key: str
    fields: dict[str, tuple[int, int]]

    def read(self, ending: str) -> bytes:
        return read_member(self.tar, *self.fields[ending])

    def picture(self) -> Picture:
        for ending in IMAGE_KEYS:
            if ending in self.fields:
                return Member(self.tar, f"{self.key}.{ending}", *self.fields[ending])
        return Missing(f"{units.short_name(self.tar)}: {self.key} has no picture")


def tar_samples(tar: str) -> Iterator[TarSample]:
    """Samples of a tar in order, by its headers alone; nothing is unpacked.

    Raises:
        ValueError: it cannot be read to its end.
    """
    sample = None
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                key, ending = base_plus_ext(member.name)
                if not member.isfile() or key is None:
                    continue
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = TarSample(tar, key, {})
                sample.fields[ending.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{tar}: not a readable uncompressed tar file ({one_line(error, 200)})") from error
    if sample is not None:
        yield sample


class FolderOfPictures:
    """Pictures by path below a folder; a name without an ending is tried with each."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def find(self, names: Sequence[str]) -> Picture | None:
        """The first of the names that is there."""
        for name in names:
            for path in (self.folder / name, *(self.folder / f"{name}.{ending}" for ending in IMAGE_KEYS)):
                if path.is_file():
                    return File(str(path))
        return None


class ShardsOfPictures:
    """Pictures by their key in tar shards, with or without its folder."""

    def __init__(self, shards: str):
        self.shards, self.by_key = shards, {}
        for unit in local_units(shards):
            if ".parquet#" in unit:
                raise ValueError(
                    f"{shards}: pictures that a list of captions names can be looked up in .tar shards only"
                )
            for sample in tar_samples(unit):
                self.by_key.setdefault(sample.key, sample)
                self.by_key.setdefault(sample.key.rpartition("/")[2], sample)

    def __str__(self) -> str:
        return self.shards

    def find(self, names: Sequence[str]) -> Picture | None:
        for name in names:
            base = name.rpartition("/")[2]
            for key in (name, base_plus_ext(name)[0], base, base_plus_ext(base)[0]):
                if key in self.by_key:
                    return self.by_key[key].picture()
        return None
