"""The README's commands: each is known to its program with every flag, and the short ones run, on small checkpoints.

Run in this process, as their files do it. A test puts its own paths and a small size in a command's place; see SMALL.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_drip.tokens import TokenBatch
from llava_drip.world.dataset import build_world

LAUNCHERS = ("python", "deepspeed", "torchrun")
# The later flag wins: the sizes of a GPU run become those of two steps on a CPU.
SMALL = {
    "scripts/train_clip.py": "--model DRIP-mini-8-4x --train-num-samples 16 --batch-size 8 --epochs 1 --warmup 1 "
    "--precision fp32 --workers 0 --device cpu --logs logs --name run",
    "scripts/pretrain_projector.py": "--deepspeed= --bf16 false --max_steps 2 --per_device_train_batch_size 2 "
    "--dataloader_num_workers 0 --save_strategy no --report_to none",
    "eval/llava_bench.py": "--device cpu --max_new_tokens 4",
}
SMALL["scripts/finetune.py"] = SMALL["scripts/pretrain_projector.py"]


@pytest.fixture(scope="module")
def readme(repository) -> str:
    return (repository / "README.md").read_text()


@pytest.fixture(scope="module")
def commands(readme) -> list[list[str]]:
    """Commands of the README, in indented lines (continuation lines joined, comments cut off) and in running text."""
    text = readme.replace("\\\n", " ")
    lines = [line.strip().split("  #")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    lines += in_text(text)
    starts = tuple(f"{word} " for word in ("make", *LAUNCHERS))
    return [shlex.split(line.removesuffix(" ...")) for line in lines if line.startswith(starts)]


def in_text(text: str) -> list[str]:
    """What stands between backticks, outside blocks."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]


def parts(command: list[str]) -> tuple[list[str], str, list[str]]:
    """A command's launcher with its flags, its program (a file, or the module of -m), the program's flags."""
    start = next(i for i, word in enumerate(command) if word.endswith(".py") or command[i - 1] == "-m")
    return command[:start], command[start], command[start + 1 :]


def command_of(commands: list[list[str]], program: str) -> list[str]:
    """The arguments that the README gives a program, the first time that it gives any."""
    found = [parts(command)[2] for command in commands if command[0] in LAUNCHERS and parts(command)[1] == program]
    return next(arguments for arguments in found if arguments not in ([], ["--help"]))


@pytest.fixture
def run(repository, monkeypatch, tmp_path, capsys):
    """Runs a program as from the repository's folder, but in an empty one; returns what it printed."""

    def run(program: str, arguments: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(repository)
        capsys.readouterr()
        try:
            if program.endswith(".py"):
                runpy.run_path(str(repository / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__")
        except SystemExit as end:
            assert not end.code, capsys.readouterr().err[-2000:]
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world") / "world", num_train=16, num_test=2, questions_per_scene=2)


def flags(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if word.startswith("--") and word != "--"]


def test_there_is_one_for_each_task(commands):
    named = {parts(command)[1] for command in commands if command[0] in LAUNCHERS}
    assert named >= {*SMALL, "serve.gradio_app", "eval/zero_shot.py", "scripts/convert_captions.py"}
    assert {command[1] for command in commands if command[0] == "make"} == {"demo", "test"}
    assert {command[0] for command in commands} >= set(LAUNCHERS)


def test_make_commands_are_targets(commands, repository):
    for command in commands:
        if command[0] == "make":
            subprocess.run([*command, "--dry-run"], cwd=repository, check=True, capture_output=True)


def test_every_flag_is_known_to_its_program(commands, readme, run):
    """Also torchrun's own, and those that the text names without a command."""
    from torch.distributed.run import get_args_parser

    known: dict[str, set[str]] = {}
    for command in commands:
        if command[0] not in LAUNCHERS:
            continue
        launcher, program, arguments = parts(command)
        if program not in known:
            known[program] = set(re.findall(r"(?<![\w-])--[\w-]+", run(program, ["--help"])))
        assert set(flags(arguments)) <= known[program], f"{command}"
        if launcher[0] == "torchrun":
            assert set(flags(launcher)) <= set(get_args_parser()._option_string_actions), f"{command}"
    named = {code.split()[0] for code in in_text(readme) if re.match("--[a-z]", code)}
    assert len(named) > 3 and named <= set().union(*known.values())


def test_files_named_in_the_readme_exist(commands, readme, repository):
    files = [word for command in commands for word in command if word.endswith(".yaml")]
    files += re.findall(r"scripts/[\w/]+\.json|docs/[\w/]+\.md", readme)
    assert len(files) > 4 and all((repository / file).is_file() for file in files)


def test_the_python_block_runs(readme):
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    names = {"images": torch.randn(2, 3, 224, 224)}
    exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["tokens"], TokenBatch) and names["tokens"].segments.shape == (2, 196)
    assert names["logits"].shape == (2, 10)


def test_train_clip_and_convert_captions(commands, run, world, tmp_path):
    shards = str(world.clip_shards[0])
    arguments = command_of(commands, "scripts/train_clip.py")
    arguments[arguments.index("--train-data") + 1] = shards
    run("scripts/train_clip.py", [*arguments, *shlex.split(SMALL["scripts/train_clip.py"])])
    assert (tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt").is_file()
    printed = run("scripts/convert_captions.py", ["--input", shards, "--output", "captions"])
    assert "16 pictures" in printed and len(json.loads((tmp_path / "captions" / "chat.json").read_text())) == 16


def test_align_then_tune(commands, run, world, tiny_language_model, tiny_tower, tmp_path, repository):
    shutil.copytree(repository / "scripts", tmp_path / "scripts")  # for the recipes
    places = {"LANGUAGE_MODEL": tiny_language_model, "TOWER": tiny_tower, "OUT_OF_ALIGN": "aligned"}
    places |= dict.fromkeys(["images", "coco/train2017"], world.images)
    places |= {"blip_laion_cc_sbu_558k.json": world.caption_train, "llava_instruct_158k.json": world.instruct_train}
    for program, out in (("scripts/pretrain_projector.py", "aligned"), ("scripts/finetune.py", "tuned")):
        arguments = command_of(commands, program)
        assert arguments[0].endswith(".yaml") and "OUT" in arguments
        arguments = [str({**places, "OUT": out}.get(word, word)) for word in arguments]
        printed = run(program, [*arguments, *shlex.split(SMALL[program])])
        assert "multi_modal_projector" in printed  # the table of what is trained
        state = json.loads((tmp_path / out / "trainer_state.json").read_text())
        assert state["global_step"] == 2 and (tmp_path / out / "model.safetensors").is_file()


def test_llava_bench(commands, run, tiny_checkpoint, tmp_path):
    images = tmp_path / "bench" / "coco" / "images"
    images.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(images / "0.jpg")
    rows = [{"question_id": i, "image": "0.jpg", "text": f"Question {i}?", "category": "conv"} for i in range(3)]
    questions = tmp_path / "bench" / "coco" / "questions_30x3.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = command_of(commands, "eval/llava_bench.py")
    for flag, value in (("--model", tiny_checkpoint), ("--data", tmp_path / "bench")):
        arguments[arguments.index(flag) + 1] = str(value)
    printed = run("eval/llava_bench.py", [*arguments, *shlex.split(SMALL["eval/llava_bench.py"])])
    answers = Path(re.search(r"^(\S+): 3 answers$", printed, re.M)[1])
    assert [json.loads(line)["question_id"] for line in answers.read_text().splitlines()] == [0, 1, 2]
