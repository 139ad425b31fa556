"""Units → batches, in an order that any number of ranks share and that a killed run finds again without decoding a picture.

The units of an epoch are shuffled and dealt to `streams`. Each stream reads its units one after another through a shuffle buffer.
Batch t of an epoch comes from the streams of group t % workers: each gives an equal part, one after another. A rank owns as many
neighbouring streams of every group as any other, so with the same number of workers and streams the global batch is the same
whether one rank makes it or several.

A batch carries how far each of its streams has come (`Position`). That is the whole state: to resume, a stream takes as many raw
samples from its buffer again, without decoding any.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import Value

from torch.utils.data import IterableDataset, default_collate, get_worker_info
from torch.utils.data._utils.pin_memory import pin_memory
from webdataset.filters import _shuffle

from llava_drip.images import ImageError
from llava_drip.training import units
from llava_drip.training.seeds import seed_of, seed_sample
from llava_drip.training.skips import BadSample, Skips

# Pass over the data, raw samples taken in it, copies of the next one made, and 1 where the stream reads all units.
Position = tuple[int, int, int, int]
START: Position = (0, 0, 0, 0)


@dataclass
class Batch:
    """What travels from a worker: collated samples, and what the loader keeps."""

    data: object
    positions: dict[int, Position] = field(default_factory=dict)
    skips: Skips = field(default_factory=Skips)

    def pin_memory(self) -> Batch:  # called by DataLoader
        return Batch(pin_memory(self.data), self.positions, self.skips)


@dataclass(frozen=True)
class ShardOptions:
    """How shards become samples.

    Attributes:
        units: see units.expand.
        decode: raw sample → a sample that collates; raises BadSample or ImageError for one to skip. Draws from random, NumPy
            and torch, which are seeded for each sample.
        seed: of order and augmentation.
        buffer: raw samples that a stream shuffles among; 1 keeps the order of the files.
        weights: draw units with replacement, each with its weight, instead of going through all (None: do not).
        copies: augmented copies of each sample, one after another (repeated augmentation, Hoffer et al., CVPR 2020).
    """

    units: Sequence[str]
    decode: Callable[[dict], object]
    seed: int = 0
    buffer: int = 5000
    weights: Sequence[float] | None = None
    copies: int = 1


class Stream:
    """One stream of an epoch: an endless iterator over decoded samples."""

    def __init__(self, options: ShardOptions, epoch: int, number: int, streams: int, start: Position = START):
        self.options, self.epoch, self.number, self.streams = options, epoch, number, streams
        self.position, self.skips = start, Skips()

    def __iter__(self) -> Iterator[object]:
        while True:
            number, taken, copies, everything = self.position
            good = False
            for sample in self._one_pass(number, taken, copies, everything):
                good = True
                yield sample
            if not (good or taken or copies):  # a whole pass for nothing
                if everything or self.streams == 1:
                    raise ValueError(f"no usable sample in any shard: {self.skips}; {'; '.join(self.skips.examples)}")
                everything = 1  # this stream's own units hold nothing
            self.position = (number + 1, 0, 0, everything)

    def _one_pass(self, number: int, taken: int, copies: int, everything: int) -> Iterator[object]:
        options, raw = self.options, self._shuffled(number, everything)
        if taken:
            for _ in islice(raw, taken):
                pass
            self.skips.take()  # what is wrong with their shards was counted before
        for sample in raw:
            while copies < options.copies:
                seed_sample(options.seed, self.epoch, number, copies, sample["__key__"])
                try:
                    decoded = options.decode(sample)
                except (BadSample, ImageError) as error:
                    self.skips.add(getattr(error, "cause", "corrupt picture"), str(error))
                    break
                copies += 1
                self.position = (number, taken, copies, everything)
                if copies == options.copies:
                    self.position = (number, taken + 1, 0, everything)
                yield decoded
            taken, copies = taken + 1, 0
            self.position = (number, taken, 0, everything)

    def _shuffled(self, number: int, everything: int) -> Iterator[dict]:
        options, rng = self.options, random.Random(seed_of(self.options.seed, "units", self.epoch, number))
        if options.weights is not None:
            rng = random.Random(seed_of(options.seed, "units", self.epoch, number, self.number))
            share = max(1, len(options.units) // self.streams)
            own = rng.choices(options.units, options.weights, k=len(options.units) if everything else share)
        else:
            own = list(options.units)
            rng.shuffle(own)
            own = own if everything else own[self.number % len(own) :: self.streams]
        raw = (sample for unit in own for sample in units.read(unit, self.skips))
        rng = random.Random(seed_of(options.seed, "samples", self.epoch, number, self.number))
        return raw if options.buffer <= 1 else _shuffle(raw, options.buffer, min(options.buffer, 1000), rng)


class ShardBatches(IterableDataset):
    """Batches of one rank, for a DataLoader with batch_size=None. Endless within `batches` an epoch: passes repeat as needed."""

    def __init__(
        self,
        options: ShardOptions,
        *,
        batch_size: int,
        batches: int,
        workers: int = 0,
        streams: int | None = None,
        rank: int = 0,
        ranks: int = 1,
        collate: Callable[[list], object] = default_collate,
    ):
        """
        Args:
            batch_size: of this rank.
            batches: of this rank in an epoch.
            workers: of the DataLoader.
            streams: over all ranks, default one for each worker. More keep the order for a later run with more ranks.
        Raises:
            ValueError: streams that cannot be divided among ranks and workers, or a batch that cannot among its streams.
        """
        super().__init__()
        self.groups = max(1, workers)
        readers = ranks * self.groups
        self.streams = streams or readers
        if self.streams % readers:
            raise ValueError(
                f"{self.streams} data streams cannot be divided among {readers} workers over all ranks; "
                f"give a multiple of {readers}"
            )
        self.own = self.streams // readers  # streams of this rank in each group
        if batch_size % self.own:
            raise ValueError(f"batch size {batch_size} cannot be divided among {self.own} data streams")
        self.options, self.batch_size, self.batches = options, batch_size, batches
        self.rank, self.collate = rank, collate
        self.epoch = Value("q", 0)  # seen by workers that are already running
        self.start_epoch, self.start_batch, self.start = 0, 0, {}

    def start_at(self, epoch: int, batch: int, positions: dict[int, Position]) -> None:
        """Begin within an epoch. Before the first iteration."""
        self.start_epoch, self.start_batch, self.start = epoch, batch, positions

    def __iter__(self) -> Iterator[Batch]:
        worker, epoch = get_worker_info(), self.epoch.value
        number, resumed = worker.id if worker else 0, epoch == self.start_epoch
        first = self.start_batch if resumed else 0
        group = (number + first) % self.groups  # a DataLoader begins with worker 0
        own = range(self.rank * self.own, (self.rank + 1) * self.own)
        streams = [
            Stream(self.options, epoch, name, self.streams, self.start.get(name, START) if resumed else START)
            for name in (group + self.groups * i for i in own)
        ]
        samples = [iter(stream) for stream in streams]
        share = self.batch_size // self.own
        for _ in range(first + number, self.batches, self.groups):
            data = self.collate([sample for stream in samples for sample in islice(stream, share)])
            batch = Batch(data, {stream.number: stream.position for stream in streams})
            for stream in streams:
                batch.skips.merge(stream.skips.take())
            yield batch
