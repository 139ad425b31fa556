"""The one file that reaches into open_clip_train's trainer (run.py surrounds its epochs).

open_clip 3's trainer is one function, `open_clip_train.main.main(argv)`, that builds everything itself and has no
hooks. Rather than copy its 580 lines, this file replaces a few names in its namespace for the time of the call:

    main.parse_args                    hands over arguments already parsed (with flags of ours) and checked
    main.create_model_and_transforms   open_clip's, then lets a tower with boundaries answer with its rate loss
    main.create_loss                   open_clip's, wrapped in BoundaryLoss for such a tower
    main.get_latest_checkpoint         knows the checkpoints between epochs
    main.pt_load                       open_clip's, for any number of ranks, and keeps what a checkpoint holds of ours
    main.train_one_epoch, evaluate     open_clip_train's, with what run.py does around them
    data.get_dataset_fn                readers of pairs.py
    zero_shot.accuracy                 see evaluator.py

and two in torch's, where the trainer looks them up:

    nn.parallel.DistributedDataParallel   the trainer passes device_ids, which torch refuses for a model on the CPU
    save                                  through a temporary file: a run killed while it saves leaves no broken
                                          checkpoint for `--resume latest` to pick; with the flags that made it, and
                                          after the weights for other programs (export.py)

A model without boundaries (compression 1, any stock open_clip model) gets the stock model and the stock loss.
open_clip's main branch replaces this trainer by tasks: when that is released, this file and run.py are what has to change.
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import open_clip
import torch
from open_clip_train import data as trainer_data
from open_clip_train import main as trainer
from open_clip_train import zero_shot as trainer_zero_shot
from open_clip_train.distributed import is_master
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llava_drip.cli import one_line
from llava_drip.contrastive import pairs
from llava_drip.contrastive.evaluator import accuracy, replaced
from llava_drip.contrastive.export import write_config, write_weights
from llava_drip.contrastive.loss import BoundaryLoss, whole_gradients
from llava_drip.contrastive.model import BoundaryCLIP, has_boundaries, tower_of
from llava_drip.contrastive.resume import OURS, check_settings, newest, rename
from llava_drip.contrastive.run import Run
from llava_drip.contrastive.validation import Evaluation


@dataclass
class Progress:
    """What the caller may ask after a run, also after one that failed."""

    loss_calls: int = 0
    on_loss: Callable[[dict[str, Tensor]], None] | None = None  # called with the losses of each call


def run_trainer(args: Namespace, argv: list[str], progress: Progress) -> None:
    """open_clip_train.main.main for parsed arguments. It completes `args` in place (name, rank, checkpoint_path, ...).

    argv: the command line, for the run's description.
    Raises:
        ValueError: the trainer refused to start, a checkpoint of other settings, or an epoch had not one step.
    """
    adapter = _Adapter(args, argv, progress)
    with (
        replaced(
            trainer,
            parse_args=lambda argv: args,
            create_model_and_transforms=adapter.create_model_and_transforms,
            create_loss=adapter.create_loss,
            get_latest_checkpoint=_latest_checkpoint,
            pt_load=adapter.pt_load,
            train_one_epoch=lambda *inputs, **named: adapter.run.train_one_epoch(*inputs, **named),
            evaluate=lambda *inputs, **named: adapter.run.evaluate(*inputs, **named),
        ),
        replaced(trainer_zero_shot, accuracy=accuracy),
        replaced(trainer_data, get_dataset_fn=pairs.dataset_of),
        replaced(torch.nn.parallel, DistributedDataParallel=_DistributedDataParallel),
        replaced(torch, save=adapter.save),
    ):
        if trainer.main([]) == -1:  # it has printed why
            raise ValueError(
                f"open_clip's trainer refused to start the experiment {args.name!r}; the lines above say why"
            )


class _Adapter:
    def __init__(self, args: Namespace, argv: list[str], progress: Progress):
        self.args, self.argv, self.progress = args, argv, progress
        self.run: Run | None = None
        self.exported = 0  # epochs
        # With --save-most-recent the trainer would look for epoch_latest.pt alone; put back once it has looked.
        self.save_most_recent = args.save_most_recent
        if args.resume == "latest" and args.remote_sync is None:
            args.save_most_recent = False

    def create_model_and_transforms(self, name: str, *inputs, **named):
        try:
            model, *transforms = open_clip.create_model_and_transforms(name, *inputs, **named)
        except (RuntimeError, AssertionError, KeyError) as error:  # open_clip's, for weights of another model
            if self.run is not None or not os.path.isfile(self.args.pretrained):
                raise
            file, text = self.args.pretrained, one_line(error)
            raise ValueError(f"--pretrained: {file} does not fit {name}: {text}") from error
        if self.run is not None:  # a frozen teacher in eval mode
            return model, *transforms
        args = self.args
        args.save_most_recent = self.save_most_recent
        if args.boundary_loss_weight is None:
            args.boundary_loss_weight = getattr(tower_of(model), "rate_loss_weight", 1.0)
        self.run = Run(args, self.argv, model, _save_whole)
        if has_boundaries(model):
            BoundaryCLIP.adopt(model)
        elif hasattr(tower_of(model), "freeze_boundaries"):
            # At compression 1 the predictor does not run; DistributedDataParallel would wait for its gradients.
            tower_of(model).freeze_boundaries()
        if args.zeroshot_data is not None or args.retrieval_data is not None:
            tokenizer = open_clip.get_tokenizer(
                name, context_length=args.force_context_length, cache_dir=args.cache_dir
            )
            self.run.evaluation = Evaluation(args, transforms[1], tokenizer)
        if is_master(args):
            write_config(model, args, self.run.folder)
        return model, *transforms

    def create_loss(self, args: Namespace) -> nn.Module:
        stock = loss = open_clip.create_loss(args)
        if has_boundaries(self.run.model):
            loss = BoundaryLoss(stock, args.boundary_loss_weight)
        elif is_master(args):
            logging.info(f"{args.model} has no boundaries: stock loss, --boundary-loss-weight has no effect")
        if isinstance(stock, open_clip.ClipLoss):
            whole_gradients(loss, stock)
        loss.register_forward_hook(self._keep_losses)
        return loss

    def _keep_losses(self, module: nn.Module, inputs, output) -> None:
        self.progress.loss_calls += 1
        self.run.meters.add_losses(output)
        if self.progress.on_loss is not None:
            self.progress.on_loss(output)

    def pt_load(self, path: str, map_location=None) -> dict:
        checkpoint = _pt_load(path, map_location=map_location)
        parallel = self.args.distributed and not self.args.horovod
        if "epoch" not in checkpoint:
            return rename(checkpoint, parallel)
        checkpoint["state_dict"] = rename(checkpoint["state_dict"], parallel)
        self.run.position = checkpoint.get(OURS, {})
        check_settings(self.run.position.get("settings", {}), self.args, checkpoint["epoch"])
        return checkpoint

    def save(self, checkpoint, path, *inputs, **named) -> None:
        """torch.save, as the trainer calls it for its checkpoints."""
        run = self.run
        if not (isinstance(checkpoint, dict) and "optimizer" in checkpoint and isinstance(path, (str, os.PathLike))):
            return _save_whole(checkpoint, path, *inputs, **named)
        # The weights first: killed after the last epoch's checkpoint, a run would find nothing left to do when it is resumed.
        if checkpoint["epoch"] != self.exported:  # with --save-most-recent an epoch may be saved twice
            write_weights(run.model, run.folder)
            self.exported = checkpoint["epoch"]
        _save_whole(checkpoint | {OURS: run.extra()}, path, *inputs, **named)


class _DistributedDataParallel(DistributedDataParallel):
    def __init__(self, module: nn.Module, device_ids=None, **kwargs):
        on_cpu = next(module.parameters()).device.type == "cpu"
        super().__init__(module, device_ids=None if on_cpu else device_ids, **kwargs)


_torch_save, _pt_load, _stock_latest = torch.save, trainer.pt_load, trainer.get_latest_checkpoint


def _latest_checkpoint(path: str, remote: bool) -> str | None:
    if remote:
        return _stock_latest(path, remote)
    found = newest(path)
    return None if found is None else str(found)


def _save_whole(obj, f, *args, **kwargs) -> None:
    if not isinstance(f, (str, os.PathLike)):
        return _torch_save(obj, f, *args, **kwargs)
    partial = f"{os.fspath(f)}.partial"  # not *.pt: `--resume latest` must not see it
    _torch_save(obj, partial, *args, **kwargs)
    os.replace(partial, f)
