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


@pytest.fixture(scope="package")
def results(tmp_path_factory, tiny_checkpoint):
    """Result files of every program, and what they were made from: see report_results.everything. Not to be changed."""
    for package in ("openai", "rouge_score", "tenacity"):
        pytest.importorskip(package, reason="the eval extra is not installed")
    from report_results import everything

    return everything(tmp_path_factory.mktemp("results"), tiny_checkpoint)
