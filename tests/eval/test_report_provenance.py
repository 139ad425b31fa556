"""The report uses what a result was made of, unchanged, or says that it is not there or not recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from bench_helpers import write_rows
from report_helpers import report
from report_results import run_program, science_qa, science_qa_data, zero_shot

from llava_drip.reports.evaluation.paired import compare
from llava_drip.reports.evaluation.records import read_records
from llava_drip.reports.evaluation.results import read_result


@pytest.mark.parametrize("kind", ["science_qa", "rouge", "judged"])
def test_answers_that_give_the_same_figures_are_not_taken_either(results, tmp_path, kind):
    """Other words in the same file change no accuracy, but are not those that were scored."""
    source = getattr(results, kind)[0]
    content = json.loads(source.read_text())
    for name in ("answers", "reviews"):
        if name not in content["run"]["data"]:
            continue
        changed = tmp_path / "changed.jsonl"
        changed.write_text(Path(content["run"]["files"][name]).read_text() + "\n")
        run = {**content["run"], "files": {**content["run"]["files"], name: str(changed)}}
        (tmp_path / "result.json").write_text(json.dumps({**content, "run": run}))
        with pytest.raises(ValueError, match=f"{name}: .*changed.jsonl is not what it was when"):
            read_records(read_result(tmp_path / "result.json"))
        del run["data"][name]  # an earlier version's
        (tmp_path / "result.json").write_text(json.dumps({**content, "run": run}))
        assert read_records(read_result(tmp_path / "result.json"))
    assert (kind == "judged") == ("reviews" in json.loads(source.read_text())["run"]["data"])


def test_another_order_of_the_problems_is_not_what_it_was(results, tmp_path):
    shutil.copytree(results.folder / "scienceqa", tmp_path / "scienceqa")
    content = json.loads(results.science_qa[0].read_text())
    content["run"]["data"]["problems"]["path"] = str(tmp_path / "scienceqa" / "problems.json")
    path = tmp_path / "sqa.json"
    path.write_text(json.dumps(content))
    assert len(read_records(read_result(path))) == 12
    splits = tmp_path / "scienceqa" / "pid_splits.json"
    splits.write_text(json.dumps({"test": list(reversed(json.loads(splits.read_text())["test"]))}))
    with pytest.raises(ValueError, match="pid_splits: .* is not what it was when"):
        read_records(read_result(path))
    del content["run"]["data"]["pid_splits"]  # an earlier version's
    path.write_text(json.dumps(content))
    assert len(read_records(read_result(path))) == 12


def test_data_without_a_hash_are_not_the_same_data(results):
    first, second = (read_result(path) for path in results.zero_shot)
    for one in (first, second):
        one.run["data"]["data"] = {"sha256": None, "files": 0}  # behind an address
    found = compare(first, second, ("not read", "not read"))
    assert found.refused == ("Their data may differ: data are not recorded by their hash.",) and not found.differences


def test_clip_results_record_their_prompts(results):
    first, second = (read_result(path) for path in results.zero_shot)
    assert first.run["prompts"] == second.run["prompts"] and first.run["prompts"]["count"] == 5 * 7
    assert read_result(results.retrieval[0]).run["prompts"]["count"] == 16
    names = results.folder / "other_names.txt"
    names.write_text((results.folder / "names.txt").read_text().replace("red", "crimson"))
    other = zero_shot(results.folder, results.folder / "clip", "zero_crimson", classes=names)
    assert read_result(other).run["prompts"]["sha256"] != first.run["prompts"]["sha256"]


def test_a_run_on_other_data_shows_no_samples(results, tmp_path):
    """Its answers would stand under questions and pictures of the first, by the same names."""
    science_qa_data(tmp_path / "scienceqa")
    problems = json.loads((tmp_path / "scienceqa" / "problems.json").read_text())
    problems["1"]["question"] = "Another?"
    (tmp_path / "scienceqa" / "problems.json").write_text(json.dumps(problems))
    other = science_qa(tmp_path, results.model, "other", "--max_new_tokens", 4)
    page, markdown, done = report(tmp_path, [results.science_qa[0], other], "--samples", 1, "--device", "cpu")
    assert len(page.all("img")) == 2 and "other is left out here: Their data differ: problems" in done.err
    shown = markdown.partition("### Sample answers")[2].partition("## What the files say")[0]
    assert "sqa, " in shown and "other, " not in shown and "Another?" not in shown


def test_what_answers_do_not_tell_is_not_recorded(results, tmp_path):
    """Answers of unknown making, and a result of an earlier version that has nulls where the answers had told."""
    answers = write_rows(tmp_path / "theirs.jsonl", [{"question_id": str(n), "text": "A"} for n in range(1, 13)])
    theirs = tmp_path / "theirs.json"
    run_program("science_qa.py", "--data", results.folder / "scienceqa", "--predictions", answers, "--json", theirs)
    page, markdown, _ = report(tmp_path, [results.science_qa[1], theirs])
    facts = markdown.rpartition("### theirs")[2]
    for name in ("checkpoint", "compression asked for", "prompts", "asking", "devices", "machines", "answered\\_with"):
        assert f"- {name}: not recorded" in facts.replace("answered_with", "answered\\_with"), name
    assert "| compression | 16.0 | not recorded |" in markdown and "as the checkpoint says" not in facts
    kept = tmp_path / "kept.json"
    flags = ["--data", results.folder / "scienceqa", "--predictions", results.folder / "sqa_16x.jsonl", "--json", kept]
    run_program("science_qa.py", *flags)
    _, markdown, _ = report(tmp_path, [results.science_qa[1], kept])
    assert "compression asked for: 16x" in markdown.rpartition("### kept")[2] and "What differs" not in markdown
