"""eval/llava_bench.py with a judge: a real HTTP endpoint that fails in every way, a kill, and what it all comes to."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from bench_helpers import PROGRAM, assert_one_line_error, check_right, flags, read, write_rows

from llava_drip.fingerprint import fingerprint
from llava_drip.record import text_hash

for package in ("openai", "tenacity"):
    pytest.importorskip(package, reason="the eval extra is not installed")


def test_right_scores_from_a_judge_that_fails_in_every_way(judge, server):
    failing = ("malformed", "429", "500", "slow", "cut off", "drop", "html")
    server.script = {f"Question {i}?": [act] for i, act in enumerate(failing)}
    result = judge(**{"judge-timeout": 1, "judge-price-in": 10, "judge-price-out": 30})
    assert result.returncode == 0, result.stderr
    check_right(judge.scores())
    assert [len(server.asked(f"Question {i}?")) for i in range(7)] == [2] * 7
    first, second = server.asked("Question 1?")
    assert second["time"] - first["time"] >= 1  # as Retry-After says
    assert {request["key"] for request in server.requests} == {"Bearer secret-key"} and server.most <= 4
    body = server.requests[0]["body"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge/m", 0.2, 1024)

    reviews = read(judge.reviews)
    assert [(row["question_id"], row["tuple"]) for row in reviews] == [(10 + i, [8.5, 1.0 + i]) for i in range(7)]
    assert [row["category"] for row in reviews[:3]] == ["conv", "detail", "complex"]
    assert (reviews[0]["answer1_id"], reviews[0]["answer2_id"]) == (10, "mine-0")
    replies = read(judge.replies)
    outcomes = [(row["question_id"], row["outcome"]) for row in replies if row["outcome"] != "scored"]
    kept = [(10, "malformed"), (11, "http error"), (12, "http error"), (14, "cut off"), (16, "malformed")]
    assert sorted(outcomes) == kept
    assert [row["status"] for row in sorted(replies, key=lambda row: row["question_id"]) if "status" in row] == [
        429,
        500,
    ]
    assert {row["question_id"]: row["retries"] for row in replies if row["outcome"] == "scored"} == {
        10: 0,
        11: 1,
        12: 1,
        13: 1,
        14: 0,
        15: 1,
        16: 0,
    }
    assert all("The first knows the cat." in row["raw"] for row in replies if row["outcome"] == "scored")
    assert "secret-key" not in judge.reviews.read_text() + judge.replies.read_text() + json.dumps(judge.scores())
    assert (
        "7 reviews to ask for: about" in result.stdout and "at most 7,168 to write, at most about $0.2" in result.stdout
    )
    assert "the judge read 900 tokens and wrote 90, repetitions included, $0.01" in result.stdout

    # The same command again: nothing is asked, the scores are the same.
    asked, before = len(server.requests), judge.scores()
    result = judge(**{"judge-timeout": 1, "judge-price-in": 10, "judge-price-out": 30})
    assert (
        result.returncode == 0 and len(server.requests) == asked and "7 of 7 reviews are there already" in result.stdout
    )
    after = judge.scores()
    del before["run"], after["run"]
    assert after == before


def test_a_review_that_cannot_be_had_is_no_number(judge, server):
    server.script = {"Question 0?": ["malformed", "forever"], "Question 4?": ["cut off", "forever"]}
    server.script |= {"Question 5?": ["500", "forever"], "Question 6?": ["400", "forever"]}
    result = judge(**{"judge-retries": 1})
    assert_one_line_error(result, "4 of 7 questions have a failed review", "question_id 10", "not two scores")
    assert [len(server.asked(f"Question {i}?")) for i in (0, 1, 4, 5, 6)] == [2, 1, 2, 2, 1]
    failed = [row for row in read(judge.reviews) if row["tuple"] is None]
    assert [row["question_id"] for row in failed] == [10, 14, 15, 16] and {row["status"] for row in failed} == {
        "failed"
    }
    for row, words in zip(failed, ("not two scores", "cut off", "scripted 500", "scripted 400")):
        assert words in row["reason"]
    group = judge.scores()["all"]
    assert (group["n"], group["failed"], group["model"]) == (3, 4, 3.0)  # of questions 1, 2 and 3
    # Asked for again, alone, when the judge is itself again.
    server.script = {}
    asked = len(server.requests)
    assert judge(**{"judge-retries": 1}).returncode == 0 and len(server.requests) == asked + 4
    check_right(judge.scores())


def test_both_orders(judge, server):
    assert judge(**{"both-orders": True}).returncode == 0
    assert (
        len(server.requests) == 14 and sum(request["first"].startswith("Reference") for request in server.requests) == 7
    )
    group = judge.scores()["all"]
    # reference 8.5 then 8, model 4 then 4.5
    assert (group["n"], group["reference"], group["model"]) == (7, 8.25, 4.25)
    assert group["reference_first"] == pytest.approx(100 * 4 / 8.5)
    assert group["model_first"] == pytest.approx(100 * 4.5 / 8)
    assert group["difference"] == pytest.approx(100 * 4 / 8.5 - 100 * 4.5 / 8)
    rows = read(judge.reviews.with_name("mine.judge_m.both_orders.reviews.jsonl"))
    assert [row["tuple"] for row in rows[:2]] == [[8.5, 1.0], [8.0, 1.5]]
    assert [row["content"].split("\n")[0] for row in rows[:2]] == ["8.5 1", "1.5 8"]


def test_a_narrower_run_takes_no_reviews_away(judge, server, tmp_path):
    assert judge(**{"both-orders": True}).returncode == 0 and judge().returncode == 0
    files = (judge.reviews, judge.reviews.with_name("mine.judge_m.both_orders.reviews.jsonl"))
    whole = [path.read_bytes() for path in files]
    assert judge(limit=2).returncode == 0
    assert [path.read_bytes() for path in files] == whole and len(server.requests) == 14  # all from the same replies
    assert len(read(judge.reviews.with_name("mine.judge_m.first_2.reviews.jsonl"))) == 2
    own = {"reviews-output": tmp_path / "own.reviews.jsonl", "both-orders": True}
    assert judge(limit=1, **own).returncode == 0 and judge(limit=2, **own).returncode == 0  # growing is no loss
    before, asked = own["reviews-output"].read_bytes(), len(server.requests)
    for narrower in ({"limit": 1}, {"both-orders": None, "limit": 2}):
        words = ("own.reviews.jsonl: 2 of its 4 reviews are none of this run's", "--reviews-output")
        assert_one_line_error(judge(**{**own, **narrower}), *words)
    assert own["reviews-output"].read_bytes() == before and len(server.requests) == asked
    own["reviews-output"].write_text('{"a": 1}\n')
    assert_one_line_error(judge(**own), "line 1: not a review")


def test_what_the_judge_is_told(judge, server, bench):
    assert judge(limit=1).returncode == 0 and judge(limit=1, bench="in_the_wild").returncode == 0
    coco, wild = server.requests
    assert coco["context"] == "Cat 0.\nOn a mat.\n\ncat: [0.1, 0.2, 0.3, 0.4]\nmat: [0.0, 0.5, 1.0, 1.0]"
    assert coco["prompt"] == "Rate both (conv, sentences and boxes), 1 to 10."
    assert (coco["first"], coco["second"]) == ("Reference of Question 0?", "Mine 0.")
    assert wild["context"] == "Cat 0 on a mat." and wild["prompt"] == "Rate both (conv, sentences), 1 to 10."


def test_another_request_is_asked_anew(judge, server, bench):
    """A reply counts for the very request that it answers: another prompt, judge or answer asks again."""
    assert judge(limit=2).returncode == 0
    changes = ({"judge-temperature": 0}, {"judge-options": "max_completion_tokens=50"}, {"judge-max-tokens": 9})
    for number, change in enumerate(changes, 2):
        assert judge(limit=2, **change).returncode == 0 and len(server.requests) == 2 * number
    assert judge(limit=2).returncode == 0 and len(server.requests) == 8
    rules = bench / "rule.json"
    rules.write_text(rules.read_text().replace("Rate both (conv", "Rate them (conv"))
    assert judge(limit=2).returncode == 0 and len(server.requests) == 9
    bodies = [request["body"] for request in server.requests]
    assert bodies[4]["max_completion_tokens"] == 50 and bodies[2]["temperature"] == 0 and bodies[6]["max_tokens"] == 9
    assert judge(limit=1, **{"judge-options": "max_tokens=null"}).returncode == 0
    assert "max_tokens" not in server.requests[-1]["body"]
    assert judge(limit=1, **{"judge-options": "only_this_server_knows=1"}).returncode == 0
    assert server.requests[-1]["body"]["only_this_server_knows"] == 1


def test_no_review_is_asked_for_twice_after_a_kill(judge, server, bench, tmp_path):
    server.delay = 0.3
    values = {"answers": tmp_path / "mine.jsonl", "bench": "coco", "data": bench, "judge": "judge/m"}
    values |= {"judge-base-url": server.url, "judge-in-flight": 1}
    process = subprocess.Popen([sys.executable, PROGRAM, *flags(values)], stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not (judge.replies.exists() and judge.replies.read_bytes().count(b"\n") >= 2):
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    had = {row["question_id"] for row in read(judge.replies)}
    assert 2 <= len(had) < 7 and not judge.reviews.exists()
    with open(judge.replies, "ab") as file:
        file.write(b'{"request": "torn')  # within the next line
    asked, server.delay = len(server.requests), 0.0
    result = judge()
    assert result.returncode == 0 and f"{len(had)} of 7 reviews are there already" in result.stdout, result.stderr
    again = {10 + int(request["question"].split()[1].rstrip("?")) for request in server.requests[asked:]}
    assert again == set(range(10, 17)) - had and len(server.requests) == asked + 7 - len(had)
    check_right(judge.scores())


def test_a_hopeless_endpoint_ends_the_run(judge, server, monkeypatch):
    server.script = {f"Question {i}?": ["401", "forever"] for i in range(7)}
    assert_one_line_error(judge(**{"judge-in-flight": 1}), server.url, "scripted 401")
    assert len(server.requests) <= 2 and not judge.reviews.exists()
    server.script = {f"Question {i}?": ["400", "forever"] for i in range(7)}
    asked = len(server.requests)
    assert_one_line_error(judge(**{"judge-in-flight": 1}), "the first 5 reviews all failed", "scripted 400")
    assert len(server.requests) <= asked + 6
    address = {"judge-base-url": server.url.replace("/v1", "/v2")}
    assert_one_line_error(judge(**address), "no /v2/chat/completions")
    monkeypatch.delenv("OPENAI_API_KEY")
    asked = len(server.requests)
    assert_one_line_error(judge(**{"judge-base-url": None}), "no key in the environment variable OPENAI_API_KEY")
    assert_one_line_error(judge(**{"judge-base-url": None, "judge-key-env": "OWN"}), "variable OWN")
    assert len(server.requests) == asked
    server.script = {}
    assert judge(limit=1).returncode == 0 and server.requests[-1]["key"] == "Bearer EMPTY"


def test_the_estimate_asks_nothing(judge, server):
    result = judge(estimate=True, **{"both-orders": True, "judge-max-tokens": 100})
    assert (
        result.returncode == 0
        and "14 reviews to ask for" in result.stdout
        and "at most 1,400 to write" in result.stdout
    )
    assert not server.requests and not judge.reviews.exists() and not judge.replies.exists()


def test_the_estimate_needs_no_key_and_answers_nothing(judge, server, monkeypatch, tiny_checkpoint, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert judge(estimate=True, limit=2, **{"judge-base-url": None}).stdout.startswith("https://api.openai.com/v1/")
    answers = [{"question_id": 10 + i, "text": f"Reference of Question {i}?"} for i in range(7)]
    known = judge(estimate=True, answers=write_rows(tmp_path / "as_long.jsonl", answers))
    output = tmp_path / "out" / "answers.jsonl"
    result = judge(estimate=True, answers=None, model=tiny_checkpoint, output=output, batch_size=2)
    assert result.returncode == 0 and "as long as the reference's" in result.stdout, result.stderr
    assert result.stdout.splitlines()[0] == known.stdout.splitlines()[0] and not output.parent.exists()
    assert_one_line_error(judge(estimate=True, answers=None, model=tmp_path / "none"), "none: no such folder")
    assert not server.requests


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"reviews": "x", "judge": "m"}, "--judge is not for --reviews"),
        ({"reviews": "x", "limit": 2}, "--limit is not for --reviews"),
        ({"reviews": "x", "both-orders": True}, "--both_orders is not for --reviews"),
        ({"model": "x", "bench": "coco", "estimate": True}, "--estimate is for --judge MODEL"),
        (
            {"model": "x", "bench": "coco", "judge": "rules", "judge-timeout": 120},
            "--judge_timeout is for --judge MODEL",
        ),
        ({"model": "x", "bench": "coco", "references": "y"}, "--references is for --judge rules or --judge MODEL"),
        ({"answers": "x", "bench": "coco", "judge": "rules", "compression": 2}, "--compression is for --model"),
        ({"answers": "x", "bench": "coco", "judge": "m", "batch_size": 8}, "--batch_size is for --model"),
    ],
)
def test_flags_that_nothing_would_read_are_refused(run_bench, values, words):
    """A default's own value (--judge-timeout 120, --batch_size 8) too."""
    assert_one_line_error(run_bench(**values), words)


def test_answers_then_reviews_then_their_record(run_bench, server, bench, tiny_checkpoint, tmp_path):
    values = {"model": tiny_checkpoint, "bench": "in_the_wild", "data": bench, "device": "cpu", "max_new_tokens": 4}
    values |= {"judge": "judge/m", "judge-base-url": server.url, "output": tmp_path / "answers.jsonl", "compression": 8}
    result = run_bench(json=tmp_path / "scores.json", **values)
    assert result.returncode == 0, result.stderr
    answers = read(tmp_path / "answers.jsonl")
    assert sorted(request["second"] for request in server.requests) == sorted(row["text"] for row in answers)
    summary = json.loads((tmp_path / "scores.json").read_text())
    check_right(summary)
    run = summary["run"]
    assert "--compression=8" in run["command"] and run["versions"]["openai"] and run["versions"]["torch"]
    assert run["checkpoint"] == {"path": str(tiny_checkpoint), "sha256": fingerprint(tiny_checkpoint)}
    assert run["data"]["questions"]["sha256"] == fingerprint(bench / "in_the_wild" / "questions.jsonl")
    assert run["data"]["rules"]["sha256"] == fingerprint(bench / "rule.json") and run["data"]["images"]["files"] == 3
    assert run["prompts"] == {"sha256": text_hash(f"Question {i}?" for i in range(7)), "count": 7}
    assert (run["compression"], run["tokens_per_image"]) == (8, 8)
    assert run["seconds"] == pytest.approx(sum(row["metadata"]["seconds"] for row in answers), abs=0.01)
    assert run["judge"]["answered_as"] == ["judge/m-0001"] and run["judge"]["tokens"] == {"read": 700, "written": 70}

    # From nothing: the same scores.
    for path in tmp_path.glob("answers*.jsonl"):
        path.unlink()
    assert run_bench(json=tmp_path / "again.json", **values).returncode == 0
    again = json.loads((tmp_path / "again.json").read_text())
    del again["run"], summary["run"]
    assert again == summary


def test_rules_are_word_overlap_and_no_relative_score(judge, bench, tmp_path, server):
    pytest.importorskip("rouge_score", reason="the eval extra is not installed")
    rows = [{"question_id": 10 + i, "text": f"Reference of Question {i}?"} for i in range(7)]
    rows[3]["text"] = ""
    rows[6]["text"] = "Reference and more words here"  # "reference" of "reference of question 6": 2 * 1 / (4 + 5)
    path = write_rows(tmp_path / "same.jsonl", rows)
    result = judge(answers=path, judge="rules", **{"judge-base-url": None})
    assert result.returncode == 0 and "ROUGE-L" in result.stdout and "not a relative score" in result.stdout
    summary = judge.scores()
    assert summary["all"]["rouge_l"] == pytest.approx((5 + 2 / 9) / 7) and summary["all"]["n"] == 7
    assert summary["conv"]["rouge_l"] == pytest.approx((1 + 2 / 9) / 3) and summary["detail"]["rouge_l"] == 1
    assert "ROUGE-L" in summary["run"]["score"] and not server.requests
    assert not any("relative" in group for group in summary.values())


def test_reviews_that_exist(run_bench, tmp_path):
    rows = [{"question_id": i, "category": "llava_bench_conv", "tuple": [8, 4 + i]} for i in range(3)]
    path, out = write_rows(tmp_path / "reviews.jsonl", rows), tmp_path / "out.json"
    result = run_bench(reviews=path, json=out)
    assert result.returncode == 0 and "62.5" in result.stdout, result.stderr
    summary = json.loads(out.read_text())
    assert list(summary) == ["all", "conv", "run"] and summary["all"]["relative"] == 62.5
    assert summary["run"]["data"]["reviews"]["sha256"] == fingerprint(path)
    write_rows(path, [*rows, {"question_id": 9, "category": "llava_bench_conv", "tuple": [-1, -1]}])
    result = run_bench(reviews=path, json=out)
    assert_one_line_error(result, "1 of 4 questions have a failed review", "question_id 9")
    assert json.loads(out.read_text())["all"]["n"] == 3 and "62.5" in result.stdout


def test_mistakes_are_named(judge, server, bench, tmp_path):
    answers = read(tmp_path / "mine.jsonl")
    for rows, words in (
        (answers[:5], ["2 questions have no answer", "question_id 15"]),
        ([*answers, answers[0]], ["line 8", "answered twice"]),
        ([{"question_id": 10}, *answers[1:]], ["line 1", "not an answer"]),
        ([{**answers[0], "prompt": "Another?"}, *answers[1:]], ["line 1", "prompt was Another?"]),
    ):
        assert_one_line_error(judge(answers=write_rows(tmp_path / "bad.jsonl", rows)), "bad.jsonl", *words)
    assert_one_line_error(judge(judge="none"), "--answers: say who judges")
    assert_one_line_error(judge(model=bench), "give one of --model, --answers and --reviews")
    assert_one_line_error(judge(answers=None), "give one of --model, --answers and --reviews")
    assert_one_line_error(judge(**{"judge-price-in": 1}), "belong together")
    assert_one_line_error(judge(**{"judge-in-flight": 0}), "--judge_in_flight 0")
    assert_one_line_error(judge(json=tmp_path / "no" / "x.json"), "no folder")
    assert_one_line_error(judge(**{"judge-options": "x"}), "--judge-options: 'x' is not KEY=VALUE")
    assert_one_line_error(judge(**{"judge-options": "stream=true"}), "--judge-options: stream is not to be changed")
    assert_one_line_error(
        judge(**{"judge-options": "max_completion_tokens=x"}), "max_completion_tokens='x' is no whole number"
    )
    assert_one_line_error(judge(**{"reviews-output": tmp_path / "mine.jsonl"}), "holds the answers")
    assert_one_line_error(judge(rules=tmp_path / "none.json"), "none.json: no such file (--rules)")
    assert_one_line_error(
        judge(judge="rules", references=tmp_path / "x", **{"judge-base-url": None}), "x: no such file (--references)"
    )
    judge.replies.write_text('{"a": 1}\n')
    assert_one_line_error(judge(), "line 1: not a judge's reply", "--reviews-output")
    assert judge.replies.read_text() == '{"a": 1}\n'
    (bench / "rule.json").unlink()
    assert_one_line_error(judge(), "has no rule.json", "--rules")
    assert not server.requests
