"""Recipes and flags."""

from __future__ import annotations

import json

import pytest
import yaml

from llava_drip.instruct.arguments import parse

NEEDED = ["--model_name_or_path", "lm", "--data_path", "chat.json"]


def parsed(*argv: str):
    return parse(list(argv), "finetune.py", "test")


def test_flags(tmp_path):
    model, data, args = parsed(*NEEDED, "--output_dir", str(tmp_path), "--vision_tower", "t", "--learning_rate", "1e-5")
    assert (model.model_name_or_path, model.vision_tower, model.mm_vision_select_layer) == ("lm", "t", None)
    assert (data.data_path, data.image_folder, data.model_max_length) == ("chat.json", None, None)
    assert args.learning_rate == 1e-5 and args.remove_unused_columns is False and not args.logging_nan_inf_filter
    assert list(tmp_path.iterdir()) == []


def test_a_flag_wins_over_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "version: plain\nlearning_rate: 1.0e-3\nwarmup_ratio: 0.1\nlogging_steps: 7\ngradient_checkpointing: true\n"
        "image_folder: null\nmodel_max_length: 99\n"
    )
    flags = [*NEEDED, "--output_dir", str(tmp_path / "out"), "--learning_rate", "5e-4", "--version", "vicuna_v1"]
    model, data, args = parsed(str(recipe), *flags)
    assert (model.version, args.learning_rate) == ("vicuna_v1", 5e-4)
    assert (args.logging_steps, args.gradient_checkpointing, data.model_max_length) == (7, True, 99)
    assert args.get_warmup_steps(200) == 20


@pytest.mark.parametrize("launchers", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"]])
def test_a_recipe_is_read_behind_the_launchers_flags(launchers, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_max_length: 99\n")
    _, data, args = parsed(*launchers, str(recipe), *NEEDED, "--output_dir", str(tmp_path / "out"))
    assert (data.model_max_length, args.local_rank) == (99, 1)


def test_warmup_steps_win_over_the_ratio(tmp_path):
    flags = [*NEEDED, "--output_dir", str(tmp_path / "out")]
    for given, steps in (([], 6), (["--warmup_steps", "0"], 0), (["--warmup_steps", "9", "--warmup_ratio", "0.5"], 9)):
        assert parsed(*flags, *given)[2].get_warmup_steps(200) == steps


@pytest.mark.parametrize("name", ["pretrain_558k", "finetune_158k"])
def test_our_recipes_are_understood(name, repository, tmp_path):
    recipe = repository / "scripts" / "recipes" / f"{name}.yaml"
    deepspeed = repository / "scripts" / "deepspeed" / "zero2.json"
    flags = [*NEEDED, "--output_dir", str(tmp_path / "out"), "--bf16", "false", "--deepspeed", str(deepspeed)]
    pytest.importorskip("deepspeed")
    model, _, args = parsed(str(recipe), *flags)
    assert args.learning_rate == {"pretrain_558k": 1e-3, "finetune_158k": 2e-5}[name]
    assert model.version == {"pretrain_558k": "plain", "finetune_158k": "vicuna_v1"}[name]
    named = (recipe.parent / yaml.safe_load(recipe.read_text())["deepspeed"]).resolve()
    assert named == deepspeed.parent / {"pretrain_558k": "zero2.json", "finetune_158k": "zero3.json"}[name]
    assert json.loads(named.read_text())["train_batch_size"] == "auto"


def test_a_recipe_finds_its_deepspeed_file_from_anywhere(repository, tmp_path, monkeypatch, capsys):
    pytest.importorskip("deepspeed")
    monkeypatch.chdir(tmp_path)
    flags = [*NEEDED, "--output_dir", str(tmp_path / "out"), "--bf16", "false"]
    recipes = repository / "scripts" / "recipes"
    args = parsed(str(recipes / "pretrain_558k.yaml"), *flags)[2]
    assert args.hf_deepspeed_config.get_value("zero_optimization.stage") == 2
    (tmp_path / "own").mkdir()
    recipe = tmp_path / "own" / "recipe.yaml"
    recipe.write_text("deepspeed: zero.json\n")
    config = json.loads((recipes.parent / "deepspeed" / "zero2.json").read_text())
    for place, bucket in ((tmp_path, 1000), (tmp_path / "own", 2000)):  # the recipe's own folder comes first
        config["zero_optimization"]["reduce_bucket_size"] = bucket
        (place / "zero.json").write_text(json.dumps(config))
        args = parsed(str(recipe), *flags)[2]
        assert args.hf_deepspeed_config.get_value("zero_optimization.reduce_bucket_size") == bucket
    recipe.write_text("deepspeed: nowhere.json\n")
    with pytest.raises(SystemExit) as stop:
        parsed(str(recipe), *flags)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and f"{recipe}: deepspeed: no such file" in line and "own/nowhere.json" in line


@pytest.mark.parametrize(
    "argv, message",
    [
        ([*NEEDED, "--output_dir", "out", "--learning_rat", "1"], "--learning_rat"),
        ([*NEEDED, "--output_dir", "out", "--nonsense"], "--nonsense"),
        (["--data_path", "x", "--output_dir", "out"], "--model_name_or_path"),
        (NEEDED, "--output_dir is missing"),
        ([*NEEDED, "--output_dir", "out", "--max_steps", "many"], "--max_steps"),
        ([*NEEDED, "--output_dir", "out", "--model_max_length", "0"], "--model_max_length must be at least 1, got 0"),
        (["none.yaml", *NEEDED], "none.yaml: no such recipe"),
        (["recipe.txt", *NEEDED], "recipe.txt: a recipe must be a .yaml file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("finetune.py: error:") and message in lines[0]


@pytest.mark.parametrize(
    "text, message",
    [("learning_rat: 1", "unknown flag 'learning_rat'"), ("- a\n- b", "must hold"), ("a: [", "not valid YAML")],
)
def test_a_mistake_in_a_recipe_names_file_and_key(text, message, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(SystemExit) as stop:
        parsed(str(recipe), *NEEDED)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and str(recipe) in line and message in line
