"""Lists of pictures with their captions, in the formats in which people keep them, each row with where it stands."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_drip.cli import one_line
from llava_drip.jsonl import read_jsonl
from llava_drip.training.pictures import FolderOfPictures, ShardsOfPictures

LISTINGS = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".token")
NAME_FIELDS = ("filepath", "image", "file_name", "filename", "image_name", "image_id", "path")
CAPTION_FIELDS = ("captions", "sentences", "caption", "comment", "title", "text", "txt")


# Flickr8k.token.txt and Flickr30k's results_20130124.token: NAME.jpg#0, a tab, the caption
_TOKEN_LINE = re.compile(r"(?P<image>[^\t#]+)#\d+\t(?P<caption>.*)")


@dataclass
class CaptionRow:
    """A row as it is written down. names: of its picture, the likeliest first. captions: none empty."""

    where: str
    names: tuple[str, ...]
    captions: list[str]
    split: str | None = None


def read_listing(path: Path) -> Iterator[CaptionRow]:
    """Rows in the order of the file; a picture may have several (see `grouped`).

    .json: Karpathy's splits (dataset_coco.json), COCO's captions_*.json, or a list of rows as in .jsonl. .jsonl: {"image" or
    "image_id", "captions" or "caption", "split"} a line. .csv, .tsv, .txt: a table with a column for the path (filepath, image,
    ...) and one for the caption (title, caption, ...). .txt, .token: also Flickr8k's own, NAME.jpg#0, a tab, the caption.
    Raises:
        ValueError: naming the file and row that cannot be understood.
    """
    if path.suffix.lower() == ".jsonl":
        for where, row in read_jsonl(path):
            yield _row(row, where)
        return
    if path.suffix.lower() != ".json":
        yield from _read_token(path) if _is_token(path) else _read_table(path)
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


def _read_rows(path: Path, rows: list, what: str) -> Iterator[CaptionRow]:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: {what} {number}: not a JSON object")
        yield _row(row, f"{path}: {what} {number}")


def _read_coco(path: Path, content: dict) -> Iterator[CaptionRow]:
    """COCO's own annotations: pictures by id, and one caption an annotation."""
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for number, annotation in enumerate(content["annotations"]):
            where = f"{path}: annotation {number}"
            yield CaptionRow(where, (names[annotation["image_id"]],), captions_of(annotation, where))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not COCO's captions, {error!r} is missing") from error


def _is_token(path: Path) -> bool:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return _TOKEN_LINE.match(file.readline()) is not None


def _read_token(path: Path) -> Iterator[CaptionRow]:
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                found = _TOKEN_LINE.match(line.rstrip("\r\n"))
                if found is None:
                    raise ValueError(f"{path}: line {number}: not NAME#NUMBER, a tab and the caption")
                yield _row(found.groupdict(), f"{path}: line {number}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from error


def _read_table(path: Path) -> Iterator[CaptionRow]:
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
                where = f"{path}: line {reader.line_num}"
                if any(field.strip() for field in row.get(None, ())):
                    raise ValueError(
                        f"{where}: {len(columns) + len(row[None])} fields, the header has {len(columns)}; put a caption "
                        f'that holds {separator!r} in "quotes"'
                    )
                yield _row({name: row[column] for name, column in columns.items()}, where)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable table ({one_line(error, 200)})") from error


def _row(fields: dict, where: str) -> CaptionRow:
    name = next((fields[field] for field in NAME_FIELDS if field in fields and field != "filepath"), None)
    folder = fields.get("filepath")  # Karpathy's COCO: the folder of `filename`; open_clip's tables: the path itself
    name, folder = (folder, None) if name is None else (name, folder)
    if not isinstance(name, (str, int)) or isinstance(name, bool) or not str(name).strip():
        raise ValueError(f"{where}: names no picture ({', '.join(NAME_FIELDS)})")
    name = str(name).strip()
    names = (name,) if not folder else (f"{folder}/{name}", name)
    return CaptionRow(where, names, captions_of(fields, where), fields.get("split"))


def captions_of(fields: dict, where: str, names: Sequence[str] = CAPTION_FIELDS) -> list[str]:
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


def of_split(rows: list[CaptionRow], split: str | None, path: Path, asked: bool = True) -> list[CaptionRow]:
    """The rows of a split; all of them where none names one and none is asked for. split: None: there must be no splits.

    Raises:
        ValueError: no row of that split, or a choice is needed; it lists the splits that there are.
    """
    there = sorted({str(row.split) for row in rows if row.split is not None})
    if not there:
        if split is not None and asked:
            raise ValueError(f"split {split}: {path} names no splits")
        return rows
    if split is None:
        raise ValueError(f"{path}: has the splits {', '.join(there)}; name one (--split)")
    chosen = [row for row in rows if row.split == split]
    if not chosen:
        raise ValueError(f"{path}: no picture of the split {split!r}; there are {', '.join(there)}")
    return chosen


def grouped(rows: list[CaptionRow]) -> list[CaptionRow]:
    """One row a picture, with the captions of all its rows."""
    by_name: dict[str, CaptionRow] = {}
    for row in rows:
        if row.names[0] in by_name:
            by_name[row.names[0]].captions += row.captions
        else:
            by_name[row.names[0]] = row
    return list(by_name.values())


def place_of(images: str | None, listing: Path, rows: list[CaptionRow]) -> FolderOfPictures | ShardsOfPictures:
    """Where the pictures of a listing lie. images: folder or tar shards; None: the paths as they are, else beside the listing."""
    if images is None:
        here = FolderOfPictures(Path())  # an absolute path stays one
        return here if here.find(rows[0].names) else FolderOfPictures(listing.parent)
    folder = Path(os.path.expanduser(images))
    if os.path.isdir(folder) and not any(folder.glob("*.tar")):
        return FolderOfPictures(folder)
    if not os.path.isdir(folder) and not images.endswith((".tar", ".parquet")):
        raise ValueError(f"{images}: no such folder of pictures")
    return ShardsOfPictures(images)
