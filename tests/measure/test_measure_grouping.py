"""scripts/measure_grouping.py: what it writes is what the layers cost."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def measure(run_script, repository):
    return lambda *arguments: run_script(repository / "scripts" / "measure_grouping.py", *arguments)


def test_a_table_and_a_record(measure, tmp_path, one_thread):
    done = measure(
        *("--model", "senatra_mini_64", "--sizes", 64, 32, "--rounds", 2, "--batch", 2, "--towers", "senatra_tiny_224"),
        *("--output", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    text, record = (
        (tmp_path / "out" / "grouping.md").read_text(),
        json.loads((tmp_path / "out" / "grouping.json").read_text()),
    )
    assert text.strip() in done.stdout and "NAT-Tiny: 28, 4.3" in text
    cost = {(layer["layer"], layer["size"]): layer for layer in record["layers"]}
    assert set(cost) == {(i, size) for i in (1, 2, 3) for size in (32, 64)}
    for i, window, growth in ((1, 3, 4), (2, 3, 4), (3, None, 16)):
        small, large = cost[i, 32], cost[i, 64]
        assert small["window"] == large["window"] == window and large["tokens_in"] == 4 * small["tokens_in"]
        assert large["pair_macs"] == growth * small["pair_macs"] and large["macs"] > large["pair_macs"]
        assert large["macs"] - large["pair_macs"] == 4 * (small["macs"] - small["pair_macs"])
        assert 0 < large["low"] <= large["seconds"] <= large["high"]
    (tiny,) = record["towers"]
    assert tiny["macs"] == sum(tiny["parts"].values()) < tiny["macs_as_run"]
    # The trunk alone is NAT-Tiny, 28 M parameters and 4.3 G, within 3 %.
    assert abs((tiny["parameters"] - tiny["grouping_parameters"]) / 28e6 - 1) < 0.03
    assert abs((tiny["macs"] - tiny["grouping_macs"]) / 4.3e9 - 1) < 0.03


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "drip_base_patch16_224"], "--model drip_base_patch16_224: not a SeNaTra that timm knows"),
        (["--towers", "senatra_huge_224"], "--towers senatra_huge_224: not a SeNaTra that timm knows"),
        (["--sizes", 63, "--model", "senatra_mini_64"], "img_size 63: each side must be a multiple of the patch size"),
        (["--rounds", 0], "--rounds 0: must be at least 1"),
    ],
)
def test_mistakes_are_one_line(measure, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = measure(*arguments)
    assert done.returncode not in (0, None) and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
