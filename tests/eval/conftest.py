from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from bench_helpers import PROGRAM, flags, judge_scores, write_bench, write_rows
from judge_server import JudgeServer, serving


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


@pytest.fixture
def server():
    with serving(JudgeServer(judge_scores)) as server:
        yield server


@pytest.fixture
def judge(run_bench, server, bench, tmp_path, monkeypatch):
    """Runs the program on answers that exist; flags given override or add to the usual ones."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    answers = [{"question_id": 10 + i, "text": f"Mine {i}.", "answer_id": f"mine-{i}"} for i in range(7)]
    path = write_rows(tmp_path / "mine.jsonl", answers)

    def run(**values) -> subprocess.CompletedProcess:
        usual = {"answers": path, "bench": "coco", "data": bench, "judge": "judge/m", "judge-base-url": server.url}
        return run_bench(**{**usual, "json": tmp_path / "scores.json", **values})

    run.reviews, run.replies = (tmp_path / f"mine.judge_m.{kind}.jsonl" for kind in ("reviews", "replies"))
    run.scores = lambda: json.loads((tmp_path / "scores.json").read_text())
    return run


@pytest.fixture(scope="package")
def results(tmp_path_factory, tiny_checkpoint):
    """Result files of every program, and what they were made from: see report_results.everything. Not to be changed."""
    for package in ("openai", "rouge_score", "tenacity"):
        pytest.importorskip(package, reason="the eval extra is not installed")
    from report_results import everything

    return everything(tmp_path_factory.mktemp("results"), tiny_checkpoint)
