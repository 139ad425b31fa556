"""Two CPU ranks under DeepSpeed's launcher: the losses of one process, and no rank that waits for another."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_drip.assistant.build import load_assistant
from llava_drip.assistant.projector import PLACE_DIM
from llava_drip.instruct.stage import run_stage

from .conftest import REPOSITORY, SCRIPTS, common, environment, fingerprints, losses, parts

pytest.importorskip("deepspeed", reason="deepspeed is not installed (extra: train)")
LAUNCHER = Path(sys.executable).parent / "deepspeed"
STEPS = 3


def launch(stage: str, config: str, *flags: object) -> str:
    """flags: as the program takes them, a recipe first or none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [
        sys.executable,
        LAUNCHER,
        "--num_gpus",
        "2",
        "--master_port",
        port,
        REPOSITORY / "scripts" / SCRIPTS[stage],
    ]
    command += [*flags, "--deepspeed", REPOSITORY / "scripts" / "deepspeed" / config]
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,  # the launcher's children end with it, should it hang
    )
    try:
        printed, _ = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, printed[-8000:]
    return printed


def test_zero2_gives_the_losses_of_one_process(tiny_language_model, tiny_tower, tiny_world, tmp_path):
    data = ["--data_path", tiny_world.caption_train, "--image_folder", tiny_world.images, "--version", "plain"]
    one, two = tmp_path / "one", tmp_path / "two"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data_path: {tiny_world.caption_train}\nimage_folder: {tiny_world.images}\nversion: plain\n")
    launch("pretrain", "zero2.json", recipe, *parts(tiny_language_model, tiny_tower, two), *common(4, STEPS))
    run_stage("pretrain", [*parts(tiny_language_model, tiny_tower, one), *map(str, data), *common(8, STEPS)])
    assert losses(two) == pytest.approx(losses(one), abs=1e-3) and len(losses(two)) == STEPS
    single, double = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert single.keys() == double.keys()
    for key, value in single.items():
        torch.testing.assert_close(double[key], value, atol=2e-4, rtol=0, msg=key)


def test_zero3_with_ranks_that_have_text_alone(tiny_checkpoint, tiny_world, tmp_path):
    rows = json.loads(tiny_world.instruct_train.read_text())[: 4 * STEPS]
    for row in (row for i, row in enumerate(rows) if i % 8 in (1, 2, 3, 6)):
        del row["image"]
        row["conversations"][0]["value"] = row["conversations"][0]["value"].replace("<image>", "").strip()
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps(rows))
    flags = ["--model_name_or_path", tiny_checkpoint, "--data_path", path, "--image_folder", tiny_world.images]
    prefix, weights = "multi_modal_projector.", load_file(tiny_checkpoint / "model.safetensors")
    projector = {key.removeprefix(prefix): 2 * value for key, value in weights.items() if key.startswith(prefix)}
    save_file(projector, tmp_path / "mm_projector.safetensors")
    flags += ["--pretrain_mm_mlp_adapter", tmp_path / "mm_projector.safetensors"]
    one, two = tmp_path / "one", tmp_path / "two"
    # One row a rank, in order: the second has text alone, both have, none has, the first has, and so on.
    flags += ["--train_sampling_strategy", "sequential"]
    launch("finetune", "zero3.json", *flags, *common(1, 2 * STEPS), "--output_dir", two)
    run_stage("finetune", list(map(str, [*flags, *common(2, 2 * STEPS), "--output_dir", one])))
    assert losses(two) == pytest.approx(losses(one), abs=5e-3) and len(losses(two)) == 2 * STEPS
    before, after = (fingerprints(load_file(p / "model.safetensors")) for p in (tiny_checkpoint, two))
    assert {name for name in after if before[name] != after[name]} == {"multi_modal_projector", "language_model"}
    assert (two / "mm_projector.safetensors").is_file()


def test_offloading_is_zero3_with_parts_on_the_cpu():
    """It is not run: it compiles an optimizer, which takes too long here (docs/guides/robust_training.md)."""
    whole, offloaded = (
        json.loads((REPOSITORY / "scripts" / "deepspeed" / f"{name}.json").read_text())
        for name in ("zero3", "zero3_offload")
    )
    for part in ("optimizer", "param"):
        assert offloaded["zero_optimization"].pop(f"offload_{part}") == {"device": "cpu", "pin_memory": True}
    assert offloaded == whole


def random_projector(directory: Path) -> dict[str, torch.Tensor]:
    """A projector with segment positions, in mm_projector.safetensors: ZeRO-3 would begin with other random weights."""
    torch.manual_seed(0)
    shapes = {"0": (64, 96), "2": (64, 64), "position": (64, PLACE_DIM)}
    projector = {f"{name}.weight": torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
    projector |= {f"{name}.bias": torch.randn(64) for name in shapes}
    save_file(projector, directory / "mm_projector.safetensors")
    return projector


@pytest.mark.slow
def test_zero3_in_bf16_from_a_language_model_and_a_projector(tiny_language_model, tiny_tower, tiny_world, tmp_path):
    """LLaVA's way into stage 2: ZeRO-3 makes the language model, and the other parts are made apart."""
    adapter = random_projector(tmp_path)
    flags = ["--mm_segment_positions", "true", "--pretrain_mm_mlp_adapter", tmp_path]
    flags += ["--version", "v1", "--bf16", "true"]
    flags += ["--data_path", tiny_world.instruct_train, "--image_folder", tiny_world.images]
    one, two = tmp_path / "one", tmp_path / "two"
    launch("finetune", "zero3.json", *parts(tiny_language_model, tiny_tower, two), *flags, *common(2, STEPS))
    run_stage("finetune", [*parts(tiny_language_model, tiny_tower, one), *map(str, flags), *common(4, STEPS)])
    assert losses(two) == pytest.approx(losses(one), abs=0.05) and len(losses(two)) == STEPS
    result, alone = load_file(two / "model.safetensors"), load_file(one / "model.safetensors")
    assert result.keys() == alone.keys() and {value.dtype for value in result.values()} == {torch.bfloat16}
    assert {value.dtype for key, value in alone.items() if not key.startswith("vision_tower")} == {torch.float32}
    for key, value in alone.items():  # learning rate 2e-3, and bf16 rounds what is near 4 by 1/64
        torch.testing.assert_close(result[key].float(), value.float(), atol=0.02, rtol=0, msg=key)
    trained = load_file(two / "mm_projector.safetensors")
    assert trained.keys() == adapter.keys() and any(not torch.equal(trained[k], adapter[k].bfloat16()) for k in adapter)


@pytest.mark.slow
def test_lora_under_zero2(tiny_checkpoint, tiny_world, tmp_path):
    flags = ["--model_name_or_path", tiny_checkpoint, "--data_path", tiny_world.instruct_train, "--lora_enable", "true"]
    flags += ["--image_folder", tiny_world.images, "--lora_r", "4", "--lora_dropout", "0", "--mm_projector_lr", "1e-3"]
    one, two = tmp_path / "one", tmp_path / "two"
    launch("finetune", "zero2.json", *flags, *common(2, STEPS), "--output_dir", two)
    run_stage("finetune", list(map(str, [*flags, *common(4, STEPS), "--output_dir", one])))
    assert losses(two) == pytest.approx(losses(one), abs=1e-3) and len(losses(two)) == STEPS
    single, double = (load_file(path / "adapter_model.safetensors") for path in (one, two))
    assert single.keys() == double.keys()
    for key, value in single.items():
        torch.testing.assert_close(double[key], value, atol=5e-4, rtol=0, msg=key)


@pytest.mark.slow
def test_lora_under_zero3_from_a_language_model_and_a_tower(tiny_language_model, tiny_tower, tiny_world, tmp_path):
    """LoRA, projector, tower and rows of new tokens were parted among the ranks; the result has them whole."""
    before = random_projector(tmp_path)
    flags = ["--mm_segment_positions", "true", "--pretrain_mm_mlp_adapter", tmp_path, "--version", "v1"]
    flags += ["--data_path", tiny_world.instruct_train, "--image_folder", tiny_world.images]
    flags += ["--lora_enable", "true", "--lora_r", "4", "--lora_alpha", "8", "--lora_dropout", "0"]
    one, two = tmp_path / "one", tmp_path / "two"
    launch("finetune", "zero3.json", *parts(tiny_language_model, tiny_tower, two), *flags, *common(2, STEPS))
    run_stage("finetune", [*parts(tiny_language_model, tiny_tower, one), *map(str, flags), *common(4, STEPS)])
    # The first is that of the start: LoRA's B is 0. Then other random weights in its A tell.
    assert losses(two)[0] == pytest.approx(losses(one)[0], abs=5e-3)
    assert losses(two) == pytest.approx(losses(one), abs=0.05) and len(losses(two)) == STEPS
    single, double = (load_file(path / "adapter_model.safetensors") for path in (one, two))
    assert {key: value.shape for key, value in single.items()} == {key: value.shape for key, value in double.items()}
    assert all(value.any() for key, value in double.items() if "lora_B" in key)
    loaded = load_assistant(two)[0].state_dict()
    tower = load_file(tiny_tower / "model.safetensors")
    assert tower and all(torch.equal(loaded[f"vision_tower.{key}"], value) for key, value in tower.items())
    trained = load_file(two / "mm_projector.safetensors")
    assert trained.keys() == before.keys() and not any(torch.equal(trained[key], before[key]) for key in before)
    assert all(torch.equal(loaded[f"multi_modal_projector.{key}"], value) for key, value in trained.items())
    # What is loaded is the base with LoRA's change.
    language = load_file(tiny_language_model / "model.safetensors")
    for key, value in language.items():
        name = f"base_model.model.language_model.{key.removesuffix('.weight')}.lora"
        change = 2 * double[f"{name}_B.weight"] @ double[f"{name}_A.weight"] if f"{name}_A.weight" in double else 0
        torch.testing.assert_close(
            loaded[f"language_model.{key}"][: len(value)], value + change, atol=1e-6, rtol=0, msg=key
        )
