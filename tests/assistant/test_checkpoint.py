"""Saved and loaded: by save_pretrained, by transformers' Auto classes, and built from parts of many kinds."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    MistralConfig,
    Qwen2Config,
)

from llava_drip.assistant import LlavaDripConfig, LlavaDripForConditionalGeneration, LlavaDripProcessor, build_assistant
from llava_drip.assistant.build import is_assistant, load_assistant
from llava_drip.instruct.templates import VICUNA_V1
from llava_drip.towers.io import load_tower, save_tower

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def test_round_trip_is_exact(assistant, rows, tmp_path):
    model, processor = assistant
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, same = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is LlavaDripForConditionalGeneration and type(same) is LlavaDripProcessor
    assert type(AutoConfig.from_pretrained(tmp_path)) is LlavaDripConfig
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    buffers = dict(again.named_buffers())  # non-persistent ones come back as garbage where nobody sets them
    assert all(torch.equal(buffers[name], value) for name, value in model.named_buffers())
    inputs, twins = processor(text=rows[0], images=rows[1]), same(text=rows[0], images=rows[1])
    assert all(torch.equal(inputs[key], twins[key]) for key in inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again.eval()(**twins).logits)
    assert same.tokenizer.chat_template is None or same.chat_template == processor.chat_template
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompt = same.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt.count("<image>") == 1 and prompt.endswith("ASSISTANT:")


def test_weights_are_safetensors_under_their_parts(assistant, tmp_path):
    model, _ = assistant
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        parts = {key.split(".")[0] for key in file.keys()}  # noqa: SIM118
    assert parts == {"vision_tower", "multi_modal_projector", "language_model"}
    assert not list(tmp_path.glob("*.bin"))


def test_every_part_comes_from_where_it_was_said_to(tiny_language_model, tiny_tower):
    model, processor = build_assistant(str(tiny_language_model), str(tiny_tower))
    text = AutoModelForCausalLM.from_pretrained(tiny_language_model).state_dict()
    own = model.language_model.state_dict()
    rows = len(text["model.embed_tokens.weight"])
    for key, value in text.items():
        assert torch.equal(own[key][:rows] if value.shape != own[key].shape else own[key], value), key
    tower = load_tower(str(tiny_tower)).state_dict()
    assert all(torch.equal(model.vision_tower.state_dict()[key], value) for key, value in tower.items())
    assert len(processor.tokenizer) == rows + 1, "<image> was added"
    assert model.config.image_token_id == processor.image_token_id == rows
    assert model.get_input_embeddings().num_embeddings == rows + 1
    assert model.config.text_config.vocab_size == rows + 1
    assert list(processor.image_processor.image_mean) == [0.5, 0.5, 0.5]


def test_attention_is_the_fast_one_also_when_built_from_parts(tiny_language_model, tiny_tower, tiny_checkpoint):
    """A None here makes transformers fall back to eager attention without a word."""
    built = build_assistant(str(tiny_language_model), str(tiny_tower))[0]
    loaded = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    asked = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, attn_implementation="eager")
    names = [m.language_model.model.layers[0].self_attn.config._attn_implementation for m in (built, loaded, asked)]
    assert names == ["sdpa", "sdpa", "eager"]


@pytest.mark.parametrize("config_class", [Qwen2Config, MistralConfig])
@pytest.mark.parametrize("tied", [False, True])
def test_other_language_models(config_class, tied, tiny_tokenizer, tiny_tower, rows, tmp_path):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tiny_tokenizer),
        tie_word_embeddings=tied,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
        **SIZES,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
    tiny_tokenizer.save_pretrained(tmp_path / "lm")
    model, processor = build_assistant(str(tmp_path / "lm"), str(tiny_tower), chat_template=VICUNA_V1)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    tied_now = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied_now == tied
    inputs = processor(text=rows[0], images=rows[1])
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, again(**inputs).logits)
    out = again.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3


TOWERS = {
    "dense": {"compression": 1.0},
    "4x": {"compression": 4.0},
    "class token": {"compression": 4.0, "class_token": True, "global_pool": "token"},
    "uniform": {"compression": 10.0, "boundary": "uniform"},
}


@pytest.mark.parametrize("name", TOWERS)
def test_other_towers(name, tiny_language_model, rows, tmp_path):
    torch.manual_seed(0)
    tower = timm.create_model("drip_mini_patch8_64_4x", num_classes=0, **TOWERS[name])
    directory = save_tower(tower, tmp_path / "tower", (0.5,) * 3, (0.5,) * 3)
    model, processor = build_assistant(
        str(tiny_language_model), str(directory), projector_type="linear", vision_feature_layer=None
    )
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    inputs = processor(text=rows[0], images=rows[1])
    lengths = again.encode_images(inputs["pixel_values"]).lengths.tolist()
    expected = {"dense": 64, "uniform": 6}.get(name, 16)
    assert all(abs(n - expected) <= (0 if name in ("dense", "uniform") else 3) for n in lengths), lengths
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, again(**inputs).logits)


def test_compression_can_be_chosen_when_building(tiny_language_model, tiny_tower, rows, tmp_path):
    model, processor = build_assistant(str(tiny_language_model), str(tiny_tower), compression=5.0)
    model.save_pretrained(tmp_path)
    pixels = processor(text=rows[0], images=rows[1])["pixel_values"]
    for one in (model.eval(), AutoModelForImageTextToText.from_pretrained(tmp_path).eval()):
        assert one.encode_images(pixels).lengths.tolist() == [round(64 / 5)] * 4


def test_a_budget_set_later_is_saved(assistant, rows, tmp_path):
    model, processor = assistant
    pixels = processor(text=rows[0], images=rows[1])["pixel_values"]

    def reloaded():
        model.save_pretrained(tmp_path)
        return AutoModelForImageTextToText.from_pretrained(tmp_path).eval()

    free = reloaded().encode_images(pixels).lengths.tolist()
    for budget, lengths in ((8, [8] * 4), (torch.tensor(16.0), [4] * 4), (None, free)):
        model.set_compression(budget)
        assert (
            model.encode_images(pixels).lengths.tolist() == reloaded().encode_images(pixels).lengths.tolist() == lengths
        )
    model.set_compression(torch.tensor([2.0, 4.0, 8.0, 16.0]))  # of this batch, no one's business later
    assert reloaded().encode_images(pixels).lengths.tolist() == free
    model.set_compression(8.0)
    with pytest.raises(ValueError, match="at least 1"):
        model.set_compression(0.5)
    assert model.config.vision_config["budget"] == 8.0


def test_a_towers_own_budget_is_the_assistants(tiny_language_model, rows, tmp_path):
    tower = timm.create_model("drip_mini_patch8_64_4x", num_classes=0)
    tower.set_compression(8.0)
    directory = save_tower(tower, tmp_path / "tower", (0.5,) * 3, (0.5,) * 3)
    model, processor = build_assistant(str(tiny_language_model), str(directory))
    pixels = processor(text=rows[0], images=rows[1])["pixel_values"]
    assert model.eval().encode_images(pixels).lengths.tolist() == [8] * 4
    model.set_compression(None)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert again.vision_tower.budget is None, "taken back, it does not return with the tower's arguments"


def test_weights_that_are_missing_or_misshapen_are_named(tiny_checkpoint, tiny_language_model, tiny_tower, tmp_path):
    for source, key, load in (
        (tiny_checkpoint, "multi_modal_projector.0.weight", load_assistant),
        (tiny_language_model, "model.norm.weight", lambda path: build_assistant(str(path), str(tiny_tower))),
    ):
        for kind in ("missing", "misshapen"):
            directory = tmp_path / f"{source.name} {kind}"
            shutil.copytree(source, directory)
            weights = load_file(directory / "model.safetensors")
            value = weights.pop(key)
            if kind == "misshapen":
                weights[key] = value[:3].clone()
            save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
            with pytest.raises(ValueError, match=f"{kind}: (cannot be loaded|1 weights are missing or misshapen)"):
                load(directory)


def test_a_language_model_in_bf16_makes_an_assistant_in_bf16(tiny_language_model, tiny_tower, rows, tmp_path):
    text = AutoModelForCausalLM.from_pretrained(tiny_language_model, dtype=torch.bfloat16)
    shutil.copytree(tiny_language_model, tmp_path / "lm")
    text.save_pretrained(tmp_path / "lm")
    model, processor = build_assistant(str(tmp_path / "lm"), str(tiny_tower))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "out")
    for dtype in (torch.bfloat16, torch.float32):
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=dtype).eval()
        assert {p.dtype for p in again.parameters()} == {dtype}
        inputs = processor(text=rows[0], images=rows[1])
        out = again(**inputs, labels=inputs["input_ids"])
        assert out.logits.dtype == dtype and torch.isfinite(out.loss)
        assert again.generate(**inputs, max_new_tokens=2).shape[0] == 4
    grown = again.train()(**inputs, labels=inputs["input_ids"]).loss
    grown.backward()
    assert torch.isfinite(again.multi_modal_projector[0].weight.grad).all()


def test_bf16_training_step(assistant, rows):
    model, processor = assistant
    model = model.to(torch.bfloat16).train()
    inputs = processor(text=rows[0], images=rows[1])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for parameter in model.multi_modal_projector.parameters():
        assert parameter.grad.dtype == torch.bfloat16 and torch.isfinite(parameter.grad).all()


def test_is_assistant(tiny_language_model, tiny_checkpoint):
    assert is_assistant(tiny_checkpoint) and not is_assistant(tiny_language_model)


def test_what_cannot_be_built_is_named(tiny_language_model, tiny_tower, tmp_path):
    lm, tower = str(tiny_language_model), str(tiny_tower)
    empty, bare = tmp_path / "empty", tmp_path / "bare"
    empty.mkdir()
    bare.mkdir()
    shutil.copy(tiny_language_model / "config.json", bare)
    cases = [
        ((str(tmp_path / "none"), tower), {}, "none: no such folder"),
        ((str(empty), tower), {}, "empty: has no config.json"),
        ((str(bare), tower), {}, r"bare: no \*\.safetensors weights"),
        ((lm, "no_tower_of_this_name"), {}, "no_tower_of_this_name: neither a tower directory"),
        ((lm, str(empty)), {}, "empty: not a tower directory"),
        ((lm, "resnet18"), {}, "resnet18: not a vision tower"),
        ((lm, tower), {"projector_type": "mlp9x"}, "projector_type must be one of"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            build_assistant(*arguments, **options)


def test_a_configuration_with_a_model_that_is_no_tower_says_so():
    config = LlavaDripConfig(
        text_config=Qwen2Config(**SIZES), vision_config={"architecture": "vit_tiny_patch16_224", "model_args": {}}
    )
    with pytest.raises(ValueError, match="vit_tiny_patch16_224: not a vision tower"):
        LlavaDripForConditionalGeneration(config)


def test_a_tower_without_a_budget_says_so(tiny_language_model, assistant):
    model, _ = assistant
    model.vision_tower = torch.nn.Identity()
    with pytest.raises(ValueError, match="has no adjustable token budget"):
        model.set_compression(2.0)


def test_configuration_survives_json(tmp_path):
    config = LlavaDripConfig(text_config=Qwen2Config(**SIZES), projector_type="linear", image_token_id=7)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again.text_config) is Qwen2Config and again.text_config.hidden_size == 64
    assert (again.projector_type, again.image_token_id, again.vision_feature_layer) == ("linear", 7, -2)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llava_drip"
