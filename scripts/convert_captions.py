"""python scripts/convert_captions.py --input 'DIR/train-{00000..00005}.tar' --output DIR [--limit 512]

Puts pictures with captions into the format of LLaVA's 558K alignment set, for `pretrain_projector.py`:

    DIR/images/<id>.jpg     the original bytes
    DIR/chat.json           [{"id", "image", "conversations": [{"from": "human", ...}, {"from": "gpt", ...}]}, ...]

`--input` is either webdataset shards (a path with {00000..00005} ranges; samples of jpg, png or webp plus txt), or a
folder whose captions.jsonl has one object per line: "image" (or "file_name"), a path inside the folder, and "caption"
(or "text", or "captions", a list of which the first is taken). Every picture is decoded once, so that a broken one is
found now and by name. DIR appears only when it is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from braceexpand import braceexpand
from tqdm import tqdm

from llava_drip import cli
from llava_drip.images import ImageError, decode_image
from llava_drip.jsonl import read_jsonl

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
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


class Sample(NamedTuple):
    """One picture with its caption; `where` names both for errors."""

    key: str
    suffix: str
    picture: bytes
    caption: str
    where: str


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
    return Sample(key, suffix, fields[suffix], caption, where)


def read_folder(folder: Path) -> Iterator[Sample]:
    """Yields the samples of a folder with a captions.jsonl. ValueError names the line."""
    listing = folder / "captions.jsonl"
    if not listing.is_file():
        raise ValueError(f"{folder}: this folder has no captions.jsonl (shards are given by their path)")
    for where, row in read_jsonl(listing):
        name = row.get("image") or row.get("file_name")
        caption = row.get("caption") or row.get("text") or next(iter(row.get("captions") or []), None)
        if not isinstance(name, str):
            raise ValueError(f"{where} has no 'image' (a path inside {folder})")
        if not isinstance(caption, str):
            raise ValueError(f"{where} has no 'caption'")
        path = folder / _inside(name, where)
        if not path.is_file():
            raise ValueError(f"{where}: {path}: no such image file")
        key = str(PurePosixPath(name).with_suffix(""))
        yield Sample(key, path.suffix.lower(), path.read_bytes(), caption, where)


def _inside(name: str, where: str) -> PurePosixPath:
    """A relative path that stays in its folder: names come from archives, which may say anything."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{where}: {name!r} leads out of its folder")
    return path


def to_row(sample: Sample, image: str) -> dict:
    """One row of LLaVA's 558K format. Which request is asked depends on the key alone: a rerun gives the same file."""
    draw = zlib.crc32(sample.key.encode())
    request = REQUESTS[draw // 2 % len(REQUESTS)]
    question = f"<image>\n{request}" if draw % 2 else f"{request}\n<image>"
    caption = " ".join(sample.caption.replace("<image>", "image").split())  # a marker in a caption is only text
    conversations = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
    return {"id": sample.key, "image": image, "conversations": conversations}


def convert(source: str, output: Path, limit: int | None = None) -> int:
    """Writes `output`/images and `output`/chat.json; returns the number of rows. All or nothing."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists and is not an empty folder; choose another --output or remove it")
    samples = read_folder(Path(source)) if Path(source).is_dir() else read_shards(source)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        rows, seen = [], {}
        with tqdm(islice(samples, limit), desc="pictures", unit="", total=limit) as bar:
            for sample in bar:
                if not sample.caption.strip():
                    raise ValueError(f"{sample.where}: the caption is empty")
                name = _inside(sample.key + sample.suffix, sample.where)
                if sample.key in seen:
                    raise ValueError(f"{sample.where}: the same key as {seen[sample.key]}")
                seen[sample.key] = sample.where
                try:
                    decode_image(sample.picture, str(name))
                except ImageError as error:
                    raise ValueError(f"{sample.where}: {error}") from error
                target = partial / "images" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(sample.picture)
                rows.append(to_row(sample, str(name)))
        if not rows:
            raise ValueError(f"{source}: holds no samples")
        with open(partial / "chat.json", "w", encoding="utf-8") as file:
            json.dump(rows, file, ensure_ascii=False, indent=1)
        partial.chmod(0o755)  # mkdtemp makes it private
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return len(rows)


def main() -> None:
    parser = cli.ArgumentParser(prog="convert_captions", description=__doc__.split("\n\n")[1])
    parser.add_argument("--input", required=True, help="shards, such as 'train-{00000..00005}.tar', or a folder")
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    parser.add_argument("--limit", type=int, help="stop after this many pictures")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}: must be at least 1")
    count = convert(args.input, args.output, args.limit)
    print(f"{count} pictures: {args.output / 'chat.json'} (--data_path), {args.output / 'images'} (--image_folder)")


if __name__ == "__main__":
    cli.run(main, "convert_captions")
