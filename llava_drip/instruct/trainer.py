"""The HF Trainer with guards: a run that cannot learn stops at its first step instead of burning hours."""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from llava_drip.assistant.expand import IGNORE_INDEX
from llava_drip.instruct.cost import EpochCost
from llava_drip.instruct.elastic import ElasticBudget
from llava_drip.instruct.lora import split_projector
from llava_drip.instruct.sampler import SeededLengthGroupedSampler, rough_lengths
from llava_drip.instruct.standing import Standing
from llava_drip.instruct.throughput import Throughput


class NothingLearnedError(ValueError):
    """A run that would not learn anything: no label, or no gradient."""


def join_ranks(args: TrainingArguments) -> None:
    """Start the process group of a distributed run, also DeepSpeed's, which transformers leaves out on CPU ranks."""
    launched = {"RANK", "OMPI_COMM_WORLD_RANK"} & set(os.environ)
    if args.deepspeed and not launched:  # plain python: what a launcher does, for one rank
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = args.device
    if args.deepspeed and device.type == "cpu":
        import deepspeed

        deepspeed.init_distributed(dist_backend=args.ddp_backend or "gloo", verbose=False)


def leave_ranks() -> None:
    """End the process group of a run that succeeded.

    A gloo worker thread that drops its last tensors while Python exits aborts the process ("terminate called without an
    active exception"), and a launcher then reports a run that failed. Not for a run that did fail: its other ranks may be
    within a collective, and to wait for them is to hang.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    comm = sys.modules.get("deepspeed.comm")
    (comm if comm is not None and comm.is_initialized() else torch.distributed).destroy_process_group()
    time.sleep(0.2)  # under ZeRO-3 hooks keep the group's threads alive: time for them to let go


def rank_and_ranks() -> tuple[int, int]:
    """This process's rank and how many there are."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank. No rank returns before all have called."""
    if rank_and_ranks()[1] == 1:
        return flag
    value = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return bool(value)


def on_all_ranks(value: object) -> list:
    """What each rank passed, in the order of ranks."""
    if rank_and_ranks()[1] == 1:
        return [value]
    values = [None] * rank_and_ranks()[1]
    torch.distributed.all_gather_object(values, value)
    return values


class FirstStepGuard(TrainerCallback):
    """Watches the first optimizer step: were there labels, and did a gradient, a finite one, reach a trainable parameter?

    Hooks on the parameters see the gradient before DeepSpeed takes it away; they are removed after the step.
    """

    def __init__(self, model: torch.nn.Module):
        self.saw_label = False
        self.largest: torch.Tensor | None = (
            None  # of all gradients; NaN or infinite if one is. On the device: no waiting for it
        )
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        if not self.trainable:
            raise NothingLearnedError("no parameter is trainable in this run")
        self.hooks = [p.register_hook(self._look) for p in self.trainable]

    def _look(self, gradient: torch.Tensor) -> None:
        largest = gradient.detach().abs().max().float()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest.to(self.largest.device))

    def on_train_end(self, args, state, control, **kwargs):
        if state.global_step == 0:  # the same on all ranks
            raise NothingLearnedError(
                "no step was made: --dataloader_drop_last true leaves none of so few rows; give more, or a smaller batch"
            )

    def on_step_end(self, args, state, control, **kwargs):
        if not self.hooks:
            return
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        if not any_rank(self.saw_label, args.device):
            raise NothingLearnedError(
                "every label of step 1 is ignored: no token of these conversations belongs to an answer (check --version)"
            )
        largest = 0.0 if self.largest is None else float(self.largest)
        not_finite = any_rank(not math.isfinite(largest), args.device)
        if not_finite and not args.fp16:  # fp16's loss scaling begins too high, and skips such steps
            raise NothingLearnedError(
                "the gradient of step 1 is not finite (NaN or infinite): check the weights that were given, and the precision"
            )
        if not any_rank(not_finite or largest > 0, args.device):
            raise NothingLearnedError("no trainable parameter received a gradient in step 1")


@contextmanager
def naming_flags(flag: str, value: str, more: str, options: str | dict | None) -> Iterator[None]:
    """What a library says of an option that it lacks or was not given, as a ValueError that names the flags."""
    try:
        yield
    except (ImportError, TypeError, ValueError) as error:
        given = f"{flag} {value}" + (f" {more} {options}" if options else "")
        raise ValueError(f"{given}: {error}") from error


class StageTrainer(Trainer):
    """Trainer for both stages."""

    def __init__(
        self,
        *args,
        elastic: ElasticBudget | None = None,
        standing: Standing | None = None,
        projector_lr: float | None = None,
        **kwargs,
    ):
        """
        Args:
            elastic: draws the budgets of the pictures of each batch; None: the model's own.
            standing: saves what is trained alone, and the base it stands on; None: the whole assistant is saved.
            projector_lr: learning rate of the projector; None: --learning_rate.
        """
        super().__init__(*args, **kwargs)
        self.elastic, self.standing, self.projector_lr = elastic, standing, projector_lr
        self.guard, cost = FirstStepGuard(self.model), EpochCost()
        cost.log = self.log
        self.throughput = Throughput(self.model.language_model, cost)
        self.add_callback(self.guard)
        self.add_callback(cost)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return SeededLengthGroupedSampler(rows, rough_lengths(self.train_dataset), seed)

    def create_optimizer(self, *args, **kwargs):
        with naming_flags("--optim", self.args.optim.value, "--optim_args", self.args.optim_args):
            optimizer = super().create_optimizer(*args, **kwargs)
        if self.projector_lr is not None:
            split_projector(optimizer, self.model, self.projector_lr)
        return optimizer

    def create_scheduler(self, *args, **kwargs):
        kind, own = self.args.lr_scheduler_type.value, self.args.lr_scheduler_kwargs
        with naming_flags("--lr_scheduler_type", kind, "--lr_scheduler_kwargs", own):
            return super().create_scheduler(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Every checkpoint, and the result."""
        if self.standing is None:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            super()._save(output_dir, self.standing.trained(self.model, state_dict))
            self.standing.write(Path(output_dir or self.args.output_dir))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # all ranks come here
            logs |= self.throughput.rates(self.args.device)
        super().log(logs, start_time)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.guard.hooks:
            self.guard.saw_label |= bool((inputs["labels"] != IGNORE_INDEX).any())
        if self.elastic is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.elastic.begin(self.state.global_step, self.args.process_index, len(inputs.get("pixel_values", ())))
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.elastic.end()
