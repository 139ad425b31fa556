"""Locks that a killed build of one of torch's extensions (DeepSpeed's operators) left behind."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from .checks import NOTE, PROBLEM, Check

_BUILDERS = {"ninja", "c++", "g++", "cc1plus", "clang", "clang++", "ld", "nvcc", "cicc", "ptxas", "hipcc"}
_YOUNG = 60.0  # seconds within which a build may not have started its compilers


def lock_checks(needed: bool) -> Iterator[Check]:
    """Whoever wants the same operator waits for such a lock in silence, for ever. A lock does not say whose it is: it is stale
    where nothing on this machine compiles. needed: somebody wants to train, or it is a note."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torch_extensions")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache).expanduser()
    for lock in sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}):
        with contextlib.suppress(OSError):  # its build has just ended
            if time.time() - lock.stat().st_mtime > _YOUNG and not compiling():
                value = f"{lock}: nothing is being compiled here; a run that needs the operator waits for ever"
                advice = f"rm {shlex.quote(str(lock))} (unless another machine that shares the folder is compiling)"
                yield Check("tools", "stale lock", PROBLEM if needed else NOTE, value, advice)


def compiling() -> bool:
    """Whether a compiler runs on this machine. True where processes cannot be looked at (no /proc)."""
    names = set()
    for file in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it has ended
            names.add(file.read_text().strip())
    return not names or bool(names & _BUILDERS)
