"""What an epoch leaves: records, evaluation that leaves no trace in the training, and weights that load elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import timm
import torch
from clip_helpers import COLOURS, MODEL, picture, run_program, write_tar
from open_clip_train import main
from open_clip_train import train as trainer_train
from safetensors.torch import load_file
from transformers import AutoProcessor

import llava_drip  # noqa: F401 - registers the models
from llava_drip.contrastive.checkpoint import load_clip
from llava_drip.contrastive.epoch import line
from llava_drip.contrastive.train import TrainingError, train
from llava_drip.instruct.stage import run_stage
from llava_drip.towers.io import load_tower


def rows(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluation(data, pictures, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "names.txt").write_text("\n".join(COLOURS))
    classes = [f"--zeroshot-data={data}/cls-{{0..1}}.tar", f"--zeroshot-classes={folder}/names.txt"]
    return [*classes, f"--retrieval-data={pictures}"]


@pytest.fixture(scope="module")
def evaluated(training_flags, evaluation, tmp_path_factory) -> Path:
    """Three epochs, evaluated after the second and the last."""
    flags = [*training_flags, *evaluation, "--epochs=3", "--report-to=tensorboard", "--workers=1"]
    return train([*flags, f"--logs={tmp_path_factory.mktemp('evaluated')}", "--name=run"])


def test_records(evaluated):
    run = json.loads((evaluated / "run.json").read_text())
    assert run["program"] == "train_clip.py" and run["model"] == MODEL and run["flags"]["boundary_loss_weight"] == 5.0
    assert torch.__version__.startswith(run["versions"]["torch"]) and run["command"][1:] and run["started"][:2] == "20"
    assert run["parameters"] == sum(p.numel() for p in open_clip.create_model(MODEL).parameters())
    assert run["data"]["samples"] == 48
    epochs, steps = rows(evaluated, "epochs.jsonl"), rows(evaluated, "steps.jsonl")
    assert [(row["epoch"], row["step"]) for row in epochs] == [(1, 6), (2, 12), (3, 18)]
    for row in epochs:
        assert row["loss"] == pytest.approx(row["contrastive_loss"] + row["boundary_loss"])
        assert 1 <= row["compression_p5"] <= row["compression_p95"] <= 64
        assert (
            0.9 * row["compression_p5"] <= row["compression"] <= 1.1 * row["compression_p95"]
        )  # it is that of the mean count
        assert row["tokens"] * row["compression"] == pytest.approx(64)
        assert row["step_seconds"] > 0 and row["images_per_second"] > 0 and 0.05 < row["peak_memory_gib"] < 16
        assert row["skipped"] == {"counts": {}, "examples": []}
    assert [row["step"] for row in steps] == [1, 3, 5, 6, 7, 9, 11, 12, 13, 15, 17, 18]
    assert all({"loss", "lr", "contrastive_loss", "boundary_loss", "compression"} <= row.keys() for row in steps)
    logged = (evaluated / "out.log").read_text()
    assert f"Loss: {steps[0]['loss']:#.5g} " in logged  # the trainer's own line says the same


def test_evaluation(evaluated):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scores = ["zero_shot_top1", "zero_shot_top5"]
    scores += [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    epochs = rows(evaluated, "epochs.jsonl")
    assert not set(scores) & epochs[0].keys()
    for row in epochs[1:]:
        assert all(0 <= row[name] <= 1 for name in scores) and row["zero_shot_top5"] == 1.0  # of five classes
    (last,) = [text for text in (evaluated / "out.log").read_text().splitlines() if "Epoch 3 (step 18)" in text]
    assert f"zero-shot top-1 {epochs[2]['zero_shot_top1']:.1%}" in last and "image-to-text R@1/5/10" in last
    events = EventAccumulator(str(evaluated / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("val/zero_shot_top1")] == [2, 3]
    assert [event.step for event in events.Scalars("retrieval/image_to_text_R@1")] == [2, 3]
    # The same figures by the evaluation program, from the run's folder.
    names, data = (
        json.loads((evaluated / "run.json").read_text())["flags"][f"zeroshot_{what}"] for what in ("classes", "data")
    )
    flags = ["--model", MODEL, "--checkpoint", str(evaluated), "--data", data, "--classes", names, "--device", "cpu"]
    result = run_program("eval/zero_shot.py", *flags, "--json", str(evaluated / "zero_shot.json"))
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads((evaluated / "zero_shot.json").read_text())["top1"] == pytest.approx(epochs[2]["zero_shot_top1"])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_evaluation_leaves_no_trace(workers, training_flags, evaluation, tmp_path, pictures):
    """The curve is that of a run that evaluated nothing."""
    flags = [*training_flags, "--epochs=2", f"--workers={workers}", f"--logs={tmp_path}"]
    with_validation = [*evaluation, "--zeroshot-frequency=1", f"--val-data={pictures}", "--dataset-type=auto"]
    curves = [
        [
            (row["step"], row["loss"], row["compression"])
            for row in rows(train([*flags, *more, f"--name={name}"]), "steps.jsonl")
        ]
        for name, more in (("bare", []), ("evaluated", with_validation))
    ]
    assert curves[0] == curves[1]
    for row in rows(tmp_path / "evaluated", "epochs.jsonl"):
        assert "clip_val_loss" in row["validation"] and "zero_shot_top1" in row


@pytest.mark.slow
def test_other_ranks_wait_for_the_evaluation(training_flags, evaluation, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--", "scripts/train_clip.py"]
    flags = [*training_flags, *evaluation, "--epochs=2", "--zeroshot-frequency=1", f"--logs={tmp_path}", "--name=run"]
    result = run_program(*torchrun, *flags, "--batch-size=4")
    assert result.returncode == 0, result.stderr[-3000:]
    assert all("text_to_image_R@10" in row for row in rows(tmp_path / "run", "epochs.jsonl"))


def test_weights_load_everywhere(evaluated):
    state = torch.load(evaluated / "checkpoints" / "epoch_3.pt", weights_only=True)["state_dict"]
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{evaluated}")
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    trunk = {
        name.removeprefix("visual.trunk."): value for name, value in state.items() if name.startswith("visual.trunk.")
    }
    for tower in (
        load_tower(str(evaluated / "tower")),
        timm.create_model(f"local-dir:{evaluated}/tower", pretrained=True),
    ):
        found = tower.state_dict()
        for name, value in trunk.items():
            assert torch.equal(found[name], value), name
    assert json.loads((evaluated / "tower" / "config.json").read_text())["pretrained_cfg"]["mean"] == list(
        open_clip.OPENAI_DATASET_MEAN
    )
    names = {path.name for path in evaluated.iterdir()}
    assert not [name for name in names if "partial" in name or name.endswith(".tmp")]


def test_the_tower_is_aligned_with_a_language_model(evaluated, data, pictures, tiny_language_model, tmp_path):
    """pretrain_projector.py --vision_tower RUN/tower, as the README says."""
    images = sorted(pictures.parent.glob("*.jpg"))[:8]
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a square"}]
    rows_ = [{"id": image.stem, "image": image.name, "conversations": turns} for image in images]
    (tmp_path / "pairs.json").write_text(json.dumps(rows_))
    output = tmp_path / "assistant"
    flags = ["--model_name_or_path", tiny_language_model, "--vision_tower", evaluated / "tower", "--version", "plain"]
    flags += ["--data_path", tmp_path / "pairs.json", "--image_folder", pictures.parent, "--output_dir", output]
    flags += ["--per_device_train_batch_size", 4, "--max_steps", 2, "--save_strategy", "no", "--report_to", "none"]
    run_stage("pretrain", [*map(str, flags), "--dataloader_num_workers", "0"])
    state = torch.load(evaluated / "checkpoints" / "epoch_3.pt", weights_only=True)["state_dict"]
    found = load_file(output / "model.safetensors")
    for name, value in state.items():
        if name.startswith("visual.trunk."):
            assert torch.equal(found[f"vision_tower.{name.removeprefix('visual.trunk.')}"], value), name
    processor = AutoProcessor.from_pretrained(output)
    assert list(processor.image_processor.image_mean) == list(open_clip.OPENAI_DATASET_MEAN)


def test_wandb_gets_everything(training_flags, evaluation, pictures, tmp_path, monkeypatch):
    """It drops what is logged for a step before the last one. wandb's place is taken by a list, for it is not installed."""
    logged: list[tuple[int, dict]] = []
    stand_in = SimpleNamespace(
        init=lambda **_: None,
        save=lambda *_: None,
        finish=lambda: None,
        log=lambda values, step: logged.append((step, values)),
    )
    for module in (main, trainer_train):
        monkeypatch.setattr(module, "wandb", stand_in)
    flags = [*training_flags, *evaluation, f"--val-data={pictures}", "--dataset-type=auto", "--report-to=wandb"]
    train([*flags, "--epochs=2", "--zeroshot-frequency=1", f"--logs={tmp_path}", "--name=run"])
    steps = [step for step, _ in logged]
    assert steps == sorted(steps) and steps[-1] == 12
    ours = ["val/zero_shot_top1", "retrieval/text_to_image_R@10", "train/compression_epoch"]
    for name in [*ours, "val/image_to_text_R@1"]:  # the last is of --val-data, and another than retrieval/...
        assert [step for step, values in logged if name in values] == [6, 12], name


def test_overridden_models_load_too(training_flags, tmp_path):
    """Context length, SigLIP's bias and the image size are in the directory; a stock model writes no tower."""
    flags = [*training_flags, "--train-num-samples=16", "--epochs=1", "--siglip", f"--logs={tmp_path}"]
    run = train([*flags, "--force-context-length=16", "--name=drip"])
    model = open_clip.create_model(f"local-dir:{run}")
    state = torch.load(run / "checkpoints" / "epoch_1.pt", weights_only=True)["state_dict"]
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert model.logit_bias is not None and model.context_length == 16
    run = train([*flags, "--force-image-size", "32", "--name=small"])
    assert load_clip(run)[0].visual.trunk.patch_embed.grid_size == (4, 4)
    assert load_tower(str(run / "tower")).patch_embed.grid_size == (4, 4)
    small = json.dumps(
        {
            "embed_dim": 32,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
        }
    )
    (tmp_path / "stock-mini.json").write_text(small)
    open_clip.add_model_config(tmp_path / "stock-mini.json")
    run = train(
        [
            *training_flags,
            "--train-num-samples=16",
            "--epochs=1",
            f"--logs={tmp_path}",
            "--model=stock-mini",
            "--name=s",
        ]
    )
    model = open_clip.create_model(f"local-dir:{run}")
    state = torch.load(run / "checkpoints" / "epoch_1.pt", weights_only=True)["state_dict"]
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert type(model) is open_clip.CLIP and not (run / "tower").exists()
    (row,) = rows(run, "epochs.jsonl")
    assert "compression" not in row and row["loss"] > 0


def test_continual_pretraining_from_a_run(evaluated, training_flags, data, tmp_path):
    """--pretrained RUN takes the weights alone: another data set, and a first loss near the last run's, not a fresh one's."""
    flags = [
        *training_flags,
        f"--train-data={data}/train-0.tar",
        "--train-num-samples=8",
        "--epochs=1",
        f"--logs={tmp_path}",
    ]
    run = train([*flags, f"--pretrained={evaluated}", "--name=more", "--lr=0"])
    before = torch.load(evaluated / "checkpoints" / "epoch_3.pt", weights_only=True)["state_dict"]
    after = torch.load(run / "checkpoints" / "epoch_1.pt", weights_only=True)
    torch.testing.assert_close(after["state_dict"], before)
    assert after["llava_drip"]["step"] == 1


def test_recipe(data, tmp_path):
    lines = [
        f"model: {MODEL}",
        f"train-data: {data}/train-{{0..1}}.tar",
        "train-num-samples: 16",
        "batch-size: 8",
        "lr: 0.001",
    ]
    lines += ["device: cpu", "precision: fp32", "workers: 0", "warmup: 2", "epochs: 5", "image-mean: [0.5, 0.5, 0.5]"]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    train([str(tmp_path / "recipe.yaml"), "--epochs=1", f"--logs={tmp_path}", "--name=run"])
    assert len(rows(tmp_path / "run", "epochs.jsonl")) == 1
    assert json.loads((tmp_path / "run" / "open_clip_config.json").read_text())["preprocess_cfg"]["mean"] == [0.5] * 3
    with pytest.raises(TrainingError, match="none.yaml: no such recipe"):
        train(["none.yaml"])


def test_an_evaluation_that_fails_does_not_cost_the_epoch(training_flags, tmp_path):
    labels = {"00.jpg": picture(np.random.default_rng(0), "red"), "00.cls": b"7"}  # there are five classes
    write_tar(tmp_path / "bad.tar", labels)
    (tmp_path / "names.txt").write_text("\n".join(COLOURS))
    evaluation = [f"--zeroshot-data={tmp_path / 'bad.tar'}", f"--zeroshot-classes={tmp_path / 'names.txt'}"]
    run = train([*training_flags, *evaluation, f"--logs={tmp_path}", "--name=run", "--epochs=1"])
    (row,) = rows(run, "epochs.jsonl")
    assert "bad.tar" in row["evaluation_error"] and "zero_shot_top1" not in row
    assert (run / "checkpoints" / "epoch_1.pt").is_file()


def test_weights_have_the_mode_of_other_files(evaluated):
    modes = {(evaluated / name).stat().st_mode for name in ("out.log", "open_clip_model.safetensors")}
    modes |= {(evaluated / "tower" / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_two_domains_stand_side_by_side_in_the_line():
    row = {
        "epoch": 1,
        "step": 5,
        "loss": 1.0,
        "step_seconds": 1.0,
        "peak_memory_gib": 1.0,
        "skipped": {"counts": {}, "examples": []},
    }
    domains = {"zero_shot_top1": 0.5, "zero_shot_top5": 0.6, "imagenet_top1": 0.7, "imagenet_top5": 0.8}
    assert "zero-shot top-1 50.0%, top-5 60.0%, zero-shot on --imagenet-val top-1 70.0%, top-5 80.0%" in line(
        row | domains
    )
    assert "evaluation failed (no file)" in line(row | {"evaluation_error": "no file"})
