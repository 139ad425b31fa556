"""LoRA's flags where they do not fit, and results whose base is not what it was."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from safetensors.torch import load_file, save_file

from llava_drip.assistant.adapter import Base, frozen_parts, read_base
from llava_drip.assistant.build import build_assistant, load_assistant
from llava_drip.fingerprint import fingerprint
from llava_drip.instruct.arguments import ModelArguments
from llava_drip.instruct.lora import add_lora, check_stage, linear_layers, target_pattern
from llava_drip.instruct.merge import merge

peft = pytest.importorskip("peft", reason="peft is not installed (extra: train)")
ON = {"lora_enable": True, "lora_r": 4}
NO_DEEPSPEED = SimpleNamespace(deepspeed=None)


def zero(stage: int, **config: object) -> SimpleNamespace:
    return SimpleNamespace(
        deepspeed=f"zero{stage}.json",
        hf_deepspeed_config=HfDeepSpeedConfig({"zero_optimization": {"stage": stage}, **config}),
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"lora_r": 8}, "--lora_r 8: has no effect without --lora_enable true"),
        ({"lora_target_modules": ["q_proj", "v_proj"]}, "--lora_target_modules q_proj v_proj: has no effect without"),
        ({"quant_type": "fp4"}, "--quant_type fp4: has no effect without --bits 4"),
        ({**ON, "bits": 8, "double_quant": True}, "--double_quant True: has no effect without --bits 4"),
        ({"bits": 5}, "--bits must be 4, 8 or 16, got 5"),
        ({**ON, "bits": 4, "quant_type": "int4"}, "--quant_type must be nf4 or fp4"),
        ({**ON, "lora_bias": "all"}, "--lora_bias all: must be none"),
        ({**ON, "lora_r": 0}, "--lora_r must be at least 1"),
        ({**ON, "lora_alpha": -1.0}, "--lora_alpha must be above 0"),
        ({**ON, "lora_dropout": 1.0}, "--lora_dropout must be at least 0 and below 1"),
        ({**ON, "lora_target_modules": ["all-linear", "q_proj"]}, "--lora_target_modules: all-linear stands alone"),
        ({"mm_projector_lr": -1.0}, "--mm_projector_lr must be at least 0"),
    ],
)
def test_a_flag_that_is_wrong_or_would_be_ignored(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelArguments("m", **flags)


@pytest.mark.parametrize(
    "stage, flags, args, message",
    [
        ("pretrain", ON, NO_DEEPSPEED, "--lora_enable true: the first stage trains the projector alone"),
        ("pretrain", {"mm_projector_lr": 1e-3}, NO_DEEPSPEED, "--mm_projector_lr: the first stage .* --learning_rate"),
        ("finetune", {"bits": 4}, NO_DEEPSPEED, "--bits 4: .* cannot be trained itself; add --lora_enable true"),
        ("finetune", {**ON, "bits": 4}, zero(3), "--bits 4: .*ZeRO-3; give --deepspeed zero2.json"),
        (
            "finetune",
            {"mm_projector_lr": 1e-3},
            zero(2, optimizer={"type": "Adam"}),
            "an optimizer of its own .Adam.",
        ),
    ],
)
def test_flags_that_do_not_go_together(stage, flags, args, message):
    with pytest.raises(ValueError, match=message):
        check_stage(stage, ModelArguments("m", **flags), args)


def test_llavas_values_are_filled_in():
    args = ModelArguments("m", lora_enable=True, bits=4)
    assert (args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_bias) == (128, 256, 0.05, "none")
    assert (args.quant_type, args.double_quant) == ("nf4", True)
    check_stage("finetune", args, zero(2))


def test_targets_are_layers_of_the_language_model_alone(tiny_checkpoint):
    model, _ = load_assistant(tiny_checkpoint)
    layers = linear_layers(model.language_model)
    assert len(layers) == 2 * 7 and "lm_head" not in layers
    for names, wanted in ((["all-linear"], set(layers)), (["q_proj"], {n for n in layers if n.endswith("q_proj")})):
        pattern = target_pattern(model.language_model, names)
        found = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
        assert found == {f"language_model.{name}" for name in wanted}
    with pytest.raises(ValueError, match="--lora_target_modules query: .* no such linear layer, but down_proj, gate"):
        target_pattern(model.language_model, ["query"])


def adapter_of(base: Path, directory: Path, language_model: Path | None = None, tower: Path | None = None) -> Path:
    """The result of a LoRA run of no steps."""
    if language_model is None:
        model, processor = load_assistant(base)
        frozen = {}
    else:
        model, processor = build_assistant(str(language_model), str(tower))
        frozen = frozen_parts(model, json.loads((language_model / "config.json").read_text())["vocab_size"])
    adapted = add_lora(model, ModelArguments("m", **ON), str(base))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(directory)
    processor.save_pretrained(directory)
    Base(base, fingerprint(base), language_model is None, {}).write(directory, model, frozen)
    return directory


@pytest.fixture
def base(tiny_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "runs" / "base"))


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    return adapter_of(base, tmp_path / "runs" / "adapter")


def test_peft_itself_loads_the_adapter(adapter, base):
    """As a user of peft would, with nothing of ours but the base: LoRA and projector."""
    own, _ = load_assistant(adapter)
    theirs = peft.PeftModel.from_pretrained(load_assistant(base)[0], str(adapter)).merge_and_unload()
    assert own.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(own.state_dict()[key], value, atol=1e-6, rtol=0, msg=key)


def test_a_base_that_is_not_there(adapter, base, tmp_path):
    moved = base.rename(tmp_path / "elsewhere")
    message = f"{adapter}: its base, an assistant, is not at {base}; put it back, or merge: .*--base"
    with pytest.raises(ValueError, match=message):
        load_assistant(adapter)
    assert "merged" in merge(adapter, tmp_path / "merged", base=moved)
    load_assistant(tmp_path / "merged")


def test_a_base_that_moved_along(adapter, tmp_path):
    runs = adapter.parent.rename(tmp_path / "archive")
    load_assistant(runs / "adapter")
    assert read_base(runs / "adapter").path == runs / "base"
    # Another model has taken the former place.
    former = Path(shutil.copytree(runs / "base", adapter.parent / "base"))
    (former / "generation_config.json").write_text('{"max_new_tokens": 7}')
    for check in (True, False):
        assert read_base(runs / "adapter", check=check).path == runs / "base"
    (runs / "base" / "generation_config.json").write_text('{"max_new_tokens": 8}')
    with pytest.raises(ValueError, match=f"its base {former} .* and {runs / 'base'} .* is not what it was trained on"):
        read_base(runs / "adapter")


def test_a_base_that_was_changed(adapter, base):
    tensors = load_file(base / "model.safetensors")
    tensors["language_model.lm_head.weight"][0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{adapter}: its base {base} .fingerprint .* is not what it was trained on"):
        load_assistant(adapter)


def test_a_vocabulary_of_another_size(adapter, tiny_language_model, tiny_tower, tmp_path):
    """LLaVA issue 462: the tokens that a run added are not in the language model that it is merged into."""
    config = json.loads((adapter / "config.json").read_text())
    config["text_config"]["vocab_size"] += 8
    (adapter / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has a vocabulary of \d+ tokens, and its base .* one of \d+"):
        load_assistant(adapter)
    grown = adapter_of(tiny_language_model, tmp_path / "grown", tiny_language_model, tiny_tower)
    load_assistant(grown)
    tensors = load_file(grown / "frozen_parts.safetensors")
    assert tensors.pop("input_embeddings").shape == (1, 64)
    save_file(tensors, grown / "frozen_parts.safetensors")
    with pytest.raises(ValueError, match=r"has a vocabulary of \d+ tokens, 0 of them new, and its base .* one of \d+"):
        load_assistant(grown)


def test_files_that_are_damaged(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_A" in key)
    for odd, message in (
        ({k: v for k, v in tensors.items() if k != key}, "its adapter does not fit its base: .*lora_A.* is missing"),
        ({**tensors, key: tensors[key][:, :8].contiguous()}, "its adapter does not fit its base: .*size mismatch"),
    ):
        save_file(odd, adapter / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_assistant(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"half of")
    with pytest.raises(ValueError, match="adapter_model.safetensors: missing, cut off or no safetensors file"):
        load_assistant(adapter)
    (adapter / "base_model.json").write_text("{")
    with pytest.raises(ValueError, match="base_model.json: damaged"):
        load_assistant(adapter)


def test_what_is_not_merged(adapter, base, tmp_path, run_script, repository):
    with pytest.raises(ValueError, match="a whole assistant already"):
        merge(base, tmp_path / "merged")
    for path, name in ((adapter, "the adapter"), (base, "its base")):
        with pytest.raises(ValueError, match=f"--output {path}: is {name}, which the result would replace"):
            merge(adapter, path)
    for name in ("config.json", "notes.txt"):  # another model, somebody's files
        other = tmp_path / name.partition(".")[0]
        other.mkdir()
        (other / name).write_text("{}")
        with pytest.raises(ValueError, match=f"--output {other}: holds {name} already; remove it, or give another"):
            merge(adapter, other)
        with pytest.raises(ValueError, match=f"--output {other / name}: is a file; give a directory"):
            merge(adapter, other / name)
        assert [path.read_text() for path in other.iterdir()] == ["{}"]
    done = run_script(repository / "scripts" / "merge_lora.py", base, "--output", tmp_path / "merged")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "merge_lora.py: error:" in done.stderr
    done = run_script(
        repository / "scripts" / "merge_lora.py", adapter, "--output", tmp_path / "merged", "--dtype", "bfloat16"
    )
    assert done.returncode == 0 and f"{adapter} merged into {base}, bfloat16" in done.stdout
