"""What a flag that was left out stands for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava_drip.assistant.build import build_assistant
from llava_drip.instruct.arguments import DataArguments, ModelArguments
from llava_drip.instruct.parts import resolve
from llava_drip.instruct.stage import run_stage
from llava_drip.towers.io import load_tower, save_tower

from .conftest import common, parts


def test_a_budget_that_was_saved_is_the_default(tiny_language_model, tiny_tower, tmp_path):
    tower = load_tower(str(tiny_tower))
    tower.set_compression(5.0)
    budgeted = save_tower(tower, tmp_path / "tower", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    for part in build_assistant(str(tiny_language_model), str(budgeted)):
        part.save_pretrained(tmp_path / "assistant")
    for model in (
        ModelArguments(str(tiny_language_model), vision_tower=str(budgeted)),
        ModelArguments(str(tmp_path / "assistant")),
    ):
        assert resolve("pretrain", model, DataArguments("rows.json"))[0].compression == 5.0
    without = ModelArguments(str(tiny_language_model), vision_tower=str(tiny_tower))
    assert resolve("pretrain", without, DataArguments("rows.json"))[0].compression is None


@pytest.mark.parametrize("pad", [0, None, -1])
def test_a_language_model_with_sampling_defaults(tiny_language_model, tiny_tower, tiny_world, tmp_path, pad):
    """Such as Vicuna's: transformers refuses to save them with do_sample off, once anything was changed."""
    vicuna = Path(shutil.copytree(tiny_language_model, tmp_path / "vicuna"))
    given = {"temperature": 0.9, "top_p": 0.6, "pad_token_id": pad, "bos_token_id": 1, "eos_token_id": 2}
    (vicuna / "generation_config.json").write_text(json.dumps(given))
    data = ["--data_path", str(tiny_world.caption_train), "--image_folder", str(tiny_world.images), *common(2, 1)]
    aligned = run_stage("pretrain", [*parts(vicuna, tiny_tower, tmp_path / "aligned"), *data])
    told = json.loads((aligned / "generation_config.json").read_text())
    assert told.get("temperature") is None and told.get("top_p") is None and told["eos_token_id"] == 2
    told = {**told, **given}  # as an older version of transformers, or another program, left it
    (aligned / "generation_config.json").write_text(json.dumps(told))
    tuned = run_stage(
        "finetune", ["--model_name_or_path", str(aligned), "--output_dir", str(tmp_path / "tuned"), *data]
    )
    assert (tuned / "config.json").is_file()


def test_sampling_defaults_that_are_used_are_kept(tiny_language_model, tiny_tower, tmp_path):
    qwen = Path(shutil.copytree(tiny_language_model, tmp_path / "qwen"))
    (qwen / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.7, "top_k": 20}))
    config = build_assistant(str(qwen), str(tiny_tower))[0].generation_config
    assert (config.temperature, config.top_k) == (0.7, 20)


def test_what_transformers_would_not_save_is_said_before_training(tiny_language_model, tiny_tower, tmp_path):
    odd = Path(shutil.copytree(tiny_language_model, tmp_path / "odd"))
    (odd / "generation_config.json").write_text(json.dumps({"length_penalty": 2.0}))
    with pytest.raises(
        ValueError, match="odd/generation_config.json: transformers could not save it again: .*length_penalty"
    ):
        build_assistant(str(odd), str(tiny_tower))


@pytest.mark.parametrize("name", ["model_name_or_path", "vision_tower"])
def test_a_result_does_not_replace_what_it_is_made_from(tiny_language_model, tiny_tower, tiny_world, tmp_path, name):
    own = Path(shutil.copytree({"vision_tower": tiny_tower}.get(name, tiny_language_model), tmp_path / "own"))
    flags = parts(tiny_language_model, tiny_tower, own)
    flags[flags.index(f"--{name}") + 1] = str(own)
    data = ["--data_path", str(tiny_world.caption_train), "--image_folder", str(tiny_world.images), *common(2, 1)]
    with pytest.raises(ValueError, match=f"--output_dir .*own: is --{name}, which the result would replace"):
        run_stage("pretrain", [*flags, *data])


def test_a_path_in_a_recipe_may_begin_with_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = ModelArguments("m", pretrain_mm_mlp_adapter="~/mm_projector.safetensors")
    assert model.pretrain_mm_mlp_adapter == str(tmp_path / "mm_projector.safetensors")
    assert DataArguments("rows.json", image_folder="~/images").image_folder == str(tmp_path / "images")
