"""The README's commands: they parse, and the short ones run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

README_PROGRAM = re.compile(r"^(?:deepspeed|python) (?:-m )?([\w./]+)")


@pytest.fixture(scope="module")
def commands(repository) -> list[list[str]]:
    """Indented commands of the README, continuation lines joined, comments cut off."""
    text = (repository / "README.md").read_text().replace("\\\n", " ")
    lines = [line.strip().split("  #")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    return [
        shlex.split(line) for line in lines if line.startswith(("make ", "python ", "deepspeed ", "torchrun ", ". "))
    ]


def test_there_is_one_for_each_task(commands):
    named = " ".join(word for command in commands for word in command)
    programs = ("train_clip.py", "pretrain_projector.py", "finetune.py", "llava_bench.py", "serve.gradio_app")
    for program in ("make demo", "make test", *programs):
        assert program in named, program


def test_make_commands_are_targets(commands, repository):
    makefile = (repository / "Makefile").read_text()
    for command in commands:
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, re.M), command


def test_every_flag_is_known_to_its_program(commands, repository):
    """`--help` of each named program lists every flag that the README gives it."""
    seen = set()
    for command in commands:
        if command[0] not in ("python", "deepspeed"):
            continue
        at = 2 if command[1] == "-m" else 1
        program = command[:at] + [command[at]] if at == 2 else [command[1]]
        call = [sys.executable, *(["-m", command[2]] if at == 2 else program), "--help"]
        env = {**os.environ, "COLUMNS": "200"}
        run = subprocess.run(call, cwd=repository, capture_output=True, text=True, timeout=120, env=env)
        assert run.returncode == 0, run.stderr
        for word in command[at + 1 :]:
            if word.startswith("--") and word != "--help":
                assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", run.stdout), f"{command}: {word}"
                seen.add(word)
    assert len(seen) > 10


def test_recipes_named_in_the_readme_exist(commands, repository):
    files = [word for command in commands for word in command if word.endswith((".yaml", "zero2.json", "zero3.json"))]
    assert files and all((repository / file).is_file() for file in files)
