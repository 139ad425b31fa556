"""Mistakes of a user: one line that names them, a non-zero exit, and nothing left behind. And runs that cannot learn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from PIL import Image
from safetensors.torch import save_file

from llava_drip.instruct.stage import check_deepspeed, run_stage
from llava_drip.instruct.watch import DivergedError, NothingLearnedError

from .conftest import common, parts, start


@pytest.fixture(scope="module")
def mistaken(tiny_language_model, tiny_tower, tiny_world, tmp_path_factory) -> Callable[[str], tuple]:
    """mistaken(kind): the program's exit code, lines on stderr, whether the output directory exists."""
    folder = tmp_path_factory.mktemp("mistakes")
    rows = json.loads(tiny_world.caption_train.read_text())
    missing, silent = [*rows], [*rows]
    missing[7] = {**rows[7], "image": "not_there.jpg"}
    silent[5] = {key: value for key, value in rows[5].items() if key != "conversations"}
    for name, content in (("missing", missing), ("silent", silent)):
        (folder / f"{name}.json").write_text(json.dumps(content))

    images = folder / "images"
    shutil.copytree(tiny_world.images, images)
    cut = [{**row, "image": "cut.jpg"} for row in rows]
    (folder / "cut.json").write_text(json.dumps(cut))
    Image.effect_noise((200, 200), 60).save(images / "cut.jpg")
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:2000])

    bare = folder / "bare"
    shutil.copytree(tiny_language_model, bare)
    (bare / "config.json").unlink()

    def flags(name: str, **changes: object) -> list[object]:
        values = {
            "--model_name_or_path": tiny_language_model,
            "--vision_tower": tiny_tower,
            "--data_path": tiny_world.caption_train,
            "--image_folder": images,
            "--output_dir": folder / "out" / name,
            **{f"--{key}": value for key, value in changes.items()},
        }
        return [part for pair in values.items() for part in pair] + common(4, 2)

    calls = {
        "missing image": flags("missing image", data_path=folder / "missing.json"),
        "truncated": flags("truncated", data_path=folder / "cut.json") + ["--dataloader_num_workers", 1],
        "no conversations": flags("no conversations", data_path=folder / "silent.json"),
        "unknown flag": flags("unknown flag") + ["--mm_projector_tipe", "linear"],
        "no config": flags("no config", model_name_or_path=bare),
    }

    def run(kind: str) -> tuple[int, list[str], bool]:
        process = start("pretrain", *calls[kind])
        _, err = process.communicate(timeout=240)
        return process.returncode, err.strip().splitlines(), (folder / "out" / kind).exists()

    return run


EXPECTED = {
    "missing image": (1, ["missing.json: row 7", "'not_there.jpg' not found"]),
    "truncated": (1, ["images/cut.jpg: truncated or corrupt"]),
    "no conversations": (1, ["silent.json: row 5", "has no 'conversations'"]),
    "unknown flag": (2, ["--mm_projector_tipe"]),
    "no config": (1, ["bare: has no config.json"]),
}


QUICK = ("missing image",)  # a process each, which mostly imports


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in EXPECTED]
)
def test_a_mistake_is_one_line_and_leaves_nothing(mistaken, kind):
    code, lines, left = mistaken(kind)
    expected_code, parts = EXPECTED[kind]
    assert code == expected_code, lines
    assert not any("Traceback" in line for line in lines), lines
    errors = [line for line in lines if line.startswith("pretrain_projector.py: error:")]
    assert len(errors) == 1 and lines[-1] == errors[0]
    assert all(part in errors[0] for part in parts) and len(errors[0]) < 500, errors[0]
    if kind != "truncated":  # seen when it is read, after the progress bars of loading
        assert len(lines) == 1, lines
    assert not left


# Runs that cannot learn anything


def conversation(question: str, answer: str) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def try_run(stage: str, rows: list[dict], model, tower, folder, *flags: str) -> None:
    path = folder / "chat.json"
    path.write_text(json.dumps(rows))
    argv = ["--model_name_or_path", model, "--vision_tower", tower, "--data_path", path, "--output_dir", folder / "out"]
    try:
        run_stage(stage, [*map(str, argv), *common(1, 3), *flags])
    finally:
        assert not (folder / "out").exists()


def test_an_answer_that_is_cut_away(tiny_language_model, tiny_tower, tmp_path):
    """Wherever it stands: the row is not one of the three that this run would draw."""
    rows = [conversation("Short?", "Yes.") for _ in range(200)]
    rows[-1] = {"id": "long", **conversation("A long question that takes the room there is. " * 20, "An answer.")}
    message = r"chat.json: row 199 \(id 'long'\): nothing of an answer is left within --model_max_length 200"
    with pytest.raises(NothingLearnedError, match=message):
        try_run("finetune", rows, tiny_language_model, tiny_tower, tmp_path, "--model_max_length", "200")


def test_an_image_that_is_cut_away(tiny_language_model, tiny_tower, tiny_world, tmp_path):
    rows = [conversation("Short?", "Yes.") for _ in range(200)]
    late = [
        *conversation("?", "A long answer. " * 40)["conversations"],
        *conversation("<image>", "It.")["conversations"],
    ]
    rows[-1] = {"image": next(tiny_world.images.iterdir()).name, "conversations": late}
    flags = ["--image_folder", str(tiny_world.images)]
    message = "chat.json: row 199: an <image> is cut off by --model_max_length 400, of which 1 <image> may take 64"
    with pytest.raises(ValueError, match=message):
        try_run("finetune", rows, tiny_language_model, tiny_tower, tmp_path, *flags, "--model_max_length", "400")


def test_more_positions_than_the_language_model_has(tiny_language_model, tiny_tower, tmp_path):
    rows = [conversation("Short?", "Yes.")]
    with pytest.raises(ValueError, match="--model_max_length 2049: the language model has 2048 positions"):
        try_run("finetune", rows, tiny_language_model, tiny_tower, tmp_path, "--model_max_length", "2049")


def test_a_template_without_answers(tiny_language_model, tiny_tower, tmp_path):
    model = shutil.copytree(tiny_language_model, tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = "{%- for m in messages if m.role == 'user' -%}{{ m.content[-1].text }}{%- endfor -%}"
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "chat_template.jinja").write_text(config["chat_template"])
    with pytest.raises(NothingLearnedError, match="chat.json: every label of the first 3 rows is ignored"):
        try_run("finetune", [conversation("What?", "That.")] * 3, model, tiny_tower, tmp_path)


def test_a_loss_that_is_not_a_number(tiny_language_model, tiny_tower, tiny_world, tmp_path):
    """From a projector that an earlier run has spoilt; it is not called "no gradient"."""
    shapes = {"0.weight": (64, 96), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    save_file({name: torch.full(shape, float("nan")) for name, shape in shapes.items()}, tmp_path / "nan.safetensors")
    rows = json.loads(tiny_world.caption_train.read_text())
    flags = ["--image_folder", str(tiny_world.images), "--pretrain_mm_mlp_adapter", str(tmp_path / "nan.safetensors")]
    with pytest.raises(DivergedError, match=r"the loss of step 1 is nan: row \d+"):
        try_run("pretrain", rows, tiny_language_model, tiny_tower, tmp_path, *flags)


def test_no_gradient_reaches_the_projector(tiny_language_model, tiny_tower, tmp_path):
    """Alignment on text alone: there are labels, and nothing that is trained has to do with them."""
    rows = [conversation("What is red?", "A circle.")] * 4
    with pytest.raises(NothingLearnedError, match="no trainable parameter received a gradient in step 1"):
        try_run("pretrain", rows, tiny_language_model, tiny_tower, tmp_path)


def test_one_row_with_labels_is_enough(tiny_language_model, tiny_tower, tiny_world, tmp_path):
    rows = json.loads(tiny_world.caption_train.read_text())[:1]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    flags = parts(tiny_language_model, tiny_tower, tmp_path / "out")
    flags += ["--data_path", str(tmp_path / "chat.json"), "--image_folder", str(tiny_world.images), *common(1, 1)]
    assert run_stage("pretrain", flags) == tmp_path / "out"


def test_too_few_rows_for_one_batch(tiny_language_model, tiny_tower, tmp_path):
    """transformers would end such a run without a step, and save what was given as its result."""
    flags = ["--dataloader_drop_last", "true", "--per_device_train_batch_size", "5"]
    with pytest.raises(NothingLearnedError, match="no step was made: --dataloader_drop_last true"):
        try_run("finetune", [conversation("What?", "That.")] * 4, tiny_language_model, tiny_tower, tmp_path, *flags)


def test_a_layer_that_the_tower_does_not_have(tiny_language_model, tiny_tower, tmp_path):
    rows = [conversation("What?", "That.")]
    for layer in ("-99", "-5"):
        with pytest.raises(
            ValueError, match=f"--mm_vision_select_layer {layer} .*: {tiny_tower} gives layers -4 to -1"
        ):
            try_run("finetune", rows, tiny_language_model, tiny_tower, tmp_path, "--mm_vision_select_layer", layer)


def test_an_option_that_the_schedule_or_the_optimizer_lacks(tiny_language_model, tiny_tower, tmp_path):
    rows = [conversation("What?", "That.")] * 2
    for flags, message in (
        (
            ["--lr_scheduler_kwargs", '{"peak": 1}'],
            "--lr_scheduler_type cosine --lr_scheduler_kwargs {'peak': 1}: .*peak",
        ),
        (["--optim", "galore_adamw"], "--optim galore_adamw: .*galore_torch"),  # no dependency of ours
    ):
        with pytest.raises(ValueError, match=message):
            try_run("finetune", rows, tiny_language_model, tiny_tower, tmp_path, *flags)


def test_a_projector_that_does_not_fit_is_named(tiny_checkpoint, tiny_language_model, tiny_tower, tmp_path):
    rows = [conversation("What?", "That.")]
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tiny_tower / "model.safetensors").read_bytes()[:5000])
    for adapter, message in (
        (tmp_path / "none.safetensors", "no such projector file"),
        (tiny_tower / "model.safetensors", "does not fit"),
        (cut, f"{cut}: cut off or no safetensors file"),
    ):
        with pytest.raises(ValueError, match=message):
            try_run(
                "finetune", rows, tiny_language_model, tiny_tower, tmp_path, "--pretrain_mm_mlp_adapter", str(adapter)
            )
    with pytest.raises(ValueError, match="--vision_tower: .* is an assistant and has its tower"):
        try_run("finetune", rows, tiny_checkpoint, tiny_tower, tmp_path)


def test_a_deepspeed_configuration_without_weights_in_the_result(repository):
    pytest.importorskip("deepspeed")
    config = json.loads((repository / "scripts" / "deepspeed" / "zero3.json").read_text())
    for gathers in (True, False):
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = gathers
        args = SimpleNamespace(deepspeed="own.json", hf_deepspeed_config=HfDeepSpeedConfig(config))
        if gathers:
            check_deepspeed(args)
            continue
        with pytest.raises(ValueError, match="--deepspeed own.json: stage3_gather_16bit_weights_on_model_save must be"):
            check_deepspeed(args)
