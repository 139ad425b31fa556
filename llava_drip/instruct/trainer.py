"""The HF Trainer with guards: rows that name themselves, losses that are watched, throughput in the log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.data import Dataset, Sampler
from transformers import Trainer

from llava_drip.instruct.bad_images import BadImages
from llava_drip.instruct.cost import EpochCost
from llava_drip.instruct.elastic import ElasticBudget
from llava_drip.instruct.lora import split_projector
from llava_drip.instruct.ranks import wait_for_ranks
from llava_drip.instruct.rows import BAD_ROWS, NAMES
from llava_drip.instruct.sampler import SeededLengthGroupedSampler, rough_lengths
from llava_drip.instruct.standing import Standing
from llava_drip.instruct.stops import StopSignals
from llava_drip.instruct.throughput import Throughput
from llava_drip.instruct.watch import FirstStepGuard, StepWatch


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
        stops: StopSignals | None = None,
        projector_lr: float | None = None,
        **kwargs,
    ):
        """train_dataset, data_collator: ReadableRows and NamingCollator; of others' rows messages have no names.
        args: StageArguments.

        Args:
            elastic: draws the budgets of the pictures of each batch; None: the model's own.
            standing: saves what is trained alone, and the base it stands on; None: the whole assistant is saved.
            stops: says which signal has come; None: signals do what they do.
            projector_lr: learning rate of the projector; None: --learning_rate.
        """
        super().__init__(*args, **kwargs)
        self.elastic, self.standing, self.projector_lr = elastic, standing, projector_lr
        cost = EpochCost()
        cost.log = self.log
        self.throughput = Throughput(self.model.language_model, cost)
        self.bad_images = BadImages(self.args.max_bad_images)
        self.watch = StepWatch(self.bad_images, self.args.fp16, stops)
        for callback in (*([stops] if stops else []), FirstStepGuard(self.model), cost, self.bad_images):
            self.add_callback(callback)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return SeededLengthGroupedSampler(rows, rough_lengths(self.train_dataset.conversations), seed)

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
            if self.bad_images.total:
                logs["bad_images"] = self.bad_images.total
        super().log(logs, start_time)

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        unnamed = [[f"sample {i}" for i in range(len(batch["labels"]))] for batch in batches]
        names = [batch.pop(NAMES, without) for batch, without in zip(batches, unnamed, strict=True)]
        bad = [row for batch in batches for row in batch.pop(BAD_ROWS, ())]
        self.watch.begin(self.state.global_step + 1, batches, names, bad)
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.elastic is not None:
            self.elastic.begin(self.state.global_step, self.args.process_index, len(inputs.get("pixel_values", ())))
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            if self.elastic is not None:
                self.elastic.end()
        self.watch.look(result[0] if return_outputs else result)
        return result

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        self.watch.end(grad_norm, self.accelerator.optimizer_step_was_skipped)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """The last that every rank writes of a checkpoint. Rank 0 then says with trainer_state.json that it is whole."""
        super()._save_rng_state(output_dir)
        wait_for_ranks(self.args.device)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The result, or the first that is written of a checkpoint. All ranks call it."""
        self.watch.check_gradient(self.args.device)
        if not _internal_call:
            self.watch.check_learned(self.state.global_step, self.args.device)
        super().save_model(output_dir, _internal_call)
