"""What a run is: the files it read and the flags that make its result, kept in each of its checkpoints.

Numbers alone would not tell: an output directory may hold another run's checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import os
from enum import Enum
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from llava_drip.fingerprint import fingerprint
from llava_drip.instruct.arguments import DataArguments, ModelArguments, StageArguments
from llava_drip.instruct.lora import LORA_FLAGS

_MODEL_FLAGS = (
    "mm_projector_type",
    "mm_vision_select_layer",
    "mm_segment_positions",
    "version",
    "compression",
    "elastic_compression",
    *LORA_FLAGS,
)
# Every flag of TrainingArguments is recorded but these, which may change when a run is resumed. (So may --image_folder: the
# names of the pictures stand in the data file, and the data may be moved.)
_FREE = {
    *("output_dir", "resume_from_checkpoint", "max_steps", "num_train_epochs"),  # where, and how long
    *("per_device_train_batch_size", "gradient_accumulation_steps"),  # their product is recorded
    *("warmup_ratio", "deepspeed"),  # recorded as --warmup_steps, which wins, and as the ZeRO stage
    # How fast, and on what.
    *("use_cpu", "local_rank", "parallelism_config", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "torch_compile", "torch_compile_backend"),
    *("torch_compile_mode", "torch_empty_cache_steps", "use_cache", "skip_memory_metrics", "packing"),
    # What is told and kept of it; nothing is evaluated.
    *(
        "dry_run",
        "disable_tqdm",
        "report_to",
        "run_name",
        "project",
        "debug",
        "include_num_input_tokens_seen",
        "do_train",
    ),
    *("do_eval", "do_predict", "per_device_eval_batch_size", "prediction_loss_only", "include_for_metrics"),
    *("batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "load_best_model_at_end", "metric_for_best_model"),
    *("greater_is_better", "enable_jit_checkpoint", "push_to_hub"),
    *("ignore_data_skip", "restore_callback_states_from_checkpoint"),  # are about resuming itself
    "max_bad_images",  # when to stop, not what is trained
}
_FREE_KINDS = ("logging_", "log_", "eval_", "save_", "hub_", "push_to_hub_", "trackio_", "ddp_", "dataloader_")
_KEPT = ("dataloader_drop_last",)  # though of a free kind
_ZERO = "--deepspeed's ZeRO stage"
_PROCESSES = "processes"  # free, but under ZeRO
_BATCH = "--per_device_train_batch_size x --gradient_accumulation_steps x processes"
_CONTENT = "contents sha256:"


def describe_run(
    stage: str, model_args: ModelArguments, data_args: DataArguments, args: StageArguments
) -> dict[str, str]:
    """What a run is: flag → value, or a fingerprint of what lies there (a file that was only moved stays the same).

    model_args, data_args: with defaults filled in (parts.resolve), so that a default may be spelled out later.
    """
    record = {"stage": stage}
    for name, value in (
        ("model_name_or_path", model_args.model_name_or_path),
        ("vision_tower", model_args.vision_tower),
        ("pretrain_mm_mlp_adapter", model_args.pretrain_mm_mlp_adapter),
        ("data_path", data_args.data_path),
    ):
        there = value is not None and Path(value).expanduser().exists()  # a timm name is none
        record[f"--{name}"] = f"{_CONTENT}{fingerprint(value)}" if there else str(value)
    training = [field.name for field in dataclasses.fields(args)]
    training = [n for n in training if n in _KEPT or not (n in _FREE or n.startswith(_FREE_KINDS))]
    for source, names in ((model_args, _MODEL_FLAGS), (data_args, ("model_max_length",)), (args, training)):
        for name in names:
            value = getattr(source, name)
            record[f"--{name}"] = str(value.value if isinstance(value, Enum) else value)
    zero = args.hf_deepspeed_config.get_value("zero_optimization.stage", 0) if args.deepspeed else None
    processes = int(os.environ.get("WORLD_SIZE", 1))
    record[_ZERO], record[_PROCESSES] = str(zero), str(processes)
    record[_BATCH] = str(args.per_device_train_batch_size * args.gradient_accumulation_steps * processes)
    return record


def fingerprint_of(record: dict[str, str], flag: str) -> str:
    """The fingerprint that a record holds of what a flag names."""
    assert record[flag].startswith(_CONTENT), f"{flag} names no file"
    return record[flag].removeprefix(_CONTENT)


class RunRecord(TrainerCallback, ExportableState):
    """Makes the Trainer keep the record in every checkpoint's trainer_state.json."""

    def __init__(self, record: dict[str, str]):
        self.record = record

    def state(self) -> dict:
        return {"args": {"record": self.record}, "attributes": {}}


def recorded(state: dict) -> dict[str, str]:
    """The record in a trainer_state.json; empty if it has none."""
    try:
        return dict(state["stateful_callbacks"][RunRecord.__name__]["args"]["record"])
    except (KeyError, TypeError, ValueError):
        return {}


def processes_of(state: dict) -> int | None:
    """How many processes wrote a checkpoint; None without a record."""
    number = recorded(state).get(_PROCESSES)
    return None if number is None else int(number)


def under_deepspeed(state: dict) -> bool:
    """Whether a checkpoint was written under DeepSpeed; False without a record."""
    return recorded(state).get(_ZERO, "None") != "None"


def check_same_run(checkpoint: Path, record: dict[str, str]) -> None:
    """ValueError naming the first flag in which the run of a (whole) checkpoint differs."""
    advice = "go on with the flags of that run, or give another --output_dir"
    kept = recorded(json.loads((checkpoint / "trainer_state.json").read_text()))
    if not kept:
        raise ValueError(
            f"{checkpoint}: says nothing of its run (another program or an older version wrote it), so it cannot be "
            "resumed from; give another --output_dir"
        )
    for flag, value in record.items():
        was = kept.get(flag, value)  # absent: an option that the version of transformers which wrote it did not have
        if was == value:
            continue
        if flag == _PROCESSES:
            if kept[_ZERO] != "None":  # it divides the optimizer's state among them
                raise ValueError(
                    f"{checkpoint}: was written by {_processes(was)} under ZeRO-{kept[_ZERO]} and cannot be resumed from by "
                    f"{_processes(value)}: start with --num_gpus {was}"
                )
            continue
        if _CONTENT in was and _CONTENT in value:
            raise ValueError(f"{flag}: what lies there is not what the run of {checkpoint} was given; {advice}")
        given, had = ("absent" if v == "None" else "another" if _CONTENT in v else v for v in (value, was))
        raise ValueError(f"{flag} is {given}, but {had} in the run of {checkpoint}; {advice}")


def _processes(number: str) -> str:
    return "1 process" if number == "1" else f"{number} processes"
