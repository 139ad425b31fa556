"""The two stages as a user runs them: programs in processes of their own, on a tiny rendered world."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llava_drip.instruct.freeze import PARTS
from llava_drip.world.dataset import WorldPaths, build_world

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = {"pretrain": "pretrain_projector.py", "finetune": "finetune.py"}


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> WorldPaths:
    return build_world(tmp_path_factory.mktemp("worlds") / "world", num_train=40, num_test=1, questions_per_scene=3)


def environment() -> dict[str, str]:
    """The caller's, with the virtual environment's programs (ninja) on PATH and one thread a process."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def started(*command: object) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], **pipes, env=environment())


def start(stage: str, *flags: object) -> subprocess.Popen:
    return started(REPOSITORY / "scripts" / SCRIPTS[stage], *flags)


def torchrun(stage: str, ranks: int, *flags: object) -> subprocess.Popen:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", port]
    return started(*launcher, REPOSITORY / "scripts" / SCRIPTS[stage], *flags)


def run(stage: str, *flags: object) -> str:
    """Standard output of a run that succeeds."""
    process = start(stage, *flags)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return out


def losses(output_dir: Path) -> list[float]:
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def common(batch_size: int, steps: int, learning_rate: float = 2e-3) -> list[str]:
    return [
        *("--per_device_train_batch_size", str(batch_size), "--max_steps", str(steps), "--save_strategy", "no"),
        *("--learning_rate", str(learning_rate), "--dataloader_num_workers", "0", "--report_to", "none"),
    ]


def parts(language_model: Path, tower: Path, output_dir: Path) -> list[str]:
    """Flags of a stage that builds an assistant from its parts."""
    named = {"--model_name_or_path": language_model, "--vision_tower": tower, "--output_dir": output_dir}
    return [str(word) for pair in named.items() for word in pair]


def fingerprints(state: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each part's tensors, names included: equal if and only if nothing in it changed.

    state: a state dict with keys under PARTS, e.g. of a loaded model.safetensors.
    """
    digests = {name: hashlib.sha256() for name in PARTS}
    for key in sorted(state):
        part = key.split(".", 1)[0]
        if part in digests:
            tensor = state[key].detach().cpu().contiguous().flatten()
            digests[part].update(f"{key} {tensor.dtype} {tuple(state[key].shape)}".encode())
            digests[part].update(tensor.view(torch.uint8).numpy().tobytes())
    return {name: digest.hexdigest() for name, digest in digests.items()}
