"""Real training steps by open_clip's trainer: scripts/train_clip.py, and train() in this process."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path

import open_clip
import pytest
import torch
from clip_helpers import MODEL, ROOT, SHORT, in_two_ranks
from ddp_gradients import save_step, step

from llava_drip.contrastive.run import StepNoise
from llava_drip.contrastive.train import TrainingError, train

PREDICTOR = "visual.trunk.boundary_predictor"


def losses(log: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"{name}: (\S+) \(", log)]


def weights(run: Path, epoch: int) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"epoch_{epoch}.pt", weights_only=True)["state_dict"]


def test_script_trains_the_boundaries(run):
    log = (run / "out.log").read_text()
    for name in ("Contrastive_loss", "Boundary_loss", "Loss"):
        assert len(losses(log, name)) == 4  # steps 1, 3, 5 and the last, 6
        assert all(math.isfinite(value) and value > 0 for value in losses(log, name))
    windows = [float(value) for value in re.findall(r" Compression: (\S+) patches", log)]
    assert len(windows) == 4 and all(1 <= value <= 64 for value in windows)
    epoch = re.search(r"Epoch 1 \(step 6\): loss \S+ .* compression (\S+) \(.* in eval mode (\S+), none skipped", log)
    assert 2 < float(epoch[1]) < 8 and 1 <= float(epoch[2]) <= 64
    state = weights(run, 1)
    assert state[f"{PREDICTOR}.fc1.bias"].abs().max() > 1e-4  # starts at zero, and weight decay does not move a bias
    assert "beta2: 0.98" in (run / "params.txt").read_text()  # a ViT's, as open_clip has it


def test_checkpoint_loads_strictly_in_stock_open_clip(run):
    path = run / "checkpoints" / "epoch_1.pt"
    model = open_clip.create_model(MODEL, pretrained=str(path))
    assert type(model) is open_clip.CustomTextCLIP
    torch.testing.assert_close(model.state_dict(), weights(run, 1))
    assert [file.name for file in path.parent.iterdir()] == ["epoch_1.pt"]  # no temporary file beside it


def test_accumulates_and_resumes(training_flags, tmp_path):
    flags = [
        *training_flags,
        f"--logs={tmp_path}",
        "--name=run",
        "--batch-size=4",
        "--accum-freq=2",
        "--lr-scheduler=const",
    ]
    handlers, level = list(logging.root.handlers), logging.root.level
    run = train([*flags, "--epochs=1"])
    assert run == tmp_path / "run"
    assert train([*flags, "--epochs=2", "--resume=latest"]) == run
    assert (logging.root.handlers, logging.root.level) == (handlers, level)

    log = (run / "out.log").read_text()
    assert "epoch_1.pt' (epoch 1)" in log and log.count("Start epoch") == 2
    assert len(losses(log, "Boundary_loss")) == 8  # two epochs of six steps of two batches
    assert log.count("(last 2 steps)") == 4
    before, after = weights(run, 1), weights(run, 2)
    for name in ("fc1.bias", "fc2.bias"):  # no weight decay moves them
        assert not torch.equal(before[f"{PREDICTOR}.{name}"], after[f"{PREDICTOR}.{name}"])
    steps = torch.load(run / "checkpoints" / "epoch_2.pt", weights_only=True)["optimizer"]["state"][0]["step"]
    assert steps == 12


def test_noise_is_another_each_step_and_the_same_in_both_passes(training_flags, tmp_path, monkeypatch):
    """Accumulation passes each batch twice, for features and for gradients: with the same boundaries."""
    drawn, call = [], StepNoise.__call__

    def keep(self, like):
        drawn.append(call(self, like))
        return drawn[-1]

    monkeypatch.setattr(StepNoise, "__call__", keep)
    flags = [*training_flags, "--batch-size=4", "--accum-freq=2", "--epochs=1", f"--logs={tmp_path}", "--name=run"]
    train(flags)
    steps = [drawn[i : i + 4] for i in range(0, len(drawn), 4)]
    assert len(steps) == 6
    for first, second, first_again, second_again in steps:
        assert torch.equal(first, first_again) and torch.equal(second, second_again)
    assert len({noise[0, 0].item() for step in steps for noise in step[:2]}) == 12


def test_two_ranks_have_the_gradients_of_one_process(tmp_path):
    """The same pairs and the same noise, half of them on each rank: losses and gradients are those of the whole batch."""
    assert in_two_ranks(save_step, str(tmp_path)) == [0, 0]
    whole, ranks = step(), [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(torch.cat([rank["num_tokens"] for rank in ranks]), whole["num_tokens"])
    assert len(whole["num_tokens"].unique()) > 1, (
        "the ranks should differ in tokens, or an average of averages would do"
    )
    for name in ("contrastive_loss", "boundary_loss"):
        assert ranks[0][name] != ranks[1][name]
        torch.testing.assert_close((ranks[0][name] + ranks[1][name]) / 2, whole[name])
    for name, value in whole.items():
        if name.startswith("gradient "):
            assert torch.equal(ranks[0][name], ranks[1][name])
            torch.testing.assert_close(ranks[0][name], value, atol=1e-6, rtol=1e-4)
    assert whole[f"gradient {PREDICTOR}.fc1.weight"].abs().max() > 1e-3


def test_without_boundaries_the_stock_path_runs(training_flags, tmp_path):
    run = train([*training_flags, "--model=DRIP-mini-8-1x", f"--logs={tmp_path}", "--name=run", "--epochs=1"])
    log = (run / "out.log").read_text()
    assert "stock loss" in log and "Compression" not in log
    assert not losses(log, "Boundary_loss") and len(losses(log, "Contrastive_loss")) == 4
    # The predictor does not run at compression 1; with gradients expected, two ranks would wait for them.
    groups = torch.load(run / "checkpoints" / "epoch_1.pt", weights_only=True)["optimizer"]["param_groups"]
    model = open_clip.create_model("DRIP-mini-8-1x")
    unused = len(list(model.visual.trunk.boundary_predictor.parameters()))
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) - unused


def test_csv_siglip_tensorboard_and_evaluation(pictures, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [f"--model={MODEL}", f"--train-data={pictures}", "--batch-size=8", "--epochs=1", "--siglip"]
    validation = [f"--val-data={pictures}", "--report-to=tensorboard", f"--logs={tmp_path}"]
    run = train([*flags, *validation, *SHORT, "--name=run", "--boundary-loss-weight=3"])

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert len(scalars["train/boundary_loss"]) == len(scalars["train/compression"]) == 3 - 1
    assert scalars["train/boundary_loss"][0] > 3 * 0.02  # log-likelihoods of 64 places are near 0.04 an image
    assert len(scalars["train/compression_epoch"]) == len(scalars["train/compression_eval"]) == 1
    (row,) = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
    (result,) = [json.loads(line) for line in (run / "checkpoints" / "results.jsonl").read_text().splitlines()]
    assert math.isfinite(result["clip_val_loss"]) and 0 <= result["image_to_text_R@1"] <= 1
    assert row["validation"]["clip_val_loss"] == result["clip_val_loss"]
    assert "logit_bias" in weights(run, 1)


def test_image_statistics_and_size_are_kept(training_flags, tmp_path):
    flags = ["--image-mean", "0.5", "0.5", "0.5", "--force-image-size", "32", f"--logs={tmp_path}", "--name=run"]
    run = train([*training_flags, *flags, "--epochs=1", "--train-num-samples=16"])
    config = json.loads((run / "open_clip_config.json").read_text())
    assert config["preprocess_cfg"]["mean"] == [0.5, 0.5, 0.5]
    assert config["model_cfg"]["vision_cfg"]["image_size"] == 32


BAD = {
    "no model 'DRIP-mini-8-5x'; did you mean DRIP-mini-8-4x": ["--model=DRIP-mini-8-5x"],
    "--train-data: no shard .*train-2.tar": ["--train-data={data}/train-{{0..2}}.tar"],
    "--val-data: no shard .*val.tar": ["--val-data={data}/val.tar"],
    "--train-data: no file .*none.csv": ["--train-data={data}/none.csv"],
    "cannot tell the kind of data": ["--train-data={data}/train"],
    "--accum-freq must be at least 1": ["--accum-freq=0"],
    "--boundary-loss-weight must be": ["--boundary-loss-weight=-1"],
    "--lr-scheduler must be one of": ["--lr-scheduler=linear"],
    "--resume: no checkpoint file none.pt": ["--resume=none.pt"],
    "--resume: .*junk.pt is not a checkpoint": ["--resume={data}/junk.pt"],
    "--pretrained: 'nothing' is neither": ["--pretrained=nothing"],
    "--trace, --torchscript": ["--torchscript"],
    "epoch 0 had no training step: .*--accum-freq 7": ["--accum-freq=7"],
    "--train-data: .*holds no picture with a caption .* no caption in its .txt": [
        "--train-data={data}/cls-{{0..1}}.tar"
    ],
    "--train-data: .*holds no picture with a caption .*unreadable shard.*junk.tar": ["--train-data={data}/junk.tar"],
    "--train-data: .*no caption in 'sentences'": ["--caption-key=sentences"],
    "3 data streams cannot be divided among 2 workers": ["--data-streams=3", "--workers=2", "--dataset-resampled"],
    "--data-streams must be at least 1": ["--data-streams=0"],
    "--save-every-n-steps must be at least 0": ["--save-every-n-steps=-1"],
    "--save-every-n-steps: synthetic": ["--save-every-n-steps=5", "--dataset-type=synthetic"],
    "--train-data-upsampling-factors needs": ["--train-data-upsampling-factors=1"],
    "--train-data-upsampling-factors must be one": ["--dataset-resampled", "--train-data-upsampling-factors=1::2"],
    "--zeroshot-data and --zeroshot-classes need": ["--zeroshot-data={data}"],
    "--zeroshot-classes: .*none.txt": ["--zeroshot-data={data}", "--zeroshot-classes=none.txt"],
    "--retrieval-split needs --retrieval-data": ["--retrieval-split=test"],
    "--retrieval-data: .*none.json": ["--retrieval-data=none.json"],
    "--pretrained: .*no such checkpoint file, nor": ["--pretrained={data}"],
}


@pytest.mark.parametrize("message", BAD)
def test_mistakes_are_named_and_leave_nothing(message, data, training_flags, tmp_path):
    for name in ("junk.pt", "junk.tar"):
        (data / name).write_bytes(b"neither a checkpoint nor a tar file")
    flags = [flag.format(data=data) for flag in BAD[message]]
    logs = tmp_path / "logs"
    with pytest.raises(TrainingError, match=message) as error:
        train([*training_flags, *flags, f"--logs={logs}", "--name=run", "--epochs=1"])
    assert "\n" not in str(error.value)
    assert not logs.exists() or not list(logs.iterdir())


def test_another_run_is_not_overwritten(run, training_flags):
    before = (run / "out.log").read_bytes()
    with pytest.raises(TrainingError, match="--name: .* holds an earlier run"):
        train([*training_flags, f"--logs={run.parent}", "--name=run"])
    assert (run / "out.log").read_bytes() == before


def test_checkpoint_of_another_model_is_named(run, training_flags, tmp_path):
    other = run / "checkpoints" / "epoch_1.pt"
    flags = [*training_flags, "--model=ViT-S-32-alt", f"--logs={tmp_path}/logs", "--name=run"]
    with pytest.raises(TrainingError, match="--model: the run to resume has 'DRIP-mini-8-4x', now 'ViT-S-32-alt'"):
        train([*flags, f"--resume={other}"])
    with pytest.raises(TrainingError, match=r"--pretrained: .*epoch_1.pt does not fit ViT-S-32-alt"):
        train([*flags, f"--pretrained={other}"])
    assert not list((tmp_path / "logs").iterdir())


def test_programs_end_in_one_line(training_flags, tmp_path, run_script):
    flags = [*training_flags, "--train-data=none.tar", f"--logs={tmp_path}/logs"]
    result = run_script(ROOT / "scripts" / "train_clip.py", *flags)
    assert result.returncode == 1
    assert result.stderr.splitlines() == ["train_clip.py: error: --train-data: no shard none.tar"]
    assert not (tmp_path / "logs").exists()


def test_unknown_flag_ends_with_code_2(training_flags, capsys):
    with pytest.raises(SystemExit) as error:
        train([*training_flags, "--boundary-los-weight=1"])
    assert error.value.code == 2
    assert "--boundary-los-weight" in capsys.readouterr().err
