"""A subset of tables of picture addresses (LAION's metadata): filters, then rows by a seeded hash of their URL.

The rows with the smallest hashes are taken, so that which rows these are depends on the filters, the seed and the tables, not on
the order of the files, and a smaller subset lies inside a larger one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv, parquet

from llava_drip.cli import one_line
from llava_drip.files import whole_folder
from llava_drip.training.seeds import seed_of

ENDINGS = (".parquet", ".csv", ".tsv")
# Field → its names in LAION-400M, LAION-5B, Re-LAION and COYO, in lower case.
NAMES = {
    "url": ("url",),
    "caption": ("text", "caption", "title"),
    "width": ("width", "original_width"),
    "height": ("height", "original_height"),
    "similarity": ("similarity", "clip_similarity_vitb32"),
    "unsafe": ("punsafe",),
    "watermark": ("pwatermark", "watermark_score"),
}
BATCH = 65536  # rows read at once
ROWS_OF_PART = 1_000_000  # of a written file: 100 whole shards of 10,000
BUCKET_BITS = 20  # the hashes are counted in a million buckets


@dataclass(frozen=True)
class Filters:
    """What a row must have; None: not asked. A row without a value does not pass."""

    min_similarity: float | None = None  # cosine of CLIP; LAION-400M was made with 0.3, LAION-2B-en with 0.28
    min_side: int | None = None  # pixels of the shorter side
    max_aspect: float | None = None  # longer side over shorter
    max_unsafe: float | None = None  # punsafe, 0 .. 1
    max_watermark: float | None = None  # pwatermark, 0 .. 1


def parse_count(text: str) -> int:
    """ "26M", "280M", "2.5M", "400k" or "1000" as a number of rows. ValueError for anything else."""
    scale = {"k": 1_000, "m": 1_000_000, "b": 1_000_000_000}.get(text[-1:].lower(), 1)
    try:
        count = round(float(text[:-1] if scale > 1 else text) * scale)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise ValueError(f"{text!r} is not a number of rows; give 26M, 280M, 400k or 1000")
    return count


def find_tables(data: str) -> list[Path]:
    """A table, or all of a folder. ValueError: there is none."""
    path = Path(data).expanduser()
    files = sorted(file for file in path.iterdir() if file.suffix in ENDINGS) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"{path}: no {', '.join(ENDINGS)} file" + (" in this folder" if path.is_dir() else ""))
    if files[0].suffix not in ENDINGS:
        raise ValueError(f"{path}: not a {', '.join(ENDINGS)} file")
    return files


def select(data: str, folder: Path, count: int | None, filters: Filters, seed: int) -> dict:
    """Write the chosen rows to folder/part-NNNNN.parquet (url, caption, and what was filtered by) and folder/selection.json.

    A folder that holds the same selection is left as it is.

    Args:
        data: see find_tables.
        count: rows to take, at most; fewer by up to a millionth of what passes. None: all that pass.
    Returns:
        What selection.json holds: {"inputs", "count", "filters", "seed", "rows", "passed", "selected"}.
    Raises:
        ValueError: a table that cannot be read or lacks a column; another selection in the folder; nothing passes.
    """
    files, record = find_tables(data), folder / "selection.json"
    asked = {"inputs": [file.name for file in files], "count": count, "filters": asdict(filters), "seed": seed}
    if record.is_file():
        before = json.loads(record.read_text())
        different = [name for name, value in asked.items() if before.get(name) != value]
        if different:
            raise ValueError(
                f"{folder}: holds a selection with other {', '.join(different)}; choose another output folder"
            )
        return before
    rows, limit, passed = 0, None, 0
    if count is not None:
        buckets = np.zeros(2**BUCKET_BITS, np.int64)
        for _, hashes, read in _passing(files, filters, seed):
            rows += read
            buckets += np.bincount((hashes >> (64 - BUCKET_BITS)).astype(np.int64), minlength=len(buckets))
        passed = int(buckets.sum())
        limit = int(np.searchsorted(buckets.cumsum(), count, side="right"))  # whole buckets below this one
    with whole_folder(folder) as partial:
        writer, selected, rows_again = _Parts(partial), 0, 0
        for table, hashes, read in _passing(files, filters, seed):
            rows_again += read
            if limit is None:
                passed += len(hashes)
            else:
                table = table.filter(pa.array((hashes >> (64 - BUCKET_BITS)).astype(np.int64) < limit))
            selected += len(table)
            writer.add(table)
        writer.close()
        if not selected:
            raise ValueError(f"{data}: of {rows_again:,} rows {passed:,} pass the filters, and none was chosen")
        found = {**asked, "rows": rows_again, "passed": passed, "selected": selected}
        (partial / record.name).write_text(json.dumps(found, indent=2))
    return found


def _passing(files: Sequence[Path], filters: Filters, seed: int) -> Iterator[tuple[pa.Table, np.ndarray, int]]:
    """Of each batch: the rows that pass, the hashes of their URLs [rows] uint64, and how many rows were read."""
    # Exactly 16 characters, as pandas wants its key.
    key = f"{seed_of('laion subset', seed):016x}"
    for file in files:
        for batch in _batches(file):
            table = _named(batch, file, filters)
            kept = table.filter(pa.array(_passes(table, filters)))
            urls = kept["url"].to_numpy(zero_copy_only=False).astype(object)
            yield kept, pd.util.hash_array(urls, hash_key=key, categorize=False), len(table)


def _batches(file: Path) -> Iterator[pa.Table]:
    try:
        if file.suffix == ".parquet":
            with parquet.ParquetFile(file) as source:
                names = [name for name in source.schema_arrow.names if name.lower() in sum(NAMES.values(), ())]
                for batch in source.iter_batches(BATCH, columns=names):
                    yield pa.Table.from_batches([batch])
            return
        options = csv.ParseOptions(delimiter="\t" if file.suffix == ".tsv" else ",", newlines_in_values=True)
        with csv.open_csv(file, parse_options=options) as source:
            names = source.schema.names
        with csv.open_csv(file, parse_options=options, convert_options=_columns(names)) as source:
            for batch in source:
                yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a readable table ({one_line(error, 200)})") from error


def _columns(names: Sequence[str]) -> csv.ConvertOptions:
    """Of a csv the columns of NAMES alone, and of which type they are: pyarrow would guess it from the first megabyte."""
    known = {name: field for name in names for field, ours in NAMES.items() if name.lower() in ours}
    types = {name: pa.string() if field in ("url", "caption") else pa.float64() for name, field in known.items()}
    return csv.ConvertOptions(include_columns=list(known), column_types=types)


def _named(table: pa.Table, file: Path, filters: Filters) -> pa.Table:
    """The columns that are needed, under our names."""
    there = {name.lower(): name for name in table.column_names}
    found = {field: there[name] for field, names in NAMES.items() for name in names[::-1] if name in there}
    size = filters.min_side is not None or filters.max_aspect is not None
    needs = {
        "url": (True, "every row needs one"),
        "caption": (True, "every row needs one"),
        "width": (size, "--min-side and --max-aspect need one"),
        "height": (size, "--min-side and --max-aspect need one"),
        "similarity": (filters.min_similarity is not None, "--min-similarity needs one"),
        "unsafe": (filters.max_unsafe is not None, "--max-unsafe needs one"),
        "watermark": (filters.max_watermark is not None, "--max-watermark needs one"),
    }
    columns = {}
    for field, (wanted, why) in needs.items():
        if not wanted:
            continue
        if field not in found:
            raise ValueError(f"{file}: no column {' or '.join(NAMES[field])} among {', '.join(there.values())}; {why}")
        kind = pa.string() if field in ("url", "caption") else pa.float64()
        try:
            columns[field] = table[found[field]].cast(kind)
        except pa.ArrowException as error:
            raise ValueError(f"{file}: column {found[field]}: {one_line(error, 200)}") from error
    return pa.table(columns)


def _passes(table: pa.Table, filters: Filters) -> np.ndarray:
    """[rows] bool."""

    def column(name: str) -> np.ndarray:  # nothing there: NaN, which passes no comparison
        return table[name].to_numpy(zero_copy_only=False)

    passes = np.ones(len(table), bool)
    for name in ("url", "caption"):
        text = table[name].to_pandas()
        passes &= (text.notna() & (text.str.strip() != "")).to_numpy(bool)
    with np.errstate(invalid="ignore", divide="ignore"):
        if filters.min_similarity is not None:
            passes &= column("similarity") >= filters.min_similarity
        if filters.max_unsafe is not None:
            passes &= column("unsafe") <= filters.max_unsafe
        if filters.max_watermark is not None:
            passes &= column("watermark") <= filters.max_watermark
        if filters.min_side is not None or filters.max_aspect is not None:
            shorter = np.minimum(column("width"), column("height"))
            if filters.min_side is not None:
                passes &= shorter >= filters.min_side
            if filters.max_aspect is not None:
                passes &= np.maximum(column("width"), column("height")) <= filters.max_aspect * shorter
    return passes


class _Parts:
    """Parquet files of ROWS_OF_PART rows, so that all shards but the last are full."""

    def __init__(self, folder: Path):
        self.folder, self.waiting, self.rows, self.parts = folder, [], 0, 0

    def add(self, table: pa.Table) -> None:
        self.waiting.append(table)
        self.rows += len(table)
        while self.rows >= ROWS_OF_PART:
            self._write(ROWS_OF_PART)

    def close(self) -> None:
        if self.rows:
            self._write(self.rows)

    def _write(self, rows: int) -> None:
        table = pa.concat_tables(self.waiting)
        parquet.write_table(table.slice(0, rows), self.folder / f"part-{self.parts:05}.parquet")
        self.waiting, self.rows, self.parts = [table.slice(rows)], self.rows - rows, self.parts + 1
