"""Checkpoints of a run: which one to resume from, whether it is whole, and whether it is of the same run.

Each checkpoint's trainer_state.json, which is written last, also holds a record of the run: what it read and the flags that
make its result. Numbers alone would not tell: an output directory may hold another run's checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
from enum import Enum
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from llava_drip.instruct.arguments import DataArguments, ModelArguments, StageArguments

# How long a run goes (--max_steps, --num_train_epochs), where and how fast (devices, workers) may change when it is resumed.
_MODEL_FLAGS = ("mm_projector_type", "mm_vision_select_layer", "mm_segment_positions", "version", "compression")
_TRAINING_FLAGS = (
    *("learning_rate", "lr_scheduler_type", "weight_decay", "optim", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "seed", "data_seed", "bf16", "fp16"),
)
_BATCH = "--per_device_train_batch_size x --gradient_accumulation_steps x processes"
_CONTENT = "contents sha256:"


def digest(path: str | Path) -> str:
    """SHA-256 (16 hex digits) of a file, or of a model directory's weights, configuration and tokenizer.

    Of a file above 64 MiB only its size and 64 pieces of 64 KiB, from its beginning to its end.
    """
    path, whole, piece = Path(path).expanduser(), 1 << 26, 1 << 16
    files = [path]
    if path.is_dir():
        kinds = (".safetensors", ".json", ".jinja", ".model")
        files = [file for file in sorted(path.iterdir()) if file.suffix in kinds and file.name != "trainer_state.json"]
    sha = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        sha.update(f"{file.name if path.is_dir() else ''} {size}".encode())
        with file.open("rb") as data:
            if size <= whole:
                sha.update(data.read())
                continue
            for i in range(64):
                data.seek((size - piece) * i // 63)
                sha.update(data.read(piece))
    return sha.hexdigest()[:16]


def describe_run(
    stage: str, model_args: ModelArguments, data_args: DataArguments, args: StageArguments
) -> dict[str, str]:
    """What a run is: flag → value, or a digest of what lies there (a file that was only moved stays the same)."""
    record = {"stage": stage}
    for name, value in (
        ("model_name_or_path", model_args.model_name_or_path),
        ("vision_tower", model_args.vision_tower),
        ("pretrain_mm_mlp_adapter", model_args.pretrain_mm_mlp_adapter),
        ("data_path", data_args.data_path),
    ):
        there = value is not None and Path(value).expanduser().exists()  # a timm name is none
        record[f"--{name}"] = f"{_CONTENT}{digest(value)}" if there else str(value)
    for source, names in ((model_args, _MODEL_FLAGS), (data_args, ("model_max_length",)), (args, _TRAINING_FLAGS)):
        for name in names:
            value = getattr(source, name)
            record[f"--{name}"] = str(value.value if isinstance(value, Enum) else value)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    record[_BATCH] = str(args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks)
    return record


class RunRecord(TrainerCallback, ExportableState):
    """Makes the Trainer keep the record in every checkpoint's trainer_state.json."""

    def __init__(self, record: dict[str, str]):
        self.record = record

    def state(self) -> dict:
        return {"args": {"record": self.record}, "attributes": {}}


def check_same_run(checkpoint: Path, record: dict[str, str]) -> None:
    """ValueError naming the first flag in which the run of a (whole) checkpoint differs."""
    advice = "go on with the flags of that run, or give another --output_dir"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    try:
        kept = state["stateful_callbacks"][RunRecord.__name__]["args"]["record"]
    except (KeyError, TypeError):
        raise ValueError(
            f"{checkpoint}: says nothing of its run (another program or an older version wrote it), so it cannot be "
            "resumed from; give another --output_dir"
        ) from None
    for flag, value in record.items():
        was = kept.get(flag, "None")
        if was != value and _CONTENT in was and _CONTENT in value:
            raise ValueError(f"{flag}: what lies there is not what the run of {checkpoint} was given; {advice}")
        if was != value:
            given, had = ("absent" if v == "None" else "another" if _CONTENT in v else v for v in (value, was))
            raise ValueError(f"{flag} is {given}, but {had} in the run of {checkpoint}; {advice}")


def asks_to_resume(args: StageArguments) -> bool:
    return str(args.resume_from_checkpoint).lower() not in ("none", "false")


def number_of(checkpoint: Path) -> int | None:
    """24 of checkpoint-24; None of a name that the Trainer does not give."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isascii() and number.isdigit() else None


def find_resume(args: StageArguments, record: dict[str, str]) -> str | None:
    """The checkpoint to resume from: a path, or the newest complete one for "latest" (or "True").

    record: of this run (describe_run).
    Raises:
        ValueError: the checkpoint is not whole, or of another run; or the output directory holds checkpoints that this run
            would delete (--save_total_limit) or mix with its own.
    """
    asked, ranks = args.resume_from_checkpoint, int(os.environ.get("WORLD_SIZE", 1))
    held = sorted(path for path in Path(args.output_dir).glob("checkpoint-*") if path.is_dir())
    found = None
    if asks_to_resume(args):
        for path in held:
            if number_of(path) is None and args.save_total_limit:
                raise ValueError(
                    f"{path}: --save_total_limit {args.save_total_limit} would delete it with the older checkpoints; "
                    "give it a name that does not begin with checkpoint-"
                )
        if str(asked).lower() in ("latest", "true"):
            complete = [path for path in held if number_of(path) is not None and not lack_of(path, ranks)]
            found = max(complete, key=number_of, default=None)
        else:
            found = Path(asked)
            if lack := lack_of(found, ranks):
                raise ValueError(f"--resume_from_checkpoint {asked}: not a complete checkpoint, {lack}")
            if held and found.resolve().parent != Path(args.output_dir).resolve():
                raise ValueError(
                    f"--output_dir {args.output_dir}: holds {held[0].name}, and --resume_from_checkpoint {asked} lies "
                    "elsewhere; give another --output_dir"
                )
    elif held:
        raise ValueError(
            f"--output_dir {args.output_dir}: holds {held[0].name} of an earlier run; add --resume_from_checkpoint "
            "latest to go on with that run, or give another --output_dir"
        )
    if found is None:
        return None
    check_same_run(found, record)
    return str(found)


def lack_of(checkpoint: Path, ranks: int = 1) -> str | None:
    """What a kill left out of a checkpoint, or None if it is complete. ranks: processes of the run that resumes."""
    try:  # rank 0 writes it last
        whole = "global_step" in json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        whole = False
    if not whole:
        return "trainer_state.json is missing or cut off"
    states = {path.stem.rpartition("_")[2] for path in checkpoint.glob("rng_state_*.pth")}
    # The other ranks write at their own pace. A run of one process wrote rng_state.pth, and any number may go on from it.
    if states or (ranks > 1 and not (checkpoint / "rng_state.pth").is_file()):
        highest = max((int(rank) for rank in states if rank.isdigit()), default=0)
        for rank in range(max(ranks if ranks > 1 else 0, highest + 1)):
            if str(rank) not in states:
                return f"rng_state_{rank}.pth is missing"
    latest = checkpoint / "latest"  # DeepSpeed's: the directory with the optimizer's state
    if latest.is_file():
        name = latest.read_text().strip()
        if not name or not (checkpoint / name).is_dir() or not any((checkpoint / name).iterdir()):
            return f"the directory {name!r}, which its file latest names, is missing or empty"
    return None
