"""The demo, whole, at a size that takes seconds: it learns nothing, but every stage runs and hands over to the next."""

from __future__ import annotations

import importlib
import json

import pytest


@pytest.fixture
def quickstart(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("quickstart")


def test_the_whole_demo(quickstart, tmp_path, capfd):
    size = quickstart.Size(
        train_scenes=160, test_scenes=8, language_steps=4, clip_epochs=1, clip_batch=32, align_steps=2, tune_steps=2
    )
    (tmp_path / "demo" / ".world.partial-0123abcd").mkdir(parents=True)  # what a demo that was killed leaves
    record = quickstart.run_demo(tmp_path / "demo", size, elastic=True)
    assert not list((tmp_path / "demo").glob(".world*"))
    printed = capfd.readouterr().out
    assert "Held-out questions answered right" in printed and "peak memory" in printed
    assert json.loads((tmp_path / "demo" / "results.json").read_text()) == json.loads(json.dumps(record))
    assert record["accuracy"]["dense"]["tokens"] == 64 and record["accuracy"]["blind"]["tokens"] == 0
    assert 8 <= record["accuracy"]["drip-4x"]["tokens"] <= 32
    assert (tmp_path / "demo" / "segments.png").stat().st_size > 1000
    assert (tmp_path / "demo" / "drip-4x" / "assistant" / "model.safetensors").is_file()
    assert len(record["stages"]) == 17
    assert record["command"] and record["machine"] and record["versions"]["torch"] and record["seeds"]["towers"] == 0
    # one assistant, asked at every budget
    assert "by budget" in printed
    for budgets in record["accuracy_by_budget"].values():
        assert list(budgets) == ["1x", "2x", "4x", "10x", "image"]
        assert [budgets[f"{times}x"]["tokens"] for times in (1, 2, 4, 10)] == [64, 32, 16, 6]
    config = json.loads((tmp_path / "demo" / "elastic" / "assistant" / "config.json").read_text())
    assert "budget" not in config["vision_config"]


def test_a_foreign_folder_is_left_alone(quickstart, tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an earlier demo"):
        quickstart.run_demo(tmp_path, quickstart.Size())
    assert (tmp_path / "dense" / "thesis.txt").read_text() == "mine"
