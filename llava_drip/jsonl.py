"""JSON Lines files, one object a line: read with the number of the line, so that whatever is wrong with one can be found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path


def read_jsonl(path: Path, torn: bytes = b"") -> Iterator[tuple[str, dict]]:
    """Yields ("FILE: line N", object) for each line that is not blank; N counts from 1, blank lines included.

    A line ends at "\\n" alone: str.splitlines would cut at a raw U+2028 or U+0085 too, which a JSON string may hold.

    torn: a tail of the file to leave out.
    Raises:
        ValueError: naming the file, and the line that is no JSON object.
    """
    try:
        lines = path.read_bytes().removesuffix(torn).decode("utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:  # its own message calls every line the first
            raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not a JSON object")
        yield where, row
