"""Keys and values of past conversations: the next turn of one starts with what was read and written in the turns before."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice, zip_longest

import numpy as np

from llava_drip.scheduling.slots import KeysValues

BLOCK = 16  # tokens; what is shorter is not worth a copy
LOOKED_AT = 8


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
        """How many tokens both begin with; a picture's tokens count only where it is the same one."""
        length = min(len(self.ids), len(other.ids))
        differ = np.flatnonzero(self.ids[:length] != other.ids[:length])
        length = int(differ[0]) if len(differ) else length
        for mine, theirs in zip_longest(self.pictures, other.pictures):
            if mine != theirs:
                return min([length, *(picture[0] for picture in (mine, theirs) if picture is not None)])
        return length

    def followed_by(self, ids: list[int]) -> Sequence:
        return Sequence(np.concatenate([self.ids, np.asarray(ids, np.int64)]), self.pictures)

    def blocks(self) -> list[bytes]:
        """A name for each whole block of BLOCK tokens, which stands for all that comes before it too."""
        names, name, pictures = [], b"", list(self.pictures)
        for start in range(0, len(self.ids) - BLOCK + 1, BLOCK):
            block = hashlib.blake2b(name, digest_size=16)
            block.update(self.ids[start : start + BLOCK].tobytes())
            while pictures and pictures[0][0] < start + BLOCK:
                block.update(repr(pictures.pop(0)).encode())
            name = block.digest()
            names.append(name)
        return names


@dataclass(frozen=True)
class _Entry:
    sequence: Sequence
    kept: KeysValues
    blocks: list[bytes]


class PrefixCache:
    """Least recently used first out, bounded in tokens. Found by blocks of tokens, however many are kept."""

    def __init__(self, max_tokens: int):
        self.max_tokens, self.tokens, self.number = max_tokens, 0, 0
        self.entries: OrderedDict[int, _Entry] = OrderedDict()
        self.having: dict[bytes, dict[int, None]] = {}  # block → who begins with it, newest last
        self.hits = self.misses = 0

    def _closest(self, sequence: Sequence, blocks: list[bytes]) -> int | None:
        """Of those that share most blocks, and of the newest of these, the one with the longest common beginning."""
        having = {}
        for block in blocks:
            if block not in self.having:
                break
            having = self.having[block]
        newest = islice(reversed(having), LOOKED_AT)
        return max(newest, key=lambda number: sequence.common(self.entries[number].sequence), default=None)

    def find(self, sequence: Sequence) -> tuple[KeysValues | None, int]:
        """Kept keys and values with a common beginning of a block or more, and its length: less than the whole sequence, whose
        last token has to be read for its logits. None, 0: there are none."""
        number = self._closest(sequence, sequence.blocks())
        if number is None:
            self.misses += 1
            return None, 0
        self.hits += 1
        self.entries.move_to_end(number)
        entry = self.entries[number]
        return entry.kept, min(sequence.common(entry.sequence), len(sequence.ids) - 1)

    def add(self, sequence: Sequence, kept: KeysValues) -> None:
        """sequence: as long as what is kept. The turn before, with which it begins, is not kept a second time."""
        if not BLOCK <= len(sequence.ids) <= self.max_tokens:
            return
        blocks = sequence.blocks()
        before = self._closest(sequence, blocks)
        if before is not None and sequence.common(old := self.entries[before].sequence) == len(old.ids):
            self._forget(before)
        self.number += 1
        self.entries[self.number] = _Entry(sequence, kept, blocks)
        for block in blocks:
            self.having.setdefault(block, {})[self.number] = None
        self.tokens += len(sequence.ids)
        self.shrink(self.max_tokens)

    def shrink(self, tokens: int) -> None:
        """Forgets the least recently used until at most so many tokens are kept."""
        while self.tokens > max(0, tokens):
            self._forget(next(iter(self.entries)))

    def _forget(self, number: int) -> None:
        entry = self.entries.pop(number)
        for block in entry.blocks:
            del self.having[block][number]
            if not self.having[block]:
                del self.having[block]
        self.tokens -= len(entry.sequence.ids)
