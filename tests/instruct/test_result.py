"""A result takes the place of an older one as a whole or not at all, whatever stops it."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import start_processes

from llava_drip.assistant.build import load_assistant
from llava_drip.instruct import result, standing
from llava_drip.instruct.result import cleared_if_useless, put_in_place
from llava_drip.instruct.stage import run_stage

from .conftest import common, parts


def new_result(checkpoint: Path, partial: Path, shard_size: str) -> None:
    """The checkpoint with a projector of zeros, saved as save_result saves it."""
    model, processor = load_assistant(checkpoint)
    for parameter in model.multi_modal_projector.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(partial, max_shard_size=shard_size)
    processor.save_pretrained(partial)
    (partial / "trainer_state.json").write_text("{}")


def is_new(directory: Path) -> bool:
    return not any(parameter.any() for parameter in load_assistant(directory)[0].multi_modal_projector.parameters())


SIZES = {"single": "10GB", "sharded": "300KB"}


@pytest.mark.parametrize("over", SIZES)
@pytest.mark.parametrize("kind", SIZES)
def test_the_new_weights_are_those_that_load(tiny_checkpoint, tmp_path, kind, over):
    target, partial = tmp_path / "out", tmp_path / "out" / ".partial"
    load_assistant(tiny_checkpoint)[0].save_pretrained(target, max_shard_size=SIZES[over])
    new_result(tiny_checkpoint, partial, SIZES[kind])
    assert len(list(partial.glob("model-*"))) == 0 if kind == "single" else len(list(partial.glob("model-*"))) > 1
    expected = {path.name for path in partial.iterdir()}
    put_in_place(partial, target)
    assert is_new(target) and {path.name for path in target.iterdir()} == expected


def test_nothing_of_an_older_result_is_read_with_the_new_one(tiny_checkpoint, tmp_path):
    target, partial = tmp_path / "out", tmp_path / "out" / ".partial"
    shutil.copytree(tiny_checkpoint, target)
    olders = ("tokenizer.model", "added_tokens.json", "chat_template.json", "additional_chat_templates/rag.jinja")
    others = ("checkpoint-1/tokenizer.model", "notes.txt", "checkpoint-1/model.safetensors", "vocabulary.json")
    for name in (*olders, *others):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).touch()
    new_result(tiny_checkpoint, partial, SIZES["single"])
    put_in_place(partial, target)
    assert not any((target / name).exists() for name in olders) and is_new(target)
    assert all((target / name).is_file() for name in others)


def test_a_failure_between_two_moves_leaves_nothing_that_loads(tiny_checkpoint, tmp_path, monkeypatch):
    new = tmp_path / "new"
    new_result(tiny_checkpoint, new, SIZES["sharded"])
    files = len(list(new.iterdir()))
    move, moved = os.replace, []

    def failing(source, destination):
        if len(moved) == allowed:
            raise OSError(28, "No space left on device")
        moved.append(source)
        move(source, destination)

    monkeypatch.setattr(result.os, "replace", failing)
    for allowed in range(files):
        target = Path(shutil.copytree(tiny_checkpoint, tmp_path / f"out{allowed}"))
        partial = Path(shutil.copytree(new, target / ".partial"))
        moved.clear()
        with pytest.raises(OSError, match="No space left"):
            put_in_place(partial, target)
        with pytest.raises(ValueError, match="has no config.json"):
            load_assistant(target)
        assert (partial / "config.json").is_file() and len(moved) == allowed


@pytest.fixture
def flags(tiny_language_model, tiny_tower, tiny_world, tmp_path) -> list[str]:
    data = ["--data_path", tiny_world.caption_train, "--image_folder", tiny_world.images]
    return [*parts(tiny_language_model, tiny_tower, tmp_path / "out"), *map(str, data), *common(2, 1)]


def test_what_a_killed_run_left_is_not_part_of_the_result(flags, tmp_path):
    stale = tmp_path / "out" / ".partial"
    stale.mkdir(parents=True)
    (stale / "model-00002-of-00002.safetensors").write_bytes(b"half of")
    run_stage("pretrain", flags)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "mm_projector.safetensors", "trainer_state.json"} <= names
    assert not any(name.startswith((".partial", "model-0")) for name in names)
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 1


@pytest.mark.parametrize("older", [False, True])
def test_a_full_disk_leaves_what_was_there(flags, tmp_path, monkeypatch, tiny_checkpoint, older):
    output = tmp_path / "out"
    if older:
        shutil.copytree(tiny_checkpoint, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()} if older else None

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(standing, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        run_stage("pretrain", flags)
    assert older == output.exists()
    if older:
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before
        assert load_file(output / "model.safetensors")


@pytest.mark.parametrize(
    "error", [ZeroDivisionError, RuntimeError("out of memory"), KeyboardInterrupt, OSError, ValueError]
)
def test_a_run_that_wrote_nothing_leaves_nothing(flags, tmp_path, monkeypatch, error):
    (tmp_path / "mine").mkdir()
    output = tmp_path / "mine" / "deep" / "er" / "out"

    def failing(*_, **__):
        assert output.is_dir(), "the Trainer made it"
        raise error

    monkeypatch.setattr("llava_drip.instruct.trainer.StageTrainer.compute_loss", failing)
    flags[flags.index("--output_dir") + 1] = str(output)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        run_stage("pretrain", flags)
    assert list((tmp_path / "mine").iterdir()) == []


LEFT = ["out/checkpoint-1/config.json", "out/.partial/model.safetensors", "out/config.json", "out/runs/events.out"]


@pytest.mark.parametrize("name", [*LEFT, "notes.txt"])
def test_what_was_written_stays(tmp_path, name):
    args = SimpleNamespace(output_dir=str(tmp_path / "deep" / "out"), device=torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt), cleared_if_useless(args):
        (tmp_path / "deep" / name).parent.mkdir(parents=True)
        (tmp_path / "deep" / name).touch()
        (tmp_path / "deep" / "out").mkdir(exist_ok=True)
        raise KeyboardInterrupt
    assert (tmp_path / "deep" / name).is_file() and (tmp_path / "deep" / "out").exists() == (name in LEFT)


def test_the_processor_is_written_with_it(flags, tmp_path, tiny_checkpoint):
    run_stage("pretrain", flags)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    model, processor = load_assistant(tiny_checkpoint)
    processor.save_pretrained(tmp_path / "processor")
    assert {path.name for path in (tmp_path / "processor").iterdir()} <= written


def _rank(rank: int, folder: Path, existing: bool) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    args = SimpleNamespace(output_dir=str(folder / "out"), device=torch.device("cpu"))
    if rank == 1:
        time.sleep(0.5)  # rank 0 must not have made the directory by then
    try:
        with cleared_if_useless(args):
            if rank == 0:
                (folder / "out").mkdir(exist_ok=existing)
            torch.distributed.barrier()
            if rank == 1:  # the other one waits for its gradients, until the launcher ends it
                raise ValueError("broken.jpg: truncated or corrupt")
    except ValueError:
        assert rank == 1


@pytest.mark.parametrize("existing", [False, True])
def test_a_mistake_on_another_rank_leaves_nothing(tmp_path, existing):
    if existing:
        (tmp_path / "out").mkdir()
    start_processes(_rank, (tmp_path, existing), nprocs=2, start_method="fork")
    assert (tmp_path / "out").exists() == existing
