"""Training data as a loader that knows how far it has come, and can be put back there."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch.distributed as dist
from torch.utils.data import DataLoader

from llava_drip.training.rows import Batches, RowBatches
from llava_drip.training.skips import Skips
from llava_drip.training.streams import Position, ShardBatches


def batches_of_epoch(samples: int, batch_size: int, ranks: int = 1, workers: int = 0) -> int:
    """Batches of a rank so that every worker of every rank gives as many: at least all samples, some perhaps twice."""
    groups = max(1, workers)
    return math.ceil(math.ceil(samples / (batch_size * ranks)) / groups) * groups


class TrainLoader:
    """Iterates over one epoch's batches. `len` and the epoch's `skips` are this rank's.

    for epoch in range(loader.epoch, epochs):
        loader.set_epoch(epoch)
        for batch in loader: ...
    """

    def __init__(self, dataset: ShardBatches | RowBatches, workers: int = 0, pin_memory: bool = False):
        self.dataset, self.batch_size = dataset, dataset.batch_size
        options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": pin_memory}
        self.sampler = None if isinstance(dataset, ShardBatches) else Batches(dataset)
        self.loader = DataLoader(dataset, batch_size=None, sampler=self.sampler, **options)
        self.epoch, self.batch, self.first = 0, 0, 0  # `batch`: taken in this epoch, those of before a kill included
        self.positions: dict[int, Position] = {}
        self.skips = Skips()

    def __len__(self) -> int:
        """Batches of a whole epoch, whatever has been taken of it."""
        return self.dataset.batches if self.sampler is None else len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Before each epoch's iteration. The epoch in which the loader was put back goes on from there."""
        if self.sampler is None:
            self.dataset.epoch.value = epoch
        else:
            self.sampler.epoch = epoch
        if not (epoch == self.epoch and self.batch == self.first > 0):
            self.batch = self.first = 0
            self.positions, self.skips = {}, Skips()
        self.epoch = epoch

    def __iter__(self) -> Iterator[object]:
        for batch in self.loader:
            self.batch += 1
            self.positions.update(batch.positions)
            self.skips.merge(batch.skips)
            yield batch.data

    def state(self) -> dict:
        """What `resume` takes, of all ranks (a collective), as JSON would hold it."""
        own = {"positions": self.positions, "skips": self.skips.state()}
        ranks = [own]
        if dist.is_available() and dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, own)
        positions = {str(stream): list(at) for rank in ranks for stream, at in rank["positions"].items()}
        layout = [self.dataset.streams, self.dataset.groups] if self.sampler is None else None
        skips = [rank["skips"] for rank in ranks]
        return {"epoch": self.epoch, "batch": self.batch, "positions": positions, "layout": layout, "skips": skips}

    def resume(self, state: dict) -> None:
        """Go to where `state` was taken. Before the first iteration.

        Raises:
            ValueError: shards divided among another number of workers or streams, which would give another order.
        """
        self.epoch, self.batch = state["epoch"], state["batch"]
        if self.batch >= len(self):  # the epoch was over
            self.epoch, self.batch = self.epoch + 1, 0
        self.first = self.batch
        if self.sampler is None:
            layout = [self.dataset.streams, self.dataset.groups]
            if self.batch and state["layout"] != layout:
                (streams, groups), (now, workers) = state["layout"], layout
                raise ValueError(
                    f"the run read its shards with {groups} workers and {streams} data streams, now {workers} and {now}: "
                    "within an epoch that would be another order; give the same --workers and --data-streams"
                )
            self.positions = {int(stream): tuple(at) for stream, at in state["positions"].items()} if self.batch else {}
            self.dataset.start_at(self.epoch, self.batch, self.positions)
        else:
            self.sampler.start_epoch, self.sampler.start_batch = self.epoch, self.batch
        if self.batch and (not dist.is_initialized() or dist.get_rank() == 0):  # rank 0 keeps what all had skipped
            for skips in state["skips"]:
                self.skips.merge(Skips(skips["counts"], skips["examples"]))

    def all_skips(self) -> Skips:
        """The epoch's skips over all ranks (a collective)."""
        total = Skips()
        states = [self.skips.state()]
        if dist.is_available() and dist.is_initialized():
            states = [None] * dist.get_world_size()
            dist.all_gather_object(states, self.skips.state())
        for state in states:
            total.merge(Skips(state["counts"], state["examples"]))
        return total
