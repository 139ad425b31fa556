"""Pictures with their captions, for retrieval, in the formats in which people keep them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llava_drip.cli import one_line
from llava_drip.training import units
from llava_drip.training.caption_lists import (
    CAPTION_FIELDS,
    LISTINGS,
    captions_of,
    grouped,
    of_split,
    place_of,
    read_listing,
)
from llava_drip.training.pictures import Missing, ParquetRow, Picture, local_units, tar_samples
from llava_drip.training.skips import Skips

DEFAULT_SPLIT = "test"


@dataclass(frozen=True)
class CaptionSet:
    """Pictures, each with one caption or more.

    Attributes:
        source: what it was read from, for messages.
        pictures: where each lies; loaded when asked for.
        captions: of each picture, as long as `pictures`, none empty.
    """

    source: str
    pictures: Sequence[Picture]
    captions: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.pictures)

    def files(self) -> dict[str, str | list[str]]:
        """What all this lies in: "pictures": the files, or their shards; "captions": the listing, where there is one."""
        places = {picture.file for picture in self.pictures} - {None}
        listing = {"captions": self.source} if Path(self.source).suffix.lower() in LISTINGS else {}
        return {**listing, "pictures": sorted(filter(os.path.isfile, places))}

    def load(self, index: int) -> Image.Image:
        """The RGB picture. ImageError or BadSample names one that is missing or corrupt."""
        return self.pictures[index].load()


def open_captions(data: str, images: str | None = None, split: str | None = None) -> CaptionSet:
    """Pictures with captions.

    Args:
        data: shards ('test-{00000..00004}.tar', several joined by '::', .parquet files, or a folder of either), or a listing.
            Shards: captions from a .json field or parquet column "captions", "sentences" (lists), else a .txt with one caption
                a line, as CLIP_benchmark keeps them, else "caption".
            .json: Karpathy's splits (dataset_coco.json), COCO's captions_val2014.json, or a list of rows as in .jsonl.
            .jsonl: {"image" or "image_id", "captions" or "caption", "split"} a line.
            .csv, .tsv: a column with the path (filepath, image, ...) and one with the caption (title, caption, ...).
            A picture named in several rows has all their captions.
        images: for a listing, the folder of the pictures, or tar shards whose keys are the names. Default: the paths as they
            are, else from the listing's folder.
        split: for a listing that names splits; default "test".
    Raises:
        ValueError: naming the file and row that cannot be understood; no picture of the split; no picture at all where `images`
            says. Single missing pictures are left for `load` to name.
    """
    path = Path(data).expanduser()
    if path.suffix.lower() not in LISTINGS:
        for name, value in (("images", images), ("split", split)):
            if value is not None:
                raise ValueError(f"{name} {value}: {data} are shards, which hold their pictures and are one split")
        return _from_shards(data)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    rows = grouped(of_split(list(read_listing(path)), split or DEFAULT_SPLIT, path, asked=split is not None))
    if not rows:
        raise ValueError(f"{path}: lists no picture")
    place = place_of(images, path, rows)
    found = [place.find(row.names) for row in rows]
    if not any(found):
        raise ValueError(f"{rows[0].where}: no picture {rows[0].names[0]} in {place}, nor any other that is listed")
    pictures = [
        picture or Missing(f"{row.where}: no picture {row.names[0]} in {place}") for row, picture in zip(rows, found)
    ]
    return CaptionSet(str(path), pictures, [row.captions for row in rows])


def _from_shards(data: str) -> CaptionSet:
    pictures, captions = [], []
    for unit in local_units(data):
        samples = _parquet_samples(unit) if ".parquet#" in unit else _tar_samples(unit)
        for picture, texts in samples:
            pictures.append(picture)
            captions.append(texts)
    if not pictures:
        raise ValueError(f"{data}: holds no picture")
    return CaptionSet(data, pictures, captions)


def _tar_samples(tar: str) -> Iterator[tuple[Picture, list[str]]]:
    for sample in tar_samples(tar):
        where, fields = f"{tar}: {sample.key}", {}
        try:
            if "json" in sample.fields:
                fields = json.loads(sample.read("json"))
                fields = fields if isinstance(fields, dict) else {"captions": fields}
            if "txt" in sample.fields:
                fields["txt"] = sample.read("txt").decode().splitlines()
        except ValueError as error:  # not JSON, not UTF-8
            raise ValueError(f"{where}: its captions cannot be read ({one_line(error, 200)})") from error
        yield sample.picture(), captions_of(fields, where, ("captions", "sentences", "txt", *CAPTION_FIELDS))


def _parquet_samples(unit: str) -> Iterator[tuple[Picture, list[str]]]:
    skips = Skips()
    for number, row in enumerate(units.read(unit, skips)):
        yield ParquetRow(unit, number), captions_of(row, row["__key__"])
    if skips.total:
        raise ValueError("; ".join(skips.examples))
