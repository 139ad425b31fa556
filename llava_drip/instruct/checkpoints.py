"""Checkpoints of a run: which one to resume from, whether it is whole, and whether it is of the same run.

Each checkpoint's trainer_state.json, which is written last, also holds a record of the run: what it read and the flags that
make its result. Numbers alone would not tell: an output directory may hold another run's checkpoints.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from enum import Enum
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from llava_drip.instruct.arguments import DataArguments, ModelArguments, StageArguments

_MODEL_FLAGS = ("mm_projector_type", "mm_vision_select_layer", "mm_segment_positions", "version", "compression")
# Every flag of TrainingArguments is recorded but these, which may change when a run is resumed. (So may --image_folder: the
# names of the pictures stand in the data file, and the data may be moved.)
_FREE = {
    *("output_dir", "resume_from_checkpoint", "max_steps", "num_train_epochs"),  # where, and how long
    *("per_device_train_batch_size", "gradient_accumulation_steps"),  # their product is recorded
    *("warmup_ratio", "deepspeed"),  # recorded as --warmup_steps, which wins, and as the ZeRO stage
    # How fast, and on what.
    *("use_cpu", "local_rank", "parallelism_config", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "torch_compile", "torch_compile_backend"),
    *("torch_compile_mode", "torch_empty_cache_steps", "use_cache", "skip_memory_metrics"),
    # What is told and kept of it; nothing is evaluated.
    *("disable_tqdm", "report_to", "run_name", "project", "debug", "include_num_input_tokens_seen", "do_train"),
    *("do_eval", "do_predict", "per_device_eval_batch_size", "prediction_loss_only", "include_for_metrics"),
    *("batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "load_best_model_at_end", "metric_for_best_model"),
    *("greater_is_better", "enable_jit_checkpoint", "push_to_hub"),
    *("ignore_data_skip", "restore_callback_states_from_checkpoint"),  # are about resuming itself
}
_FREE_KINDS = ("logging_", "log_", "eval_", "save_", "hub_", "push_to_hub_", "trackio_", "ddp_", "dataloader_")
_KEPT = ("dataloader_drop_last",)  # though of a free kind
_ZERO = "--deepspeed's ZeRO stage"
_BATCH = "--per_device_train_batch_size x --gradient_accumulation_steps x processes"
_CONTENT = "contents sha256:"
_ALONE = "holds the model alone (--save_only_model true, or its other files were deleted) and cannot be resumed from"


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
    training = [field.name for field in dataclasses.fields(args)]
    training = [n for n in training if n in _KEPT or not (n in _FREE or n.startswith(_FREE_KINDS))]
    for source, names in ((model_args, _MODEL_FLAGS), (data_args, ("model_max_length",)), (args, training)):
        for name in names:
            value = getattr(source, name)
            record[f"--{name}"] = str(value.value if isinstance(value, Enum) else value)
    zero = args.hf_deepspeed_config.get_value("zero_optimization.stage", 0) if args.deepspeed else None
    record[_ZERO] = str(zero)
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
        if flag not in kept:  # an option that the version of transformers which wrote it did not have
            continue
        was = kept[flag]
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
        ValueError: the checkpoint is not whole, holds the model alone, or is of another run; or the output directory holds
            checkpoints that this run would delete (--save_total_limit) or mix with its own.
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
            alone = [path for path in held if holds_model_alone(path)]
            if found is None and alone:
                raise ValueError(f"--resume_from_checkpoint {asked}: {alone[-1]} {_ALONE}; give another --output_dir")
        else:
            found = Path(asked)
            if holds_model_alone(found):
                raise ValueError(f"--resume_from_checkpoint {asked}: {_ALONE}; give another checkpoint")
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
    state = state_of(checkpoint)
    if state is None:
        return "trainer_state.json is missing or cut off"
    states = {path.stem.rpartition("_")[2] for path in checkpoint.glob("rng_state_*.pth")}
    # The other ranks write at their own pace. A run of one process wrote rng_state.pth, and any number may go on from it.
    if states or (ranks > 1 and not (checkpoint / "rng_state.pth").is_file()):
        highest = max((int(rank) for rank in states if rank.isdigit()), default=0)
        for rank in range(max(ranks if ranks > 1 else 0, highest + 1)):
            if str(rank) not in states:
                return f"rng_state_{rank}.pth is missing"
    latest = checkpoint / "latest"  # DeepSpeed's: the directory with the optimizer's state
    if latest.is_file() or _zero_of(state) != "None":
        if not latest.is_file():
            return "DeepSpeed's file latest is missing"
        name = latest.read_text().strip()
        if not name or not (checkpoint / name).is_dir() or not any((checkpoint / name).iterdir()):
            return f"the directory {name!r}, which its file latest names, is missing or empty"
        return None
    for name in ("optimizer.pt", "scheduler.pt"):  # without one of them transformers goes on with a new one of each
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    return None


def state_of(checkpoint: Path) -> dict | None:
    """A checkpoint's trainer_state.json, which rank 0 writes last; None if it is missing or cut off."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and "global_step" in state else None


def _zero_of(state: dict) -> str:
    """The ZeRO stage in a checkpoint's record; "None" without DeepSpeed, or without a record."""
    try:
        return state["stateful_callbacks"][RunRecord.__name__]["args"]["record"][_ZERO]
    except (KeyError, TypeError):
        return "None"


def holds_model_alone(checkpoint: Path) -> bool:
    """Whether it was written whole, but under --save_only_model true: without optimizer, schedule and random state."""
    names = ("optimizer.pt", "scheduler.pt", "latest")
    missing = not any((checkpoint / name).exists() for name in names) and not any(checkpoint.glob("rng_state*.pth"))
    return missing and state_of(checkpoint) is not None


def unseal_later(output_dir: str | Path, resume: str | None) -> None:
    """Remove trainer_state.json from every checkpoint that the run will write anew, so that a kill amid that leaves an
    incomplete checkpoint, not one of old and new files. Rank 0 calls it, after all ranks have chosen.

    resume: the checkpoint that the run goes on from; None: it starts from the beginning.
    """
    step = state_of(Path(resume))["global_step"] if resume else -1
    for path in Path(output_dir).glob("checkpoint-*"):
        number = number_of(path)
        if path.is_dir() and number is not None and number > step:
            (path / "trainer_state.json").unlink(missing_ok=True)
