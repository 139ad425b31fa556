"""Steps of both stages as training makes them: the Trainer of instruct/trainer.py, its loss, optimizer, clipping and precision.

One run of it goes through all cases, whose steps take turns: what differs between cases is the batch, its arrangement and the
tower's budget. So whatever else a machine does hits all alike, and weights and moments are there once.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

from llava_drip.assistant.modeling import LlavaDripForConditionalGeneration
from llava_drip.cli import one_line
from llava_drip.instruct.arguments import StageArguments
from llava_drip.instruct.data import Collator
from llava_drip.instruct.freeze import freeze_for
from llava_drip.instruct.rows import NamingCollator, ReadableRows
from llava_drip.instruct.stage import set_dtypes
from llava_drip.instruct.stage_cost.clock import StepClock
from llava_drip.instruct.stage_cost.parts import Budgets, NoiseRows
from llava_drip.instruct.stage_cost.plan import Case, Plan, Step
from llava_drip.instruct.trainer import StageTrainer
from llava_drip.instruct.watch import FirstStepGuard
from llava_drip.measure.speed import FAILURES
from llava_drip.training.meters import peak_memory_gib


@dataclass(frozen=True)
class Made:
    """A step that was made.

    Attributes:
        seconds: of forward, backward, clipping and optimizer; the batch lay ready. parts: of clock.PARTS.
        positions: of the language model, visual tokens among them, without padding; slots: with it.
        visual: visual tokens; images: of how many. peak_gib: see training.meters.peak_memory_gib.
    """

    step: Step
    seconds: float
    parts: dict[str, float]
    positions: int
    slots: int
    visual: int
    images: int
    peak_gib: float


def stage_arguments(plan: Plan, output_dir: str) -> StageArguments:
    """As scripts/pretrain_projector.py and finetune.py have them, but that nothing is logged or saved, and that the learning
    rate is 0. ValueError: a flag's."""
    own = {} if plan.optim is None else {"optim": plan.optim}
    if plan.gradient_checkpointing:
        own |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return StageArguments(
        output_dir=output_dir,
        use_cpu=plan.device == "cpu",
        bf16=plan.dtype == "bfloat16",
        per_device_train_batch_size=plan.batch_size,
        learning_rate=0.0,
        num_train_epochs=1,
        dataloader_num_workers=0,
        dataloader_pin_memory=plan.device != "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=plan.seed,
        **own,
    )


def make_steps(
    plan: Plan,
    model: LlavaDripForConditionalGeneration,
    steps: Sequence[Step],
    errors: dict[Case, str],
    progress: bool = True,
) -> list[Made]:
    """Make the steps, in one run of the Trainer.

    errors: takes in what a case failed with (out of memory, say); its other steps are left out then, and other cases go on.
    """
    if not steps:
        return []
    with tempfile.TemporaryDirectory() as output_dir:
        args = stage_arguments(plan, output_dir)
        freeze_for(plan.stage, model)
        set_dtypes(model, args)
        rows = NoiseRows(plan.samples, model, [i for step in steps for i in step.samples])
        with tqdm(
            total=len(steps), desc=plan.stage, unit=" steps", leave=False, disable=None if progress else True
        ) as bar:
            turns = Turns(plan, model, steps, errors, bar)
            trainer = TurnsTrainer(
                model=model,
                args=args,
                train_dataset=ReadableRows(rows),
                data_collator=NamingCollator(Collator(pad_token_id=0)),
                callbacks=[turns],
            )
            trainer.remove_callback(PrinterCallback)  # what there is to say, tables say
            turns.counted = trainer.throughput
            trainer.turns = turns
            try:
                trainer.train()
            except RuntimeError as error:  # outside of a case's own pass: the optimizer's moments do not fit
                made, asked = (
                    Counter(step.case for step in each) for each in ([one.step for one in turns.made], steps)
                )
                for case in asked:
                    if made[case] < asked[case]:
                        errors.setdefault(case, one_line(error))
    return [made for made in turns.made if made.step.case not in errors]


class Turns(TrainerCallback):
    """Arranges the model for each step's case, and measures the step."""

    def __init__(
        self,
        plan: Plan,
        model: LlavaDripForConditionalGeneration,
        steps: Sequence[Step],
        errors: dict[Case, str],
        bar: tqdm,
    ):
        self.model, self.steps, self.errors, self.bar = model, steps, errors, bar
        self.stage, self.samples = plan.stage, plan.samples
        self.budgets = Budgets(plan, model)
        self.clock = StepClock(model.multi_modal_projector, torch.device(plan.device))
        self.made: list[Made] = []
        self.step: Step | None = None  # in progress; None: one that is left out
        self.counted = None  # the Trainer's Throughput
        self.before = (0, 0)

    def on_step_begin(self, args, state, control, **kwargs):
        step = self.steps[state.global_step]
        self.bar.set_description(f"{self.stage}: {step.case.label}", refresh=False)
        self.step = None if step.case in self.errors else step
        if self.step is None:
            return
        self.model.pack_samples(step.case.arrangement == "packed")
        self.budgets.ask(step.case.compression, step.samples)
        self.before = (int(self.counted.tokens), self.counted.slots)
        self.clock.begin()

    def failed(self, error: Exception) -> None:
        self.errors[self.step.case] = one_line(error)
        self.step = None

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()
        if self.step is None:
            return
        seconds, parts = self.clock.end()
        positions, slots = int(self.counted.tokens) - self.before[0], self.counted.slots - self.before[1]
        text = sum(self.samples[i].text for i in self.step.samples)
        images = sum(self.samples[i].images for i in self.step.samples)
        counts = (positions, slots, positions - text, images)
        self.made.append(Made(self.step, seconds, parts, *counts, peak_memory_gib()))


class TurnsTrainer(StageTrainer):
    """StageTrainer, whose batches come in the order of the steps, and whom a case that fails does not stop."""

    turns: Turns

    def _get_train_sampler(self, train_dataset=None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def training_step(self, model, *args, **kwargs) -> Tensor:
        nothing = torch.zeros((), device=self.args.device)
        if self.turns.step is None:
            return nothing
        try:
            loss = super().training_step(model, *args, **kwargs)
        except FAILURES as error:
            self.turns.failed(error)
            self._disarm()
        else:
            self.turns.clock.mark()
            return loss
        model.zero_grad()
        if self.args.device.type == "cuda":  # after the error and what it holds are gone
            torch.cuda.empty_cache()
        return nothing

    def _disarm(self) -> None:
        """A first step that failed has no gradient to look at."""
        for guard in self.callback_handler.callbacks:
            if isinstance(guard, FirstStepGuard):
                for hook in guard.hooks:
                    hook.remove()
                guard.hooks = []
