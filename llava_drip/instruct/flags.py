"""transformers' flags that a stage cannot honour, and the range of every number: named before anything is loaded.

A flag that would be ignored is refused, not ignored: whoever asks for an evaluation must not wait for one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, fields
from enum import Enum

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

_EVALUATION = "a stage evaluates nothing; run eval/llava_bench.py on the result"
_HUB = "a stage uploads nothing; when it has ended: hf upload REPOSITORY OUTPUT_DIR"
# Flag (or, with *, the flags that begin so) → why a value other than the default is refused.
_REFUSED = {
    **dict.fromkeys(
        ("do_eval", "do_predict", "eval_*", "per_device_eval_batch_size", "batch_eval_metrics"), _EVALUATION
    ),
    **dict.fromkeys(("prediction_loss_only", "include_for_metrics", "label_names"), _EVALUATION),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval", "jit_mode_eval"), _EVALUATION),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _EVALUATION),
    **dict.fromkeys(("push_to_hub*", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"), _HUB),
    "label_smoothing_factor": "transformers would smooth labels without the visual tokens, at the wrong places; leave it out",
    **dict.fromkeys(("fsdp*", "parallelism_config"), "not supported; several GPUs: --deepspeed, or torchrun"),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "Liger has no kernels for this model; leave it out"),
    "use_cache": "training keeps no cache; leave it out",
    "auto_find_batch_size": "after running out of memory it begins again, but with trained weights; give a batch size that fits",
    "restore_callback_states_from_checkpoint": "what a stage has to restore, it restores; leave it out",
    "length_column_name": "conversations have no columns; leave it out",
}
# Choices that are refused, of flags whose others are not.
_CHOICES = {
    "save_strategy": {"best": _EVALUATION},
    "lr_scheduler_type": {"reduce_lr_on_plateau": _EVALUATION, "greedy": _EVALUATION},
    "train_sampling_strategy": {
        "batch_rebalance": "would read every picture before the first step; random, sequential or group_by_length"
    },
}
_RANGES = (
    (
        "at least 1",
        lambda value: value >= 1,
        ("per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_prefetch_factor", "ddp_timeout"),
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        ("dataloader_num_workers", "save_total_limit", "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps")
        + ("neftune_noise_alpha", "adam_epsilon", "dry_run"),
    ),
    ("above 0", lambda value: value > 0, ("num_train_epochs", "logging_steps", "save_steps")),
    ("at least 1, or -1 to go by --num_train_epochs", lambda value: value >= 1 or value == -1, ("max_steps",)),
    ("at least 0 and below 1", lambda value: 0 <= value < 1, ("adam_beta1", "adam_beta2", "warmup_ratio")),
    ("at least 0 and at most 1", lambda value: 0 <= value <= 1, ("max_bad_images",)),
    ("at least 0 and below 2**32", lambda value: 0 <= value < 2**32, ("seed", "data_seed")),
)


def why_refused(name: str) -> str | None:
    """Why a stage refuses a flag, whatever its value; None if it does not."""
    begin = (pattern for pattern in _REFUSED if pattern.endswith("*") and name.startswith(pattern[:-1]))
    return _REFUSED.get(name) or _REFUSED.get(next(begin, ""))


def refused_flags(arguments: type[TrainingArguments]) -> Iterator[str]:
    """Names of the flags that a stage refuses, of those that this version of transformers has."""
    return (field.name for field in fields(arguments) if why_refused(field.name))


def check_flags(args: TrainingArguments) -> None:
    """ValueError for a flag that would be ignored or would break the run. Before TrainingArguments.__post_init__, which
    changes values, and may refuse one under another flag's name."""
    for field in fields(args):
        value = getattr(args, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        word = value.value if isinstance(value, Enum) else value
        if word != default and (why := why_refused(field.name)):
            raise ValueError(f"--{field.name} {word}: {why}")
        if field.name in _CHOICES and (why := _CHOICES[field.name].get(word)):
            raise ValueError(f"--{field.name} {word}: {why}")
    optimizer = args.optim.value if isinstance(args.optim, Enum) else args.optim
    if args.optim_args and optimizer in ("adamw_torch", "adamw_torch_fused", "adafactor"):
        raise ValueError(
            f"--optim_args {args.optim_args}: --optim {optimizer} takes none; see --adam_beta1 and its like"
        )
    if args.optim_target_modules and not any(kind in optimizer for kind in ("galore", "apollo")):
        raise ValueError(
            f"--optim_target_modules {args.optim_target_modules}: --optim {optimizer} takes none, only GaLore and APOLLO do"
        )
    if "trackio" not in str(args.report_to) and (args.hub_token or args.hub_private_repo):
        flag = "hub_token" if args.hub_token else "hub_private_repo"
        raise ValueError(f"--{flag} is for --report_to trackio; {_HUB}")


def check_numbers(args: TrainingArguments) -> None:
    """ValueError for a number that is out of its range, or no finite number."""
    for text, holds, names in _RANGES:
        for name in names:
            value = getattr(args, name, None)
            strategy = getattr(args, name.replace("_steps", "_strategy"), None) if name.endswith("_steps") else None
            if value is None or strategy == "no":
                continue
            if not (math.isfinite(value) and holds(value)):
                raise ValueError(f"--{name} must be {text}, got {value}")
    if args.dataloader_persistent_workers and args.dataloader_num_workers == 0:
        raise ValueError("--dataloader_persistent_workers true: there are none with --dataloader_num_workers 0")


def check_surroundings(args: TrainingArguments) -> None:
    """ValueError for what only finished TrainingArguments tell: the GPUs, loggers that are not installed, how batches are cut."""
    check_gpus(args)
    known = {*get_available_reporting_integrations(), "azure_ml", "flyte"}  # the two are not always listed
    for name in args.report_to:
        if name not in known:
            raise ValueError(f"--report_to {name}: unknown, or not installed (here: {', '.join(sorted(known))}, none)")
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name, None):
            raise ValueError(f"--accelerator_config {name}: a batch cannot be cut, its pictures are not one a row")


def check_gpus(args: TrainingArguments) -> None:
    """ValueError if one process has several GPUs: transformers would spread the model with nn.DataParallel, which cuts batches
    whose pictures are not one a row."""
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs and one process: start with deepspeed --num_gpus {args.n_gpu} or "
            f"torchrun --nproc_per_node {args.n_gpu}, or set CUDA_VISIBLE_DEVICES=0"
        )
