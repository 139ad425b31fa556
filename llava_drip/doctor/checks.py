"""Checks that import no large library: packages against the ranges of the package's own metadata, and the machine."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
except ImportError:  # a bare environment
    try:
        from pip._vendor.packaging.requirements import Requirement
        from pip._vendor.packaging.specifiers import SpecifierSet
    except ImportError:  # without pip, as uv makes it
        Requirement = SpecifierSet = None

PACKAGE = "llava_drip"
OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Check:
    """One line of the report. state: ok; note, which limits what can be done; problem, without which it does not work.
    advice: what to do, "" where nothing is."""

    section: str
    name: str
    state: str
    value: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def requirements(extra: str | None = None) -> list[Requirement]:
    """Of the package itself (None), or of one of its extras, as its metadata has them."""
    found = []
    for line in metadata.requires(PACKAGE) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        in_base = marker is None or marker.evaluate({"extra": ""})
        if in_base if extra is None else (not in_base and marker.evaluate({"extra": extra})):
            found.append(requirement)
    return found


def extras() -> list[str]:
    """Names of the extras that the package has."""
    return metadata.metadata(PACKAGE).get_all("Provides-Extra") or []


def package_checks(wanted: list[str]) -> Iterator[Check]:
    """Each package of the base and of every extra, once; one of an extra that is not wanted is a note where it is missing.

    Raises:
        ValueError: an extra that the package does not have.
    """
    advice = f'pip install -e ".[{",".join(wanted)}]" in the clone (with uv: uv pip install ...)'
    try:
        known = extras()
    except metadata.PackageNotFoundError:
        yield Check("packages", PACKAGE, PROBLEM, "not installed in this environment", advice)
        return
    if Requirement is None:
        value = "what it depends on is not installed (no packaging, so versions cannot be compared either)"
        yield Check("packages", PACKAGE, PROBLEM, value, advice)
        return
    for extra in wanted:
        if extra not in known:
            raise ValueError(f"--extra {extra}: is none; there are {', '.join(known)}")
    asks = metadata.metadata(PACKAGE)["Requires-Python"]
    fits = SpecifierSet(asks or "").contains(platform.python_version())
    advice = "" if fits else f"install Python {asks}"
    yield Check("packages", "python", OK if fits else PROBLEM, f"{platform.python_version()} ({asks})", advice)
    seen = set()
    for extra in (None, *wanted, *(name for name in known if name not in wanted)):
        for requirement in requirements(extra):
            if requirement.name not in seen:
                seen.add(requirement.name)
                yield package_check(requirement, extra, needed=extra is None or extra in wanted)


def package_check(requirement: Requirement, extra: str | None, needed: bool) -> Check:
    name = requirement.name
    of = "" if extra is None else f" [{extra}]"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        state, value = PROBLEM if needed else NOTE, f"missing ({requirement.specifier}){of}"
    else:
        fits = requirement.specifier.contains(version, prereleases=True)
        state, value = OK if fits else PROBLEM if needed else NOTE, f"{version} ({requirement.specifier}){of}"
    advice = "" if state == OK else f'pip install "{name}{requirement.specifier}"'
    return Check("packages", name, state, value, advice)


# The machine


def machine_checks() -> Iterator[Check]:
    yield Check(
        "machine",
        "cores",
        OK,
        str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    )
    yield memory_check()
    yield from gpu_driver_checks()
    for name, path, least, advice in (
        (
            "disk here",
            Path.cwd(),
            20,
            "checkpoints of a 7B model take 14 GB, with the optimizer's state 84 GB: give --output_dir room",
        ),
        ("disk of the Hub's cache", hub_cache(), 20, "set HF_HOME to a larger disk"),
    ):
        there = next(place for place in (path, *path.parents) if place.exists())
        free = shutil.disk_usage(there).free / 2**30
        yield Check(
            "machine",
            name,
            OK if free >= least else NOTE,
            f"{free:.0f} GiB free at {path}",
            "" if free >= least else advice,
        )
    yield shared_memory_check()
    yield open_files_check()
    offline = os.environ.get("HF_HUB_OFFLINE", "")
    says = (
        "HF_HUB_OFFLINE is set: only what is in the cache is found"
        if offline.upper() in ("1", "ON", "YES", "TRUE")
        else "online"
    )
    yield Check("machine", "Hugging Face Hub", OK, f"{says}; HF_ENDPOINT {os.environ.get('HF_ENDPOINT', 'is not set')}")


def memory_check() -> Check:
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return Check("machine", "memory", NOTE, "not known on this system")
    return Check("machine", "memory", OK, f"{total:.0f} GiB, {free:.0f} GiB free")


def hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def shared_memory_check() -> Check:
    """Where the workers of a DataLoader put batches; containers often have 64 MiB of it."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Check("machine", "/dev/shm", NOTE, "is not there", "workers may fail: --dataloader_num_workers 0")
    size = shutil.disk_usage(path).total / 2**30
    few = size < 1
    advice = "docker run --shm-size 8g (or --ipc host); or --dataloader_num_workers 0" if few else ""
    return Check("machine", "/dev/shm", NOTE if few else OK, f"{size:.2f} GiB", advice)


def open_files_check(least: int = 4096) -> Check:
    try:
        import resource
    except ImportError:
        return Check("machine", "open files", NOTE, "not known on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < least
    advice = f"ulimit -n {least if hard < 0 else min(hard, 65536)}" if few else ""
    return Check("machine", "open files", NOTE if few else OK, f"{soft} (ulimit -n), at most {hard}", advice)


def gpu_driver_checks() -> Iterator[Check]:
    """What nvidia-smi says, which needs no torch."""
    program = shutil.which("nvidia-smi")
    if program is None:
        yield Check(
            "machine", "NVIDIA driver", NOTE, "no nvidia-smi here", "without a GPU only small models can be trained"
        )
        return
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        yield Check(
            "machine",
            "NVIDIA driver",
            PROBLEM,
            "nvidia-smi does not answer",
            "the driver hangs: ask who keeps the machine",
        )
        return
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[:200]
        yield Check(
            "machine", "NVIDIA driver", PROBLEM, f"nvidia-smi fails: {said}", "install the driver anew, or reboot"
        )
        return
    for i, line in enumerate(done.stdout.strip().splitlines()):
        yield Check("machine", f"GPU {i}", OK, re.sub(r", (?=[^,]*$)", ", driver ", line))


def tool_checks(cuda: bool, needed: bool) -> Iterator[Check]:
    """Compilers, for what DeepSpeed and torch.compile build when they are first used. needed: somebody wants to train."""
    on_path = str(Path(sys.executable).parent)
    for name, why in (("ninja", "DeepSpeed's operators"), ("g++", "DeepSpeed's operators and torch.compile")):
        found = shutil.which(name)
        advice = f"for {why}: " + (
            f"activate the environment, {on_path} is not on PATH" if name == "ninja" else "apt-get install g++"
        )
        if name == "ninja" and not Path(on_path, "ninja").exists():
            advice = f'for {why}: pip install "ninja"'
        yield Check(
            "tools", name, OK if found else PROBLEM if needed else NOTE, found or "not on PATH", "" if found else advice
        )
    nvcc = shutil.which("nvcc") or (
        os.environ.get("CUDA_HOME") and shutil.which("nvcc", path=f"{os.environ['CUDA_HOME']}/bin")
    )
    if cuda:
        advice = (
            "" if nvcc else "DeepSpeed's own Adam (offload) cannot be built: install the CUDA toolkit, set CUDA_HOME"
        )
        yield Check("tools", "nvcc", OK if nvcc else NOTE, nvcc or "not on PATH", advice)
