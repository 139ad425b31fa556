"""Exports beside transformers' own LlavaForConditionalGeneration, read back from disk by stock code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PhiConfig,
)

from llava_drip.assistant import build_assistant, load_assistant
from llava_drip.assistant.stock import check_text, clip_of, to_stock
from llava_drip.instruct.templates import VICUNA_V1
from llava_drip.towers.io import load_tower

PROMPT = "<s> USER: <image>\nWhat is this? ASSISTANT:"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return [folder / "a.png", folder / "b.png"]


@pytest.fixture(scope="module")
def clip_assistant(tmp_path_factory, tiny_language_model) -> Path:
    """An assistant with a Hugging Face CLIP tower, which is plain here."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    clip = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8, initializer_factor=5.0))
    with torch.no_grad():  # norms and biases start as ones and zeros
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    clip.save_pretrained(folder / "tower")
    model, processor = build_assistant(str(tiny_language_model), str(folder / "tower"), chat_template=VICUNA_V1)
    for part in (model, processor):
        part.save_pretrained(folder / "assistant")
    return folder / "assistant"


def exported(run_script, repository, *arguments: object) -> str:
    done = run_script(repository / "scripts" / "export_llava.py", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ours(assistant: Path, pictures: list[Path], compression: float | None = None):
    """Logits of the last position of each prompt, and ids expanded to visual positions."""
    model, processor = load_assistant(assistant)
    if compression is not None:
        model.set_compression(compression)
    inputs = processor(images=[[Image.open(file)] for file in pictures], text=[PROMPT] * len(pictures))
    with torch.no_grad():
        _, expanded = model.embed(**inputs)
        return model(**inputs).logits, expanded


def test_a_clip_tower_goes_over_whole(clip_assistant, pictures, tmp_path, run_script, repository):
    out = exported(run_script, repository, clip_assistant, "--output", tmp_path / "export")
    assert out == f"wrote {tmp_path / 'export' / 'model'}\n"
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "export" / "model").eval()
    processor = LlavaProcessor.from_pretrained(tmp_path / "export" / "model")
    images = [Image.open(file) for file in pictures]
    inputs = processor(images=images, text=[PROMPT] * 2, return_tensors="pt", add_special_tokens=False)
    wanted, expanded = ours(clip_assistant, pictures)
    assert torch.equal(inputs["input_ids"], expanded.input_ids) and int(expanded.is_image[0].sum()) == 16
    with torch.no_grad():
        logits = stock(**inputs).logits
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        answer = stock.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 4
    assert processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)


def test_embeddings_of_a_drip_tower(tiny_checkpoint, pictures, tmp_path, run_script, repository):
    """Put where a server puts them, by stock code, they give the assistant's own logits, for each budget."""
    for compression, tokens, more in ((4.0, 16, ("--batch_size", 1)), (10.0, 6, ("--device", "cpu"))):
        folder = tmp_path / f"{compression:g}"
        out = exported(
            run_script,
            repository,
            tiny_checkpoint,
            "--output",
            folder,
            "--images",
            *pictures,
            "--compression",
            compression,
            *more,
        )
        assert sorted(path.name for path in (folder / "images").iterdir()) == ["a.safetensors", "b.safetensors"]
        assert f"{folder}/images/a.safetensors: {tokens} tokens" in out
        assert "random weights (a Drip is no plain ViT): give it embeddings" in out
        stock = LlavaForConditionalGeneration.from_pretrained(folder / "model").eval()
        config = stock.config.vision_config
        assert (config.hidden_size, config.image_size, config.patch_size) == (96, 64, 8)
        wanted, expanded = ours(tiny_checkpoint, pictures, compression)
        for row, picture in enumerate(pictures):
            embeds = load_file(folder / "images" / f"{picture.stem}.safetensors")["image_embeds"]
            assert embeds.shape == (tokens, 64) and embeds.dtype == torch.float32
            ids = expanded.input_ids[row : row + 1]
            with torch.no_grad():
                text = stock.get_input_embeddings()(ids)
                place = stock.model.get_placeholder_mask(ids, inputs_embeds=text, image_features=embeds[None])
                if place.shape[-1] == 1:
                    place = place.expand_as(text)
                logits = stock(inputs_embeds=text.masked_scatter(place, embeds)).logits
            torch.testing.assert_close(logits, wanted[row : row + 1], atol=1e-4, rtol=1e-4)


def test_what_has_no_place_in_the_stock_layout(
    tiny_language_model, tiny_tower, pictures, tmp_path, run_script, repository
):
    program = repository / "scripts" / "export_llava.py"
    for name, options, why in (
        ("linear", {"projector_type": "linear"}, "its projector is 'linear', and the stock one is mlp2x_gelu"),
        ("places", {"segment_positions": True}, "it has segment positions"),
    ):
        model, processor = build_assistant(str(tiny_language_model), str(tiny_tower), **options)
        for part in (model, processor):
            part.save_pretrained(tmp_path / name)
        done = run_script(program, tmp_path / name, "--output", tmp_path / "out", "--images", pictures[0])
        assert done.returncode == 1 and why in done.stderr and len(done.stderr.splitlines()[-1]) < 400
        assert not (tmp_path / "out").exists()
    # Embeddings have what the projector adds, so they are written all the same.
    out = exported(
        run_script,
        repository,
        tmp_path / "places",
        "--output",
        tmp_path / "out",
        "--images",
        pictures[0],
        "--only-images",
    )
    assert re.search(r"a.safetensors: \d+ tokens", out)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["images"]


def test_mistakes_are_one_line(tiny_checkpoint, tiny_language_model, pictures, tmp_path, run_script, repository):
    program = repository / "scripts" / "export_llava.py"
    for name in ("model", "images"):
        (tmp_path / "full" / name).mkdir(parents=True)
    (tmp_path / "broken.png").write_bytes(pictures[0].read_bytes()[:200])
    twin = tmp_path / "a.jpg"
    Image.open(pictures[0]).save(twin)
    out = ("--output", tmp_path / "out")
    for arguments, message in (
        ((tiny_checkpoint, "--output", tmp_path / "full"), "full: holds a model already"),
        ((tiny_language_model, *out), "model_type is 'llama', not 'llava_drip'"),
        ((tiny_checkpoint, *out, "--compression", 4), "--compression: is for --images"),
        ((tiny_checkpoint, *out, "--batch_size", 4), "--batch_size: is for --images"),
        ((tiny_checkpoint, *out, "--device", "cpu"), "--device: is for --images"),
        ((tiny_checkpoint, *out, "--images", pictures[0], "--batch_size", 0), "--batch_size must be at least 1, got 0"),
        ((tiny_checkpoint, *out, "--images", pictures[0], "--device", "gpu"), "device gpu: not available here"),
        (
            (tiny_checkpoint, "--output", tmp_path / "full", "--images", pictures[0], "--only-images"),
            "full: holds images already",
        ),
        (
            (tiny_checkpoint, *out, "--images", pictures[0], tmp_path / "broken.png", "--batch_size", 1),
            "broken.png: truncated",
        ),
        ((tiny_checkpoint, *out, "--only-images"), "--only-images: there are none"),
        ((tiny_checkpoint, *out, "--images", pictures[0], twin), "--images: two pictures are called a"),
        ((tiny_checkpoint, *out, "--images", tmp_path / "none.png"), "none.png"),
    ):
        done = run_script(program, *arguments)
        assert done.returncode == 1 and message in done.stderr.splitlines()[-1], done.stderr
        assert not list((tmp_path / "out").glob("*")), arguments  # of the pictures before the broken one, too
    assert json.loads((tiny_checkpoint / "config.json").read_text())["model_type"] == "llava_drip"


@pytest.mark.parametrize(
    "name, options, why",
    [
        ("plain_vit_mini_patch8_64", {}, "it has no norm before the blocks"),
        ("tokenlearner_base_patch16_224", {"depth": 2, "insert_at": 1}, "is no plain ViT"),
    ],
)
def test_which_towers_are_a_clip(name, options, why):
    assert why in clip_of(timm.create_model(name, **options) if options else load_tower(name))


@pytest.mark.parametrize(
    "family, options, why",
    [
        (GraniteConfig, {"logits_scaling": 8.0}, r"\(granite\) has logits_scaling 8,"),
        (CohereConfig, {"logit_scale": 0.0625}, r"\(cohere\) has logit_scale 0.0625,"),
        (
            Gemma2Config,
            {"head_dim": 16, "final_logit_softcapping": 30.0},
            r"\(gemma2\) has final_logit_softcapping 30,",
        ),
        (PhiConfig, {}, r"\(phi\) has a bias in its head"),
        (GraniteConfig, {"logits_scaling": 1.0, "embedding_multiplier": 12.0}, None),
    ],
)
def test_language_models_that_change_their_logits(family, options, why, tiny_tokenizer, tiny_tower, tmp_path):
    """The stock model's head is a bare matrix, so its answers would be others (of Granite eight times as sure)."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    special = {f"{name}_token_id": getattr(tiny_tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = family(vocab_size=len(tiny_tokenizer), num_key_value_heads=4, **sizes, **special, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model, _ = build_assistant(str(tmp_path), str(tiny_tower))
    if why is None:
        assert to_stock(model)[0].config.text_config.embedding_multiplier == 12.0
        return
    with pytest.raises(ValueError, match=f"cannot be exported: its language model {why}"):
        to_stock(model)


def test_logits_of_text_are_compared(tiny_checkpoint):
    """What else a family may do to them, of which nothing is known here."""
    model, _ = load_assistant(tiny_checkpoint)
    stock, _ = to_stock(model)
    stock.lm_head.weight.data *= 1.1
    with pytest.raises(ValueError, match=r"does not compute what this language model \(llama\) does; .* off by 0.1 of"):
        check_text(model, stock)
