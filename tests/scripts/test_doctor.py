"""scripts/doctor.py: the ranges are the metadata's, a broken library is a line and not a crash, and the exit status says it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from llava_drip.doctor import checks, locks, probes, report
from llava_drip.doctor.checks import NOTE, OK, PROBLEM, Check


def test_packages_are_compared_with_the_metadata():
    found = {check.name: check for check in checks.package_checks(["train"])}
    lines = [Requirement(line) for line in importlib.metadata.requires("llava_drip")]
    assert set(found) == {line.name for line in lines} | {"python"}
    version = importlib.metadata.version("transformers")
    asked = next(line.specifier for line in lines if line.name == "transformers")
    assert found["transformers"] == Check("packages", "transformers", OK, f"{version} ({asked})")
    assert found["deepspeed"].value.endswith("[train]") and found["fastapi"].value.endswith("[serve]")


@pytest.mark.parametrize(
    "line, needed, state, advice",
    [
        ("torch>=1", True, OK, ""),
        ("torch>=99", True, PROBLEM, 'pip install "torch>=99"'),
        ("torch>=99", False, NOTE, 'pip install "torch>=99"'),
        ("no-such-package>=1,<2", True, PROBLEM, 'pip install "no-such-package<2,>=1"'),
        ("no-such-package", False, NOTE, 'pip install "no-such-package"'),
    ],
)
def test_a_package_that_is_missing_or_out_of_range(line, needed, state, advice):
    check = checks.package_check(Requirement(line), "train", needed)
    assert (check.state, check.advice) == (state, advice)
    assert ("missing" in check.value) == line.startswith("no-such")


def test_a_clone_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(checks, "PACKAGE", "no_such_package")
    (check,) = checks.package_checks(["train"])
    assert check.state == PROBLEM and check.advice.startswith('pip install -e ".[train]"')


def test_a_package_without_its_dependencies(monkeypatch):
    """pip install --no-deps in an environment of uv, which has no pip."""
    monkeypatch.setattr(checks, "Requirement", None)
    (check,) = checks.package_checks(["serve"])
    assert check.state == PROBLEM and "no packaging" in check.value
    assert check.advice.startswith('pip install -e ".[serve]"')


def test_the_machine(tmp_path, monkeypatch):
    found = {check.name: check for check in checks.machine_checks()}
    assert found["memory"].value.endswith("GiB free") and found["disk here"].state in (OK, NOTE)
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 8192))
    assert checks.open_files_check() == Check(
        "machine", "open files", NOTE, "1024 (ulimit -n), at most 8192", "ulimit -n 8192"
    )
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(total=64 * 2**20, free=0))
    assert checks.shared_memory_check().advice.startswith("docker run --shm-size")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert checks.hub_cache() == tmp_path / "hub"


@pytest.mark.parametrize(
    "script, status, states",
    [
        ("echo 'NVIDIA H200, 143771 MiB, 570.1'", 0, [OK]),
        ("echo 'NVML: Driver/library version mismatch'; exit 18", 18, [PROBLEM]),
    ],
)
def test_what_nvidia_smi_says(script, status, states, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = list(checks.gpu_driver_checks())
    assert [check.state for check in found] == states
    assert found[0].value == "NVIDIA H200, 143771 MiB, driver 570.1" if not status else "mismatch" in found[0].value


def test_ninja_that_is_not_on_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {check.name: check for check in checks.tool_checks(cuda=True, needed=True)}
    assert found["ninja"].state == found["g++"].state == PROBLEM
    assert {check.state for check in checks.tool_checks(cuda=False, needed=False)} == {NOTE}
    assert "activate the environment" in found["ninja"].advice and "apt-get" in found["g++"].advice


def test_the_probes_do_what_they_say():
    """In processes of their own, where they import what they try."""
    found = {
        (section, name): (state, value) for section, name, state, value, *_ in probes.run_probes(["torch", "attention"])
    }
    assert found["devices", "torch"][0] == found["attention", "SDPA math"][0] == OK
    assert found["attention", "packed tokens, float32"][0] == found["attention", "packed tokens, bfloat16"][0] == OK
    assert "a call for each image" in found["attention", "packed tokens, float32"][1]


@pytest.mark.parametrize(
    "body, state, value",
    [
        ("import os; os.kill(os.getpid(), 11)", PROBLEM, "crashed (SIGSEGV)"),
        ("raise ImportError('undefined symbol: _ZN3c10')", PROBLEM, "fails: ImportError: undefined symbol: _ZN3c10"),
        ("import time; time.sleep(60)", NOTE, "gave no answer within 2 s"),
    ],
)
def test_a_broken_library_is_a_line(body, state, value, tmp_path, monkeypatch):
    broken = tmp_path / "probes.py"
    broken.write_text(body)
    monkeypatch.setattr(probes, "__file__", str(broken))
    ((section, name, found, said, advice),) = probes.run_probes(["torch"], timeout=2)
    assert (section, name, found, said) == ("probes", "torch", state, value) and advice
    assert probes.run_probes(["torch"], timeout=2, optional=["torch"]) == [("probes", "torch", NOTE, value, advice)]


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(report, "machine_checks", lambda: [Check("machine", "GPU 0", OK, "a GPU")])
    monkeypatch.setattr(report, "run_probes", lambda names, optional: [("devices", "CUDA", NOTE, "torch sees no GPU")])
    found = report.examine(["train"])
    assert found[-1].name == "GPU" and found[-1].state == PROBLEM and not report.good(found)


def test_who_only_serves_needs_nothing_of_training(monkeypatch):
    """Neither a compiler nor a working DeepSpeed and bitsandbytes."""
    monkeypatch.setattr(report, "machine_checks", list)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(probes, "_run", lambda name, timeout: [("probes", name, PROBLEM, "crashed", "")])
    for wanted, broken in (["serve"], {"torch", "attention", "flash_attn"}), (["train", "serve"], {"ninja", "g++"}):
        found = {check.name: check.state for check in report.examine(wanted) if check.section != "packages"}
        assert {name for name in found if found[name] == PROBLEM} >= broken
        assert (found["ninja"] == found["deepspeed"] == found["bitsandbytes"] == NOTE) == ("train" not in wanted)


def test_a_lock_that_a_killed_build_left(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setattr(locks, "_BUILDERS", {"no-such-program"})
    assert not list(locks.lock_checks(needed=True))  # of this minute
    os.utime(lock, (0, 0))
    (check,) = locks.lock_checks(needed=True)
    assert check.state == PROBLEM and str(lock) in check.value and check.advice.startswith(f"rm {lock} ")
    assert [check.state for check in locks.lock_checks(needed=False)] == [NOTE]
    monkeypatch.setattr(locks, "_BUILDERS", {Path("/proc/self/comm").read_text().strip()})
    assert not list(locks.lock_checks(needed=True))  # a build that goes on


def test_the_program(monkeypatch, repository, run_script, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=0, stdout="", stderr=""))
    done = run_script(repository / "scripts" / "doctor.py", "--json")
    content = json.loads(done.stdout)
    assert done.returncode == 1 and not content["ok"]  # no probe said anything
    assert set(content["checks"][0]) == {"section", "name", "state", "value", "advice"}
    done = run_script(repository / "scripts" / "doctor.py", "--extra", "nonsense")
    assert done.returncode == 1 and done.stderr.startswith(
        "doctor.py: error: --extra nonsense: is none; there are train"
    )
    done = run_script(repository / "scripts" / "doctor.py", "--jsn")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_it_runs_where_nothing_is_installed(repository):
    """Only the standard library, without packaging and pip: a Python that has no site-packages at all."""
    start = [sys.executable, "-S", str(repository / "scripts" / "doctor.py"), "--json"]
    done = subprocess.run(start, capture_output=True, text=True, timeout=120, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 1 and not done.stderr, done.stderr
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert found["llava_drip"]["state"] == PROBLEM and "pip install" in found["llava_drip"]["advice"]
    assert "cores" in found
