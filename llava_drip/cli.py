"""What every program does with a user's mistake: one line on stderr that names it, and an exit code other than 0."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NoReturn

import yaml
from tqdm import tqdm

if TYPE_CHECKING:
    import torch

# At every start bitsandbytes warns of a CPU kernel that it could not download and does not need.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors (no usage block), and no abbreviated flags: a misspelt flag is never guessed."""

    def __init__(self, **options):
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(**options)

    def parse_given(self) -> tuple[argparse.Namespace, set[str]]:
        """The arguments, and the names of those that the command line gives, with their defaults' values or others."""
        unset = object()
        args = self.parse_args(namespace=argparse.Namespace(**{action.dest: unset for action in self._actions}))
        given = {name for name, value in vars(args).items() if value is not unset}
        for name in set(vars(args)) - given:
            setattr(args, name, self.get_default(name))
        return args, given

    def check_least(self, args: argparse.Namespace, least: dict[str, float]) -> None:
        """Ends with an error for a flag below its least value, or infinite; of one with several values, each. None is none."""
        flags = {action.dest: action.option_strings[0] for action in self._actions if action.option_strings}
        for name, lowest in least.items():
            value = getattr(args, name)
            values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
            if not all(lowest <= number < float("inf") for number in values):
                self.error(f"{flags[name]} {value}: must be at least {lowest}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


@contextlib.contextmanager
def one_line_usage() -> Iterator[None]:
    """Around another library's argparse: of its usage error the last line alone, which names the flag, is printed."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        if end.code == 2 and said.getvalue().strip():
            print(f"{said.getvalue().strip().splitlines()[-1]} (--help lists the flags)", file=sys.stderr)
            said = io.StringIO()
        raise
    finally:
        sys.stderr.write(said.getvalue())


def key_values(items: Iterable[str], flag: str) -> dict:
    """{"a": 1, "b": "x"} of ["a=1", "b=x"]: values are Python literals where they can be, or YAML's true, false and null (yes,
    no, on, off, ~ and nothing too), as recipes have them; else strings.

    Raises:
        ValueError: an item without "=", named with the flag it was given by.
    """
    result = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{flag}: {item!r} is not KEY=VALUE")
        try:
            result[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            result[key] = _switch(value)
    return result


def _switch(value: str) -> bool | None | str:
    """What YAML reads as true, false or null; else the text."""
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    return read if read is None or isinstance(read, bool) else value


def merged(arguments: dict, flags: dict) -> dict:
    """The arguments of --model-kwargs and those that have flags of their own, {argument: the flag's value, None where it was not
    given}.

    Raises:
        ValueError: an argument that is given in both ways.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    for key in given:
        if key in arguments:
            raise ValueError(f"--model-kwargs: {key} has a flag of its own; leave one of them out")
    return {**arguments, **given}


def checked_device(device: str | torch.device | None) -> torch.device:
    """The device, default cuda where there is one, else the CPU. ValueError names one that is not available here."""
    import torch  # late: most of a program's start

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        raise ValueError(f"device {device!s}: not available here ({str(error).splitlines()[0]})") from error
    return device


def one_line(error: BaseException, limit: int = 400) -> str:
    """The error's message without line breaks; for an error in a data-loading worker, its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "in DataLoader worker process" in lines[0]:
        kind, _, cause = lines[-1].partition(": ")
        lines = [cause or kind]
    text = " ".join(lines)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def end_progress_bars() -> None:
    """Ends the line on which a progress bar stands, so that a message begins on one of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def run(main: Callable[[], None], prog: str) -> NoReturn:
    """Runs a program to its exit: 0, or 1 after a user's mistake (ValueError, OSError), or 130 after Ctrl-C.

    LLAVA_DRIP_TRACEBACK=1 shows where a one-line error came from.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("LLAVA_DRIP_TRACEBACK") == "1":
            raise
        end_progress_bars()
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
