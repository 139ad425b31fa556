"""Where a run is: what its checkpoints hold beyond open_clip's, which is the newest, and what may not change on the way.

open_clip saves at the end of epochs. With --save-every-n-steps, checkpoints/step_latest.pt replaces itself as the run goes; it
holds what an epoch's checkpoint holds, and under "llava_drip" where in the epoch it was taken:

    step      optimizer steps so far
    settings  the flags that decide what the run computes
    loader    how far the data had been read, of all ranks (training.loader.TrainLoader.state); None between epochs
    meters    the epoch's running sums
"""

from __future__ import annotations

import json
import os
import re
from argparse import Namespace
from pathlib import Path

import torch

from llava_drip.cli import one_line
from llava_drip.contrastive.pairs import SHUFFLE_BUFFER, kind_of, shards_of
from llava_drip.training.seeds import seed_of
from llava_drip.training.units import is_local, short_name

OURS = "llava_drip"  # the key of the above
STEP_CHECKPOINT, LATEST_EPOCH = "step_latest.pt", "epoch_latest.pt"
PREFIX = "module."  # DistributedDataParallel's

# Arguments on which the weights after a step depend. Not among them: paths, what is logged, saved or evaluated, and how the work
# is divided as long as the order of the data stays.
SETTINGS = (
    *("model", "siglip", "force_image_size", "force_context_length", "force_quick_gelu", "force_custom_text"),
    *("force_patch_dropout", "lock_image", "lock_image_unlocked_groups", "lock_image_freeze_bn_stats", "lock_text"),
    *("lock_text_unlocked_layers", "lock_text_freeze_layer_norm", "use_bn_sync", "precision"),
    *("train_num_samples", "dataset_resampled", "train_data_upsampling_factors", "caption_key"),
    *("csv_img_key", "csv_caption_key", "csv_separator"),
    *("image_mean", "image_std", "image_interpolation", "image_resize_mode", "aug_cfg"),
    *("seed", "accum_freq", "opt", "lr", "beta1", "beta2", "eps", "wd", "momentum", "grad_clip_norm"),
    *("lr_scheduler", "skip_scheduler", "warmup", "epochs", "epochs_cooldown", "lr_cooldown_end", "lr_cooldown_power"),
    *("boundary_loss_weight", "coca_caption_loss_weight", "coca_contrastive_loss_weight"),
    *("distill_model", "distill_pretrained"),
)


def newest(folder: str | Path) -> Path | None:
    """The checkpoint that is furthest along: of epoch_N.pt, epoch_latest.pt and step_latest.pt. None: there is none.

    Raises:
        ValueError: one of the latter two cannot be read.
    """
    folder = Path(folder)
    epochs = [
        (int(match[1]), file)
        for file in folder.glob("epoch_*.pt")
        if (match := re.fullmatch(r"epoch_(\d+)\.pt", file.name))
    ]
    best = max(epochs, default=(-1, None))
    for name in (LATEST_EPOCH, STEP_CHECKPOINT):  # both of these may be left from earlier than an epoch_N.pt
        path = folder / name
        if path.is_file():
            epoch = _epoch(path)
            if epoch >= best[0]:  # of as many epochs: the step's is from later
                best = (epoch, path)
    return best[1]


def _epoch(path: Path) -> int:
    try:
        return int(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["epoch"])
    except Exception as error:
        raise ValueError(
            f"{path}: not a training checkpoint ({one_line(error, 200)}); delete it to go on from another"
        ) from error


def rename(state_dict: dict, parallel: bool) -> dict:
    """A model's state dict with the names it has inside DistributedDataParallel, or outside."""
    bare = {name.removeprefix(PREFIX): value for name, value in state_dict.items()}
    return {PREFIX + name: value for name, value in bare.items()} if parallel else bare


def settings_of(args: Namespace) -> dict:
    """What must be the same when the run goes on, by the name of its flag; as JSON would hold it."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["batch_size"] = args.batch_size * args.world_size  # over all ranks
    if args.dataset_type != "synthetic":
        settings["train_data"] = _identity(args)
        if kind_of(args.train_data, args.dataset_type) == "webdataset":
            settings["workers"] = max(1, args.workers)  # they take turns in giving batches
            settings["data_streams"] = args.data_streams or args.world_size * max(1, args.workers)
            settings["shuffle_buffer"] = args.shuffle_buffer or SHUFFLE_BUFFER
    return json.loads(json.dumps(settings, default=str))


def _identity(args: Namespace) -> str:
    """Of the data: names and sizes of its files, wherever they lie."""
    kind = kind_of(args.train_data, args.dataset_type)
    names = [args.train_data] if kind == "csv" else shards_of(args)[0]
    files = [name.rpartition("#")[0] if ".parquet#" in name else name for name in names]
    sizes = [os.path.getsize(file) if is_local(file) else "remote" for file in files]
    return f"{len(names)} files or row groups, {seed_of(*map(short_name, names), *sizes):016x}"


def check_settings(recorded: dict, args: Namespace, epoch: int) -> None:
    """Raises ValueError, naming the flag, where the run could not go on as it would have without the interruption.

    More (or fewer) --epochs stretch a cosine over other steps, so that the learning rates so far would have been others too. They
    are allowed where the steps so far do not depend on them: a constant rate, or one that has not begun to cool down.

    Args:
        epoch: completed epochs of the checkpoint.
    """
    now = settings_of(args)
    for name, value in now.items():
        if (
            name not in recorded
            or recorded[name] == value
            or (name == "epochs" and _may_end_later(recorded, now, epoch))
        ):
            continue
        was, becomes = recorded[name], value
        if name == "batch_size":
            was, becomes = f"{was} over all ranks", f"{becomes} over all ranks"
        why = "it would not go on as it began. Give what it began with"
        if name == "epochs":
            why = f"the learning rate would have been another from the start ({now['lr_scheduler']}). Give the same number"
        raise ValueError(
            f"--{name.replace('_', '-')}: the run to resume has {was!r}, now {becomes!r}: {why}, or begin a new run "
            "(--pretrained takes over the weights)"
        )


def _may_end_later(recorded: dict, now: dict, epoch: int) -> bool:
    if now["skip_scheduler"] or now["lr_scheduler"] == "const":
        return True
    first_end = min(recorded["epochs"], now["epochs"])
    return now["lr_scheduler"] == "const-cooldown" and epoch + 1 <= first_end - (now["epochs_cooldown"] or 0)
