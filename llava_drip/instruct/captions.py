"""Pictures with captions → rows of LLaVA's 558K alignment format.

    {"id": "0001", "image": "0001.jpg", "conversations": [{"from": "human", "value": "<image>\\nCaption the image."},
                                                            {"from": "gpt", "value": "A cat on a mat."}]}

Which request is asked, and on which side of the picture, is drawn from seed and key: a rerun gives the same file.
As in LLaVA's own file they ask for a brief description; the wordings are ours. (The template `plain` leaves requests out.)
"""

from __future__ import annotations

import json
import os
import random
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from braceexpand import braceexpand
from tqdm import tqdm

from llava_drip.files import whole_folder
from llava_drip.images import IMAGE_KEYS, ImageError, decode_image
from llava_drip.training.caption_lists import LISTINGS, grouped, of_split, place_of, read_listing
from llava_drip.training.pictures import File, FolderOfPictures, Missing

PICTURES = tuple(f".{ending}" for ending in IMAGE_KEYS)
REQUESTS = (
    "Describe this picture in one short sentence.",
    "What does the picture show, in brief?",
    "Give a short caption for this photo.",
    "Sum up what can be seen here.",
    "Write one sentence on the content of the image.",
    "In a few words, what is in this picture?",
    "Tell me shortly what the photo is about.",
    "Caption the image.",
)
CHOICES = ("first", "random", "all")  # which of a picture's captions


@dataclass(frozen=True)
class Sample:
    """One picture with its captions. `where` names both for errors.

    picture: the encoded file, to be copied to images/`name`; None: it stays where it is, `name` below the image folder.
    """

    key: str
    name: str
    picture: bytes | None
    captions: list[str]
    where: str


@dataclass(frozen=True)
class Converted:
    """rows: how many. data_path, image_folder: for the stage programs."""

    rows: int
    data_path: Path
    image_folder: Path


def read_shards(pattern: str) -> Iterator[Sample]:
    """Yields the samples of webdataset shards in order. ValueError names the shard and the sample."""
    shards = [Path(name) for name in braceexpand(pattern)]
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"{shard}: no such shard (--input {pattern})")
    for shard in shards:
        key, fields = None, {}
        try:
            with tarfile.open(shard, "r|*") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    # webdataset's rule: the key ends at the first dot of the file name
                    match = re.fullmatch(r"((?:.*/)?[^./]+)(\.[^/]*)", member.name)
                    if match is None:
                        continue
                    if match[1] != key:
                        if key is not None:
                            yield _shard_sample(shard, key, fields)
                        key, fields = match[1], {}
                    fields[match[2].lower()] = archive.extractfile(member).read()
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{shard}: not a readable tar, near sample {key!r} ({error})") from error
        if key is not None:
            yield _shard_sample(shard, key, fields)


def _shard_sample(shard: Path, key: str, fields: dict[str, bytes]) -> Sample:
    where = f"{shard}: sample {key!r}"
    suffix = next((suffix for suffix in PICTURES if suffix in fields), None)
    if suffix is None:
        raise ValueError(f"{where} has no picture ({', '.join(PICTURES)}); it has {', '.join(sorted(fields))}")
    if ".txt" not in fields:
        raise ValueError(f"{where} has no .txt caption; it has {', '.join(sorted(fields))}")
    try:
        caption = fields[".txt"].decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: the caption is not UTF-8 ({error})") from error
    return Sample(key, key + suffix, fields[suffix], [caption], where)


def read_folder(folder: Path) -> Iterator[Sample]:
    """Yields the samples of a folder with a captions.jsonl, rows as of a listing. ValueError names the line."""
    listing = folder / "captions.jsonl"
    if not listing.is_file():
        raise ValueError(f"{folder}: this folder has no captions.jsonl (shards and listings are given by their path)")
    place = FolderOfPictures(folder)
    for row in read_listing(listing):
        for name in row.names:
            _inside(name, row.where)
        found = place.find(row.names)
        if found is None:
            raise ValueError(f"{row.where}: {folder / row.names[0]}: no such image file")
        path = Path(found.path)
        key = path.relative_to(folder).with_suffix("").as_posix()
        yield Sample(key, key + path.suffix.lower(), path.read_bytes(), row.captions, row.where)


def read_list(listing: Path, images: str | None, split: str | None) -> tuple[Iterator[Sample], Path | None]:
    """The samples of a listing (COCO's captions_*.json, Flickr8k.token.txt, ...: see training/caption_lists.py).

    Returns:
        Samples, and the folder that their names start from; None: they come out of tar shards and are to be copied.
    Raises:
        ValueError: naming the file and row that cannot be understood, a picture that is not there, a split that is needed.
    """
    if not listing.is_file():
        raise ValueError(f"{listing}: no such file (--input)")
    rows = grouped(of_split(list(read_listing(listing)), split, listing))
    if not rows:
        raise ValueError(f"{listing}: holds no samples")
    place = place_of(images, listing, rows)
    folder = place.folder if isinstance(place, FolderOfPictures) else None

    def samples() -> Iterator[Sample]:
        for row in rows:
            found = place.find(row.names)
            if found is None or isinstance(found, Missing):
                raise ValueError(f"{row.where}: no picture {row.names[0]} in {place} (--images)")
            if isinstance(found, File):
                name = os.path.relpath(found.path, folder) if not os.path.isabs(row.names[0]) else found.path
                yield Sample(os.path.splitext(row.names[0])[0], name, None, row.captions, row.where)
            else:
                key, suffix = os.path.splitext(getattr(found, "name", row.names[0]))
                yield Sample(key, key + suffix, found.read(), row.captions, row.where)

    return samples(), folder


def _inside(name: str, where: str) -> PurePosixPath:
    """A relative path that stays in its folder: names come from archives, which may say anything."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{where}: {name!r} leads out of its folder")
    return path


def to_rows(sample: Sample, choice: str = "first", seed: int = 0) -> list[dict]:
    """The row of a picture, or one for each of its captions (choice "all"; ids KEY#0, KEY#1, ..., as in Flickr8k)."""
    draw = random.Random(f"{seed}/{sample.key}")
    chosen = {"first": sample.captions[:1], "random": [draw.choice(sample.captions)], "all": sample.captions}[choice]
    rows = []
    for number, caption in enumerate(chosen):
        request, first = draw.choice(REQUESTS), draw.random() < 0.5
        question = f"<image>\n{request}" if first else f"{request}\n<image>"
        caption = " ".join(caption.replace("<image>", "image").split())  # a marker in a caption is only text
        conversations = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
        key = f"{sample.key}#{number}" if choice == "all" else sample.key
        rows.append({"id": key, "image": sample.name, "conversations": conversations})
    return rows


def convert(
    source: str,
    output: Path,
    images: str | None = None,
    split: str | None = None,
    choice: str = "first",
    seed: int = 0,
    limit: int | None = None,
) -> Converted:
    """Writes `output`/chat.json, and `output`/images of what comes out of shards or a folder. All or nothing.

    Args:
        source: webdataset shards, a folder with captions.jsonl, or a listing (LISTINGS).
        images, split: of a listing: where its pictures lie (default: beside it), and which part.
        choice: of CHOICES. limit: pictures.
    Raises:
        ValueError: naming what is wrong and where; a picture that is copied is decoded once, so a broken one is named.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists and is not an empty folder; choose another --output or remove it")
    path, folder = Path(source).expanduser(), None
    if path.suffix.lower() in LISTINGS:
        samples, folder = read_list(path, images, split)
    else:
        for flag, value in (("--images", images), ("--split", split)):
            if value is not None:
                raise ValueError(
                    f"{flag} {value}: belongs to a listing ({', '.join(LISTINGS)}), not to --input {source}"
                )
        samples = read_folder(path) if path.is_dir() else read_shards(source)
    with whole_folder(output) as partial:
        rows, seen = [], {}
        with tqdm(islice(samples, limit), desc="pictures", unit="", total=limit) as bar:
            for sample in bar:
                if not all(caption.strip() for caption in sample.captions):
                    raise ValueError(f"{sample.where}: the caption is empty")
                if sample.key in seen:
                    raise ValueError(f"{sample.where}: the same key as {seen[sample.key]}")
                seen[sample.key] = sample.where
                if sample.picture is not None:
                    _copy(sample, partial / "images")
                rows += to_rows(sample, choice, seed)
        if not rows:
            raise ValueError(f"{source}: holds no samples")
        with open(partial / "chat.json", "w", encoding="utf-8") as file:
            json.dump(rows, file, ensure_ascii=False, indent=1)
    return Converted(len(rows), output / "chat.json", output / "images" if folder is None else folder)


def _copy(sample: Sample, folder: Path) -> None:
    name = _inside(sample.name, sample.where)
    try:
        decode_image(sample.picture, str(name))
    except ImageError as error:
        raise ValueError(f"{sample.where}: {error}") from error
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(sample.picture)
