"""What every program does with a user's mistake: one line on stderr that names it, and an exit code other than 0."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors (no usage block), and no abbreviated flags: a misspelt flag is never guessed."""

    def __init__(self, **options):
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def run(main: Callable[[], None], prog: str) -> NoReturn:
    """Runs a program to its exit: 0, or 1 after a user's mistake (ValueError, OSError), or 130 after Ctrl-C.

    LLAVA_DRIP_TRACEBACK=1 shows where a one-line error came from.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("LLAVA_DRIP_TRACEBACK") == "1":
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"{prog}: error: {message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
