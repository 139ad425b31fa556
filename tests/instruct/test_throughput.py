"""Packed rows, rows of like length, budgets drawn in tuning: the same losses, less padding, what the log says of it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText

from llava_drip.instruct.cost import EpochCost
from llava_drip.instruct.data import load_records
from llava_drip.instruct.elastic import ElasticBudget
from llava_drip.instruct.sampler import SeededLengthGroupedSampler, rough_lengths
from llava_drip.instruct.stage import run_stage

from .conftest import common, losses, parts

pytestmark = pytest.mark.usefixtures("one_thread")


def tuning(language_model, tower, world, output: Path, *flags: object, steps: int = 6) -> Path:
    run_stage(
        "finetune",
        [
            *parts(language_model, tower, output),
            *("--version", "vicuna_v1", "--data_path", str(world.instruct_train), "--image_folder", str(world.images)),
            *common(batch_size=6, steps=steps),
            *map(str, flags),
        ],
    )
    return output


def logged(output: Path) -> list[dict]:
    return [row for row in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in row]


@pytest.fixture(scope="module")
def packed(tiny_language_model, tiny_tower, tiny_world, tmp_path_factory) -> Path:
    return tuning(tiny_language_model, tiny_tower, tiny_world, tmp_path_factory.mktemp("packed") / "out")


def test_packed_rows_learn_what_padded_ones_do(packed, tiny_language_model, tiny_tower, tiny_world, tmp_path):
    padded = tuning(tiny_language_model, tiny_tower, tiny_world, tmp_path / "out", "--packing", "false")
    assert losses(packed) == pytest.approx(losses(padded), abs=2e-4) and losses(packed)[-1] < losses(packed)[0]
    assert all(row["non_padding"] == 1 for row in logged(packed))
    assert all(0.4 < row["non_padding"] < 0.99 for row in logged(padded))
    for mine, other in zip(logged(packed), logged(padded), strict=True):
        # as many positions without padding, over the seconds of the same steps
        tokens = mine["tokens_per_second"] / mine["samples_per_second"]
        assert tokens == pytest.approx(other["tokens_per_second"] / other["samples_per_second"])
        assert mine["samples_per_second"] > 0 and mine["step_peak_memory_gib"] > 0.1


def test_rows_of_like_length(tiny_world, tiny_language_model, tiny_tower, tmp_path):
    class Rows:
        records, image_tokens = load_records(tiny_world.instruct_train, tiny_world.images), 64

    lengths = rough_lengths(Rows)
    words = [len(turn["value"].split()) for turn in Rows.records[0]["conversations"]]
    assert lengths[0] == sum(words) + 64
    sampler = SeededLengthGroupedSampler(4, lengths, seed=3)
    first, again = list(sampler), list(SeededLengthGroupedSampler(4, lengths, seed=3))
    assert first == again and sorted(first) == list(range(len(lengths)))
    sampler.set_epoch(1)
    assert list(sampler) != first
    loader = Accelerator(cpu=True).prepare(DataLoader(range(len(lengths)), batch_size=4, sampler=sampler))
    epochs = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)  # as the Trainer does
        epochs.append(torch.cat(list(loader)).tolist())
    assert epochs[0] == first and epochs[1] != first
    padded = ("--packing", "false")
    mixed = tuning(tiny_language_model, tiny_tower, tiny_world, tmp_path / "mixed", *padded, steps=12)
    alike = tuning(
        *(tiny_language_model, tiny_tower, tiny_world, tmp_path / "alike", *padded),
        *("--train_sampling_strategy", "group_by_length"),
        steps=12,
    )
    share = [sum(row["non_padding"] for row in logged(run)) / 12 for run in (mixed, alike)]
    assert share[1] > share[0] + 0.02, share


def test_one_assistant_for_every_budget(tiny_language_model, tiny_tower, tiny_world, tmp_path, monkeypatch):
    drawn = []
    draw = ElasticBudget.draw
    monkeypatch.setattr(ElasticBudget, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    flags = ("--elastic_compression", 1, 10, "--save_strategy", "steps", "--save_steps", 3)
    output = tuning(tiny_language_model, tiny_tower, tiny_world, tmp_path / "out", *flags)
    seen = torch.cat(drawn)
    assert (
        len(seen) == 36
        and seen.min() >= 1
        and seen.max() <= 10
        and seen.std() > 1
        and losses(output)[-1] < losses(output)[0]
    )
    model = AutoModelForImageTextToText.from_pretrained(output)
    assert "budget" not in model.config.vision_config and model.vision_tower.budget is None
    pixels = torch.randn(2, 3, 64, 64)
    for compression, tokens in ((1, 64), (4, 16), (10, 6)):
        model.set_compression(compression)
        assert model.eval().encode_images(pixels).lengths.tolist() == [tokens, tokens]

    # Resumed after step 3: the same budgets, the same losses.
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(output / "checkpoint-3", again / "checkpoint-3")
    drawn.clear()
    tuning(tiny_language_model, tiny_tower, tiny_world, again, *flags, "--resume_from_checkpoint", "latest")
    assert torch.equal(torch.cat(drawn), seen[18:]) and losses(again) == losses(output)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--elastic_compression", 4, 2), "--elastic_compression 4 2: must be LOW HIGH"),
        (("--elastic_compression", 0.5, 2), "--elastic_compression 0.5 2: must be LOW HIGH"),
        (("--elastic_compression", 4), "--elastic_compression 4: must be LOW HIGH"),
        (("--elastic_compression", 1, 2, 3), "--elastic_compression 1 2 3: must be LOW HIGH"),
        (("--elastic_compression", 1, 4, "--compression", 2), "leave one of them out"),
        (("--data_seed", -1), "--data_seed must be at least 0"),
        (("--elastic_compression", 1, 4, "--vision_tower", "plain_vit_mini_patch8_64"), "give a DRIP tower"),
    ],
)
def test_mistakes(flags, message, tiny_language_model, tiny_tower, tiny_world, tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)) as stopped:
        tuning(tiny_language_model, tiny_tower, tiny_world, tmp_path / "out", *flags)
    assert message in f"{stopped.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_what_is_passed_over_after_a_resumption_is_no_part_of_a_step():
    cost, at = EpochCost(), {"args": None, "control": None}
    cost.on_train_begin(state=SimpleNamespace(global_step=3), **at)
    cost.on_epoch_begin(state=None, **at)
    time.sleep(0.3)  # data of three steps
    for _ in range(2):
        cost.on_step_begin(state=None, **at)
        time.sleep(0.05)
        cost.on_step_end(state=None, **at)
    assert all(0.05 <= seconds < 0.25 for seconds in cost.clock.seconds)
    seconds, memory = cost.recent()
    assert seconds == pytest.approx(sum(cost.clock.seconds)) and memory > 0.1 and cost.recent() == (0.0, 0.0)
