"""The recipes of the two stages, by the real parser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from llava_drip.instruct.arguments import parse

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
RECIPES = sorted(path for kind in ("pretrain", "finetune") for path in (SCRIPTS / "recipes").glob(f"{kind}_*.yaml"))
# Learning rate, template, ZeRO stage, epochs, as LLaVA publishes them where the recipe's comment says so; and LoRA's:
# rank, alpha, learning rate of the projector, bits, kind of 4 bits, scales quantised as well.
WHOLE = (None, None, None, 16, None, None)
SETTINGS = {
    "pretrain_558k": (1e-3, "plain", 2, 1, *WHOLE),
    "pretrain_small": (1e-3, "plain", None, 1, *WHOLE),
    "finetune_158k": (2e-5, "vicuna_v1", 3, 3, *WHOLE),
    "finetune_158k_elastic": (2e-5, "vicuna_v1", 3, 3, *WHOLE),
    "finetune_158k_lora": (2e-4, "vicuna_v1", 3, 3, 128, 256, 2e-5, 16, None, None),
    "finetune_158k_qlora": (2e-4, "vicuna_v1", 2, 3, 128, 256, 2e-5, 4, "nf4", True),
    "finetune_665k": (2e-5, "vicuna_v1", 3, 1, *WHOLE),
    "finetune_scienceqa": (2e-5, "vicuna_v1", 3, 12, *WHOLE),
    "finetune_small": (2e-5, None, None, 1, *WHOLE),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_understood_and_its_batch_is_what_it_says(recipe, tmp_path):
    """ZeRO-2 in place of the recipe's, as transformers remembers a ZeRO-3 for the life of a process."""
    pytest.importorskip("deepspeed")
    flags = ["--data_path", "chat.json", "--output_dir", str(tmp_path / "out"), "--bf16", "false"]
    given = yaml.safe_load(recipe.read_text())
    zero = None
    if "model_name_or_path" not in given:
        flags += ["--model_name_or_path", "lm"]
    if "deepspeed" in given:
        config = json.loads((recipe.parent / given["deepspeed"]).resolve().read_text())
        zero = config["zero_optimization"]["stage"]
        flags += ["--deepspeed", str(SCRIPTS / "deepspeed" / "zero2.json")]
    model, data, args = parse([str(recipe), *flags], "finetune.py", "test")
    ((batch, gpus),) = re.findall(r"[Bb]atch \(?(\d+) on (\d+) GPU", recipe.read_text())
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * int(gpus) == int(batch)
    assert int(batch) == (256 if recipe.stem.startswith("pretrain") else 128)
    assert (data.model_max_length, args.get_warmup_steps(1000), args.gradient_checkpointing) == (2048, 30, True)
    assert (model.elastic_compression == [1, 10]) == ("elastic" in recipe.stem)
    found = (args.learning_rate, model.version, zero, args.num_train_epochs, model.lora_r, model.lora_alpha)
    found += (model.mm_projector_lr, model.bits, model.quant_type, model.double_quant)
    assert found == SETTINGS[recipe.stem] and given["bf16"]
    assert model.lora_enable == ("lora" in recipe.stem)


def test_every_recipe_has_its_settings():
    assert set(SETTINGS) == {path.stem for path in RECIPES}
