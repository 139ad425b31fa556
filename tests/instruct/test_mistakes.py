"""Mistakes of a user: one line that names them, a non-zero exit, and nothing left behind. And runs that cannot learn."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from llava_drip.instruct.stage import run_stage
from llava_drip.instruct.trainer import NothingLearnedError

from .conftest import common, start


@pytest.fixture(scope="module")
def failures(tiny_language_model, tiny_tower, tiny_world, tmp_path_factory) -> dict[str, tuple]:
    """kind → exit code, lines on stderr, whether the output directory exists. All run at once: each mostly imports."""
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
    running = {kind: start("pretrain", *arguments) for kind, arguments in calls.items()}
    results = {}
    for kind, process in running.items():
        _, err = process.communicate(timeout=240)
        results[kind] = (process.returncode, err.strip().splitlines(), (folder / "out" / kind).exists())
    return results


EXPECTED = {
    "missing image": (1, ["missing.json: row 7", "'not_there.jpg' not found"]),
    "truncated": (1, ["images/cut.jpg: truncated or corrupt"]),
    "no conversations": (1, ["silent.json: row 5", "has no 'conversations'"]),
    "unknown flag": (2, ["--mm_projector_tipe"]),
    "no config": (1, ["bare: has no config.json"]),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_mistake_is_one_line_and_leaves_nothing(failures, kind):
    code, lines, left = failures[kind]
    expected_code, parts = EXPECTED[kind]
    assert code == expected_code, lines
    assert not any("Traceback" in line for line in lines)
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


def test_every_label_cut_away(tiny_language_model, tiny_tower, tmp_path):
    rows = [conversation("A long question that takes the room there is.", "An answer.")] * 3
    with pytest.raises(NothingLearnedError, match=r"chat.json: every label of the first 3 rows is ignored"):
        try_run("finetune", rows, tiny_language_model, tiny_tower, tmp_path, "--model_max_length", "16")


def test_every_label_of_the_first_step_cut_away(tiny_language_model, tiny_tower, tmp_path):
    rows = [conversation("A long question that takes the room there is. " * 20, "An answer.")] * 30
    rows.append(conversation("Short?", "Yes."))
    with pytest.raises(NothingLearnedError, match="every label of step 1 is ignored"):
        try_run("finetune", rows, tiny_language_model, tiny_tower, tmp_path, "--model_max_length", "200")


def test_no_gradient_reaches_the_projector(tiny_language_model, tiny_tower, tmp_path):
    """Alignment on text alone: there are labels, and nothing that is trained has to do with them."""
    rows = [conversation("What is red?", "A circle.")] * 4
    with pytest.raises(NothingLearnedError, match="no trainable parameter received a gradient in step 1"):
        try_run("pretrain", rows, tiny_language_model, tiny_tower, tmp_path)


def test_one_row_with_labels_is_enough(tiny_language_model, tiny_tower, tiny_world, tmp_path):
    rows = json.loads(tiny_world.caption_train.read_text())[:1]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    flags = [
        "--model_name_or_path",
        tiny_language_model,
        "--vision_tower",
        tiny_tower,
        "--data_path",
        tmp_path / "chat.json",
    ]
    flags += ["--image_folder", tiny_world.images, "--output_dir", tmp_path / "out"]
    assert run_stage("pretrain", [*map(str, flags), *common(1, 1)]) == tmp_path / "out"


def test_a_projector_that_does_not_fit_is_named(tiny_checkpoint, tiny_language_model, tiny_tower, tmp_path):
    rows = [conversation("What?", "That.")]
    for adapter, message in (
        (tmp_path / "none.safetensors", "no such projector file"),
        (tiny_tower / "model.safetensors", "does not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            try_run(
                "finetune", rows, tiny_language_model, tiny_tower, tmp_path, "--pretrain_mm_mlp_adapter", str(adapter)
            )
    with pytest.raises(ValueError, match="--vision_tower: .* is an assistant and has its tower"):
        try_run("finetune", rows, tiny_checkpoint, tiny_tower, tmp_path)
