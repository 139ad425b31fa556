"""train(argv): CLIP training of a DRIP tower (or any open_clip model) by open_clip's own trainer."""

from __future__ import annotations

import logging
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from llava_drip.cli import one_line
from llava_drip.contrastive import register

if TYPE_CHECKING:
    from llava_drip.contrastive.adapter import Progress


class TrainingError(ValueError):
    """What the user can mend, in one line that names it."""


def train(argv: list[str]) -> Path:
    """Train as `scripts/train_clip.py ARGV` does.

    Args:
        argv: open_clip's training flags (https://github.com/mlfoundations/open_clip) and those of arguments.py; a recipe
            (*.yaml, training/recipe.py) may stand first.
    Returns:
        The run's folder, --logs/--name:
            out.log, params.txt                                   open_clip's
            run.json, epochs.jsonl, steps.jsonl                   what it was, and its figures by epoch and step
            checkpoints/epoch_*.pt, step_latest.pt                to go on from
            open_clip_config.json, open_clip_model.safetensors    open_clip.create_model_and_transforms("local-dir:RUN")
            tower/                                                the image tower in timm's format, where it is one of ours
    Raises:
        TrainingError: wrong arguments or unreadable data. A run that fails before its first step leaves no folder.
        SystemExit: an unknown flag (argparse).
    """
    from llava_drip.contrastive import arguments
    from llava_drip.contrastive.adapter import Progress, run_trainer

    register()
    try:
        args = arguments.parse(argv)
        arguments.check(args)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    existed = args.name is not None and Path(args.logs, args.name).exists()
    had_group = dist.is_available() and dist.is_initialized()
    progress = Progress()
    try:
        with logging_restored(), mistakes_named(args, progress):
            run_trainer(args, argv, progress)
    except Exception:
        begun = progress.loss_calls > 0
        if not begun and not existed and args.name is not None and getattr(args, "rank", 0) == 0:
            shutil.rmtree(Path(args.logs, args.name), ignore_errors=True)
        raise
    finally:
        if not had_group and dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    return Path(args.logs, args.name)


@contextmanager
def mistakes_named(args: Namespace, progress: Progress) -> Iterator[None]:
    """Around a run: TrainingError for what the user can mend.

    Before the first step the trainer refuses with whatever comes; later only files are the user's to mend.
    """
    try:
        yield
    except Exception as error:
        refused = progress.loss_calls == 0 and isinstance(error, (ValueError, RuntimeError, AssertionError))
        if refused or isinstance(error, OSError):
            raise TrainingError(_explain(error, args)) from error
        raise


def _explain(error: Exception, args: Namespace) -> str:
    """One line, with the file it is about where the trainer does not say."""
    text = one_line(error)
    if args.resume and ("state_dict" in text or "state dict" in text):
        text = f"--resume: {args.resume} does not fit {args.model}: {text}"
    return text


@contextmanager
def logging_restored() -> Iterator[None]:
    """The trainer adds handlers to the root logger and sets every logger's level; give the caller's back."""
    root = logging.root
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in list(root.manager.loggerDict)}
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)
