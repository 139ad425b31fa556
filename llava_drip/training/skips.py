"""What a run left out of its data, by cause, with a few examples: counted in the workers, reported once an epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from llava_drip.images import ImageError

EXAMPLES = 5
GIVE_UP_AFTER = 1000  # unreadable rows in a row

Sample = TypeVar("Sample")


class BadSample(ValueError):
    """A sample that training does without. `cause` is a few words that many share, such as "corrupt picture"."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple:  # between processes
        return type(self), (self.cause, str(self))


class Skips:
    """Counts by cause, and the first few messages."""

    def __init__(self, counts: dict[str, int] | None = None, examples: list[str] | None = None):
        self.counts, self.examples = Counter(counts or {}), list(examples or [])

    def add(self, cause: str, message: str) -> None:
        self.counts[cause] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(message)

    def merge(self, other: Skips) -> None:
        self.counts.update(other.counts)
        self.examples = (self.examples + other.examples)[:EXAMPLES]

    def take(self) -> Skips:
        """What has been added since the last call."""
        taken = Skips(self.counts, self.examples)
        self.counts, self.examples = Counter(), []
        return taken

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        """ "3 skipped (2 corrupt picture, 1 missing caption)", or "none skipped"."""
        if not self.total:
            return "none skipped"
        return f"{self.total:,} skipped ({', '.join(f'{n:,} {cause}' for cause, n in self.counts.most_common())})"

    def state(self) -> dict:
        return {"counts": dict(self.counts), "examples": list(self.examples)}


def next_good(
    load: Callable[[int], Sample], row: int, rows: int, skips: Skips, before: Callable[[int], None] | None = None
) -> tuple[Sample, int]:
    """What `load` makes of a row, or, where it cannot be read, of the next one that can; and which row that is.

    Nothing is drawn, so a run that is resumed finds the same one, and the order of all other rows stays.

    Args:
        load: row → sample; raises BadSample or ImageError for one to skip.
        rows: how many there are; the first follows the last.
        skips: the row is counted here if it cannot be read. Those tried after it are not: they have places of their own.
        before: called with 0, 1, ... before each attempt.
    Raises:
        ValueError: none of them can be read, or none of very many.
    """
    tried = Skips()
    for attempt in range(min(rows, GIVE_UP_AFTER)):
        if before is not None:
            before(attempt)
        try:
            return load((row + attempt) % rows), (row + attempt) % rows
        except (BadSample, ImageError) as error:
            tried.add(getattr(error, "cause", "corrupt picture"), str(error))
            if attempt == 0:
                skips.merge(tried)
    raise ValueError(f"no usable sample: {tried}; {'; '.join(dict.fromkeys(tried.examples))}")
