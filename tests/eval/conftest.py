from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from bench_helpers import PROGRAM, flags, write_bench


@pytest.fixture
def bench(tmp_path) -> Path:
    """A small LLaVA-Bench: see bench_helpers.write_bench."""
    return write_bench(tmp_path / "bench")


@pytest.fixture
def run_bench(run_script):
    """run_bench(**flags): eval/llava_bench.py in this process."""

    def run(**values) -> subprocess.CompletedProcess:
        return run_script(PROGRAM, *flags(values))

    return run
