"""Packed samples learn what padded ones do, and no sample sees another."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from llava_drip.assistant import build_assistant
from llava_drip.assistant.expand import IGNORE_INDEX
from llava_drip.assistant.packing import ATTENTION, PACKED_FAMILIES, pack, why_not_packed
from llava_drip.instruct.templates import VICUNA_V1
from llava_drip.tokens import Packing

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def assistant(tiny_language_model, tiny_tower):
    torch.manual_seed(0)
    return build_assistant(str(tiny_language_model), str(tiny_tower), chat_template=VICUNA_V1)


def batch(model, processor, side: str = "right") -> dict:
    """Three rows: one picture, none, two; of different lengths. Answers are learned."""
    generator = torch.Generator().manual_seed(1)
    texts = [
        "USER: <image>\nWhat is it? ASSISTANT: A red circle.",
        "USER: Hi. ASSISTANT: Good day to you.",
        "<image><image>two",
    ]
    processor.tokenizer.padding_side = side
    encoded = processor.tokenizer(texts, return_tensors="pt", padding=True)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    labels = ids.masked_fill((mask == 0) | (ids == model.config.image_token_id), IGNORE_INDEX)
    labels[mask.cumsum(1) <= 4] = IGNORE_INDEX  # what begins a row has nothing before it that could predict it
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "pixel_values": torch.randn(3, 3, 64, 64, generator=generator),
    }


def gradients(model, inputs: dict, **kwargs) -> tuple[float, dict]:
    model.train().zero_grad()
    loss = model(**inputs, **kwargs).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("items", [None, 7])
def test_loss_and_gradients_are_those_of_padded_rows(assistant, side, items):
    model, processor = assistant
    model.vision_tower.requires_grad_(False)
    inputs = batch(model, processor, side)
    padded, theirs = gradients(model, inputs, num_items_in_batch=items)
    model.pack_samples()
    packed, ours = gradients(model, inputs, num_items_in_batch=items)
    assert packed == pytest.approx(padded, abs=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-4, msg=name)


def test_each_sample_has_the_loss_that_it_has_alone(assistant):
    model, processor = assistant
    model.vision_tower.requires_grad_(False)
    inputs = batch(model, processor)
    model.train().pack_samples()
    with torch.no_grad():
        together = model(**inputs, num_items_in_batch=1).loss.item()  # a sum
        alone, images = 0.0, iter(((0, 1), (1, 1), (1, 3)))
        for i, (first, last) in enumerate(images):
            one = {name: inputs[name][i : i + 1] for name in ("input_ids", "attention_mask", "labels")}
            pixels = inputs["pixel_values"][first:last] if last > first else None
            alone += model(**one, pixel_values=pixels, num_items_in_batch=1).loss.item()
    assert together == pytest.approx(alone, abs=1e-4)


def test_what_a_row_is_made_of(assistant):
    model, processor = assistant
    inputs = batch(model, processor)
    embeds, expanded = model.eval().embed(**{k: inputs[k] for k in inputs})
    packed = pack(embeds, expanded)
    lengths = packed.packing.lengths
    assert (
        sum(lengths) == packed.embeds.shape[1] == int(expanded.attention_mask.sum()) < expanded.attention_mask.numel()
    )
    starts = (packed.position_ids[0] == 0).nonzero()[:, 0].tolist()
    assert starts == [0, lengths[0], lengths[0] + lengths[1]]
    learned = expanded.labels[:, 1:][expanded.labels[:, 1:] != IGNORE_INDEX]
    assert torch.equal(packed.targets[0], learned)


def test_a_batch_without_labels_learns_nothing_and_breaks_nothing(assistant):
    model, processor = assistant
    inputs = batch(model, processor)
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORE_INDEX)
    model.pack_samples()
    loss, found = gradients(model, inputs, num_items_in_batch=5)
    assert loss == 0 and found["language_model.lm_head.weight"].abs().max() == 0


def test_gradient_checkpointing(assistant):
    model, processor = assistant
    inputs = batch(model, processor)
    model.vision_tower.requires_grad_(False)
    model.pack_samples()
    plain, theirs = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed, ours = gradients(model, inputs)
    assert checkpointed == pytest.approx(plain, abs=1e-6)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], msg=name)


SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OWN = {"gemma": {"head_dim": 8}, "gemma3_text": {"head_dim": 8}, "qwen3": {"head_dim": 8}, "glm4": {"head_dim": 8}}


def language_model(family: str, **more) -> torch.nn.Module:
    """Small, with weights loud enough that what a token sees shows in its logits."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **OWN.get(family, {}), **more})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_every_family_keeps_samples_apart(family):
    model, lengths = language_model(family), (5, 9, 3)
    assert why_not_packed(model.config, max_length=max(lengths)) is None
    packing = Packing.of(torch.tensor(lengths))
    ids = torch.randint(3, 50, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, :5] = (other[:, :5] + 7) % 47 + 3
    with torch.no_grad():
        alone = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], 1)
        model.set_attn_implementation(ATTENTION)
        together, changed = (
            model(each, position_ids=packing.place_of_token[None], packing=packing).logits for each in (ids, other)
        )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert torch.equal(changed[:, 5:], together[:, 5:]) and not torch.allclose(changed[:, :5], together[:, :5])


@pytest.mark.parametrize("family", ["lfm2", "granitemoehybrid", "gemma2", "nemotron"])
def test_other_families_are_not_packed(family):
    """Convolutions and recurrent layers that run on, attention that asks for more, or is not handed the lengths."""
    assert f"{family} is none of the families" in why_not_packed(AutoConfig.for_model(family))


def test_a_window_shorter_than_samples():
    short, layered = language_model("mistral", sliding_window=4), language_model("gemma3_text", sliding_window=4)
    for model in (short, layered):
        assert why_not_packed(model.config, 4) is None and why_not_packed(model.config) is None
        assert "5 positions, more than its sliding window of 4" in why_not_packed(model.config, 5)
    packing = Packing.of(torch.tensor([6, 2]))
    short.set_attn_implementation(ATTENTION)
    with pytest.raises(ValueError, match="a sample of 6 positions is longer than the language model's sliding window"):
        short(torch.zeros(1, 8, dtype=torch.int64), position_ids=packing.place_of_token[None], packing=packing)


def test_what_packing_cannot_do_is_said(assistant, tmp_path):
    model, _ = assistant
    before = model.language_model.config._attn_implementation
    model.pack_samples()
    with pytest.raises(ValueError, match="samples are packed"):
        model.generate(torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="give labels"):
        model(torch.tensor([[5, 6]]))
    model.save_pretrained(tmp_path)  # amid training: nothing of it is in the checkpoint
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert not again.packs_samples and "packed" not in (tmp_path / "config.json").read_text()
    assert again.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape[1] >= 3
    model.pack_samples(False)
    assert model.language_model.config._attn_implementation == before
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape[1] >= 3
    model.config.text_config.model_type = "lfm2"
    with pytest.raises(ValueError, match="samples cannot be packed: lfm2 is none of the families"):
        model.pack_samples()
