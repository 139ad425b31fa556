"""What a run leaves: towers that load everywhere and reach the run's own top-1, its record, TensorBoard, wandb."""

from __future__ import annotations

import importlib.util
import json

import pytest
import timm
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_drip.assistant import build_assistant
from llava_drip.images import load_image
from llava_drip.instruct.templates import VICUNA_V1
from llava_drip.towers.io import load_tower

from .helpers import MODEL, NAMES, rows, run


def top1_of(model: torch.nn.Module, folder) -> float:
    """With nothing but what timm reads from the tower's own directory."""
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    right = total = 0
    for label, name in enumerate(NAMES):
        for path in (folder / name).glob("*.jpg"):
            with torch.no_grad():
                right += int(model.eval()(transform(load_image(str(path)))[None]).argmax()) == label
            total += 1
    return right / total


def test_timm_reproduces_top1(trained, data):
    best = max(rows(trained, "epochs"), key=lambda row: row["top1"])
    model = timm.create_model(f"local-dir:{trained}/best", pretrained=True)
    assert top1_of(model, data / "val") == pytest.approx(best["top1"])
    last = timm.create_model(f"local-dir:{trained}/last", pretrained=True)
    assert top1_of(last, data / "val") == pytest.approx(rows(trained, "epochs")[-1]["top1"])


def test_the_average_is_what_is_kept(data, flags, tmp_path):
    options = ["--model-ema", "--model-ema-decay=0.5", "--epochs=4", "--scale", "0.5", "1"]
    run(f"--model={MODEL}", *flags, *options, f"--output={tmp_path}")
    model = timm.create_model(f"local-dir:{tmp_path}/last", pretrained=True)
    row = rows(tmp_path, "epochs")[-1]
    assert top1_of(model, data / "val") == pytest.approx(row["ema_top1"])


def test_the_crop_of_evaluation_is_saved_too(data, flags, tmp_path):
    run(f"--model={MODEL}", *flags, "--crop-pct=0.6", f"--output={tmp_path}")
    model = timm.create_model(f"local-dir:{tmp_path}/last", pretrained=True)
    assert timm.data.resolve_model_data_config(model)["crop_pct"] == 0.6
    assert top1_of(model, data / "val") == pytest.approx(rows(tmp_path, "epochs")[-1]["top1"])


def test_the_assistant_takes_the_tower(trained, tiny_language_model):
    tower = load_tower(str(trained / "last"))
    assert tower.num_classes == 0
    model, _ = build_assistant(str(tiny_language_model), str(trained / "last"), chat_template=VICUNA_V1)
    own = dict(model.named_parameters())
    name = next(name for name in own if name.endswith("blocks.2.mlp.fc1.weight") and "vision" in name)
    assert torch.equal(own[name], dict(tower.named_parameters())["blocks.2.mlp.fc1.weight"])


def test_run_json(trained):
    record = json.loads((trained / "run.json").read_text())
    assert {"program", "command", "model", "flags", "versions", "parameters", "data", "started"} <= set(record)
    assert record["program"] == "train_imagenet.py" and record["command"][0] == "train_imagenet.py"
    assert record["data"]["classes"] == NAMES and record["data"]["kind"] == "folder"
    tower = timm.create_model(f"local-dir:{trained}/last", pretrained=True)
    assert record["parameters"] == sum(p.numel() for p in tower.parameters())
    assert (record["steps_an_epoch"], record["step_batch"]) == (6, 8)


def test_without_val_data_compression_is_that_of_training(data, flags, tmp_path):
    flags = [flag for flag in flags if not flag.startswith("--val-data")]
    row = rows(run(f"--model={MODEL}", *flags, "--epochs=1", f"--output={tmp_path}"), "epochs")[0]
    assert "top1" not in row and not (tmp_path / "best").exists() and (tmp_path / "last").is_dir()
    assert row["tokens"] == pytest.approx(row["train_tokens"])
    assert row["compression_p5"] <= row["compression"] <= row["compression_p95"]


def test_evaluation_every_second_epoch(flags, tmp_path):
    run(f"--model={MODEL}", *flags, "--epochs=3", "--eval-every-n-epochs=2", f"--output={tmp_path}")
    assert ["top1" in row for row in rows(tmp_path, "epochs")] == [False, True, True]


def test_tensorboard(flags, tmp_path):
    run(f"--model={MODEL}", *flags, "--report-to", "tensorboard", f"--output={tmp_path}")
    (folder,) = {path.parent for path in (tmp_path / "tensorboard").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    curve = events.Scalars("train/loss")
    assert [event.step for event in curve] == list(range(1, 13))
    assert [event.value for event in curve] == pytest.approx([row["loss"] for row in rows(tmp_path)])
    epochs = rows(tmp_path, "epochs")
    measured = ("mean_step_seconds", "mean_peak_memory_gib")
    for name in ("top1", "compression", "loss", "peak_memory_gib", "step_seconds", *measured):
        assert [event.value for event in events.Scalars(name)] == pytest.approx([row[name] for row in epochs])


def test_wandb(flags, tmp_path, monkeypatch):
    """Offline where it is installed; else it is named."""
    flags = [f"--model={MODEL}", *flags, "--report-to", "wandb", f"--output={tmp_path}/run"]
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(ValueError, match="--report-to wandb: not installed; pip install wandb"):
            run(*flags)
        return
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(*flags)
    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert all(name in content for name in (b"train/loss", b"top1", b"compression_p95", b"warmup_epochs"))
