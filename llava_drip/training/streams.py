"""Units → batches, in an order that any number of ranks share and that a killed run finds again without decoding a picture.

The units of an epoch are shuffled and dealt to `streams` (more streams than units: those that share one divide its samples).
Each stream reads its units one after another through a shuffle buffer.
Batch t of an epoch comes from the streams of group t % workers: each gives an equal part, one after another. A rank owns as many
neighbouring streams of every group as any other, so with the same number of workers and streams the global batch is the same
whether one rank makes it or several.

A batch carries how far each of its streams has come (`Position`). That is the whole state: to resume, a stream takes as many raw
samples from its buffer again, without decoding any.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing.sharedctypes import RawValue

from torch.utils.data import IterableDataset, default_collate, get_worker_info
from torch.utils.data._utils.pin_memory import pin_memory

from llava_drip.images import ImageError
from llava_drip.training import units
from llava_drip.training.seeds import kept_randomness, seed_of, seed_sample
from llava_drip.training.skips import BadSample, Skips

# Pass over the data, raw samples done with, copies of the next one made (all, perhaps), and 1 where the stream reads all units.
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
        buffer: raw samples that a stream shuffles among, and holds in memory; 1 keeps the order of the files.
        weights: draw units with replacement, each with its weight, instead of going through all (None: do not).
        copies: augmented copies of each sample, one after another (repeated augmentation, Hoffer et al., CVPR 2020).
    Raises:
        ValueError: no units, weights that do not fit them, a buffer or copies below 1.
    """

    units: Sequence[str]
    decode: Callable[[dict], object]
    seed: int = 0
    buffer: int = 5000
    weights: Sequence[float] | None = None
    copies: int = 1

    def __post_init__(self):
        if not self.units:
            raise ValueError("no shards")
        if self.buffer < 1 or self.copies < 1:
            raise ValueError(f"a shuffle buffer of {self.buffer} and {self.copies} copies: both must be at least 1")
        if self.weights is not None:
            if len(self.weights) != len(self.units):
                raise ValueError(f"{len(self.weights)} weights for {len(self.units)} shards; each shard needs one")
            if not (all(0 <= weight < math.inf for weight in self.weights) and any(self.weights)):
                raise ValueError("the shards' weights must be 0 or more, and not all of them 0")


class Stream:
    """One stream of an epoch: an endless iterator over decoded samples."""

    def __init__(self, options: ShardOptions, epoch: int, number: int, streams: int, start: Position = START):
        self.options, self.epoch, self.number, self.streams = options, epoch, number, streams
        self.position, self.skips = start, Skips()

    def __iter__(self) -> Iterator[object]:
        while True:
            number, taken, copies, everything = self.position
            good, before = bool(taken or copies), self.skips.state()
            for sample in self._one_pass(number, taken, copies, everything):
                good = True
                yield sample
            if not good:
                if everything or (self.streams == 1 and self.options.weights is None):
                    raise ValueError(f"no usable sample in any shard: {self.skips}; {'; '.join(self.skips.examples)}")
                everything = 1  # this stream's own units hold nothing
                self.skips = Skips(**before)  # the next pass counts them
            elif self.options.weights is not None:
                everything = 0  # the next draw may do better
            self.position = (number + 1, 0, 0, everything)

    def _one_pass(self, number: int, taken: int, copies: int, everything: int) -> Iterator[object]:
        options, raw = self.options, self._shuffled(number, everything)
        if taken or copies:
            for _ in islice(raw, taken):
                pass
            begun = list(islice(raw, 1 if copies else 0))  # of which the first copies were made
            self.skips.take()  # what is wrong with their shards was counted before
            raw = chain(begun, raw)
        for sample in raw:
            # A sample that may come twice in a pass must not look the same both times.
            place = (self.number, taken) if everything or options.weights is not None else ()
            while copies < options.copies:
                seed_sample(options.seed, self.epoch, number, copies, sample["__key__"], *place)
                try:
                    decoded = options.decode(sample)
                except (BadSample, ImageError) as error:
                    self.skips.add(getattr(error, "cause", "corrupt picture"), str(error))
                    break
                copies += 1
                self.position = (number, taken, copies, everything)
                yield decoded
            taken, copies = taken + 1, 0
            self.position = (number, taken, 0, everything)

    def _shuffled(self, number: int, everything: int) -> Iterator[dict]:
        """The raw samples of a pass."""
        own, part, parts = self._deal(number, everything)
        skips = self.skips if part == 0 else Skips()  # what is wrong with a shared unit counts once
        raw = (sample for unit in own for sample in units.read(unit, skips))
        rng = random.Random(seed_of(self.options.seed, "samples", self.epoch, number, self.number))
        return shuffle(islice(raw, part, None, parts), self.options.buffer, rng)

    def _deal(self, number: int, everything: int) -> tuple[list[str], int, int]:
        """This stream's units in a pass; and of their samples, every `parts`-th from `part` on."""
        options = self.options
        rng = random.Random(seed_of(options.seed, "units", self.epoch, number))
        if everything:
            own = [unit for unit, weight in zip(options.units, options.weights or [1] * len(options.units)) if weight]
            rng.shuffle(own)
            first = self.number % len(own)  # others may be reading everything too
            tried = self._deal(number - 1, 0)[0]  # first: whatever is wrong with them is counted at once
            return list(dict.fromkeys(tried + own[first:] + own[:first])), 0, 1
        if options.weights is not None:
            rng = random.Random(seed_of(options.seed, "units", self.epoch, number, self.number))
            share = max(1, len(options.units) // self.streams)
            return rng.choices(options.units, options.weights, k=share), 0, 1
        own = list(options.units)
        rng.shuffle(own)
        if self.streams <= len(own):
            return own[self.number :: self.streams], 0, 1
        # More streams than units: some share a unit.
        first = self.number % len(own)
        return [own[first]], self.number // len(own), len(range(first, self.streams, len(own)))


def shuffle(samples: Iterator, buffer: int, rng: random.Random) -> Iterator:
    """Samples in random order, each drawn from the next `buffer` of the input. Begins when 1,000 are there and fills the buffer
    as it goes, two for each that leaves (webdataset's way)."""
    held = []
    for sample in samples:
        held.append(sample)
        if len(held) < buffer:
            held.extend(islice(samples, 1))
        if len(held) >= min(buffer, 1000):
            yield _draw(held, rng)
    while held:
        yield _draw(held, rng)


def _draw(held: list, rng: random.Random) -> object:
    place = rng.randrange(len(held))
    held[place], held[-1] = held[-1], held[place]
    return held.pop()


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
        self.rank, self.ranks, self.collate = rank, ranks, collate
        # Seen by workers that are already running, and can be pickled for those that are not forked: epoch, its first batch.
        self.epoch, self.first = RawValue("q", 0), RawValue("q", 0)
        self.start: dict[int, Position] = {}

    def start_at(self, epoch: int, batch: int, positions: dict[int, Position]) -> None:
        """Begin within an epoch, until `first` is 0 again. Before the workers start."""
        self.epoch.value, self.first.value, self.start = epoch, batch, positions

    def owns(self, stream: int) -> bool:
        """Whether the stream is read by this rank."""
        return stream // self.groups // self.own == self.rank

    def __iter__(self) -> Iterator[Batch]:
        worker, epoch, first = get_worker_info(), self.epoch.value, self.first.value
        number = worker.id if worker else 0
        assert (worker.num_workers if worker else 1) == self.groups, "workers of the DataLoader and of its data differ"
        group = (number + first) % self.groups  # a DataLoader begins with worker 0
        start = self.start if first else {}
        streams = [
            Stream(self.options, epoch, name, self.streams, start.get(name, START))
            for name in range(group, self.streams, self.groups)
            if self.owns(name)
        ]
        samples = [iter(stream) for stream in streams]
        share = self.batch_size // self.own
        for _ in range(first + number, self.batches, self.groups):
            with contextlib.nullcontext() if worker else kept_randomness():
                data = self.collate([sample for stream in samples for sample in islice(stream, share)])
            batch = Batch(data, {stream.number: stream.position for stream in streams})
            for stream in streams:
                batch.skips.merge(stream.skips.take())
            yield batch
