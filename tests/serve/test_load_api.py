"""The load program against real servers: every answer compared, 429s obeyed, failures and mistakes told."""

from __future__ import annotations

import json

import pytest
from api_server import MODEL, on_loopback

from llava_drip.engine import Engine
from serve.api import make_app
from serve.service import Settings


@pytest.fixture(scope="module")
def script(repository):
    return repository / "scripts" / "load_api.py"


def test_many_get_what_one_gets(api, script, run_script, tmp_path):
    flags = ["--clients", 6, "--requests", 36, "--pool", 12, "--output", tmp_path]
    done = run_script(script, "--url", api.url, *flags)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "load.json").read_text())
    before, load, after = record["phases"]
    assert [phase["requests"] for phase in record["phases"]] == [12, 36, 12]
    assert all(phase["same"] == phase["compared"] == phase["requests"] for phase in record["phases"])
    assert before["refused"] == load["errors"] == load["lost"] == after["errors"] == 0
    assert (
        sum(one["asked"] for one in load["right"].values()) + sum(one["asked"] for one in before["right"].values()) > 12
    )
    assert load["counts"]["decoded_tokens"] == 36 * 48 and load["counts"]["steps"] < after["counts"]["steps"] * 2
    assert load["first_ms"]["p50"] <= load["first_ms"]["p95"] and record["ratios"]["requests"]["mean"] > 0
    assert (tmp_path / "load.png").stat().st_size > 5000 and "36" in (tmp_path / "load.md").read_text()


def test_who_is_told_to_come_again_does(checkpoint, script, run_script, tmp_path):
    engine = Engine.load(checkpoint, device="cpu", max_rows=1, max_waiting=1)
    with on_loopback(make_app(engine, Settings(model=MODEL))) as url:
        flags = ["--clients", 5, "--requests", 8, "--pool", 4, "--output", tmp_path]
        done = run_script(script, "--url", f"{url}/v1", *flags)
    assert done.returncode == 0, done.stderr
    load = json.loads((tmp_path / "load.json").read_text())["phases"][1]
    assert load["refused"] > 0 and load["requests"] == load["same"] == 8 and load["errors"] == load["lost"] == 0


def test_failures_are_told(checkpoint, script, run_script, tmp_path):
    """A model that fails from the second phase on."""
    engine = Engine.load(checkpoint, device="cpu")
    calls = 0

    def explode(*_):
        nonlocal calls
        calls += 1
        if calls > 600:
            raise RuntimeError("of the test")

    engine.model.language_model.register_forward_pre_hook(explode)
    with on_loopback(make_app(engine, Settings(model=MODEL))) as url:
        done = run_script(script, "--url", url, "--clients", 3, "--requests", 60, "--pool", 4, "--output", tmp_path)
    load = json.loads((tmp_path / "load.json").read_text())["phases"][1]
    assert done.returncode == 1 and "errors" in done.stderr and "Traceback" not in done.stderr
    assert load["errors"] > 0 and "work failed" in load["error_examples"][0] and load["requests"] + load["errors"] <= 60


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "one of --model and --url"),
        (["--url", "http://127.0.0.1:9"], "--url http://127.0.0.1:9: "),
        pytest.param(["--model", "nowhere"], "nowhere", marks=pytest.mark.slow),  # which a server says
        (["--url", "http://127.0.0.1:9", "--clients", 0], "--clients 0"),
        (["--url", "http://127.0.0.1:9", "--shares", 0, 0, 0], "--shares"),
    ],
)
def test_mistakes_are_named(flags, words, script, run_script):
    done = run_script(script, *flags, "--pool", 2)
    assert done.returncode in (1, 2) and words in done.stderr and "Traceback" not in done.stderr
