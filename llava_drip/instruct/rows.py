"""A dataset's rows on their way into a step: which they are travels with them, and those that cannot be read are replaced."""

from __future__ import annotations

from torch.utils.data import Dataset, get_worker_info

from llava_drip.instruct.bad_images import BadRow
from llava_drip.instruct.data import Collator, ConversationDataset
from llava_drip.instruct.stops import spare_worker
from llava_drip.training.skips import Skips, next_good

# What a batch holds beside the model's inputs; the trainer takes it out.
NAMES, BAD_ROWS = "row_names", "bad_rows"


class ReadableRows(Dataset):
    """Items of a ConversationDataset. A row with a picture that cannot be read gives its place to the next row that can.

    Beside what the dataset gives: "row": its number; "name": of the row, for messages; "bad": a BadRow, or None.
    """

    def __init__(self, conversations: ConversationDataset):
        self.conversations, self.spared = conversations, False

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, i: int) -> dict:
        if not self.spared and get_worker_info() is not None:
            spare_worker()
            self.spared = True
        skips = Skips()
        item, used = next_good(self.conversations.__getitem__, i, len(self), skips)
        names, bad = [self.conversations.name_of(row) for row in (i, used)], None
        if skips.total:
            bad = BadRow(names[0], *skips.counts, skips.examples[0], names[1])
        return {**item, "row": used, "name": names[1], "bad": bad}


class NamingCollator:
    """A Collator's batches, with NAMES (list of str) and BAD_ROWS (list of BadRow)."""

    def __init__(self, collator: Collator):
        self.collator = collator

    def __call__(self, items: list[dict]) -> dict:
        bad = [item["bad"] for item in items if item["bad"] is not None]
        return {**self.collator(items), NAMES: [item["name"] for item in items], BAD_ROWS: bad}
