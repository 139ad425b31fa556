"""Answers measured: all cases make the same tokens of the same request, budgets are met, figures are those of the rounds."""

from __future__ import annotations

import json

import pytest

from llava_drip.serving_cost.answers import DENSE, STOCK, Plan, make_cases
from llava_drip.serving_cost.answers_report import survey, table

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plan(tiny_language_model) -> Plan:
    """16 patches."""
    sizes = {"tower": "tiny", "image_size": 56, "patch_size": 14, "new_tokens": 6}
    return Plan(language_model=str(tiny_language_model), compressions=(4.0,), **sizes)


def test_cases_answer_alike_and_hold_one_language_model(plan):
    cases = {case.label: case for case in make_cases(plan, plan.labels)}
    assert list(cases) == [STOCK, DENSE, "4x"]
    assert cases[STOCK].ids(3) == cases[DENSE].ids(3) != cases["4x"].ids(3)
    heads = [cases[STOCK].model.lm_head, *(cases[label].model.language_model.lm_head for label in (DENSE, "4x"))]
    assert len({head.weight.data_ptr() for head in heads}) == 1
    answered = {label: case.answer(3) for label, case in cases.items()}
    assert {label: one.visual for label, one in answered.items()} == {STOCK: 16, DENSE: 16, "4x": 4}
    assert answered[STOCK].prompt == answered[DENSE].prompt == answered["4x"].prompt + 12
    for one in answered.values():
        assert one.tokens == 6 and 0 < one.first < one.total
        assert one.tokens_per_second == pytest.approx(5 / (one.total - one.first))
    engine_counts = cases[DENSE].answer(3)  # again: nothing was kept
    assert engine_counts.visual == 16


def test_a_survey_has_memory_and_its_ratios(plan):
    result = survey(plan, rounds=2)
    by_label = {case["label"]: case for case in result["cases"]}
    assert result["same_ids"] == 6 and result["parameters"]["vision_tower"] > 5e6
    for case in by_label.values():
        assert case["error"] is None and len(case["rounds"]) == 2 and 0.01 < case["peak_gib"] < 5
        dense = by_label[DENSE]["rounds"]
        ratios = sorted(other["first"] / one["first"] for one, other in zip(case["rounds"], dense))
        assert [case["first_ratio"]["low"], case["first_ratio"]["high"]] == pytest.approx(ratios)
    assert by_label[DENSE]["speed_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert "| 4x | 4 |" in table(result) and "same 6 of 6" in table(result)


def test_the_program_writes_all_three_files(plan, repository, run_script, tmp_path):
    flags = ["--language_model", plan.language_model, "--tower", "tiny", "--image_size", 56, "--new_tokens", 4]
    script = repository / "scripts" / "measure_answers.py"
    done = run_script(script, *flags, "--compressions", 4, "--rounds", 1, "--no_memory", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "answers.json").read_text())
    assert [case["label"] for case in record["cases"]] == [STOCK, DENSE, "4x"] and record["plan"]["new_tokens"] == 4
    assert (tmp_path / "answers.md").read_text().strip() in done.stdout
    assert (tmp_path / "answers.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--image_size", 50], "--image_size 50"),
        (["--compressions", 0.5], "--compressions"),
        (["--new_tokens", 1], "--new_tokens 1"),
        (["--language_model", "nowhere"], "--language_model nowhere"),
    ],
)
def test_mistakes_are_named(flags, words, repository, run_script):
    done = run_script(repository / "scripts" / "measure_answers.py", *flags)
    assert done.returncode in (1, 2) and words in done.stderr and "Traceback" not in done.stderr
