"""The one file that reaches into open_clip_train's trainer.

open_clip 3's trainer is one function, `open_clip_train.main.main(argv)`, that builds everything itself and has no
hooks. Rather than copy its 580 lines, this file replaces a few names in its namespace for the time of the call:

    main.parse_args                    hands over arguments already parsed (with a flag of ours) and checked
    main.create_model_and_transforms   open_clip's, then lets a tower with boundaries answer with its rate loss
    main.create_loss                   open_clip's, wrapped in BoundaryLoss for such a tower
    main.train_one_epoch               open_clip_train's, with the compression followed and logged around it
    data.tar_file_expander             webdataset's, without the {} that webdataset > 0.2.86 puts behind each shard and
                                       that open_clip 3.3 cannot read
    zero_shot.accuracy                 see evaluator.py

and two in torch's, where the trainer looks them up:

    nn.parallel.DistributedDataParallel   the trainer passes device_ids, which torch refuses for a model on the CPU
    save                                  through a temporary file: a run killed while it saves leaves no broken
                                          checkpoint for `--resume latest` to pick

A model without boundaries (compression 1, any stock open_clip model) gets the stock model and the stock loss.
open_clip's main branch replaces this trainer by tasks: when that is released, this file is what has to change.
"""

from __future__ import annotations

import json
import logging
import os
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from open_clip_train import data as trainer_data
from open_clip_train import main as trainer
from open_clip_train import zero_shot as trainer_zero_shot
from open_clip_train.distributed import is_master
from open_clip_train.precision import get_autocast
from open_clip_train.train import train_one_epoch, unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from webdataset.tariterators import tar_file_expander

from llava_drip.contrastive.checkpoint import CONFIG_NAME
from llava_drip.contrastive.compression import CompressionMeter, TokenCount
from llava_drip.contrastive.evaluator import accuracy, replaced
from llava_drip.contrastive.loss import BoundaryLoss
from llava_drip.contrastive.model import BoundaryCLIP, has_boundaries, patches_of, tower_of
from llava_drip.towers import Drip


@dataclass
class Progress:
    """What the caller may ask after a run, also after one that failed."""

    loss_calls: int = 0


def run_trainer(args: Namespace, boundary_loss_weight: float, progress: Progress) -> None:
    """open_clip_train.main.main for parsed arguments. It completes `args` in place (name, rank, checkpoint_path, ...).

    Raises:
        ValueError: the trainer refused to start, or an epoch had not one full batch.
    """
    adapter = _Adapter(args, boundary_loss_weight, progress)
    with (
        replaced(
            trainer,
            parse_args=lambda argv: args,
            create_model_and_transforms=adapter.create_model_and_transforms,
            create_loss=adapter.create_loss,
            train_one_epoch=adapter.train_one_epoch,
        ),
        replaced(trainer_zero_shot, accuracy=accuracy),
        replaced(trainer_data, tar_file_expander=_tar_files),
        replaced(torch.nn.parallel, DistributedDataParallel=_DistributedDataParallel),
        replaced(torch, save=_save_whole),
    ):
        if trainer.main([]) == -1:  # it has printed why
            raise ValueError(
                f"open_clip's trainer refused to start the experiment {args.name!r}; the lines above say why"
            )


class _Adapter:
    def __init__(self, args: Namespace, weight: float, progress: Progress):
        self.args, self.weight, self.progress = args, weight, progress
        self.model: nn.Module | None = None  # the student, where there is a teacher

    def create_model_and_transforms(self, name: str, *args, **kwargs):
        model, *transforms = open_clip.create_model_and_transforms(name, *args, **kwargs)
        if self.model is not None:  # a frozen teacher in eval mode
            return model, *transforms
        self.model = model
        if has_boundaries(model):
            BoundaryCLIP.adopt(model)
        elif isinstance(tower_of(model), Drip):
            # At compression 1 the predictor does not run; DistributedDataParallel would wait for its gradients.
            tower_of(model).boundary_predictor.requires_grad_(False)
        if is_master(self.args):
            self._write_config(model)
        return model, *transforms

    def create_loss(self, args: Namespace) -> nn.Module:
        loss = open_clip.create_loss(args)
        if has_boundaries(self.model):
            loss = BoundaryLoss(loss, self.weight)
        elif is_master(args):
            logging.info(f"{args.model} has no boundaries: stock loss, --boundary-loss-weight has no effect")
        loss.register_forward_hook(self._count_loss_call)
        return loss

    def train_one_epoch(self, model, data, loss, epoch, optimizer, scaler, scheduler, dist_model, args, tb_writer=None):
        calls_before = self.progress.loss_calls
        arguments = (model, data, loss, epoch, optimizer, scaler, scheduler, dist_model, args, tb_writer)
        if has_boundaries(self.model):
            self._train_one_epoch_with_boundaries(*arguments)
        else:
            train_one_epoch(*arguments)
        if self.progress.loss_calls == calls_before:
            raise ValueError(
                f"epoch {epoch} had no training step: each worker of each rank needs --batch-size {args.batch_size} "
                f"readable image-text pairs for a batch, and a step takes --accum-freq {args.accum_freq} batches"
            )

    def _train_one_epoch_with_boundaries(
        self, model, data, loss, epoch, optimizer, scaler, scheduler, dist_model, args, tb_writer
    ) -> None:
        tower = tower_of(unwrap_model(getattr(model, "_orig_mod", model)))
        patches, steps = patches_of(tower), data["train"].dataloader.num_batches // args.accum_freq
        last: dict[str, Tensor] = {}

        def log(step: int, text: str, **scalars: float) -> None:
            if not is_master(args):
                return
            logging.info(f"Train Epoch: {epoch} {text}")
            scalars = {f"train/{name}": value for name, value in scalars.items()}
            if tb_writer is not None:
                for name, value in scalars.items():
                    tb_writer.add_scalar(name, value, step)
            if args.wandb:
                trainer.wandb.log({**scalars, "step": step}, step=step)

        def report_window(step: int, window: int, tokens: float) -> None:
            compression = patches / tokens
            text = f"Compression: {compression:.3f} patches per token, {tokens:.2f} tokens per image"
            log(steps * epoch + step, f"{text} (last {window} steps)", compression=compression, tokens_per_image=tokens)

        loss.on_tokens = meter = CompressionMeter(
            args.device, args.accum_freq, args.log_every_n_steps, steps, report_window
        )
        hook = model.register_forward_pre_hook(lambda module, inputs: last.update(images=inputs[0]))
        try:
            train_one_epoch(model, data, loss, epoch, optimizer, scaler, scheduler, dist_model, args, tb_writer)
        finally:
            hook.remove()
            loss.on_tokens = None
        if meter.calls == 0:
            return
        # The same weights in eval, without noise, on the last batch: should say the same.
        trained = patches / meter.epoch.mean()
        in_eval = patches / self._eval_tokens(tower, last["images"])
        text = f"Epoch compression: {trained:.3f} patches per token; in eval mode {in_eval:.3f} (last batch)"
        log(steps * (epoch + 1) - 1, text, compression_epoch=trained, compression_eval=in_eval)

    def _eval_tokens(self, tower: Drip, images: Tensor) -> float:
        """Tokens per image of one batch [B, 3, h, w] with the tower in eval mode, over all ranks."""
        count = TokenCount(images.device)
        tower.eval()
        with torch.no_grad(), get_autocast(self.args.precision, device_type=images.device.type)():
            count.add(tower.forward_features(images).lengths)
        tower.train()
        return count.mean()

    def _count_loss_call(self, module: nn.Module, inputs, output) -> None:
        self.progress.loss_calls += 1

    def _write_config(self, model: nn.Module) -> None:
        """RUN/open_clip_config.json: what it takes to read the run's checkpoints (flags may override the model)."""
        config = open_clip.get_model_config(self.args.model)
        if self.args.force_image_size is not None:
            config["vision_cfg"]["image_size"] = self.args.force_image_size
        if self.args.force_context_length is not None:
            config["text_cfg"]["context_length"] = self.args.force_context_length
        path = Path(self.args.logs, self.args.name, CONFIG_NAME)
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": model.visual.preprocess_cfg}, indent=2))
        os.replace(partial, path)


class _DistributedDataParallel(DistributedDataParallel):
    def __init__(self, module: nn.Module, device_ids=None, **kwargs):
        on_cpu = next(module.parameters()).device.type == "cpu"
        super().__init__(module, device_ids=None if on_cpu else device_ids, **kwargs)


def _tar_files(*args, **kwargs) -> Iterator[dict]:
    return (file for file in tar_file_expander(*args, **kwargs) if file)


_torch_save = torch.save


def _save_whole(obj, f, *args, **kwargs) -> None:
    if not isinstance(f, (str, os.PathLike)):
        return _torch_save(obj, f, *args, **kwargs)
    partial = f"{os.fspath(f)}.partial"  # not *.pt: `--resume latest` must not see it
    _torch_save(obj, partial, *args, **kwargs)
    os.replace(partial, f)
