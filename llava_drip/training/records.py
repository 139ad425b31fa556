"""JSON Lines that a run writes as it goes: one a step or one an epoch. A run that resumes cuts them back to where it resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from llava_drip.files import write_whole
from llava_drip.jsonl import read_jsonl


class Records:
    """A file of rows. Each is handed to the system before `add` returns: a kill leaves at most one torn line, the last."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def add(self, row: dict) -> None:
        """Appends a row, in place of a torn last line."""
        line = json.dumps(row).encode() + b"\n"
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    content = self.path.read_bytes()
                    file.truncate(content.rfind(b"\n") + 1)
            file.write(line)

    def read(self) -> list[dict]:
        """All rows; a torn last line is left out. ValueError names a line that is no JSON object."""
        if not self.path.is_file():
            return []
        content = self.path.read_bytes()
        return [row for _, row in read_jsonl(self.path, content[content.rfind(b"\n") + 1 :])]

    def cut(self, key: str, limit: int) -> None:
        """Keep the rows whose `key` is at most `limit`: what a killed run had written beyond its last checkpoint goes.

        Raises:
            ValueError: a row without a number there.
        """
        if not self.path.is_file():
            return
        rows = self.read()
        for number, row in enumerate(rows, 1):
            if not isinstance(row.get(key), (int, float)):
                raise ValueError(f"{self.path}: row {number} has no number {key!r}")
        rows = [row for row in rows if row[key] <= limit]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))
