"""JSON Lines that a run writes as it goes: one a step or one an epoch. A run that resumes cuts them back to where it resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from llava_drip.jsonl import read_jsonl


class Records:
    """A file of rows. Each is whole on disk before `add` returns, so that a kill leaves at most one torn line, the last."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def add(self, row: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def read(self) -> list[dict]:
        """All rows; a torn last line is left out. ValueError names a line that is no JSON object."""
        if not self.path.is_file():
            return []
        content = self.path.read_bytes()
        return [row for _, row in read_jsonl(self.path, content[content.rfind(b"\n") + 1 :])]

    def cut(self, key: str, limit: int) -> None:
        """Keep the rows whose `key` is at most `limit`: what a killed run had written beyond its last checkpoint goes."""
        if not self.path.is_file():
            return
        rows = [row for row in self.read() if row[key] <= limit]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, self.path)
