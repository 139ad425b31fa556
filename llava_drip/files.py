"""Files that appear whole or not at all: written beside their place, then moved there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"  # folder within a result's own: what is written of a new one, before it takes its place


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yields the path of a file to write in the same folder. When that is done it takes the place of `path`; an error removes it.

    Its name begins with a dot and has this process's number, so that processes which share a folder do not meet in it.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def fresh_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields the folder, empty: what a killed run left in it goes. An error removes it."""
    path = Path(path)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a fresh folder beside `path` to fill. When that is done it becomes `path`.

    Raises:
        ValueError: `path` is there already, and no empty folder.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: is there already and no empty folder; remove it, or give another")
    with fresh_folder(path.with_name(f".{path.name}{PARTIAL}")) as partial:
        yield partial
        os.replace(partial, path)


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Writes a text file, UTF-8."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_results(folder: str | os.PathLike, name: str, record: dict, text: str) -> None:
    """What was measured, to read by machine and by eye: folder/name.json and folder/name.md; the folder is made."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{name}.json", json.dumps(record, indent=1))
    write_whole(folder / f"{name}.md", text)


def lock(file: BinaryIO, path: str | os.PathLike) -> None:
    """Takes the lock on a file that was opened at `path`, until it is closed.

    Raises:
        BlockingIOError: another process has it, or has moved or removed the file after it was opened here.
        OSError: the file system knows no locks.
    """
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        same = False
    if not same:
        raise BlockingIOError(f"{path} is another file by now")


def read_object(path: Path) -> dict:
    """A file's JSON object.

    Raises:
        ValueError: naming a file that holds none. OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object, is a {type(content).__name__}")
    return content
