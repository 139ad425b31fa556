"""Keys and values of past conversations: the next turn of one starts with what was read and written in the turns before."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from llava_drip.scheduling.slots import KeysValues


@dataclass(frozen=True)
class Sequence:
    """What a language model has read: ids, and for each picture where its tokens stand.

    Attributes:
        ids: [L] int64, the placeholder's on visual positions.
        pictures: (first place, tokens, key) of each, in order; the key names its pixels and budget.
    """

    ids: np.ndarray
    pictures: tuple[tuple[int, int, tuple], ...] = ()

    def common(self, other: Sequence) -> int:
        """How many tokens both begin with; a picture's tokens count only where it is the same one, whole or in part."""
        length = min(len(self.ids), len(other.ids))
        differ = np.flatnonzero(self.ids[:length] != other.ids[:length])
        length = int(differ[0]) if len(differ) else length
        for mine, theirs in zip(self.pictures, other.pictures):
            if mine != theirs:
                length = min(length, mine[0], theirs[0])
                break
        return length

    def followed_by(self, ids: list[int]) -> Sequence:
        return Sequence(np.concatenate([self.ids, np.asarray(ids, np.int64)]), self.pictures)


class PrefixCache:
    """Least recently used first out, bounded in tokens."""

    def __init__(self, max_tokens: int):
        self.max_tokens, self.tokens = max_tokens, 0
        self.entries: OrderedDict[int, tuple[Sequence, KeysValues]] = OrderedDict()
        self.number = 0
        self.hits = self.misses = 0

    def find(self, sequence: Sequence, least: int = 8) -> tuple[KeysValues | None, int]:
        """The kept keys and values with the longest common beginning, and its length: less than the whole sequence, whose last
        token has to be read for its logits. None, 0: nothing of at least `least` tokens."""
        lengths = {number: sequence.common(kept) for number, (kept, _) in self.entries.items()}
        number = max(lengths, key=lengths.get, default=None)
        length = 0 if number is None else min(lengths[number], len(sequence.ids) - 1)
        if length < least:
            self.misses += 1
            return None, 0
        self.hits += 1
        self.entries.move_to_end(number)
        return self.entries[number][1], length

    def add(self, sequence: Sequence, kept: KeysValues) -> None:
        """sequence: as long as what is kept. What it begins with is not kept a second time."""
        if len(sequence.ids) > self.max_tokens:
            return
        for number, (old, _) in list(self.entries.items()):
            if sequence.common(old) == len(old.ids):
                self._forget(number)
        self.number += 1
        self.entries[self.number] = sequence, kept
        self.tokens += len(sequence.ids)
        self.shrink(self.max_tokens)

    def shrink(self, tokens: int) -> None:
        """Forgets the least recently used until at most so many tokens are kept."""
        while self.tokens > max(0, tokens):
            self._forget(next(iter(self.entries)))

    def _forget(self, number: int) -> None:
        self.tokens -= len(self.entries.pop(number)[0].ids)
