"""LoRA and QLoRA through the program: what changes, what does not, what a resumed run repeats, and what the result gives."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from llava_drip.assistant.adapter import read_base
from llava_drip.assistant.build import load_assistant
from llava_drip.assistant.quantization import Quantization, dtype_name
from llava_drip.instruct.freeze import PARTS
from llava_drip.instruct.merge import merge
from llava_drip.instruct.stage import run_stage
from llava_drip.instruct.trainer import StageTrainer

from .conftest import common, fingerprints, losses, parts

pytest.importorskip("peft", reason="peft is not installed (extra: train)")
STEPS = 4
LORA = ("--lora_enable", "true", "--lora_r", "4", "--lora_alpha", "8")
SAVING = ("--save_strategy", "steps", "--save_steps", "2")
QUESTION = "USER: <image>\nWhat color? ASSISTANT:"
pytestmark = pytest.mark.usefixtures("one_thread")


def flags(world, output: Path, *more: object, steps: int = STEPS) -> list[str]:
    data = ["--data_path", world.instruct_train, "--image_folder", world.images, "--output_dir", output]
    return list(map(str, [*data, *common(4, steps, 5e-3), *more]))


def starting(checkpoint: Path) -> list[str]:
    return ["--model_name_or_path", str(checkpoint)]


def logits(model, processor) -> Tensor:
    """[1, L, vocabulary] for one rendered question, in eval."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    inputs = processor(text=[QUESTION], images=[picture])
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.fixture
def trained_model(monkeypatch) -> list:
    """Gets the model of each run as its training left it."""
    models, save = [], StageTrainer.save_model

    def watched(self, *args, **kwargs):
        if not models or models[-1] is not self.model:
            models.append(self.model)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "save_model", watched)
    return models


@pytest.fixture(scope="module")
def tuned(tiny_checkpoint, tiny_world, tmp_path_factory) -> Path:
    """Output directory of a LoRA run from an assistant, with a checkpoint every two steps."""
    output = tmp_path_factory.mktemp("lora") / "out"
    more = ["--lora_dropout", "0.1", "--gradient_checkpointing", "true", "--mm_projector_lr", "1e-3", *SAVING]
    run_stage("finetune", flags(tiny_world, output, *starting(tiny_checkpoint), *LORA, *more))
    return output


def test_lora_and_projector_change_and_nothing_else(tuned, tiny_checkpoint):
    tensors = load_file(tuned / "adapter_model.safetensors")
    kinds = {key.split(".lora_")[0].rpartition(".")[2] for key in tensors if ".lora_" in key}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(key.startswith("base_model.model.language_model.model.layers.") for key in tensors if ".lora_" in key)
    assert all(value.any() for value in tensors.values()) and {v.dtype for v in tensors.values()} == {torch.float32}
    projector = load_file(tuned / "mm_projector.safetensors")
    assert {key for key in tensors if ".lora_" not in key} == {
        f"base_model.model.multi_modal_projector.{key}" for key in projector
    }
    before, after = (load_assistant(path)[0].state_dict() for path in (tiny_checkpoint, tuned))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    linear = {key for key in before if key.startswith("language_model") and key.endswith("_proj.weight")}
    assert changed == linear | {f"multi_modal_projector.{key}" for key in projector}
    assert not any((tuned / name).exists() for name in ("model.safetensors", "README.md"))


def test_the_projector_has_a_learning_rate_of_its_own(tuned):
    groups = torch.load(tuned / "checkpoint-2" / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["initial_lr"] for group in groups} == {5e-3, 1e-3}
    assert sum(len(group["params"]) for group in groups if group["initial_lr"] == 1e-3) == 4  # two weights, two biases


def test_the_result_is_the_model_that_was_trained(tiny_checkpoint, tiny_world, tmp_path, trained_model, capsys):
    output = tmp_path / "out"
    more = ["--compression", "8", "--version", "vicuna_v1", "--packing", "false"]
    run_stage("finetune", flags(tiny_world, output, *starting(tiny_checkpoint), *LORA, *more, steps=2))
    (model,) = trained_model
    loaded, processor = load_assistant(output)
    expected = logits(model, processor)
    torch.testing.assert_close(logits(loaded, processor), expected, atol=1e-5, rtol=0)
    assert loaded.config.vision_config["budget"] == loaded.vision_tower.budget == 8.0
    assert not any("lora" in name for name, _ in loaded.named_modules())
    assert "merged into" in merge(output, tmp_path / "merged")
    whole, _ = load_assistant(tmp_path / "merged")
    torch.testing.assert_close(logits(whole, processor), expected, atol=1e-5, rtol=0)
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.count("│") == 6]
    table = {cells[1].strip(): [cell.strip() for cell in cells[2:6]] for cells in rows}
    size = f"{sum(v.numel() for k, v in load_file(output / 'adapter_model.safetensors').items() if '.lora_' in k):,}"
    assert table["language_model LoRA"] == [size, size, "-", "float32"] and table["language_model"][1] == "-"


def test_a_run_goes_on_from_its_checkpoint(tuned, tiny_checkpoint, tiny_world, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(tuned / "checkpoint-2", output / "checkpoint-2")
    more = ["--lora_dropout", "0.1", "--gradient_checkpointing", "true", "--mm_projector_lr", "1e-3", *SAVING]
    again = [*flags(tiny_world, output, *starting(tiny_checkpoint), *LORA, *more), "--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match="--lora_r is 2, but 4 in the run of"):
        run_stage("finetune", [*again, "--lora_r", "2"])
    run_stage("finetune", again)
    assert losses(output) == losses(tuned) and len(losses(tuned)) == STEPS
    one, two = (load_file(path / "adapter_model.safetensors") for path in (output, tuned))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_checkpoint_is_an_assistant(tuned):
    loaded, _ = load_assistant(tuned / "checkpoint-4")
    assert fingerprints(loaded.state_dict()) == fingerprints(load_assistant(tuned)[0].state_dict())


def test_a_result_is_tuned_on(tuned, tiny_world, tmp_path, trained_model):
    """Its LoRA is part of what the next LoRA stands on."""
    run_stage(
        "finetune", flags(tiny_world, tmp_path / "second", *starting(tuned), *LORA, "--packing", "false", steps=1)
    )
    loaded, processor = load_assistant(tmp_path / "second")
    torch.testing.assert_close(logits(loaded, processor), logits(trained_model[0], processor), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="stands on a base, and cannot be quantised .* merge it first"):
        run_stage("finetune", flags(tiny_world, tmp_path / "third", *starting(tuned), *LORA, "--bits", "4"))
    base = read_base(tuned).path
    with pytest.raises(ValueError, match=f"--output_dir {base}: --model_name_or_path .* stands on it"):
        run_stage("finetune", flags(tiny_world, base, *starting(tuned), *LORA))


def test_from_a_language_model_and_a_tower(tiny_language_model, tiny_world, tmp_path, trained_model):
    """LLaVA's way. A tower by name begins with random weights: it, and the rows of new tokens, are in the result."""
    output = tmp_path / "out"
    new = parts(tiny_language_model, Path("drip_mini_patch8_64_4x"), output)
    more = ["--version", "v1", "--mm_vision_select_layer", "-1", "--packing", "false", *LORA, *common(4, 2, 5e-3)]
    more += ["--data_path", tiny_world.instruct_train, "--image_folder", tiny_world.images]
    run_stage("finetune", [*new, *map(str, more)])
    loaded, processor = load_assistant(output)
    expected = logits(trained_model[0], processor)
    torch.testing.assert_close(logits(loaded, processor), expected, atol=1e-5, rtol=0)
    merge(output, tmp_path / "merged", dtype="bfloat16")
    whole, _ = load_assistant(tmp_path / "merged")
    assert {p.dtype for p in whole.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(whole.float(), processor), expected, atol=0.2, rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora(tiny_checkpoint, tiny_world, tmp_path, trained_model, bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: train)")
    output = tmp_path / "out"
    more = ["--bits", bits, "--packing", "false", "--gradient_checkpointing", "true"]
    run_stage("finetune", flags(tiny_world, output, *starting(tiny_checkpoint), *LORA, *more, steps=2))
    quantization = Quantization(**read_base(output).quantization)
    assert quantization == {4: Quantization(4, "nf4", True), 8: Quantization(8)}[bits]
    loaded, processor = load_assistant(output, quantization=quantization)
    expected = logits(trained_model[0], processor)
    torch.testing.assert_close(logits(loaded, processor), expected, atol=1e-5, rtol=0)
    # Merged, it stands on the weights that were not quantised: something near, and the same as loading gives.
    plain = logits(load_assistant(output)[0], processor)
    assert f"in {bits} bits" in merge(output, tmp_path / "merged")
    torch.testing.assert_close(logits(load_assistant(tmp_path / "merged")[0], processor), plain, atol=1e-5, rtol=0)
    assert 1e-3 < (plain - expected).std() < 0.5 * expected.std()


def test_alignment_before_a_quantised_language_model(
    tiny_language_model, tiny_tower, tiny_world, tmp_path, trained_model
):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: train)")
    output = tmp_path / "out"
    more = ["--data_path", tiny_world.caption_train, "--image_folder", tiny_world.images, *common(4, 2, 5e-3)]
    more += ["--bits", "4", "--quant_type", "fp4", "--bf16", "true", "--save_strategy", "steps", "--save_steps", "1"]
    argv = [*parts(tiny_language_model, tiny_tower, output), *map(str, more)]
    run_stage("pretrain", argv)
    kinds = {name: {dtype_name(p) for p in getattr(trained_model[0], name).parameters()} for name in PARTS}
    assert kinds == {
        "vision_tower": {"bfloat16"},
        "multi_modal_projector": {"float32"},
        "language_model": {"fp4", "bfloat16"},
    }
    assert trained_model[0].language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert dtype_name(trained_model[0].get_output_embeddings().weight) == "bfloat16"
    # The result stands on the language model as it is on disk.
    projector = load_file(output / "mm_projector.safetensors")
    assert not (output / "model.safetensors").exists()
    loaded = load_assistant(output)[0].state_dict()
    assert all(torch.equal(loaded[f"multi_modal_projector.{key}"], value) for key, value in projector.items())
    language = load_file(tiny_language_model / "model.safetensors")
    assert all(torch.equal(loaded[f"language_model.{key}"][: len(v)], v) for key, v in language.items())
    # So does a checkpoint, which loads and merges as any.
    saved = load_file(output / "checkpoint-1" / "mm_projector.safetensors")
    merge(output / "checkpoint-1", tmp_path / "merged")
    for directory in (output / "checkpoint-1", tmp_path / "merged"):
        loaded = load_assistant(directory)[0].state_dict()
        for key, value in saved.items():
            torch.testing.assert_close(loaded[f"multi_modal_projector.{key}"], value, atol=0, rtol=0, check_dtype=False)
    assert any(not torch.equal(saved[key], value) for key, value in projector.items()), "a step earlier"
    shutil.rmtree(output / "checkpoint-2")
    run_stage("pretrain", [*argv, "--resume_from_checkpoint", "latest"])
    again = load_file(output / "mm_projector.safetensors")
    assert all(torch.equal(again[key], value) for key, value in projector.items())
