"""What a run left out of its data, by cause, with a few examples: counted in the workers, reported once an epoch."""

from __future__ import annotations

from collections import Counter

EXAMPLES = 5


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
