"""Files that a run appends to as it goes, and goes on with after it was stopped: one run at a time, whole lines only."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llava_drip.files import lock


@contextlib.contextmanager
def locked(path: Path, program: str, flag: str = "--output") -> Iterator[BinaryIO]:
    """A file, opened to append, with nobody else at it. Nothing is left of one in which nothing was written.

    program: who warns. flag: what chooses another file.
    ValueError: another process writes to it. Where the file system knows no locks, a warning, and no lock.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            lock(file, path)  # not of a file that another removed, as below, after it was opened here
        except BlockingIOError as error:
            raise ValueError(f"{path}: another process writes to it; wait, or choose another {flag}") from error
        except OSError as error:
            warning = f"{path}: cannot be locked ({error.strerror}); let no second program write to it"
            print(f"{program}: warning: {warning}", file=sys.stderr)
        try:
            yield file
        finally:
            if not os.fstat(file.fileno()).st_size:
                with contextlib.suppress(OSError):
                    path.unlink()
                    for folder in made:
                        folder.rmdir()


def torn_tail(path: Path, opening: bytes, what: str, flag: str = "--output") -> bytes:
    """The end of a last line that a killed run did not finish, b"" where the last line is whole.

    opening: how each line begins. what: "an answer", say. flag: what chooses another file.
    ValueError: the tail begins otherwise: the file is none of ours, and nothing of it may be cut off.
    """
    data = path.read_bytes()
    torn = data[data.rfind(b"\n") + 1 :]
    if not torn.startswith(opening[: len(torn)]):
        raise ValueError(f"{path}: its last line is not {what}'s beginning; choose another {flag}")
    return torn


def cut(path: Path, torn: bytes) -> None:
    """Takes the torn tail off."""
    if torn:
        os.truncate(path, path.stat().st_size - len(torn))
