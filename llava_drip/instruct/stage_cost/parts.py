"""The assistant of a plan, with random weights, and rows of its lengths: noise for pictures and text, which cost the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

from llava_drip.assistant.configuration import LlavaDripConfig
from llava_drip.assistant.expand import IGNORE_INDEX
from llava_drip.assistant.modeling import LlavaDripForConditionalGeneration
from llava_drip.assistant.packing import why_not_packed
from llava_drip.instruct.row_check import resolve_max_length
from llava_drip.instruct.stage_cost.lengths import Sample
from llava_drip.instruct.stage_cost.plan import Plan, text_config
from llava_drip.measure.speed import DTYPES, varied_counts
from llava_drip.towers.contract import check_budget
from llava_drip.towers.io import describe_tower, load_tower


def make_assistant(plan: Plan) -> LlavaDripForConditionalGeneration:
    """On the plan's device, in its dtype. Weights are random, but for a tower's from a directory: cost does not depend on them.

    Raises:
        ValueError: a language model, tower, compression or arrangement that cannot be had.
    """
    torch.manual_seed(plan.seed)
    config = text_config(plan.language_model, plan.layers)
    if "packed" in plan.arrangements and (why := why_not_packed(config)):
        raise ValueError(f"--packing packed: {why}")
    tower = load_tower(plan.vision_tower)
    if any(compression != 1 for compression in plan.compressions):
        check_budget(tower, plan.vision_tower)
    with torch.device(plan.device):  # where 7 billion random numbers take seconds
        language_model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[plan.dtype])
    whole = LlavaDripConfig(
        text_config=config,
        vision_config=describe_tower(tower),
        projector_type=plan.mm_projector_type,
        image_token_id=config.vocab_size - 1,
    )
    return LlavaDripForConditionalGeneration(whole, tower, language_model).to(plan.device)


def fitted(plan: Plan, model: LlavaDripForConditionalGeneration) -> Plan:
    """The plan with samples cut to the language model's positions, as training cuts rows that are longer.

    Raises:
        ValueError: a sample of whose answer nothing is left.
    """
    positions, patches = resolve_max_length(None, model.config.text_config), model.vision_tower.patch_embed.num_patches
    samples = []
    for i, sample in enumerate(plan.samples):
        samples.append(sample.cut(positions, patches))
        if samples[-1].learned < 1:
            raise ValueError(
                f"--lengths: sample {i} ({sample.text} text tokens, {sample.images} images of up to {patches} tokens): nothing "
                f"of its answer is left within the {positions} positions of the language model; leave it out"
            )
    return dataclasses.replace(plan, samples=tuple(samples))


class Budgets:
    """Compressions of the pictures of a batch: around the case's, the same for a picture in every arrangement."""

    def __init__(self, plan: Plan, model: LlavaDripForConditionalGeneration):
        self.samples, self.model = plan.samples, model
        self.of_sample: dict[tuple[float, int], list[float]] = {}
        patches, images = model.vision_tower.patch_embed.num_patches, sum(plan.samples[i].images for i in plan.pool)
        for compression in plan.compressions:
            generator = torch.Generator().manual_seed(plan.seed)
            counts = iter(varied_counts(max(1, images), patches, compression, plan.spread, generator).tolist())
            for i in plan.pool:
                self.of_sample[compression, i] = [patches / next(counts) for _ in range(plan.samples[i].images)]

    def ask(self, compression: float, samples: Sequence[int]) -> None:
        """Of the tower, for the pictures of these samples; dense at 1. A tower whose counts do not vary gets the number."""
        tower = self.model.vision_tower
        if not hasattr(tower, "set_compression"):
            return
        each = [budget for i in samples for budget in self.of_sample[compression, i]]
        varies = compression != 1 and getattr(tower, "counts_vary", False) and each
        self.model.set_compression(torch.tensor(each) if varies else compression)


class NoiseRows(Dataset):
    """Rows as ConversationDataset gives them, of the lengths of samples; a sample's is the same each time."""

    def __init__(self, samples: Sequence[Sample], model: LlavaDripForConditionalGeneration, order: Sequence[int]):
        """order: which sample each row is."""
        self.samples, self.order = samples, order
        self.image, self.side = model.config.image_token_id, model.config.vision_config["image_size"]

    def __len__(self) -> int:
        return len(self.order)

    def name_of(self, i: int) -> str:
        """For messages."""
        return f"sample {self.order[i]}"

    def __getitem__(self, i: int) -> dict[str, Tensor | None]:
        sample, generator = self.samples[self.order[i]], torch.Generator().manual_seed(self.order[i])
        text = torch.randint(self.image, (sample.text,), generator=generator)
        first = min(1, sample.text - sample.learned)  # the start mark, where there is one
        ids = torch.cat([text[:first], torch.full((sample.images,), self.image), text[first:]])
        labels = ids.clone()
        labels[: len(ids) - sample.learned] = IGNORE_INDEX
        size = (sample.images, 3, self.side, self.side)
        pixels = torch.randn(size, generator=generator) if sample.images else None
        return {"input_ids": ids, "labels": labels, "pixel_values": pixels}
