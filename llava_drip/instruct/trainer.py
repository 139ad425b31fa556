"""The HF Trainer with guards: a run that cannot learn stops at its first step instead of burning hours."""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed
from transformers import Trainer, TrainerCallback, TrainingArguments

from llava_drip.assistant.expand import IGNORE_INDEX


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


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    value = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return bool(value)


class FirstStepGuard(TrainerCallback):
    """Watches the first optimizer step: were there labels, and did a gradient reach a trainable parameter?

    Hooks on the parameters see the gradient before DeepSpeed takes it away; they are removed after the step.
    """

    def __init__(self, model: torch.nn.Module):
        self.saw_label = self.saw_gradient = False
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        if not self.trainable:
            raise NothingLearnedError("no parameter is trainable in this run")
        self.hooks = [p.register_hook(self._look) for p in self.trainable]

    def _look(self, gradient: torch.Tensor) -> None:
        if not self.saw_gradient:
            self.saw_gradient = bool(gradient.detach().abs().max() > 0)

    def on_step_end(self, args, state, control, **kwargs):
        if not self.hooks:
            return
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        if not any_rank(self.saw_label, args.device):
            raise NothingLearnedError(
                "every label of step 1 is ignored: no token of these conversations belongs to an answer "
                "(check --version and --model_max_length)"
            )
        if not any_rank(self.saw_gradient, args.device):
            raise NothingLearnedError("no trainable parameter received a gradient in step 1")


class StageTrainer(Trainer):
    """Trainer for both stages."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.guard = FirstStepGuard(self.model)
        self.add_callback(self.guard)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.guard.hooks:
            self.guard.saw_label |= bool((inputs["labels"] != IGNORE_INDEX).any())
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
