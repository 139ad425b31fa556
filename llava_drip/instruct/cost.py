"""What an epoch of a stage cost: seconds of a step and peak memory, in the Trainer's log, its trackers and trainer_state.json."""

from __future__ import annotations

import math
from collections.abc import Callable

from transformers import TrainerCallback

from llava_drip.training.meters import StepClock


class EpochCost(TrainerCallback):
    """Logs at each epoch's end what StepClock.cost gives, over all ranks. Checkpoints are no part of a step."""

    def __init__(self):
        self.log: Callable[[dict[str, float]], None] | None = None  # Trainer.log
        self.clock: StepClock | None = None
        self.seconds, self.memory = 0.0, 0.0
        self.resumed = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.resumed = state.global_step > 0

    def on_step_begin(self, args, state, control, **kwargs):
        if self.resumed:  # data passed over after a resumption is no part of a step
            self.clock.restart()
            self.resumed = False

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.clock = StepClock()

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.tick()
        self.seconds += self.clock.seconds[-1]
        self.memory = max(self.memory, self.clock.memory[-1])

    def recent(self) -> tuple[float, float]:
        """Seconds of the steps since the last call, and the highest of their peaks of memory, in GiB; of this rank."""
        found = self.seconds, self.memory
        self.seconds, self.memory = 0.0, 0.0
        return found

    def on_save(self, args, state, control, **kwargs):
        self.clock.restart()

    def on_epoch_end(self, args, state, control, **kwargs):
        cost = self.clock.cost(args.device)
        if math.isnan(cost["step_seconds"]):  # an epoch of which a resumed run had nothing left
            return
        self.log(cost)
