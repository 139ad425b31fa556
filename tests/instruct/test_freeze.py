"""What is trained, what is frozen, and how a change is seen."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText

from llava_drip.instruct.freeze import PARTS, TRAINED, freeze_for, freeze_table
from llava_drip.instruct.watch import FirstStepGuard, NothingLearnedError

from .conftest import fingerprints


@pytest.fixture
def model(tiny_checkpoint):
    return AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)


@pytest.mark.parametrize("stage", sorted(TRAINED))
def test_stages(model, stage):
    freeze_for(stage, model)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert trained == set(TRAINED[stage]) and trained | frozen == set(PARTS) and not trained & frozen


def test_table_counts_every_parameter(model):
    freeze_for("pretrain", model)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(freeze_table(model))
    lines = console.export_text().splitlines()
    for name in PARTS:
        count = sum(p.numel() for p in getattr(model, name).parameters())
        (line,) = [line for line in lines if name in line]
        assert line.count(f"{count:,}") == 2 and "float32" in line, line
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.multi_modal_projector.parameters())
    (line,) = [line for line in lines if line.split()[1:2] == ["all"]]
    assert f"{total:,}" in line and f"{trained:,}" in line and f"{total - trained:,}" in line


def test_fingerprints_see_any_change_and_name_its_part(model):
    before = fingerprints(model.state_dict())
    assert set(before) == set(PARTS) and fingerprints(model.state_dict()) == before
    weight = model.multi_modal_projector[0].weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    after = fingerprints(model.state_dict())
    assert [name for name in PARTS if before[name] != after[name]] == ["multi_modal_projector"]
    assert fingerprints(model.to(torch.bfloat16).state_dict())["vision_tower"] != before["vision_tower"]


def test_nothing_to_train_is_refused(model):
    with pytest.raises(NothingLearnedError, match="no parameter is trainable"):
        FirstStepGuard(model.requires_grad_(False))


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("fp16", [False, True])
def test_a_gradient_that_is_not_finite_is_not_called_none(model, fp16, value):
    freeze_for("pretrain", model)
    guard = FirstStepGuard(model)
    model.multi_modal_projector[0].bias.sum().backward()  # one parameter has a good gradient, another not
    (float(value) * model.multi_modal_projector[0].weight).sum().backward()
    args, state = SimpleNamespace(device=torch.device("cpu"), fp16=fp16), SimpleNamespace(global_step=7)
    if fp16:  # the scale of the loss will be lowered
        guard.on_step_end(args, state, None)
        return
    message = r"gradient of step 7 is not finite \(NaN or infinite\)"  # the first step of a run resumed after 6
    with pytest.raises(NothingLearnedError, match=message):
        guard.on_step_end(args, state, None)
