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
        """workers: as given to a ShardBatches."""
        self.dataset, self.batch_size = dataset, dataset.batch_size
        self.options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": pin_memory}
        self.sampler = None if isinstance(dataset, ShardBatches) else Batches(dataset)
        assert self.sampler is not None or dataset.groups == max(1, workers), "the data were divided for other workers"
        self.loader: DataLoader | None = None
        self.epoch, self.batch, self.first = 0, 0, 0  # `batch`: taken in this epoch, those of before a kill included
        self.positions: dict[int, Position] = {}
        self.skips = Skips()

    def __len__(self) -> int:
        """Batches of a whole epoch, whatever has been taken of it."""
        return self.dataset.batches if self.sampler is None else len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Before each epoch's iteration. The epoch in which the loader was put back goes on from there."""
        if not (epoch == self.epoch and self.batch == self.first > 0):
            self._go_to(epoch, 0, {})

    def _go_to(self, epoch: int, batch: int, positions: dict[int, Position]) -> None:
        self.epoch, self.batch, self.first = epoch, batch, batch
        self.positions, self.skips = positions, Skips()
        if self.sampler is None:
            self.dataset.start_at(epoch, batch, dict(positions))
        else:
            self.sampler.epoch, self.sampler.first = epoch, batch

    def __iter__(self) -> Iterator[object]:
        if self.batch != self.first:  # once more, without set_epoch
            self._go_to(self.epoch, 0, {})
        if self.loader is None:
            self.loader = DataLoader(self.dataset, batch_size=None, sampler=self.sampler, **self.options)
        for batch in self.loader:
            self.batch += 1
            self.positions.update(batch.positions)
            self.skips.merge(batch.skips)
            yield batch.data

    def state(self) -> dict:
        """What `resume` takes, of all ranks (a collective), as JSON would hold it."""
        ranks = _of_all_ranks({"positions": self.positions, "skips": self.skips.state()})
        positions = {str(stream): list(at) for rank in ranks for stream, at in rank["positions"].items()}
        skips = [rank["skips"] for rank in ranks]
        return {"epoch": self.epoch, "batch": self.batch, "positions": positions, "skips": skips, **self._layout()}

    def _layout(self) -> dict:
        """What must be the same for an order to go on within an epoch."""
        layout = [self.dataset.streams, self.dataset.groups] if self.sampler is None else None
        return {"layout": layout, "global_batch": self.dataset.batch_size * self.dataset.ranks}

    def resume(self, state: dict) -> None:
        """Go to where `state` was taken; at an epoch's end, to the beginning of the next.

        Raises:
            ValueError: within an epoch: batches of another size, or shards divided among another number of workers or streams,
                which would give another order.
        """
        epoch, batch = state["epoch"], state["batch"]
        self._go_to(epoch, 0, {})
        if batch >= len(self):  # the epoch was over
            return self._go_to(epoch + 1, 0, {})
        if batch:
            self._check_layout(state)
        positions = {int(stream): tuple(at) for stream, at in state["positions"].items()}
        if self.sampler is None:  # not the other ranks', which go on elsewhere
            positions = {stream: at for stream, at in positions.items() if self.dataset.owns(stream)}
        self._go_to(epoch, batch, positions if batch else {})
        self.loader = None  # workers that run already know nothing of these positions
        if batch and _rank() == 0:  # rank 0 keeps what all had skipped
            for skips in state["skips"]:
                self.skips.merge(Skips(skips["counts"], skips["examples"]))

    def _check_layout(self, state: dict) -> None:
        now = self._layout()
        if (state["layout"] is None) != (now["layout"] is None):
            raise ValueError("the run read another kind of data (shards, or rows with an index)")
        if state["layout"] != now["layout"]:
            (streams, groups), (now_streams, now_groups) = state["layout"], now["layout"]
            raise ValueError(
                f"the run read its shards with {groups} workers and {streams} data streams, now {now_groups} and "
                f"{now_streams}: within an epoch that would be another order; give the same --workers and --data-streams"
            )
        if state["global_batch"] != now["global_batch"]:
            raise ValueError(
                f"the run took {state['global_batch']} samples a batch over all ranks, now {now['global_batch']}: within "
                "an epoch that would be another order; give the same batch size times ranks"
            )

    def all_skips(self) -> Skips:
        """The epoch's skips over all ranks (a collective)."""
        total = Skips()
        for state in _of_all_ranks(self.skips.state()):
            total.merge(Skips(state["counts"], state["examples"]))
        return total


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _of_all_ranks(own: object) -> list:
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone
