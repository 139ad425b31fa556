"""Batches of data with an index (image folders, tables of pairs), in an order that any number of ranks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Dataset, default_collate

from llava_drip.images import ImageError
from llava_drip.training.seeds import seed_of, seed_sample
from llava_drip.training.skips import BadSample, Skips
from llava_drip.training.streams import Batch

GIVE_UP_AFTER = 1000  # unreadable rows in a row


def shuffled(rows: int, seed: int) -> Callable[[int], Sequence[int]]:
    """epoch → a permutation of 0 .. rows - 1."""

    def order(epoch: int) -> list[int]:
        return torch.randperm(rows, generator=torch.Generator().manual_seed(seed_of(seed, "rows", epoch))).tolist()

    return order


class RowBatches(Dataset):
    """Item b is this rank's part of global batch b of the epoch; the ranks' parts follow each other in the global batch."""

    def __init__(
        self,
        load: Callable[[int], object],
        rows: int,
        *,
        order: Callable[[int], Sequence[int]],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        collate: Callable[[list], object] = default_collate,
    ):
        """
        Args:
            load: row → a sample that collates; raises BadSample or ImageError for one to skip. Seeded as in streams.ShardOptions.
            order: epoch → rows, repeats allowed; an incomplete last global batch is left out.
            batch_size: of this rank.
        """
        self.load, self.rows, self.order, self.batch_size, self.seed = load, rows, order, batch_size, seed
        self.rank, self.ranks, self.collate = rank, ranks, collate

    def batches(self, epoch: int) -> list[tuple[int, list[int], int]]:
        """(epoch, rows of this rank, place of the first in the order of all) of each batch; what __getitem__ takes."""
        order, whole = self.order(epoch), self.batch_size * self.ranks
        starts = range(self.rank * self.batch_size, len(order) // whole * whole, whole)
        return [(epoch, list(order[start : start + self.batch_size]), start) for start in starts]

    def __getitem__(self, batch: tuple[int, list[int], int]) -> Batch:
        epoch, rows, start = batch
        skips = Skips()
        samples = [self._sample(epoch, start + i, row, skips) for i, row in enumerate(rows)]
        return Batch(self.collate(samples), skips=skips)

    def _sample(self, epoch: int, place: int, row: int, skips: Skips) -> object:
        """The row, or, where it cannot be read, the next one that can."""
        for attempt in range(min(self.rows, GIVE_UP_AFTER)):
            seed_sample(self.seed, epoch, place, attempt)
            try:
                return self.load((row + attempt) % self.rows)
            except (BadSample, ImageError) as error:
                skips.add(getattr(error, "cause", "corrupt picture"), str(error))
        raise ValueError(f"no usable sample: {skips}; {'; '.join(skips.examples)}")


class Batches:
    """A DataLoader's sampler over RowBatches; can begin within an epoch."""

    def __init__(self, dataset: RowBatches):
        self.dataset, self.epoch, self.start_epoch, self.start_batch = dataset, 0, 0, 0

    def __iter__(self) -> Iterator[tuple[int, list[int], int]]:
        first = self.start_batch if self.epoch == self.start_epoch else 0
        yield from self.dataset.batches(self.epoch)[first:]

    def __len__(self) -> int:
        return len(self.dataset.batches(self.epoch))
