"""Every row against the limits of the run, before training: no picture cut off, an answer left, and room for it all."""

from __future__ import annotations

import json
import re

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from llava_drip.assistant.expand import IGNORE_INDEX
from llava_drip.assistant.processing import IMAGE_TOKEN
from llava_drip.instruct.data import ConversationDataset, images_of
from llava_drip.instruct.ranks import on_all_ranks, rank_and_ranks
from llava_drip.instruct.watch import NothingLearnedError
from llava_drip.towers.boundaries import tokens_for_budget

USUAL_LENGTH = 2048  # LLaVA's model_max_length


def most_visual_tokens(model: torch.nn.Module, least_compression: float | None = None) -> int:
    """The largest number of tokens that the (frozen) tower of an assistant can make of a picture.

    least_compression: of budgets that are drawn; None: the tower's own budget, if it has one.
    """
    if hasattr(model.vision_tower, "most_tokens"):
        return model.vision_tower.most_tokens
    rows, columns = model.vision_tower.patch_embed.grid_size
    budget = least_compression or getattr(model.vision_tower, "budget", None)  # met exactly in eval
    return rows * columns if budget is None else int(tokens_for_budget(torch.as_tensor(budget), rows * columns).max())


def resolve_max_length(asked: int | None, text_config) -> int:
    """Positions of a row: --model_max_length, or as many as are usual and the language model has.

    Raises:
        ValueError: more than the language model has.
    """
    context = getattr(text_config, "max_position_embeddings", None)  # absent where any number will do
    if asked is None:
        return min(USUAL_LENGTH, context or USUAL_LENGTH)
    if context is not None and asked > context:
        raise ValueError(
            f"--model_max_length {asked}: the language model has {context} positions (max_position_embeddings); "
            f"give {context} or less"
        )
    return asked


class TokenBound:
    """A bound on the tokens of a text, found without tokenizing it: most rows are shorter than their limit in any case.

    After normalization a token stands for a byte at least (bytes, characters or words are merged, never divided further). A
    space or ▁ may be put in front of each piece between added tokens; some pre-tokenizers put it in front of any piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        backend = tokenizer.backend_tokenizer
        self.normalizer = backend.normalizer
        pieces = json.dumps(json.loads(backend.to_str())["pre_tokenizer"])
        self.factor = 2 if '"Metaspace"' in pieces or '"add_prefix_space": true' in pieces else 1
        self.space = "▁" if backend.token_to_id("▁") is not None else " "  # three bytes, and a token at most
        self.added = re.compile("|".join(re.escape(t.content) for t in tokenizer.added_tokens_decoder.values()) or "$^")

    def __call__(self, text: str) -> int:
        between = 1 + len(self.added.findall(text))
        normal = self.normalizer.normalize_str(text) if self.normalizer else text
        return self.factor * len(normal.replace(self.space, " ").encode()) + between


def check_row(dataset: ConversationDataset, i: int, bound: TokenBound) -> bool:
    """Check row i, without decoding its pictures; says whether it is cut.

    Raises:
        ValueError: naming the row: an image is cut off or left out, no word of an answer is left, or the template rewrites it.
    """
    tokenizer, text, limit = dataset.processor.tokenizer, dataset.text(i), dataset.text_limit(i)
    fits = limit is None or bound(text) <= limit
    fits = fits or len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= limit
    if fits and text.count(IMAGE_TOKEN) == len(images_of(dataset.records[i])):
        return False
    _, labels = dataset.encode(i)
    if all(label == IGNORE_INDEX for label in labels):
        raise NothingLearnedError(f"{dataset.name_of(i)}: nothing of an answer is left within {dataset.limits(i)}")
    return True


def check_rows(dataset: ConversationDataset, path: str) -> int:
    """Check every row of the file `path`, each rank its share; returns how many rows are cut, over all ranks.

    Takes about 0.2 ms for a row that cannot be too long, else 1.5 ms; with a template that is not ours 1 ms more.
    Raises:
        ValueError: naming file and row: see check_row; or the template leaves nothing to learn.
    """
    rank, ranks = rank_and_ranks()
    error, cut = None, 0
    try:
        check_template(dataset)
        bound = TokenBound(dataset.processor.tokenizer)
        share = range(rank, len(dataset), ranks)
        for i in tqdm(share, desc="checking rows", unit_scale=ranks, delay=2, leave=False, disable=rank > 0):
            cut += check_row(dataset, i, bound)
    except ValueError as found:
        error = type(found), str(found)
    results = on_all_ranks((error, cut))  # all of them stop, or none
    for failed in (failed for failed, _ in results if failed):
        kind, message = failed
        raise kind(f"{path}: {message}")
    return sum(cut for _, cut in results)


def check_template(dataset: ConversationDataset, rows: int = 64) -> None:
    """Stop where the template makes nothing of the first rows an answer: what it does with these it does with all."""
    rows = min(rows, len(dataset))
    labels = (label for i in range(rows) for label in dataset.encode(i, whole=True)[1])
    if all(label == IGNORE_INDEX for label in labels):
        raise NothingLearnedError(f"every label of the first {rows} rows is ignored; check --version")
