"""Plans small enough for a test: a LLaMA of width 64, a tower of 64 patches."""

from __future__ import annotations

import dataclasses

import pytest

from llava_drip.instruct.stage_cost.lengths import Sample
from llava_drip.instruct.stage_cost.plan import Plan

TEXTS = (61, 31, 20, 45, 25, 15, 33, 52)


@pytest.fixture
def plan(tiny_language_model):
    """plan(**changes): 8 samples, of which one is text alone and one has two pictures."""
    samples = [Sample(text, text // 2, 1) for text in TEXTS]
    samples[1], samples[2] = (
        dataclasses.replace(one, images=images) for one, images in ((samples[1], 0), (samples[2], 2))
    )
    base = Plan(
        "finetune",
        tuple(samples),
        language_model=str(tiny_language_model),
        vision_tower="drip_mini_patch8_64_4x",
        batch_size=2,
        rounds=4,
        warmup=1,
        memory=False,
    )
    return lambda **changes: dataclasses.replace(base, **changes)
