"""Training the assistant: gradients, losses, and what a frozen tower does meanwhile."""

from __future__ import annotations

import pytest
import torch

from llava_drip.assistant.expand import IGNORE_INDEX
from llava_drip.instruct.freeze import freeze_for

from .conftest import picture


def with_labels(processor, text, images) -> dict:
    """A right-padded batch whose labels are the last five tokens of each row."""
    batch = dict(processor(text=text, images=images, padding_side="right"))
    labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
    for row, n in enumerate(batch["attention_mask"].sum(1).tolist()):
        labels[row, n - 5 : n] = batch["input_ids"][row, n - 5 : n]
    return {**batch, "labels": labels}


def gradients(model) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_gradient_reaches_the_projector_and_only_what_is_trained(assistant, rows):
    model, processor = assistant
    for stage, parts in (
        ("pretrain", {"multi_modal_projector"}),
        ("finetune", {"multi_modal_projector", "language_model"}),
    ):
        freeze_for(stage, model)
        model.zero_grad()
        model.train()(**with_labels(processor, *rows)).loss.backward()
        seen = {n: g.abs().max().item() for n, g in gradients(model).items() if g is not None}
        assert {name.split(".")[0] for name in seen} == parts
        assert all(v > 0 for n, v in seen.items() if n.startswith("multi_modal_projector"))
        assert all(p.grad is None for p in model.vision_tower.parameters())


def test_an_unfrozen_tower_gets_the_tasks_gradient(assistant, rows):
    model, processor = assistant
    model.requires_grad_(True).train()(**with_labels(processor, *rows)).loss.backward()
    assert model.vision_tower.training
    assert model.vision_tower.patch_embed.proj.weight.grad.abs().max() > 0
    assert model.vision_tower.boundary_predictor.fc1.weight.grad.abs().max() > 0


def test_a_batch_of_text_alone_gives_the_projector_a_zero_gradient(assistant):
    """Not None: in DDP and ZeRO-3 every rank must use the same parameters in every step."""
    model, processor = assistant
    batch = with_labels(processor, ["USER: What is red? ASSISTANT: A circle.", "USER: Why? ASSISTANT: So."], None)
    freeze_for("finetune", model)
    loss = model.train()(**batch).loss
    loss.backward()
    for parameter in model.multi_modal_projector.parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0
    torch.testing.assert_close(loss, model.eval()(**batch).loss)  # the blank image changes nothing


def test_a_batch_of_text_alone_beside_a_budget_for_each_image(assistant):
    model, processor = assistant
    budgets = torch.tensor([2.0, 4.0, 8.0])
    model.set_compression(budgets)
    batch = with_labels(processor, ["USER: What is red? ASSISTANT: A circle."], None)
    assert torch.isfinite(model.train()(**batch).loss)
    assert model.vision_tower.budget is budgets


def test_a_frozen_tower_stays_in_eval(assistant, rows):
    model, processor = assistant
    freeze_for("finetune", model)
    model.train()
    assert model.language_model.training and not any(m.training for m in model.vision_tower.modules())
    pixels = processor(text=rows[0], images=rows[1])["pixel_values"]
    a, b = model.encode_images(pixels), model.encode_images(pixels)
    assert torch.equal(a.values, b.values) and (a.rate_loss == 0).all()
    assert a.values.requires_grad


def test_loss_of_a_padded_batch_is_the_mean_over_its_labelled_tokens(assistant, rows):
    model, processor = assistant
    text, images = rows
    batch = with_labels(processor, text, images)
    together = model(**batch).loss
    alone = torch.stack([model(**with_labels(processor, [t], [i])).loss for t, i in zip(text, images)])
    torch.testing.assert_close(together, alone.mean(), atol=1e-5, rtol=1e-5)  # five labels in each row
    total = model(**batch, num_items_in_batch=torch.tensor(40)).loss  # what the Trainer gives over accumulated batches
    torch.testing.assert_close(total, together * 20 / 40)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_change_the_loss(assistant, rows, side):
    model, processor = assistant
    losses = []
    for padding_side in ("right", side):
        batch = processor(text=rows[0], images=rows[1], padding_side=padding_side)
        started = batch["attention_mask"].cumsum(1) > 1  # a row's first token has nothing to be predicted from
        labels = batch["input_ids"].masked_fill(~started | (batch["attention_mask"] == 0), IGNORE_INDEX)
        losses.append(model(**batch, labels=labels).loss)
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)


def test_no_position_of_a_picture_is_a_target(assistant):
    model, processor = assistant
    inputs = processor(text=["<image>"], images=[[picture(1)]])
    _, expanded = model.embed(**inputs, labels=inputs["input_ids"])
    assert expanded.is_image.sum() == model.encode_images(inputs["pixel_values"]).lengths.sum()
    assert (expanded.labels[expanded.is_image] == IGNORE_INDEX).all()


@pytest.mark.parametrize(
    "drop, message", [(slice(0, 3), "row 3, which has 1 <image>"), (slice(0, 1), "row 2, which has 2 <image>")]
)
def test_too_few_pictures_name_the_row(assistant, rows, drop, message):
    model, processor = assistant
    inputs = processor(text=rows[0], images=rows[1])
    inputs["pixel_values"] = inputs["pixel_values"][drop]
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=1)


def test_too_many_pictures_are_counted(assistant, rows):
    model, processor = assistant
    inputs = processor(text=rows[0], images=rows[1])
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"]] * 2)
    with pytest.raises(ValueError, match="4 <image> placeholders and 8 images"):
        model(**inputs)


def test_gradient_checkpointing_changes_no_gradient(assistant, rows):
    model, processor = assistant
    freeze_for("finetune", model)
    batch = with_labels(processor, *rows)
    seen = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model.train()(**batch, use_cache=False).loss.backward()
        seen.append({name: grad.clone() for name, grad in gradients(model).items()})
    assert model.language_model.is_gradient_checkpointing
    for name, grad in seen[0].items():
        torch.testing.assert_close(seen[1][name], grad, msg=name)
