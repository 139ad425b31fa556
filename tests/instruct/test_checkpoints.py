"""Which checkpoint a run goes on from, and from whose it does not."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llava_drip.instruct.checkpoints import lack_of, later_than, newest_complete, unseal_later
from llava_drip.instruct.stage import run_stage

from .conftest import REPOSITORY, common, losses, run, torchrun


def flags(language_model, tower, world, output_dir, **changes: object) -> list[str]:
    values = {
        "--model_name_or_path": language_model,
        "--vision_tower": tower,
        "--data_path": world.caption_train,
        "--image_folder": world.images,
        "--output_dir": output_dir,
        **{f"--{name}": value for name, value in changes.items()},
    }
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    return [*map(str, [part for pair in values.items() for part in pair]), *common(4, 2), *saving]


@pytest.fixture(scope="module")
def trained(tiny_language_model, tiny_tower, tiny_world, tmp_path_factory) -> Path:
    """Output directory of a run of two steps, a checkpoint for each."""
    output = tmp_path_factory.mktemp("trained") / "out"
    run_stage("pretrain", flags(tiny_language_model, tiny_tower, tiny_world, output))
    return output


@pytest.fixture
def output(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "out"))


def contents(directory: Path) -> set[tuple[str, int]]:
    return {(str(p), p.stat().st_mtime_ns) for p in directory.rglob("*")}


def test_checkpoints_of_an_earlier_run_are_not_mixed_with_a_new_ones(
    output, tiny_language_model, tiny_tower, tiny_world, tmp_path
):
    before = contents(output)
    argv = flags(tiny_language_model, tiny_tower, tiny_world, output, learning_rate="1e-4")
    with pytest.raises(
        ValueError, match=rf"--output_dir {output}: holds checkpoint-1 .*--resume_from_checkpoint latest"
    ):
        run_stage("pretrain", argv)
    elsewhere = shutil.copytree(output / "checkpoint-2", tmp_path / "elsewhere" / "checkpoint-2")
    with pytest.raises(ValueError, match=rf"--output_dir {output}: holds checkpoint-1, and .* lies elsewhere"):
        run_stage("pretrain", [*argv, "--resume_from_checkpoint", str(elsewhere)])
    assert contents(output) == before


@pytest.mark.parametrize(
    "change, value",
    [
        ("learning_rate", "0.5"),
        ("seed", "7"),
        ("compression", "8.0"),
        ("model_max_length", "300"),
        ("version", "vicuna_v1"),
        ("per_device_train_batch_size", "2"),
        ("warmup_steps", "1.0"),
        ("weight_decay", "0.1"),
        ("neftune_noise_alpha", "5.0"),
        ("max_grad_norm", "0.3"),
        ("dataloader_drop_last", "True"),
    ],
)
def test_resuming_with_another_runs_flag_names_it(output, tiny_language_model, tiny_tower, tiny_world, change, value):
    before = contents(output)
    argv = flags(tiny_language_model, tiny_tower, tiny_world, output)
    with pytest.raises(ValueError, match=rf"--{change} .*is .*{value}, but .* in the run of {output}/checkpoint-2"):
        run_stage("pretrain", [*argv, f"--{change}", value, "--resume_from_checkpoint", "latest"])
    assert contents(output) == before


def test_resuming_with_other_files_names_the_flag(output, tiny_language_model, tiny_tower, tiny_world, tmp_path):
    rows = json.loads(tiny_world.caption_train.read_text())
    (tmp_path / "fewer.json").write_text(json.dumps(rows[1:]))
    other = Path(shutil.copytree(tiny_language_model, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][-1] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    for name, value in (("data_path", tmp_path / "fewer.json"), ("model_name_or_path", other)):
        argv = flags(tiny_language_model, tiny_tower, tiny_world, output, **{name: value})
        with pytest.raises(ValueError, match=rf"--{name}: what lies there is not what the run of .*checkpoint-2"):
            run_stage("pretrain", [*argv, "--resume_from_checkpoint", "latest"])
    argv = flags(tiny_language_model, tiny_tower, tiny_world, output, vision_tower="drip_mini_patch8_64_4x")
    with pytest.raises(ValueError, match="--vision_tower is drip_mini_patch8_64_4x, but another in the run of"):
        run_stage("pretrain", [*argv, "--resume_from_checkpoint", "latest"])


def test_a_run_may_be_made_longer_and_its_files_moved(output, tiny_language_model, tiny_tower, tiny_world, tmp_path):
    data = shutil.copy(tiny_world.caption_train, tmp_path / "moved.json")
    language_model = shutil.copytree(tiny_language_model, tmp_path / "moved")
    argv = flags(language_model, tiny_tower, tiny_world, output, data_path=data)
    run_stage("pretrain", [*argv, "--max_steps", "3", "--resume_from_checkpoint", "latest"])
    assert len(losses(output)) == 3 and (output / "checkpoint-3").is_dir()


def test_a_checkpoint_without_a_record_is_refused(output, tiny_language_model, tiny_tower, tiny_world):
    file = output / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    del state["stateful_callbacks"]["RunRecord"]
    file.write_text(json.dumps(state))
    argv = flags(tiny_language_model, tiny_tower, tiny_world, output)
    with pytest.raises(ValueError, match="checkpoint-2: says nothing of its run"):
        run_stage("pretrain", [*argv, "--resume_from_checkpoint", "latest"])


def test_a_checkpoint_with_a_name_of_the_users(output, tiny_language_model, tiny_tower, tiny_world):
    """The Trainer would delete it as the oldest."""
    shutil.copytree(output / "checkpoint-2", output / "checkpoint-best")
    argv = [*flags(tiny_language_model, tiny_tower, tiny_world, output), "--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match="checkpoint-best: --save_total_limit 2 would delete it"):
        run_stage("pretrain", argv)
    run_stage("pretrain", [*argv, "--save_total_limit", "0", "--max_steps", "3"])
    assert len(losses(output)) == 3 and (output / "checkpoint-best").is_dir()


def sealed(directory: Path, **record: str) -> Path:
    """trainer_state.json with a record, in which _ stands for a space."""
    directory.mkdir(exist_ok=True)
    record = {name.replace("_", " "): value for name, value in record.items()}
    state = {"global_step": 3, "stateful_callbacks": {"RunRecord": {"args": {"record": record}}}}
    (directory / "trainer_state.json").write_text(json.dumps(state))
    return directory


def test_what_a_kill_left_out_of_a_checkpoint(tmp_path):
    assert "trainer_state.json" in lack_of(tmp_path)
    sealed(tmp_path, processes="2")
    for name in ("rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "scheduler.pt"):
        assert lack_of(tmp_path) == f"{name} is missing"
        (tmp_path / name).touch()
    assert lack_of(tmp_path) is None
    (tmp_path / "latest").write_text("global_step3")
    assert "global_step3" in lack_of(tmp_path)
    (tmp_path / "global_step3").mkdir()
    (tmp_path / "global_step3" / "states.pt").touch()
    (tmp_path / "optimizer.pt").unlink()
    assert lack_of(tmp_path) is None
    sealed(tmp_path, processes="1")
    assert lack_of(tmp_path) == "rng_state.pth is missing"
    sealed(tmp_path, processes="3")
    assert lack_of(tmp_path) == "rng_state_2.pth is missing"


def test_the_newest_complete_checkpoint(tmp_path):
    """What a kill leaves may be begun anew; what was complete once may not be written over."""
    assert newest_complete(tmp_path) is None
    (tmp_path / "checkpoint-3").mkdir()
    assert newest_complete(tmp_path) is None, "killed while the first was written"
    whole = sealed(tmp_path / "checkpoint-20", processes="1")
    (whole / "rng_state.pth").touch()
    (whole / "scheduler.pt").touch()
    with pytest.raises(
        ValueError, match=r"checkpoint-20 cannot be resumed from, optimizer.pt is missing; delete the .* in"
    ):
        newest_complete(tmp_path)
    (whole / "optimizer.pt").touch()
    (tmp_path / "checkpoint-100").mkdir()
    assert newest_complete(tmp_path) == whole


def test_a_checkpoint_of_deepspeed_needs_its_states(tmp_path):
    record = {"--deepspeed's ZeRO stage": "2"}
    state = {"global_step": 3, "stateful_callbacks": {"RunRecord": {"args": {"record": record}}}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    for name in ("optimizer.pt", "scheduler.pt"):
        (tmp_path / name).touch()
    assert "latest is missing" in lack_of(tmp_path)


def test_another_zero_stage_is_refused(output, tiny_language_model, tiny_tower, tiny_world):
    file = output / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    record = state["stateful_callbacks"]["RunRecord"]["args"]["record"]
    assert record["--deepspeed's ZeRO stage"] == "None"
    record["--deepspeed's ZeRO stage"] = "3"
    file.write_text(json.dumps(state))
    (output / "checkpoint-2" / "latest").write_text("global_step2")
    (output / "checkpoint-2" / "global_step2").mkdir()
    (output / "checkpoint-2" / "global_step2" / "states.pt").touch()
    argv = [*flags(tiny_language_model, tiny_tower, tiny_world, output), "--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match="ZeRO stage is absent, but 3 in the run of .*checkpoint-2"):
        run_stage("pretrain", argv)


def test_latest_never_writes_over_what_can_be_mended(output, tiny_language_model, tiny_tower, tiny_world):
    for number in (1, 2):
        (output / f"checkpoint-{number}" / "scheduler.pt").unlink()
    before = contents(output)
    argv = [*flags(tiny_language_model, tiny_tower, tiny_world, output), "--resume_from_checkpoint", "latest"]
    with pytest.raises(
        ValueError, match="latest: .*/checkpoint-2 cannot be resumed from, scheduler.pt is missing; delete"
    ):
        run_stage("pretrain", argv)
    assert contents(output) == before


@pytest.mark.slow
def test_another_number_of_processes(trained, output, tiny_language_model, tiny_tower, tiny_world):
    """1 → 2 → 1, through torchrun: what a process that was not there would read is no lack."""
    argv = [*flags(tiny_language_model, tiny_tower, tiny_world, output), "--resume_from_checkpoint", "latest"]
    more = ["--per_device_train_batch_size", "2", "--max_steps", "3"]
    process = torchrun("pretrain", 2, *argv, *more)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and f"resuming from {output}/checkpoint-2" in out, err[-3000:]
    checkpoint = output / "checkpoint-3"
    assert (checkpoint / "rng_state_1.pth").is_file() and not (checkpoint / "rng_state_2.pth").exists()
    assert lack_of(checkpoint) is None and losses(output)[:2] == losses(trained)
    run_stage("pretrain", [*argv, "--max_steps", "4"])
    assert len(losses(output)) == 4 and (output / "checkpoint-4" / "rng_state.pth").is_file()
    (checkpoint / "rng_state_1.pth").unlink()
    assert lack_of(checkpoint) == "rng_state_1.pth is missing"


def sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_finished_run_is_not_trained_further(trained, output, tiny_language_model, tiny_tower, tiny_world, capsys):
    """Its last step lies amid an epoch, where the Trainer would train another, at a learning rate that is not 0."""
    argv = flags(tiny_language_model, tiny_tower, tiny_world, output, lr_scheduler_type="constant_with_warmup")
    shutil.rmtree(output)
    run_stage("pretrain", argv)
    before = sha(output / "model.safetensors"), sha(output / "mm_projector.safetensors")
    state = json.loads((output / "trainer_state.json").read_text())
    for name in ("model.safetensors", "config.json"):
        (output / name).unlink()  # a kill came before the result was written
    capsys.readouterr()
    for _ in range(2):
        run_stage("pretrain", [*argv, "--resume_from_checkpoint", "latest"])
        assert f"nothing is left to train: {output}/checkpoint-2 is the end of this run" in capsys.readouterr().out
        assert (sha(output / "model.safetensors"), sha(output / "mm_projector.safetensors")) == before
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == state["global_step"] == 2
    # By epochs: 40 rows, 4 a step.
    for epochs, refused in (("0.2", False), ("0.1", True)):
        argv[argv.index("--max_steps") + 1] = "-1"
        by_epochs = [*argv, "--num_train_epochs", epochs, "--resume_from_checkpoint", "latest"]
        if refused:
            unchanged = contents(output)
            with pytest.raises(
                ValueError, match=r"--num_train_epochs 0.1: this run ends at step 1, and .*checkpoint-2"
            ):
                run_stage("pretrain", by_epochs)
            assert contents(output) == unchanged
        else:
            run_stage("pretrain", by_epochs)
            assert sha(output / "model.safetensors") == before[0]


def test_a_checkpoint_beyond_the_end_is_refused(output, tiny_language_model, tiny_tower, tiny_world):
    argv = [*flags(tiny_language_model, tiny_tower, tiny_world, output), "--resume_from_checkpoint"]
    before = contents(output)
    with pytest.raises(ValueError, match=f"--max_steps 1: .* and {output}/checkpoint-2 is of step 2 already"):
        run_stage("pretrain", [*argv, "latest", "--max_steps", "1"])
    assert contents(output) == before
    run_stage("pretrain", [*argv, str(output / "checkpoint-1"), "--max_steps", "1"])
    assert len(losses(output)) == 1
    assert lack_of(output / "checkpoint-2") is None, "nothing was trained, so nothing will be written over"
    assert sha(output / "model.safetensors") == sha(output / "checkpoint-1" / "model.safetensors")


@pytest.mark.slow
def test_zero_wants_its_number_of_processes(tiny_language_model, tiny_tower, tiny_world, tmp_path):
    """It divides the optimizer's state among them. And a finished run under it is finished too."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (extra: train)")
    from .test_deepspeed import launch

    output = tmp_path / "out"
    argv = flags(tiny_language_model, tiny_tower, tiny_world, output, lr_scheduler_type="constant_with_warmup")
    argv += ["--max_steps", "1"]
    zero2 = ["--deepspeed", REPOSITORY / "scripts" / "deepspeed" / "zero2.json"]
    run("pretrain", *argv, *zero2)
    before = sha(output / "model.safetensors")
    (output / "model.safetensors").unlink()
    argv += ["--resume_from_checkpoint", "latest"]
    assert "nothing is left to train" in run("pretrain", *argv, *zero2)
    assert sha(output / "model.safetensors") == before
    wanted = "checkpoint-1: was written by 1 process under ZeRO-2 and cannot be resumed from by 2 processes: start with"
    with pytest.raises(AssertionError, match=f"error: .*{wanted} --num_gpus 1"):  # launch: it did not succeed
        launch("pretrain", "zero2.json", *argv)


def test_a_default_may_be_spelled_out(output, tiny_language_model, tiny_tower, tiny_world):
    argv = flags(tiny_language_model, tiny_tower, tiny_world, output)
    defaults = [
        "--mm_projector_type",
        "mlp2x_gelu",
        "--mm_vision_select_layer",
        "-2",
        "--mm_segment_positions",
        "false",
    ]
    defaults += ["--version", "plain", "--model_max_length", "2048", "--resume_from_checkpoint", "latest"]
    run_stage("pretrain", [*argv, *defaults, "--max_steps", "3"])
    assert len(losses(output)) == 3
    with pytest.raises(ValueError, match="--mm_projector_type is linear, but mlp2x_gelu in the run of"):
        run_stage("pretrain", [*argv, *defaults, "--mm_projector_type", "linear"])


def test_an_assistants_defaults_may_be_spelled_out(output, tiny_world, tmp_path):
    (output / "notes.txt").write_text("its directory may be written to")
    tuned = tmp_path / "tuned"
    argv = ["--model_name_or_path", output, "--data_path", tiny_world.instruct_train, "--output_dir", tuned]
    argv += ["--image_folder", tiny_world.images, *common(4, 1), "--save_strategy", "steps", "--save_steps", "1"]
    run_stage("finetune", list(map(str, argv)))
    argv += ["--resume_from_checkpoint", "latest", "--max_steps", "2"]
    with pytest.raises(ValueError, match="--version is plain, but vicuna_v1 in the run of"):
        run_stage("finetune", list(map(str, [*argv, "--version", "plain"])))
    (output / "notes.txt").unlink()
    spelled = ["--version", "v1", "--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", "-2"]
    run_stage("finetune", list(map(str, [*argv, *spelled])))
    assert len(losses(tuned)) == 2


def test_without_its_optimizer_a_checkpoint_is_not_the_one(output, tiny_language_model, tiny_tower, tiny_world, capsys):
    (output / "checkpoint-2" / "optimizer.pt").unlink()
    argv = flags(tiny_language_model, tiny_tower, tiny_world, output)
    with pytest.raises(ValueError, match="not a complete checkpoint, optimizer.pt is missing"):
        run_stage("pretrain", [*argv, "--resume_from_checkpoint", str(output / "checkpoint-2")])
    run_stage("pretrain", [*argv, "--resume_from_checkpoint", "latest"])
    assert "resuming from" in (printed := capsys.readouterr().out) and "checkpoint-1" in printed


def test_checkpoints_of_the_model_alone_cannot_be_resumed(tiny_language_model, tiny_tower, tiny_world, tmp_path):
    output = tmp_path / "out"
    argv = [*flags(tiny_language_model, tiny_tower, tiny_world, output), "--save_only_model", "true"]
    run_stage("pretrain", argv)
    before = contents(output)
    for which in ("latest", str(output / "checkpoint-2")):
        with pytest.raises(ValueError, match=f"{output}/checkpoint-2.* holds the model alone .--save_only_model"):
            run_stage("pretrain", [*argv, "--resume_from_checkpoint", which])
    assert contents(output) == before


def test_what_will_be_overwritten_is_incomplete_before(
    output, tiny_language_model, tiny_tower, tiny_world, monkeypatch
):
    seen = []

    def look(*_, **__):
        seen.append({p.parent.name for p in output.glob("checkpoint-*/trainer_state.json")})
        raise KeyboardInterrupt

    shutil.copytree(output / "checkpoint-2", output / "checkpoint-3")
    for step, besides in ((1, None), (2, output / "checkpoint-2"), (2, output / "checkpoint-3")):
        expected = [output / f"checkpoint-{n}" for n in (2, 3) if n > step and output / f"checkpoint-{n}" != besides]
        assert later_than(output, step, besides) == expected
    argv = flags(tiny_language_model, tiny_tower, tiny_world, output, resume_from_checkpoint=output / "checkpoint-1")
    before = contents(output)
    with pytest.raises(ValueError, match="checkpoint-2 and checkpoint-3, which the run would write over"):
        run_stage("pretrain", argv)
    assert contents(output) == before
    for number in (2, 3):
        (output / f"checkpoint-{number}" / "scheduler.pt").unlink()
    monkeypatch.setattr("llava_drip.instruct.trainer.StageTrainer.compute_loss", look)
    with pytest.raises(KeyboardInterrupt):
        run_stage("pretrain", argv)
    assert seen == [{"checkpoint-1"}] and (output / "checkpoint-3" / "optimizer.pt").is_file()


def test_from_the_beginning_all_will_be_overwritten_but_the_users(output):
    shutil.copytree(output / "checkpoint-2", output / "checkpoint-best")
    unseal_later(output, None)
    assert {p.parent.name for p in output.glob("checkpoint-*/trainer_state.json")} == {"checkpoint-best"}


def test_resuming_from_what_is_no_checkpoint_is_refused(tiny_language_model, tiny_tower, tiny_world, tmp_path):
    argv = [
        *flags(tiny_language_model, tiny_tower, tiny_world, tmp_path / "out"),
        "--resume_from_checkpoint",
        str(tmp_path),
    ]
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint {tmp_path}: not a complete checkpoint"):
        run_stage("pretrain", argv)
    assert not (tmp_path / "out").exists()
