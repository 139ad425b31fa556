"""Both stages through their programs: what changes, what does not, and what a kill costs."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_drip.assistant import LlavaDripForConditionalGeneration
from llava_drip.instruct.stage import run_stage

from .conftest import common, fingerprints, losses, parts, run, start

STEPS, SAVE = 24, 8
UNMOVED = 1e-30  # a learning rate that moves no weight


def aligning(language_model, tower, world, output_dir) -> list[object]:
    return [
        *("--model_name_or_path", language_model, "--vision_tower", tower, "--version", "plain"),
        *("--data_path", world.caption_train, "--image_folder", world.images, "--output_dir", output_dir),
        *common(batch_size=8, steps=STEPS, learning_rate=5e-3),
        *("--save_strategy", "steps", "--save_steps", SAVE),
    ]


@pytest.fixture(scope="module")
def aligned(tiny_language_model, tiny_tower, tiny_world, tmp_path_factory) -> tuple[Path, str]:
    """Stage 1, uninterrupted: its output directory and what it printed."""
    output = tmp_path_factory.mktemp("aligned") / "out"
    return output, run("pretrain", *aligning(tiny_language_model, tiny_tower, tiny_world, output))


def test_alignment_lowers_the_loss_and_changes_the_projector_only(aligned, tiny_language_model, tiny_tower):
    output, printed = aligned
    seen = losses(output)
    assert len(seen) == STEPS and sum(seen[-5:]) / 5 < sum(seen[:5]) / 5 - 0.05
    table = {cells[1].strip(): cells for cells in (line.split("│") for line in printed.splitlines()) if len(cells) == 7}
    trained = {name: cells[3].strip() for name, cells in table.items()}
    assert (
        trained["language_model"] == trained["vision_tower"] == "-"
        and trained["all"] == trained["multi_modal_projector"]
    )
    assert "40 rows of" in printed
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    costs = [entry for entry in history if "mean_step_seconds" in entry]
    assert [entry["epoch"] for entry in costs] == [1, 2, 3, 4, 4.8], "one an epoch of five steps"
    assert all(entry["peak_memory_gib"] >= entry["mean_peak_memory_gib"] > 0.1 for entry in costs)
    assert all(entry["mean_step_seconds"] > 0 and entry["step_seconds"] > 0 for entry in costs)

    after = load_file(output / "model.safetensors")
    language, tower = load_file(tiny_language_model / "model.safetensors"), load_file(tiny_tower / "model.safetensors")
    for key, value in tower.items():
        if not key.startswith("head."):
            assert torch.equal(after[f"vision_tower.{key}"], value), key
    for key, value in language.items():  # one row longer where <image> was added
        assert torch.equal(after[f"language_model.{key}"][: len(value)], value), key
    projector = load_file(output / "mm_projector.safetensors")
    assert all(torch.equal(after[f"multi_modal_projector.{key}"], value) for key, value in projector.items())
    first = fingerprints(load_file(output / f"checkpoint-{STEPS - SAVE}" / "model.safetensors"))
    last = fingerprints(after)
    assert {name for name in last if first[name] != last[name]} == {"multi_modal_projector"}


def test_the_result_loads_and_answers(aligned, tiny_world):
    output, _ = aligned
    model, processor = AutoModelForImageTextToText.from_pretrained(output), AutoProcessor.from_pretrained(output)
    assert model.config.text_config.use_cache
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("ASSISTANT:"), "the template for chatting is kept, not the alignment's"
    from llava_drip.images import load_image

    inputs = processor(text=prompt, images=[[load_image(next(tiny_world.images.iterdir()))]])
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


def test_tuning_leaves_the_tower_alone(aligned, tiny_world, tmp_path):
    before = fingerprints(load_file(aligned[0] / "model.safetensors"))
    flags = ["--model_name_or_path", aligned[0], "--data_path", tiny_world.instruct_train]
    flags += ["--image_folder", tiny_world.images, "--output_dir", tmp_path / "out", *common(8, 12)]
    run("finetune", *flags)
    after = fingerprints(load_file(tmp_path / "out" / "model.safetensors"))
    assert {name for name in after if before[name] != after[name]} == {"multi_modal_projector", "language_model"}
    seen = losses(tmp_path / "out")
    assert sum(seen[-3:]) < sum(seen[:3]) - 0.5


def test_a_killed_run_resumes_to_the_same_weights(aligned, tiny_language_model, tiny_tower, tiny_world, tmp_path):
    output = tmp_path / "out"
    flags = aligning(tiny_language_model, tiny_tower, tiny_world, output)
    process = start("pretrain", *flags)
    reached = output / f"checkpoint-{SAVE}" / "trainer_state.json"
    deadline = time.monotonic() + 120
    while not reached.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert reached.exists() and process.returncode == -signal.SIGKILL
    assert not (output / "model.safetensors").exists(), "it ended before it was killed"

    # A checkpoint of which the kill left a part: newer than the others, weights of nothing, no trainer_state.json.
    torn = output / "checkpoint-9999"
    shutil.copytree(reached.parent, torn)
    (torn / "trainer_state.json").unlink()
    save_file({"nothing": torch.zeros(1)}, torn / "model.safetensors")
    shutil.copytree(torn, output / "checkpoint-9998")
    (output / "checkpoint-9998" / "trainer_state.json").write_text('{"global_st')

    printed = run("pretrain", *flags, "--resume_from_checkpoint", "latest")
    assert "resuming from" in printed and "9999" not in printed
    resumed, uninterrupted = (load_file(path / "model.safetensors") for path in (output, aligned[0]))
    assert resumed.keys() == uninterrupted.keys()
    for key, value in uninterrupted.items():
        torch.testing.assert_close(resumed[key], value, atol=1e-6, rtol=0, msg=key)
    assert losses(output) == pytest.approx(losses(aligned[0]), abs=1e-4)


def test_the_projector_file_starts_the_second_stage(
    aligned, tiny_language_model, tiny_tower, tiny_world, tmp_path, capsys
):
    """LLaVA's way: the language model and the projector of stage 1, not the assistant that stage 1 wrote."""
    flags = parts(tiny_language_model, tiny_tower, tmp_path / "out")
    flags += ["--pretrain_mm_mlp_adapter", aligned[0] / "mm_projector.safetensors", "--version", "vicuna_v1"]
    flags += ["--data_path", tiny_world.instruct_train, "--image_folder", tiny_world.images, *common(4, 1, UNMOVED)]
    flags += ["--resume_from_checkpoint", "latest"]
    run_stage("finetune", list(map(str, flags)))
    assert "no complete checkpoint in" in capsys.readouterr().out
    after = load_file(tmp_path / "out" / "mm_projector.safetensors")
    assert all(
        torch.equal(after[key], value) for key, value in load_file(aligned[0] / "mm_projector.safetensors").items()
    )


def test_an_assistant_takes_a_projector_and_keeps_its_kind(aligned, tiny_checkpoint, tiny_world, tmp_path):
    adapter = aligned[0] / "mm_projector.safetensors"
    flags = ["--model_name_or_path", tiny_checkpoint, "--data_path", tiny_world.instruct_train]
    flags += ["--image_folder", tiny_world.images, "--output_dir", tmp_path / "out", *common(4, 1, UNMOVED)]
    others = ("--mm_projector_type", "linear"), ("--mm_vision_select_layer", "-1"), ("--mm_segment_positions", "True")
    for flag, value in others:
        with pytest.raises(ValueError, match=f"{flag} {value}: .* is an assistant with"):
            run_stage("finetune", list(map(str, [*flags, flag, value])))
    same = ["--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", "-2", "--pretrain_mm_mlp_adapter", adapter]
    run_stage("finetune", list(map(str, [*flags, *same])))
    after, before = load_file(tmp_path / "out" / "mm_projector.safetensors"), load_file(adapter)
    own = load_file(tiny_checkpoint / "model.safetensors")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert any(not torch.equal(after[key], own[f"multi_modal_projector.{key}"]) for key in after)


def test_compression_sets_the_tokens_of_training_and_of_the_result(
    tiny_language_model, tiny_tower, tiny_world, tmp_path, monkeypatch
):
    seen, encode = [], LlavaDripForConditionalGeneration.encode_images

    def watched(self, pixels):
        tokens = encode(self, pixels)
        seen.extend(tokens.lengths.tolist())
        return tokens

    monkeypatch.setattr(LlavaDripForConditionalGeneration, "encode_images", watched)
    first, second = tmp_path / "first", tmp_path / "second"
    data = ["--data_path", tiny_world.caption_train, "--image_folder", tiny_world.images, *common(4, 1)]
    parts = ["--model_name_or_path", tiny_language_model, "--vision_tower", tiny_tower, "--compression", "5"]
    run_stage("pretrain", list(map(str, [*data, *parts, "--output_dir", first])))
    again = ["--model_name_or_path", first, "--compression", "10", "--output_dir", second]
    run_stage("finetune", list(map(str, [*data, *again])))
    pixels = torch.randn(2, 3, 64, 64)
    for directory in (first, second):
        AutoModelForImageTextToText.from_pretrained(directory).eval().encode_images(pixels)
    assert seen == [13] * 4 + [6] * 4 + [13] * 2 + [6] * 2  # of 64 patches
