"""Guards of training: a run that cannot learn stops at its first step, and one that diverges before it changes a weight."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from llava_drip.assistant.expand import IGNORE_INDEX
from llava_drip.instruct.bad_images import BadImages, BadRow
from llava_drip.instruct.ranks import any_rank, on_all_ranks, rank_and_ranks
from llava_drip.instruct.stops import StopSignals

_NAMED = 8  # rows in an error's line; all of them are printed before
# Steps in a row that --fp16's loss scaling may skip. Each halves the scale: 50 bring it from 2^16 to 2^-34, where gradients that
# are finite at all would be.
_SKIPPED = 50


class NothingLearnedError(ValueError):
    """A run that would not learn anything: no label, or no gradient."""


class DivergedError(ValueError):
    """A loss, or a gradient, that is not finite."""


class FirstStepGuard(TrainerCallback):
    """Watches the first optimizer step: did a gradient, a finite one, reach a trainable parameter?

    Hooks on the parameters see the gradient before DeepSpeed takes it away; they are removed after the step.
    """

    def __init__(self, model: torch.nn.Module):
        self.largest: Tensor | None = (
            None  # of all gradients; NaN or infinite if one is. On the device: no waiting for it
        )
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        if not self.trainable:
            raise NothingLearnedError("no parameter is trainable in this run")
        self.hooks = [p.register_hook(self._look) for p in self.trainable]

    def _look(self, gradient: Tensor) -> None:
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
        largest = 0.0 if self.largest is None else float(self.largest)
        not_finite = any_rank(not math.isfinite(largest), args.device)
        if not_finite and not args.fp16:  # fp16's loss scaling begins too high, and skips such steps
            raise NothingLearnedError(
                f"the gradient of step {state.global_step} is not finite (NaN or infinite): check the weights that were given, "
                "and the precision"
            )
        if not any_rank(not_finite or largest > 0, args.device):
            raise NothingLearnedError(f"no trainable parameter received a gradient in step {state.global_step}")


class StepWatch:
    """What all ranks have to agree on in a step before its gradient is applied: that every loss is finite, that the gradient
    before it was, how many pictures could not be read, and whether a signal asks for the run's end.

    Losses stay on the device until the last batch of the step. Then one sum over the ranks decides, and the host waits for
    the device once, whatever the number of batches: after the forward pass, where a DRIP tower has made it wait for the
    number of its tokens anyway. It must come before the last backward, within which DeepSpeed makes its step.
    """

    def __init__(self, bad_images: BadImages, fp16: bool, stops: StopSignals | None = None):
        """fp16: gradients may overflow: such steps are skipped, and the loss scale lowered; but not all of them."""
        self.bad_images, self.stops, self.fp16 = bad_images, stops, fp16
        self.skipped = 0  # steps in a row, until the one before the last
        self.step, self.rows, self.labels, self.bad, self.losses = 0, [], [], [], []
        self.gradient: float | Tensor | None = None  # norm, of the step before
        self.gradient_of = 0, []  # that step, and its rows

    def begin(self, step: int, batches: list[dict], names: list[list[str]], bad: list[BadRow]) -> None:
        """Before a step. step: from 1. batches: this rank's. names: of each batch's rows. bad: rows that others replaced."""
        self.step, self.rows, self.bad, self.losses = step, names, bad, []
        self.labels = [batch["labels"] for batch in batches]

    def end(self, gradient: float | Tensor | None, skipped: bool = False) -> None:
        """After a step. gradient: its norm. skipped: the optimizer left it out, because the gradient overflowed."""
        self.gradient, self.gradient_of = (math.inf if skipped else gradient), (self.step, self.rows)

    def look(self, loss: Tensor) -> None:
        """After each batch's forward pass, before its backward.

        Raises:
            DivergedError, NothingLearnedError, ValueError: on all ranks alike, after the step's last batch.
        """
        self.losses.append(loss.detach().float())
        if len(self.losses) < len(self.rows):
            return
        losses = torch.stack(self.losses)
        on_device = torch.stack([(~losses.isfinite()).sum().float(), self._gradient_fails(losses.device).float()])
        asked = self.stops.votes() if self.stops else ()
        votes = torch.cat([on_device, losses.new_tensor([sum(map(len, self.rows)), len(self.bad), *asked])])
        if rank_and_ranks()[1] > 1:
            dist.all_reduce(votes)
        lost, gradient, rows, bad, *asked = votes.tolist()
        if gradient and not self.fp16:
            self._gradient_failed()
        self.skipped = self.skipped + 1 if gradient else 0
        if self.skipped >= _SKIPPED:
            raise _all_skipped(f"{self.skipped} steps in a row, the last of them step {self.step - 1}")
        if lost:
            self._loss_failed(losses.tolist())
        self.bad_images.count(int(rows), self.bad, int(bad))
        if self.stops:
            self.stops.count(asked)

    def check_gradient(self, device: torch.device) -> None:
        """Before weights are kept. DivergedError on all ranks: the last step's gradient was not finite, so neither are they."""
        if not self.fp16 and any_rank(bool(self._gradient_fails(device)), device):
            self._gradient_failed()

    def check_learned(self, steps: int, device: torch.device) -> None:
        """Before a result is kept. NothingLearnedError on all ranks: no step changed a weight.

        steps: of the whole run, with those that it was resumed after.
        """
        if self.fp16 and 0 < steps <= self.skipped + any_rank(bool(self._gradient_fails(device)), device):
            raise _all_skipped(f"all {steps} steps")

    def _gradient_fails(self, device: torch.device) -> Tensor:
        norm = torch.as_tensor(0.0 if self.gradient is None else self.gradient, device=device)
        return ~norm.isfinite().all()

    def _gradient_failed(self) -> None:
        step, rows = self.gradient_of
        everyone = on_all_ranks([name for names in rows for name in names])
        raise _diverged(f"the gradient of step {step} is not finite, though its loss is", step, everyone)

    def _loss_failed(self, losses: list[float]) -> None:
        labelled = any(bool((labels != IGNORE_INDEX).any()) for labels in self.labels)
        found = [(loss, names) for loss, names in zip(losses, self.rows, strict=True) if not math.isfinite(loss)]
        everyone = on_all_ranks((labelled, found))
        if not any(labelled for labelled, _ in everyone):
            raise NothingLearnedError(
                f"every label of step {self.step} is ignored: no token of these conversations belongs to an answer (check "
                "--version)"
            )
        where = [(rank, *failed) for rank, (_, found) in enumerate(everyone) for failed in found]
        rank, loss, _ = where[0]
        names = [[name for r, _, names in where if r == rank for name in names] for rank in range(len(everyone))]
        on = f" on rank {rank}" if len(everyone) > 1 else ""
        raise _diverged(f"the loss of step {self.step} is {loss}{on}", self.step, names)


def _all_skipped(steps: str) -> NothingLearnedError:
    return NothingLearnedError(
        f"--fp16's loss scaling skipped {steps}: their gradients were not finite, and no weight was changed. Train with --bf16 "
        "true or without either, or check the weights that were given; a run of a few steps may need more to find its scale"
    )


def _diverged(what: str, step: int, names: list[list[str]]) -> DivergedError:
    """names: rows of each rank. Rank 0 prints them all, for an error is one line."""
    if rank_and_ranks()[0] == 0:
        for rank, rows in enumerate(names):
            if rows:
                print(f"step {step}, rank {rank}: {', '.join(rows)}", flush=True)
    rows = [name for rows in names for name in rows]
    more = f" and {len(rows) - _NAMED} more (printed above)" if len(rows) > _NAMED else ""
    return DivergedError(
        f"{what}: {', '.join(rows[:_NAMED])}{more}. Nothing of it is saved. Look at these rows, or go on from the last "
        "checkpoint with other settings, such as a lower --learning_rate"
    )
