"""Steps of both stages measured: what is trained, what each case holds, equal losses, what fails; the program's files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import MistralConfig

from llava_drip.instruct.data import Collator
from llava_drip.instruct.stage_cost.clock import PARTS
from llava_drip.instruct.stage_cost.losses import sample_losses
from llava_drip.instruct.stage_cost.parts import Budgets, NoiseRows, make_assistant
from llava_drip.instruct.stage_cost.plan import Case
from llava_drip.instruct.stage_cost.steps import make_steps
from llava_drip.instruct.stage_cost.survey import measure_stage, survey
from llava_drip.instruct.stage_cost.tables import markdown

pytestmark = pytest.mark.usefixtures("one_thread")


def steps_of(plan, model, errors=None):
    errors = {} if errors is None else errors
    made = make_steps(plan, model, plan.steps(plan.cases, 64), errors)
    return made, errors


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_steps_are_those_of_the_stage(stage, plan):
    mine = plan(stage=stage, compressions=(1.0, 4.0), arrangements=("packed", "padded"), gradient_checkpointing=True)
    model = make_assistant(mine)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made, errors = steps_of(mine, model)
    assert not errors and [one.step for one in made] == mine.steps(mine.cases, 64)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"multi_modal_projector"} | ({"language_model"} if stage == "finetune" else set())
    assert model.language_model.is_gradient_checkpointing
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())  # the learning rate is 0
    for one in made:
        assert sum(one.parts.values()) == pytest.approx(one.seconds, rel=0.05, abs=5e-3)
        assert set(one.parts) == set(PARTS) and all(value > 0 for value in one.parts.values()) and one.peak_gib > 0.1


def test_what_a_step_holds(plan):
    mine = plan(compressions=(1.0, 4.0), arrangements=("packed", "padded", "grouped"))
    made, _ = steps_of(mine, make_assistant(mine))
    text = sum(sample.text for sample in mine.samples)
    visual = {}
    for case in mine.cases:
        own = [one for one in made if one.step.case == case and not one.step.warm]
        assert sum(one.images for one in own) == 8
        visual[case] = sum(one.visual for one in own)
        assert sum(one.positions for one in own) == text + visual[case]
        share = sum(one.positions for one in own) / sum(one.slots for one in own)
        assert share == 1 if case.arrangement == "packed" else 0.5 < share < 0.999
    for how in mine.arrangements:
        assert visual[Case(1.0, how)] == 8 * 64 and visual[Case(4.0, how)] == visual[Case(4.0, "packed")]
    assert visual[Case(4.0, "packed")] == pytest.approx(8 * 16, abs=8)
    counts = {one.visual for one in made if one.step.case == Case(4.0, "packed")}
    assert len(counts) > 2  # they differ from picture to picture
    slots = {
        how: sum(one.slots for one in made if one.step.case == Case(4.0, how) and not one.step.warm)
        for how in mine.arrangements
    }
    assert slots["packed"] < slots["grouped"] < slots["padded"]


def test_losses_of_samples(plan):
    mine = plan(arrangements=("packed", "padded"))
    model = make_assistant(mine)
    for parameter in model.language_model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # loud: what a sample sees of another would show
    budgets, rows = Budgets(mine, model), NoiseRows(mine.samples, model, range(4))
    budgets.ask(4.0, range(4))
    batch = Collator(0)([rows[i] for i in range(4)])
    model.eval()
    packed, padded = (sample_losses(model, batch, packed=how) for how in (True, False))
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=0)
    model.pack_samples(False)
    for i, loss in enumerate(packed):
        budgets.ask(4.0, [i])
        with torch.no_grad():
            alone = model(**Collator(0)([rows[i]])).loss
        assert float(loss) == pytest.approx(float(alone), abs=1e-5)
    assert packed.std() > 0.1


def test_a_case_that_fails_is_a_row(plan, tmp_path):
    config = MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config.sliding_window = 90
    config.save_pretrained(tmp_path)
    mine = plan(language_model=str(tmp_path), compressions=(1.0, 10.0), arrangements=("packed",))
    result = survey([mine])
    dense, compressed = result["stages"][0]["cases"]
    assert "longer than the language model's sliding window of 90" in dense["error"] and dense["seconds"] is None
    assert compressed["error"] is None and compressed["seconds"] > 0 and compressed["faster"] is None
    text = markdown(result)
    assert "| 1x, packed | - | - | - | failed |" in text and f"1x, packed: {dense['error']}" in text


def test_memory_is_that_of_a_process_of_its_own(plan):
    (stage,) = survey([plan(compressions=(4.0,), memory=True, rounds=1)])["stages"]
    (case,) = stage["cases"]
    assert 0 < case["peak_memory_gib"] < 2


def test_towers_and_models_that_cannot_be_measured(plan, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "lfm2"}')
    for changes, message in (
        ({"language_model": str(tmp_path)}, "--packing packed: lfm2 is none of the families"),
        ({"vision_tower": "plain_vit_mini_patch8_64"}, "plain_vit_mini_patch8_64 has no adjustable token budget"),
        ({"vision_tower": "nothing_of_this_name"}, "nothing_of_this_name: neither a tower directory nor a model name"),
        ({"optim": "nothing_of_this_name"}, "nothing_of_this_name"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_stage(plan(**changes))
    own = measure_stage(plan(vision_tower="plain_vit_mini_patch8_64", compressions=(1.0,), rounds=1))
    assert own["cases"][0]["tokens"] == 64 and own["cases"][0]["faster"]["ratio"] == 1


def test_program(run_script, repository, tiny_world, tiny_language_model, tmp_path):
    lengths = tmp_path / "lengths.json"
    lengths.write_text(json.dumps([{"text": 20 + 5 * i, "learned": 9, "images": 1} for i in range(6)]))
    done = run_script(
        repository / "scripts" / "measure_assistant.py",
        *("--lengths", tiny_world.caption_train, lengths, "--language_model", tiny_language_model),
        *(
            "--vision_tower",
            "drip_mini_patch8_64_4x",
            "--packing",
            "padded",
            "packed",
            "--batch_size",
            2,
            "--rounds",
            2,
        ),
        *("--device", "cpu", "--no_memory", "--output", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "assistant.md").read_text()
    assert done.stdout.strip() == text.strip() and (tmp_path / "out" / "assistant.png").stat().st_size > 5000
    result = json.loads((tmp_path / "out" / "assistant.json").read_text())
    assert [stage["stage"] for stage in result["stages"]] == ["pretrain", "finetune"] and "transformers" in result[
        "versions"
    ]
    for stage in result["stages"]:
        assert len(stage["cases"]) == 6 and not any(case["error"] for case in stage["cases"])
        assert [case["arrangement"] for case in stage["cases"]] == ["padded"] * 3 + ["packed"] * 3
        for case in stage["cases"]:
            assert case["samples_per_second"] > 0 and math.isclose(sum(case["shares"].values()), 1)
            assert case["tokens"] == pytest.approx(64 / case["compression"], abs=3)
        assert [loss["compression"] for loss in stage["loss"]] == [1, 4, 10]
        assert all(loss["largest_difference"] < 1e-5 for loss in stage["loss"])
    assert "against 1x" in text and "against padded" in text and "| language model | optimizer |" in text
