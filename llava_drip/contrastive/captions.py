"""Pictures with their captions, for retrieval, in the formats in which people keep them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llava_drip.cli import one_line
from llava_drip.contrastive.pictures import (
    FolderOfPictures,
    Missing,
    ParquetRow,
    Picture,
    ShardsOfPictures,
    local_units,
    tar_samples,
)
from llava_drip.jsonl import read_jsonl
from llava_drip.training import units
from llava_drip.training.skips import Skips

LISTINGS = (".json", ".jsonl", ".csv", ".tsv", ".txt")
NAME_FIELDS = ("filepath", "image", "file_name", "filename", "image_name", "image_id", "path")
CAPTION_FIELDS = ("captions", "sentences", "caption", "comment", "title", "text", "txt")
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

    def load(self, index: int) -> Image.Image:
        """The RGB picture. ImageError or BadSample names one that is missing or corrupt."""
        return self.pictures[index].load()


@dataclass
class _Row:
    where: str
    names: tuple[str, ...]  # of the picture, the likeliest first
    captions: list[str]
    split: str | None = None


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
    rows = _grouped(_of_split(list(_read_listing(path)), split, path))
    if not rows:
        raise ValueError(f"{path}: lists no picture")
    place = _place(images, path, rows)
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
        yield sample.picture(), _captions(fields, where, ("captions", "sentences", "txt", *CAPTION_FIELDS))


def _parquet_samples(unit: str) -> Iterator[tuple[Picture, list[str]]]:
    skips = Skips()
    for number, row in enumerate(units.read(unit, skips)):
        yield ParquetRow(unit, number), _captions(row, row["__key__"])
    if skips.total:
        raise ValueError("; ".join(skips.examples))


def _captions(fields: dict, where: str, names: Sequence[str] = CAPTION_FIELDS) -> list[str]:
    """Of the first field that is there: a text, or a list of texts or of {"raw" or "caption": text}."""
    for name in names:
        value = fields.get(name)
        if value is None:
            continue
        texts = value if isinstance(value, list) else [value]
        texts = [text.get("raw", text.get("caption")) if isinstance(text, dict) else text for text in texts]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}: {name!r} is neither a text nor a list of texts")
        texts = [" ".join(text.split()) for text in texts if text.strip()]
        if not texts:
            raise ValueError(f"{where}: {name!r} holds no caption")
        return texts
    there = ", ".join(sorted(key for key in fields if not key.startswith("__"))) or "nothing"
    raise ValueError(f"{where}: no caption ({', '.join(CAPTION_FIELDS)}); there is {there}")


def _read_listing(path: Path) -> Iterator[_Row]:
    if path.suffix.lower() == ".jsonl":
        for where, row in read_jsonl(path):
            yield _row(row, where)
        return
    if path.suffix.lower() != ".json":
        yield from _read_table(path)
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({one_line(error, 200)})") from error
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        yield from (
            _read_coco(path, content) if "annotations" in content else _read_rows(path, content["images"], "images")
        )
    elif isinstance(content, list):
        yield from _read_rows(path, content, "row")
    else:
        raise ValueError(f'{path}: neither a list of rows nor an object with a list of "images"')


def _read_rows(path: Path, rows: list, what: str) -> Iterator[_Row]:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: {what} {number}: not a JSON object")
        yield _row(row, f"{path}: {what} {number}")


def _read_coco(path: Path, content: dict) -> Iterator[_Row]:
    """COCO's own annotations: pictures by id, and one caption an annotation."""
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for number, annotation in enumerate(content["annotations"]):
            where = f"{path}: annotation {number}"
            yield _Row(where, (names[annotation["image_id"]],), _captions(annotation, where))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not COCO's captions, {error!r} is missing") from error


def _read_table(path: Path) -> Iterator[_Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            separator = next((mark for mark in "\t|" if mark in first), ",")  # Flickr30k's results.csv has "|"
            reader = csv.DictReader(file, delimiter=separator, skipinitialspace=True)
            columns = {column.strip(): column for column in reader.fieldnames or []}
            for what, known in (("path", NAME_FIELDS), ("caption", CAPTION_FIELDS)):
                if not columns.keys() & set(known):
                    raise ValueError(
                        f"{path}: no column with the {what} ({', '.join(known)}) among {', '.join(columns)}"
                    )
            for row in reader:
                yield _row({name: row[column] for name, column in columns.items()}, f"{path}: line {reader.line_num}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable table ({one_line(error, 200)})") from error


def _row(fields: dict, where: str) -> _Row:
    name = next((fields[field] for field in NAME_FIELDS if field in fields and field != "filepath"), None)
    folder = fields.get("filepath")  # Karpathy's COCO: the folder of `filename`; open_clip's tables: the path itself
    name, folder = (folder, None) if name is None else (name, folder)
    if not isinstance(name, (str, int)) or isinstance(name, bool) or not str(name).strip():
        raise ValueError(f"{where}: names no picture ({', '.join(NAME_FIELDS)})")
    name = str(name).strip()
    names = (name,) if not folder else (f"{folder}/{name}", name)
    return _Row(where, names, _captions(fields, where), fields.get("split"))


def _of_split(rows: list[_Row], split: str | None, path: Path) -> list[_Row]:
    there = sorted({str(row.split) for row in rows if row.split is not None})
    if not there:
        if split is not None:
            raise ValueError(f"split {split}: {path} names no splits")
        return rows
    chosen = [row for row in rows if row.split == (split or DEFAULT_SPLIT)]
    if not chosen:
        raise ValueError(f"{path}: no picture of the split {split or DEFAULT_SPLIT!r}; there are {', '.join(there)}")
    return chosen


def _grouped(rows: list[_Row]) -> list[_Row]:
    """One row a picture, with the captions of all its rows."""
    by_name: dict[str, _Row] = {}
    for row in rows:
        if row.names[0] in by_name:
            by_name[row.names[0]].captions += row.captions
        else:
            by_name[row.names[0]] = row
    return list(by_name.values())


def _place(images: str | None, listing: Path, rows: list[_Row]) -> FolderOfPictures | ShardsOfPictures:
    if images is None:
        here = FolderOfPictures(Path())  # an absolute path stays one
        return here if here.find(rows[0].names) else FolderOfPictures(listing.parent)
    folder = Path(os.path.expanduser(images))
    if os.path.isdir(folder) and not any(folder.glob("*.tar")):
        return FolderOfPictures(folder)
    if not os.path.isdir(folder) and not images.endswith((".tar", ".parquet")):
        raise ValueError(f"{images}: no such folder of pictures")
    return ShardsOfPictures(images)
