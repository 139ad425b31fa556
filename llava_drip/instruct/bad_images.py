"""Pictures that cannot be read in training: counted over all ranks and workers, named once; past a share they stop the run."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from llava_drip.instruct.ranks import on_all_ranks, rank_and_ranks
from llava_drip.training.skips import Skips

HANDFUL = 5  # so many are never too many, but for a share of 0
NAMED = 100  # files named in the log


@dataclass(frozen=True)
class BadRow:
    """A row that another replaced.

    Attributes:
        name: of the row. cause: in a few words. message: what is wrong, with the file. replacement: the row in its place.
    """

    name: str
    cause: str
    message: str
    replacement: str

    def __str__(self) -> str:
        return f"bad image: {self.message}; {self.replacement} takes the place of {self.name}"


class BadImages(TrainerCallback, ExportableState):
    """Counts of the run, the same on all ranks; checkpoints keep them."""

    def __init__(self, share: float):
        """share: of the rows seen so far that may have had to be replaced (--max_bad_images); 0: none."""
        self.share, self.rows, self.skips = share, 0, Skips()
        self.named: set[str] = set()

    @property
    def total(self) -> int:
        return self.skips.total

    def count(self, rows: int, bad: list[BadRow], bad_of_all: int) -> None:
        """Of one step, before it is applied. rows, bad_of_all: over all ranks. bad: this rank's.

        Raises:
            ValueError: too many; on all ranks alike.
        """
        self.rows += rows
        if not bad_of_all:
            return
        for row in (BadRow(*row) for rank in on_all_ranks([astuple(row) for row in bad]) for row in rank):
            self.skips.merge(Skips({row.cause: 1}, [] if row.message in self.named else [row.message]))
            self._name(row)
        if self.total > (max(HANDFUL, self.share * self.rows) if self.share else 0):
            raise ValueError(
                f"{self.total:,} of the {self.rows:,} rows seen so far had a picture that cannot be read, more than "
                f"--max_bad_images {self.share:g} allows: {'; '.join(self.skips.examples)}"
            )

    def _name(self, row: BadRow) -> None:
        if row.message in self.named or len(self.named) > NAMED:
            return
        self.named.add(row.message)
        if rank_and_ranks()[0]:
            return
        if len(self.named) > NAMED:
            print(f"more than {NAMED} bad images: further ones are counted, not named", flush=True)
        else:
            print(row, flush=True)

    def state(self) -> dict:
        return {"args": {"share": self.share}, "attributes": {"rows": self.rows, "skipped": self.skips.state()}}

    def on_train_begin(self, args, state, control, **kwargs):
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # older checkpoints lack it
        self.rows, self.skips = kept["attributes"]["rows"], Skips(**kept["attributes"]["skipped"])

    def on_train_end(self, args, state, control, **kwargs):
        if self.total and state.is_world_process_zero:
            print(f"bad images: {self.total:,} of {self.rows:,} rows, other rows took their places; {self.skips}")
