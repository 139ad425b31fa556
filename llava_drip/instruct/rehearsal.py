"""Is a killed run the run that was not killed? Asked of a command as it will be started, in processes of their own.

The command runs once to its end, then once for each kill: killed with SIGKILL, every process of it, and resumed. A resumed run is
the same if every loss that it logs and every weight of its result is. One more run, of a step with a learning rate of 0, writes
the weights that all start from, to see which parts training changed. Of a result that stands on a base (LoRA), the base is to be
what it was before the first run.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
import yaml
from safetensors.torch import load_file

from llava_drip.assistant.adapter import FROZEN_FILE, LORA_FILES, PROJECTOR_FILE, is_adapted, read_base
from llava_drip.fingerprint import fingerprint
from llava_drip.instruct.checkpoints import newest_complete, number_of, state_of
from llava_drip.instruct.freeze import PARTS

FOLLOWED = 5  # losses after the checkpoint that are compared by themselves
_UNMOVED = ("--max_steps", "1", "--learning_rate", "0", "--save_strategy", "no")
_OWN_RATE = "mm_projector_lr"  # of the projector: --learning_rate 0 does not hold it
_WEIGHTS = ("model*.safetensors", LORA_FILES[1], FROZEN_FILE)


@dataclass(frozen=True)
class Kill:
    """When a run is killed: once `step` losses are logged, or (while_saving) as soon as checkpoint-`step` appears."""

    step: int
    while_saving: bool = False

    def __str__(self) -> str:
        return f"while checkpoint-{self.step} is written" if self.while_saving else f"after step {self.step}"


@dataclass
class Recovery:
    """What became of a killed run."""

    kill: str
    resumed_from: int  # step of the checkpoint; 0: there was none, from the beginning
    left: list[str]  # names of the checkpoints that the kill left, whole or not
    next_losses: float  # largest difference of the FOLLOWED losses after the checkpoint
    all_losses: float
    weights: float  # largest difference of any element of the result's weights

    @property
    def exact(self) -> bool:
        return max(self.next_losses, self.all_losses, self.weights) == 0


@dataclass
class Rehearsal:
    command: list[str]
    losses: list[float]
    seconds: float
    changed: dict[str, tuple[int, int]]  # part → tensors that training changed, and all that the result holds
    recoveries: list[Recovery] = field(default_factory=list)
    # What the result, which has its own tensors alone, stands on → fingerprint as the first run began, and after the last.
    bases: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Each resumed run is the one that was not killed, and no base was changed."""
        kept = all(before == after for before, after in self.bases.values())
        return kept and all(recovery.exact for recovery in self.recoveries)

    def ends(self, count: int = FOLLOWED) -> tuple[float, float]:
        """Mean of the first and of the last losses."""
        count = min(count, len(self.losses))
        return sum(self.losses[:count]) / count, sum(self.losses[-count:]) / count


class Killed(Exception):
    """The run was killed, as was wanted."""


def rehearse(command: Sequence[str], kills: Sequence[Kill], output: Path) -> Rehearsal:
    """Run a stage's command whole, and killed and resumed at each of `kills`.

    command: of one of the two programs, with its launcher if it has one, without --output_dir and --resume_from_checkpoint;
        each loss must be logged (--logging_steps 1).
    output: folder, of which OUTPUT/whole, OUTPUT/start and OUTPUT/killed-... are made anew.
    Raises:
        ValueError: the command failed, with what it said last; or it ended before it could be killed.
    """
    for flag in ("--output_dir", "--resume_from_checkpoint"):
        if any(word == flag or word.startswith(f"{flag}=") for word in command):
            raise ValueError(f"{flag} stands in the command; the rehearsal gives its own")
    whole, start = output / "whole", time.monotonic()
    _run(command, whole)
    seconds = time.monotonic() - start
    unmoved = output / "start"
    _run([*command, *unmoving(command)], unmoved)
    result = Rehearsal(list(command), losses_of(whole), seconds, changed_parts(unmoved, whole))
    last = len(result.losses)
    for kill in kills:
        if not 1 <= kill.step < last:
            raise ValueError(f"a kill {kill}: the run logs {last} losses; kill it before its last")
        target = output / f"killed-{'saving-' * kill.while_saving}{kill.step}"
        try:
            _run(command, target, kill)
        except Killed:
            pass
        else:
            raise ValueError(f"the run ended before it could be killed {kill}; give more steps, or an earlier kill")
        found = newest_complete(target)
        left = sorted(path.name for path in target.glob("checkpoint-*"))
        _run([*command, "--resume_from_checkpoint", "latest"], target)
        result.recoveries.append(_compared(kill, number_of(found) if found else 0, left, whole, target))
    result.bases = bases_then_and_now(whole)
    return result


def unmoving(command: Sequence[str]) -> list[str]:
    """Flags with which a stage's command changes no weight. A learning rate of the projector's own may stand in the recipe."""
    own = any(word == f"--{_OWN_RATE}" or word.startswith(f"--{_OWN_RATE}=") for word in command)
    for recipe in (Path(word) for word in command if word.endswith((".yaml", ".yml"))):
        own = own or (recipe.is_file() and _OWN_RATE in (yaml.safe_load(recipe.read_text(encoding="utf-8")) or ()))
    return [*_UNMOVED, *((f"--{_OWN_RATE}", "0") if own else ())]


def bases_then_and_now(result: Path) -> dict[str, tuple[str, str]]:
    """Each directory that a result stands on → its fingerprint when what stands on it was trained, and now. {}: a whole one."""
    found, path = {}, result
    while is_adapted(path):
        base = read_base(path, check=False)
        found[str(base.path)], path = (base.fingerprint, fingerprint(base.path)), base.path
    return found


def _run(command: Sequence[str], output_dir: Path, kill: Kill | None = None) -> None:
    """Run the command into output_dir, made anew unless the command resumes; with `kill`, until then.

    Raises:
        Killed: it was.
        ValueError: the command failed.
    """
    if "--resume_from_checkpoint" not in command:
        shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    said = output_dir.with_suffix(".log")
    with said.open("w") as log:
        words = [sys.executable if word == "python" else word for word in command]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [*words, "--output_dir", str(output_dir)], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                if kill is not None and _due(kill, output_dir, said):
                    _kill(process)
                    raise Killed
                time.sleep(0.002 if kill is not None and kill.while_saving else 0.05)
        finally:
            if process.poll() is None:
                _kill(process)
    if process.returncode:
        tail = "\n".join(said.read_text(errors="replace").splitlines()[-15:])
        raise ValueError(f"{' '.join(command)}: ended with {process.returncode}; {said}:\n{tail}")


def _due(kill: Kill, output_dir: Path, said: Path) -> bool:
    if kill.while_saving:
        return (output_dir / f"checkpoint-{kill.step}").is_dir()
    return said.read_text(errors="replace").count("'loss':") >= kill.step


def _kill(process: subprocess.Popen) -> None:
    """SIGKILL to a launcher and all that it started, data workers too, which would keep the port or the pipe."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.send_signal(signal.SIGKILL)
    for child in family:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=20)


def losses_of(directory: Path) -> list[float]:
    """The losses that a run logged, in order."""
    state = state_of(directory)
    if state is None:
        raise ValueError(f"{directory}: no trainer_state.json of a run that ended")
    found = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    if len(found) < state["global_step"]:
        raise ValueError(f"{directory}: {len(found)} losses of {state['global_step']} steps; give --logging_steps 1")
    return found


def _compared(kill: Kill, resumed_from: int, left: list[str], whole: Path, killed: Path) -> Recovery:
    one, other = losses_of(whole), losses_of(killed)
    if len(one) != len(other):
        raise ValueError(f"{killed}: {len(other)} losses, {len(one)} in {whole}")
    differences = [abs(a - b) for a, b in zip(one, other)]
    following = differences[resumed_from : resumed_from + FOLLOWED]
    return Recovery(str(kill), resumed_from, left, max(following), max(differences), weights_apart(whole, killed))


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors that a result has itself: the whole assistant's, or without its base's."""
    files = sorted(file for pattern in _WEIGHTS for file in directory.glob(pattern))
    found = {key: value for file in files for key, value in load_file(file).items()}
    alone = directory / PROJECTOR_FILE
    if alone.is_file() and not any(file.name != FROZEN_FILE for file in files):  # the projector was trained alone
        found |= {f"multi_modal_projector.{key}": value for key, value in load_file(alone).items()}
    if not found:
        raise ValueError(f"{directory}: no weights in it")
    return found


def weights_apart(one: Path, other: Path) -> float:
    """Largest difference of any element of two results' weights; infinite if they hold other tensors, or one has a NaN."""
    a, b = weights_of(one), weights_of(other)
    if a.keys() != b.keys() or any(a[key].shape != b[key].shape for key in a):
        return math.inf
    apart = [float((a[key].double() - b[key].double()).abs().max()) for key in a if not torch.equal(a[key], b[key])]
    return max((math.inf if math.isnan(value) else value for value in apart), default=0.0)


def changed_parts(start: Path, result: Path) -> dict[str, tuple[int, int]]:
    """Part of the assistant → how many of its tensors differ between two results, and how many there are.

    Raises:
        ValueError: the results hold other tensors.
    """
    before, after = weights_of(start), weights_of(result)
    if before.keys() != after.keys():
        raise ValueError(f"{start} and {result}: hold other tensors")
    counts: dict[str, tuple[int, int]] = {}
    for key, value in after.items():
        part = next((part for part in PARTS if part in key), key)
        changed, total = counts.get(part, (0, 0))
        counts[part] = changed + (not torch.equal(before[key], value)), total + 1
    return counts
