"""Recipes and flags."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml

from llava_drip.instruct.arguments import StageArguments, parse
from llava_drip.instruct.flags import check_gpus, refused_flags

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


@pytest.mark.parametrize(
    "name, learning_rate, version, zero",
    [
        ("pretrain_558k", 1e-3, "plain", "zero2.json"),
        ("finetune_158k", 2e-5, "vicuna_v1", "zero3.json"),
        ("finetune_158k_lora", 2e-4, "vicuna_v1", "zero3.json"),
        ("finetune_158k_qlora", 2e-4, "vicuna_v1", "zero2.json"),
    ],
)
def test_our_recipes_are_understood(name, learning_rate, version, zero, repository, tmp_path):
    recipe = repository / "scripts" / "recipes" / f"{name}.yaml"
    deepspeed = repository / "scripts" / "deepspeed" / "zero2.json"
    flags = [*NEEDED, "--output_dir", str(tmp_path / "out"), "--bf16", "false", "--deepspeed", str(deepspeed)]
    pytest.importorskip("deepspeed")
    model, _, args = parsed(str(recipe), *flags)
    assert args.learning_rate == learning_rate and model.version == version
    assert (model.lora_enable, model.bits) == ("lora" in name, 4 if "qlora" in name else 16)
    named = (recipe.parent / yaml.safe_load(recipe.read_text())["deepspeed"]).resolve()
    assert named == deepspeed.parent / zero
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


def refused(capsys, *argv: str) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and line.startswith("finetune.py: error:")
    return line


@pytest.mark.parametrize(
    "argv, message",
    [
        ([*NEEDED, "--output_dir", "out", "--learning_rat", "1"], "--learning_rat"),
        ([*NEEDED, "--output_dir", "out", "--nonsense"], "--nonsense"),
        (["--data_path", "x", "--output_dir", "out"], "--model_name_or_path"),
        (NEEDED, "--output_dir is missing"),
        ([*NEEDED, "--output_dir", "out", "--max_steps", "many"], "--max_steps"),
        ([*NEEDED, "--output_dir", "out", "--optim", "fast"], "--optim"),
        (["none.yaml", *NEEDED], "none.yaml: no such recipe"),
        (["recipe.txt", *NEEDED], "recipe.txt: a recipe must be a .yaml file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(argv, message, capsys):
    assert message in refused(capsys, *argv)


@pytest.mark.parametrize(
    "flag, values, message",
    [
        ("model_max_length", ["0", "-1"], "at least 1"),
        ("per_device_train_batch_size", ["0", "-4"], "at least 1"),
        ("gradient_accumulation_steps", ["0", "-1"], "at least 1"),
        ("dataloader_prefetch_factor", ["0"], "at least 1"),
        ("ddp_timeout", ["0"], "at least 1"),
        ("dataloader_num_workers", ["-1"], "at least 0"),
        ("save_total_limit", ["-1"], "at least 0"),
        ("weight_decay", ["-0.1", "nan"], "at least 0"),
        ("max_grad_norm", ["-1"], "at least 0"),
        ("warmup_steps", ["-1"], "at least 0"),
        ("neftune_noise_alpha", ["-5"], "at least 0"),
        ("adam_epsilon", ["-0.1"], "at least 0"),
        ("learning_rate", ["-0.001", "nan", "inf"], "at least 0"),
        ("num_train_epochs", ["0", "-1", "inf"], "above 0"),
        ("logging_steps", ["0", "-1"], "above 0"),
        ("save_steps", ["0", "-1"], "above 0"),
        ("max_steps", ["0", "-5"], "at least 1, or -1 to go by --num_train_epochs"),
        ("adam_beta1", ["1", "-0.1"], "at least 0 and below 1"),
        ("adam_beta2", ["2"], "at least 0 and below 1"),
        ("warmup_ratio", ["1", "-0.1", "nan"], "at least 0 and below 1"),
        ("seed", ["-1", str(2**32)], "at least 0 and below 2**32"),
        ("compression", ["0.5", "nan"], "at least 1"),
        ("mm_vision_select_layer", ["0", "3"], "-1 (the last) or less"),
        ("mm_projector_type", ["mlp"], "one of mlp2x_gelu, linear"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_its_flag(flag, values, message, tmp_path, capsys):
    for value in values:
        line = refused(capsys, *NEEDED, "--output_dir", str(tmp_path / "out"), f"--{flag}", value)
        assert f"--{flag} must be {message}" in line and "got " in line


def test_values_at_the_ends_of_their_ranges(tmp_path):
    """What the ranges must leave: transformers' own ways to say "all", "none" and "not given"."""
    flags = ["--max_steps", "-1", "--save_total_limit", "0", "--dataloader_num_workers", "0", "--logging_steps", "0.5"]
    flags += ["--max_grad_norm", "0", "--seed", "0", "--adam_beta1", "0", "--save_strategy", "no", "--save_steps", "0"]
    flags += ["--mm_vision_select_layer", "-1", "--compression", "1", "--eval_strategy", "no", "--do_eval", "false"]
    model, _, args = parsed(*NEEDED, "--output_dir", str(tmp_path / "out"), *flags)
    assert (args.max_steps, args.save_total_limit, args.adam_beta1, model.compression) == (-1, 0, 0, 1)


@pytest.mark.parametrize(
    "flag, value, advice",
    [
        ("do_eval", "true", "eval/llava_bench.py"),
        ("do_predict", "true", "eval/llava_bench.py"),
        ("eval_strategy", "steps", "eval/llava_bench.py"),
        ("eval_steps", "5", "eval/llava_bench.py"),
        ("eval_on_start", "true", "eval/llava_bench.py"),
        ("bf16_full_eval", "true", "eval/llava_bench.py"),
        ("include_for_metrics", "inputs", "eval/llava_bench.py"),
        ("per_device_eval_batch_size", "4", "eval/llava_bench.py"),
        ("load_best_model_at_end", "true", "eval/llava_bench.py"),
        ("metric_for_best_model", "loss", "eval/llava_bench.py"),
        ("save_strategy", "best", "eval/llava_bench.py"),
        ("lr_scheduler_type", "reduce_lr_on_plateau", "eval/llava_bench.py"),
        ("push_to_hub", "true", "hf upload"),
        ("hub_model_id", "me/mine", "hf upload"),
        ("label_smoothing_factor", "0.1", "at the wrong places"),
        ("fsdp", "full_shard", "--deepspeed"),
        ("use_liger_kernel", "true", "no kernels for this model"),
        ("use_cache", "true", "leave it out"),
        ("train_sampling_strategy", "batch_rebalance", "would read every picture"),
        ("optim_args", "eps=1e-6", "takes none; see --adam_beta1"),
        ("optim_target_modules", "all-linear", "takes none, only GaLore and APOLLO do"),
        ("hub_token", "x", "for --report_to trackio"),
        ("report_to", "nowhere", "unknown, or not installed"),
        ("dataloader_persistent_workers", "true", "--dataloader_num_workers 0"),
        ("accelerator_config", '{"split_batches": true}', "split_batches: a batch cannot be cut"),
    ],
)
def test_a_flag_that_would_be_ignored_or_break_the_run_is_refused(flag, value, advice, tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path / "out"), "--dataloader_num_workers", "0"]
    line = refused(capsys, *NEEDED, *flags, f"--{flag}", value)
    assert f"error: --{flag} " in line and advice in line


def test_help_shows_no_flag_that_is_refused(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = capsys.readouterr().out
    assert "--gradient_accumulation_steps" in shown and "--lr_scheduler_type" in shown
    hidden = set(refused_flags(StageArguments))
    assert {"do_eval", "eval_steps", "push_to_hub", "label_smoothing_factor", "fsdp"} <= hidden
    assert not {name for name in hidden if re.search(rf"^ *--{name}\b", shown, re.MULTILINE)}


def test_a_key_that_a_flags_dictionary_may_not_have(tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path / "out"), "--accelerator_config", '{"nonsense": 1}']
    assert "unexpected keyword argument 'nonsense'" in refused(capsys, *NEEDED, *flags)


def test_several_gpus_need_a_launcher(tmp_path, capsys, monkeypatch):
    """As transformers counts them in one process; here there are none to count."""
    args = parsed(*NEEDED, "--output_dir", str(tmp_path / "out"))[2]
    for gpus in (0, 1):
        args._n_gpu = gpus
        check_gpus(args)

    def set_up(args) -> torch.device:
        args._n_gpu = 4
        return torch.device("cpu")

    monkeypatch.setattr(StageArguments, "_setup_devices", property(set_up))
    line = refused(capsys, *NEEDED, "--output_dir", str(tmp_path / "out"))
    assert "4 GPUs and one process: start with deepspeed --num_gpus 4 or torchrun --nproc_per_node 4" in line
    assert "CUDA_VISIBLE_DEVICES=0" in line


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


@pytest.mark.parametrize(
    "content, message",
    [
        (b"seed: 1\nseed: 2\n", "seed is given twice"),
        (b"seed: \xff\n", "not valid YAML"),
        (b"- seed\n", "must hold 'flag: value' lines"),
    ],
)
def test_a_damaged_recipe_is_named(content, message, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(SystemExit):
        parsed(str(tmp_path / "recipe.yaml"), *NEEDED, "--output_dir", str(tmp_path / "out"))
    error = capsys.readouterr().err
    assert "recipe.yaml: " in error and message in error and error.count("\n") == 1


def test_a_recipe_holds_options_of_options(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("gradient_checkpointing_kwargs: {use_reentrant: false}\nlr_scheduler_kwargs:\n  num_cycles: 1\n")
    args = parsed(str(recipe), *NEEDED, "--output_dir", str(tmp_path / "out"))[2]
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False} and args.lr_scheduler_kwargs == {
        "num_cycles": 1
    }
