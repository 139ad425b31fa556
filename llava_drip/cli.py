"""What every program does with a user's mistake: one line on stderr that names it, and an exit code other than 0."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from tqdm import tqdm

# At every start bitsandbytes warns of a CPU kernel that it could not download and does not need.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors (no usage block), and no abbreviated flags: a misspelt flag is never guessed."""

    def __init__(self, **options):
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def one_line(error: BaseException, limit: int = 400) -> str:
    """The error's message without line breaks; for an error in a data-loading worker, its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "in DataLoader worker process" in lines[0]:
        kind, _, cause = lines[-1].partition(": ")
        lines = [cause or kind]
    text = " ".join(lines)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def run(main: Callable[[], None], prog: str) -> NoReturn:
    """Runs a program to its exit: 0, or 1 after a user's mistake (ValueError, OSError), or 130 after Ctrl-C.

    LLAVA_DRIP_TRACEBACK=1 shows where a one-line error came from.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("LLAVA_DRIP_TRACEBACK") == "1":
            raise
        for bar in list(getattr(tqdm, "_instances", ())):  # ends the line on which a progress bar stands
            bar.close()
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
