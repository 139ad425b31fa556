"""A loss, or a gradient, that is not finite: the run stops before a weight is changed, and names the rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_drip.assistant.expand import IGNORE_INDEX
from llava_drip.instruct.bad_images import BadImages
from llava_drip.instruct.checkpoints import lack_of
from llava_drip.instruct.stage import run_stage
from llava_drip.instruct.watch import DivergedError, NothingLearnedError, StepWatch

from .conftest import common, parts

BAD = "§"  # its tokens' embeddings are NaN in the poisoned assistant
SAVING = ["--save_strategy", "steps", "--save_steps", "1"]


@pytest.fixture(scope="module")
def poisoned(tiny_checkpoint, tiny_tokenizer, tmp_path_factory) -> Path:
    """An assistant whose loss is NaN in a batch with BAD, and only there."""
    directory = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("poisoned") / "assistant"))
    weights = load_file(directory / "model.safetensors")
    weights["language_model.model.embed_tokens.weight"][tiny_tokenizer(BAD)["input_ids"]] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def rows_with_a_bad_one(tiny_world, tmp_path) -> Path:
    """16 rows with ids r0, r1, ...; r10 has BAD in its question."""
    rows = json.loads(tiny_world.instruct_train.read_text())[:16]
    for i, row in enumerate(rows):
        row["id"] = f"r{i}"
    rows[10]["conversations"][0]["value"] += BAD
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def flags(model: Path, data: Path, world, output: Path) -> list[str]:
    given = ["--model_name_or_path", model, "--data_path", data, "--image_folder", world.images, "--output_dir", output]
    return [*map(str, given), *common(2, 4), *SAVING, "--train_sampling_strategy", "sequential"]


def check_stopped_at_step_2(output: Path) -> None:
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]
    assert lack_of(output / "checkpoint-1") is None
    assert not (output / "config.json").exists() and not (output / ".partial").exists(), "no result"


@pytest.mark.parametrize("precision", [[], ["--bf16", "true"]], ids=["fp32", "bf16"])
def test_it_names_the_rows_of_all_batches_of_the_step(
    poisoned, rows_with_a_bad_one, tiny_world, tmp_path, precision, capsys
):
    """Four batches of two rows a step; the third of step 2 is the one, and only that is named."""
    argv = flags(poisoned, rows_with_a_bad_one, tiny_world, tmp_path / "out")
    argv += ["--gradient_accumulation_steps", "4", *precision]
    message = r"the loss of step 2 is nan: row 10 \(id 'r10'\), row 11 \(id 'r11'\)\. Nothing of it is saved"
    with pytest.raises(DivergedError, match=message) as error:
        run_stage("finetune", argv)
    assert "row 9" not in str(error.value) and "step 2, rank 0: row 10 (id 'r10'), row 11" in capsys.readouterr().out
    check_stopped_at_step_2(tmp_path / "out")
    with pytest.raises(DivergedError, match=message):  # again, from the checkpoint
        run_stage("finetune", [*argv, "--resume_from_checkpoint", "latest"])
    check_stopped_at_step_2(tmp_path / "out")


@pytest.mark.slow
def test_two_ranks_under_zero(poisoned, rows_with_a_bad_one, tiny_world, tmp_path):
    """DeepSpeed makes its step within the last backward. Rank 1 has the row; both ranks say so, and end."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (extra: train)")
    from .test_deepspeed import launch

    argv = flags(poisoned, rows_with_a_bad_one, tiny_world, tmp_path / "out") + ["--gradient_accumulation_steps", "2"]
    named = r"finetune.py: error: the loss of step 2 is nan on rank 1: row 10 \(id 'r10'\), row 11 \(id 'r11'\)"
    with pytest.raises(AssertionError, match=named):  # launch: it did not succeed
        launch("finetune", "zero2.json", *argv)
    check_stopped_at_step_2(tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint-1"
    sealed = (checkpoint / "trainer_state.json").stat().st_mtime_ns
    assert all(path.stat().st_mtime_ns <= sealed for path in checkpoint.rglob("*") if path.is_file()), "written last"


def test_a_gradient_that_overflows_is_not_saved(tiny_language_model, tiny_tower, tiny_world, tmp_path):
    """The losses are finite, and each entry of the gradient; its norm is not, and clipping by it would make weights 0 or NaN."""
    model = Path(shutil.copytree(tiny_language_model, tmp_path / "steep"))
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] *= 1e25
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    argv = [*parts(model, tiny_tower, tmp_path / "out"), "--data_path", str(tiny_world.caption_train)]
    argv += ["--image_folder", str(tiny_world.images), *common(4, 3)]
    for saving, step in ((SAVING, 1), ([], 1)):  # before the checkpoint of the step; before the next step
        with pytest.raises(DivergedError, match=f"the gradient of step {step} is not finite, though its loss is: row"):
            run_stage("pretrain", [*argv, *saving])
        assert not list(tmp_path.glob("out/checkpoint-*"))


def labels(*values: int) -> dict:
    return {"labels": torch.tensor([values])}


def test_the_last_steps_gradient_is_looked_at_before_the_result_is_written():
    watch = StepWatch(BadImages(0.01), fp16=False)
    watch.begin(7, [labels(1)], [["row 3"]], [])
    watch.look(torch.tensor(1.0))
    watch.check_gradient(torch.device("cpu"))
    watch.end(torch.tensor(float("inf")))
    with pytest.raises(DivergedError, match="the gradient of step 7 is not finite, though its loss is: row 3"):
        watch.check_gradient(torch.device("cpu"))


def test_loss_scaling_may_overflow():
    watch = StepWatch(BadImages(0.01), fp16=True)
    watch.begin(1, [labels(1)], [["row 3"]], [])
    watch.look(torch.tensor(1.0))
    watch.end(float("inf"))
    watch.check_gradient(torch.device("cpu"))
    watch.begin(2, [labels(1)], [["row 4"]], [])
    with pytest.raises(DivergedError, match="the loss of step 2 is inf: row 4"):
        watch.look(torch.tensor(float("inf")))


def test_loss_scaling_that_finds_no_scale():
    """A run that skips every step would write the weights that it began with, as a result."""
    cpu = torch.device("cpu")

    def skipping(first: int, last: int, finite: tuple[int, ...] = ()) -> StepWatch:
        watch = StepWatch(BadImages(0.01), fp16=True)
        for step in range(first, last + 1):
            watch.begin(step, [labels(1)], [["row 3"]], [])
            watch.look(torch.tensor(1.0))
            # DeepSpeed leaves the norm of an earlier step, torch's scaler the one that is not finite.
            watch.end(
                1.0 if step in finite or step % 2 else torch.tensor(float("nan")), step not in finite and step % 2
            )
        return watch

    with pytest.raises(NothingLearnedError, match="--fp16's loss scaling skipped all 3 steps: .* --bf16 true"):
        skipping(1, 3).check_learned(3, cpu)
    skipping(1, 3, finite=(2,)).check_learned(3, cpu)
    skipping(4, 5).check_learned(5, cpu)  # resumed: there is something that it learned before
    skipping(1, 60, finite=(40,)).check_gradient(cpu)
    with pytest.raises(
        NothingLearnedError, match="skipped 50 steps in a row, the last of them step 90: .* --bf16 true"
    ):
        skipping(1, 91, finite=(40,))


def test_a_step_without_labels_is_called_so():
    """transformers divides by their number."""
    watch = StepWatch(BadImages(0.01), fp16=False)
    watch.begin(5, [labels(IGNORE_INDEX)] * 2, [["row 3"], ["row 4"]], [])
    watch.look(torch.tensor(float("nan")))
    with pytest.raises(NothingLearnedError, match="every label of step 5 is ignored: no token of these conversations"):
        watch.look(torch.tensor(float("nan")))


def test_many_rows_are_named_in_a_line_of_their_own(capsys):
    watch = StepWatch(BadImages(0.01), fp16=False)
    watch.begin(5, [labels(1)], [[f"row {i}" for i in range(12)]], [])
    with pytest.raises(DivergedError, match=r"row 7 and 4 more \(printed above\)\. "):
        watch.look(torch.tensor(float("nan")))
    assert capsys.readouterr().out.endswith("row 10, row 11\n")
