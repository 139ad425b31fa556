"""Shapes of language models by name; which samples each case gets, in which order; turns."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from llava_drip.instruct.stage_cost.plan import LANGUAGE_MODELS, Case, text_config


@pytest.mark.parametrize("name, billions", [("vicuna-7b", 6.738), ("vicuna-13b", 13.016), ("tinyllama-1.1b", 1.100)])
def test_named_shapes_have_as_many_parameters_as_the_published(name, billions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text_config(name))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)
    assert set(LANGUAGE_MODELS) == {"vicuna-7b", "vicuna-13b", "tinyllama-1.1b"}


def test_a_directory_needs_no_weights(tiny_language_model, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_language_model / "config.json").read_bytes())
    config = text_config(str(tmp_path), layers=1)
    assert (config.hidden_size, config.num_hidden_layers) == (64, 1)
    (tmp_path / "config.json").write_text(
        '{"model_type": "qwen3", "num_hidden_layers": 3, "layer_types": ["full_attention", "full_attention", "full_attention"]}'
    )
    assert text_config(str(tmp_path), layers=2).layer_types == ["full_attention"] * 2


@pytest.mark.parametrize(
    "name, layers, message",
    [
        ("vicuna-8b", None, "--language_model vicuna-8b: neither a directory with a config.json nor one of vicuna-7b"),
        ("vicuna-7b", 33, "--layers 33: vicuna-7b has 32"),
        ("vicuna-7b", 0, "--layers 0"),
    ],
)
def test_mistakes(name, layers, message):
    with pytest.raises(ValueError, match=message):
        text_config(name, layers)


def test_a_configuration_that_cannot_be_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nothing_of_this_name"}')
    with pytest.raises(ValueError, match="config.json: cannot be read"):
        text_config(str(tmp_path))


def test_every_arrangement_gets_every_sample_once(plan):
    mine = plan(arrangements=("packed", "padded", "grouped"), compressions=(1.0, 4.0), seed=3)
    for case in mine.cases:
        assert sorted(i for batch in mine.batches(case, 64) for i in batch) == list(range(8))
    packed, padded, grouped = (mine.batches(Case(4.0, how), 64) for how in mine.arrangements)
    assert packed == padded != grouped
    lengths = [mine.samples[i].text + 16 * mine.samples[i].images for batch in grouped for i in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert plan(seed=4).pool != mine.pool
    with pytest.raises(ValueError, match="8 samples of finetune, but --rounds 5 x --batch_size 2 are 10"):
        plan(rounds=5)  # before any stage is measured


def test_cases_take_turns(plan):
    mine = plan(arrangements=("packed", "padded"), compressions=(1.0, 4.0))
    steps = mine.steps(mine.cases, 64)
    assert len(steps) == 5 * 4 and [step.warm for step in steps].count(True) == 4
    rounds = [steps[i : i + 4] for i in range(0, 20, 4)]
    assert all({step.case for step in each} == set(mine.cases) for each in rounds)
    assert [each[0].case for each in rounds] == [*mine.cases, mine.cases[0]]
    for number, each in enumerate(rounds):  # the first round's batch warms up
        assert {step.samples for step in each} == {mine.batches(mine.cases[0], 64)[max(0, number - 1)]}
    assert mine.steps([], 64) == []
