"""Checkpoints of a run: which one to resume from, whether it is whole, and what resuming does to the others.

Whole is what has trainer_state.json, which rank 0 writes last, with a record of the run, and every file that the run's
processes write.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import TrainerCallback

from llava_drip.instruct.arguments import StageArguments
from llava_drip.instruct.record import processes_of, under_deepspeed

_ALONE = "holds the model alone (--save_only_model true, or its other files were deleted) and cannot be resumed from"


def asks_to_resume(args: StageArguments) -> bool:
    return str(args.resume_from_checkpoint).lower() not in ("none", "false")


def number_of(checkpoint: Path) -> int | None:
    """24 of checkpoint-24; None of a name that the Trainer does not give."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isascii() and number.isdigit() else None


def find_resume(args: StageArguments) -> str | None:
    """The checkpoint to resume from: a path, or the newest complete one for "latest" (or "True").

    Raises:
        ValueError: the checkpoint is not whole, or holds the model alone; or the output directory holds checkpoints that
            this run would delete (--save_total_limit), mix with its own, or write over from the beginning.
    """
    asked = args.resume_from_checkpoint
    held = sorted(path for path in Path(args.output_dir).glob("checkpoint-*") if path.is_dir())
    if not asks_to_resume(args):
        if held:
            raise ValueError(
                f"--output_dir {args.output_dir}: holds {held[0].name} of an earlier run; add --resume_from_checkpoint "
                "latest to go on with that run, or give another --output_dir"
            )
        return None
    for path in held:
        if number_of(path) is None and args.save_total_limit:
            raise ValueError(
                f"{path}: --save_total_limit {args.save_total_limit} would delete it with the older checkpoints; "
                "give it a name that does not begin with checkpoint-"
            )
    if str(asked).lower() in ("latest", "true"):
        found = newest_complete(args.output_dir, str(asked))
    else:
        found = Path(asked)
        if lack := lack_of(found):
            what = _ALONE if holds_model_alone(found) else f"not a complete checkpoint, {lack}"
            raise ValueError(f"--resume_from_checkpoint {asked}: {what}; give another checkpoint")
        if held and found.resolve().parent != Path(args.output_dir).resolve():
            raise ValueError(
                f"--output_dir {args.output_dir}: holds {held[0].name}, and --resume_from_checkpoint {asked} lies "
                "elsewhere; give another --output_dir"
            )
    return None if found is None else str(found)


def newest_complete(output_dir: str | Path, asked: str = "latest") -> Path | None:
    """The newest whole checkpoint in an output directory; None if a kill left none, and the run may begin anew.

    Raises:
        ValueError: none is whole, and one of them is not what a kill leaves: it was written to the end, and lost files since.
            To begin anew would write over it.
    """
    paths = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and number_of(path) is not None]
    paths.sort(key=number_of, reverse=True)
    for path in paths:
        if lack_of(path) is None:
            return path
    for path in paths:
        if state_of(path) is not None:
            what = _ALONE if holds_model_alone(path) else f"cannot be resumed from, {lack_of(path)}"
            raise ValueError(
                f"--resume_from_checkpoint {asked}: {path} {what}; delete the checkpoints in {output_dir} to train from the "
                "beginning, or give another --output_dir"
            )
    return None


def lack_of(checkpoint: Path) -> str | None:
    """What a checkpoint lacks of what its run wrote, or None if it is complete."""
    state = state_of(checkpoint)
    if state is None:
        return "trainer_state.json is missing or cut off"
    # Of as many processes as wrote it: the other ranks write at their own pace. More may go on from it, or fewer: what
    # transformers does not find, it does without.
    written = processes_of(state) or 0
    names = ["rng_state.pth"] if written == 1 else [f"rng_state_{rank}.pth" for rank in range(written)]
    latest = checkpoint / "latest"  # DeepSpeed's: the directory with the optimizer's state
    if latest.is_file() or under_deepspeed(state):
        if not latest.is_file():
            return "DeepSpeed's file latest is missing"
        name = latest.read_text().strip()
        if not name or not (checkpoint / name).is_dir() or not any((checkpoint / name).iterdir()):
            return f"the directory {name!r}, which its file latest names, is missing or empty"
    else:
        names += ["optimizer.pt", "scheduler.pt"]  # without one of them transformers goes on with a new one of each
    missing = [name for name in names if not (checkpoint / name).is_file()]
    return f"{missing[0]} is missing" if missing else None


def state_of(checkpoint: Path) -> dict | None:
    """A checkpoint's trainer_state.json; None if it is missing or cut off."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and "global_step" in state else None


def holds_model_alone(checkpoint: Path) -> bool:
    """Whether it was written whole, but under --save_only_model true: without optimizer, schedule and random state."""
    names = ("optimizer.pt", "scheduler.pt", "latest")
    missing = not any((checkpoint / name).exists() for name in names) and not any(checkpoint.glob("rng_state*.pth"))
    return missing and state_of(checkpoint) is not None


class NothingLeft(Exception):
    """The checkpoint that a run resumes from is its end. The Trainer holds its weights."""


class Resuming(TrainerCallback):
    """Before the first step, when the Trainer has loaded the checkpoint and knows where the run ends: it would train a step
    also beyond the end.

    resume: the checkpoint that the run goes on from; None: it starts from the beginning.
    Raises:
        NothingLeft: the checkpoint is the end of the run.
        ValueError: it lies beyond it; or newer ones are whole, which the run would write over.
    """

    def __init__(self, resume: str | None):
        self.resume = resume

    def on_train_begin(self, args, state, control, **kwargs):
        if self.resume and state.global_step == state.max_steps:
            raise NothingLeft
        if self.resume and state.global_step > state.max_steps:
            steps = args.max_steps > 0
            flag = f"--max_steps {args.max_steps}" if steps else f"--num_train_epochs {args.num_train_epochs:g}"
            raise ValueError(
                f"{flag}: this run ends at step {state.max_steps}, and {self.resume} is of step {state.global_step} already; "
                "give more, or an earlier checkpoint"
            )
        later = later_than(args.output_dir, state.global_step, besides=self.resume)
        newer = [path for path in later if lack_of(path) is None]
        if self.resume and newer:
            names = " and ".join(path.name for path in newer)
            raise ValueError(
                f"--resume_from_checkpoint {self.resume}: {names}, which the run would write over, can be resumed from as well; "
                "delete or move what is newer, or give latest"
            )
        if state.is_world_process_zero:
            unseal_later(args.output_dir, self.resume)


def later_than(output_dir: str | Path, step: int, besides: str | None) -> list[Path]:
    """Checkpoints whose names say a later step, in their order; those with a name of the user's are none.

    besides: one that does not count, though its name may say so.
    """
    paths = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and number_of(path) is not None]
    paths = [path for path in paths if number_of(path) > step and not (besides and path.samefile(besides))]
    return sorted(paths, key=number_of)


def unseal_later(output_dir: str | Path, resume: str | None) -> None:
    """Remove trainer_state.json from every checkpoint that the run may write anew, so that a kill amid that leaves an
    incomplete checkpoint, not one of old and new files. Rank 0 calls it, after all ranks have chosen. None of them is whole.

    resume: the checkpoint that the run goes on from; None: it starts from the beginning.
    """
    for path in later_than(output_dir, state_of(Path(resume))["global_step"] if resume else -1, besides=resume):
        (path / "trainer_state.json").unlink(missing_ok=True)
