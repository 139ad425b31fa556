"""Which checkpoint a run goes on from, and from whose it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llava_drip.instruct.checkpoints import digest, lack_of, unseal_later
from llava_drip.instruct.stage import run_stage

from .conftest import common, losses


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
        ("label_smoothing_factor", "0.1"),
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


def test_a_large_file_is_known_by_pieces_of_it(tmp_path):
    file = tmp_path / "large.safetensors"
    with file.open("wb") as data:
        data.truncate((1 << 26) + 12345)
    before = digest(file), digest(tmp_path)
    with file.open("r+b") as data:
        data.seek(-1, 2)
        data.write(b"x")
    after = digest(file), digest(tmp_path)
    assert before[0] != after[0] and before[1] != after[1] and digest(file) == after[0]


def test_what_a_kill_left_out_of_a_checkpoint(tmp_path):
    assert "trainer_state.json" in lack_of(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 3}')
    for name in ("optimizer.pt", "scheduler.pt"):
        assert lack_of(tmp_path) == f"{name} is missing"
        (tmp_path / name).touch()
    assert lack_of(tmp_path) is None and lack_of(tmp_path, ranks=2) == "rng_state_0.pth is missing"
    (tmp_path / "rng_state_0.pth").touch()
    assert lack_of(tmp_path, ranks=2) == "rng_state_1.pth is missing"
    (tmp_path / "rng_state_1.pth").touch()
    assert lack_of(tmp_path, ranks=2) is None
    (tmp_path / "latest").write_text("global_step3")
    assert "global_step3" in lack_of(tmp_path, ranks=2)
    (tmp_path / "global_step3").mkdir()
    (tmp_path / "global_step3" / "states.pt").touch()
    (tmp_path / "optimizer.pt").unlink()
    assert lack_of(tmp_path, ranks=2) is None


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

    def look(trainer, **_):
        seen.append({p.parent.name for p in output.glob("checkpoint-*/trainer_state.json")})
        raise KeyboardInterrupt

    shutil.copytree(output / "checkpoint-2", output / "checkpoint-3")
    monkeypatch.setattr("llava_drip.instruct.trainer.StageTrainer.train", look)
    argv = flags(tiny_language_model, tiny_tower, tiny_world, output)
    with pytest.raises(KeyboardInterrupt):
        run_stage("pretrain", [*argv, "--resume_from_checkpoint", str(output / "checkpoint-1")])
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
