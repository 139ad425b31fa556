"""Rows and pictures of a data set against the numbers that are published."""

from __future__ import annotations

import json
import os
from pathlib import Path

from llava_drip.images import IMAGE_KEYS
from llava_drip.jsonl import read_jsonl

PICTURES = tuple(f".{ending}" for ending in (*IMAGE_KEYS, "gif", "bmp"))  # what some sets have besides


def count_rows(path: Path) -> int:
    """Lines of a .jsonl, rows of a JSON list, or members of a JSON object. ValueError: the file is neither."""
    if path.suffix == ".jsonl":
        return sum(1 for _ in read_jsonl(path))
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, (list, dict)):
        raise ValueError(f"{path}: neither a JSON list nor an object")
    return len(content)


def count_pictures(folder: Path) -> int:
    """Files with a picture's ending below a folder; 0 where there is none."""
    files = (name for _, _, names in os.walk(folder) for name in names)
    return sum(name.lower().endswith(PICTURES) and not name.startswith(".") for name in files)


def named_pictures(listing: Path) -> list[str]:
    """The values of "image" in a .jsonl, each once, in order. ValueError names a line whose value is no bare file name."""
    names: dict[str, None] = {}
    for where, row in read_jsonl(listing):
        name = row.get("image")
        if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
            raise ValueError(f"{where}: 'image' must be a bare file name, got {name!r:.80}")
        names[name] = None
    return list(names)


def bytes_below(folder: Path) -> int:
    """Of all files below a folder; 0 where there is none."""
    paths = (os.path.join(above, name) for above, _, names in os.walk(folder) for name in names)
    return sum(os.lstat(path).st_size for path in paths)
