"""What a flag that was left out stands for."""

from __future__ import annotations

from llava_drip.assistant.build import build_assistant
from llava_drip.instruct.arguments import DataArguments, ModelArguments
from llava_drip.instruct.parts import resolve
from llava_drip.towers.io import load_tower, save_tower


def test_a_budget_that_was_saved_is_the_default(tiny_language_model, tiny_tower, tmp_path):
    tower = load_tower(str(tiny_tower))
    tower.set_compression(5.0)
    budgeted = save_tower(tower, tmp_path / "tower", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    build_assistant(str(tiny_language_model), str(budgeted))[0].save_pretrained(tmp_path / "assistant")
    for model in (
        ModelArguments(str(tiny_language_model), vision_tower=str(budgeted)),
        ModelArguments(str(tmp_path / "assistant")),
    ):
        assert resolve("pretrain", model, DataArguments("rows.json"))[0].compression == 5.0
    without = ModelArguments(str(tiny_language_model), vision_tower=str(tiny_tower))
    assert resolve("pretrain", without, DataArguments("rows.json"))[0].compression is None
