"""The report program on result files that the real programs made."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil

import pytest
from bench_helpers import write_rows
from markdown_it import MarkdownIt
from PIL import Image
from report_helpers import Page, compared, report
from report_results import HOSTILE, judged, picture, run_program, science_qa, science_qa_data

from llava_drip.evaluation import science_qa as scores_of_science_qa
from llava_drip.evaluation.science_qa_files import read_predictions
from llava_drip.instruct.scienceqa import load_problems
from llava_drip.reports.evaluation.paired import mcnemar
from llava_drip.reports.evaluation.records import read_records
from llava_drip.reports.evaluation.results import Line, read_result


def test_every_figure_is_that_of_its_file(results, tmp_path):
    files = [
        *results.science_qa,
        *results.pope,
        *results.rouge,
        *results.judged,
        *results.zero_shot,
        *results.retrieval,
    ]
    page, markdown, _ = report(tmp_path, files, "--title", "All & <everything>")
    said = [json.loads(path.read_text()) for path in files]
    wanted = []
    for content in said[:2]:
        for name in ("AVG", "NAT", "IMG", "G1-6"):
            low, high = content["interval"][name]
            wanted += [f"{content[name]['acc']:.2f}", f"{low:.2f} to {high:.2f}"]
    for content in said[2:4]:
        wanted += [f"{own[name]:.2f}" for own in content["splits"].values() for name in ("accuracy", "recall", "yes")]
        wanted += [f"{content['mean']['accuracy']:.2f}", f"{content['run']['tokens_per_image']:.1f}"]
    for content in said[4:6]:
        wanted += [f"{content['conv']['rouge_l']:.3f}", "{:.3f} to {:.3f}".format(*content["all"]["interval"])]
    for content in said[6:8]:
        wanted += [f"{content['all']['relative']:.1f}", "{:.1f} to {:.1f}".format(*content["detail"]["interval"])]
    for content in said[8:10]:
        wanted += [
            f"{100 * content['top1']:.2f}",
            f"{content['tokens_per_image']:.1f}",
            f"{content['run']['seconds']:.1f}",
        ]
    wanted += [f"{100 * said[10]['text_to_image_R@5']:.2f}", f"{100 * said[10]['chance']['image_to_text_R@1']:.2f}"]
    for number in wanted:
        assert number in page.text and number in markdown, number
    for content in said:  # what each says of itself
        hashes = [
            own["sha256"] for own in (*content["run"]["data"].values(), content["run"]["checkpoint"] or {}) if own
        ]
        for text in (content["run"]["command"], content["run"]["versions"]["torch"], *hashes):
            assert text in page.text and text in markdown, text
    assert page.text.startswith("All & <everything>") and "All &amp; &lt;everything&gt;" in markdown
    # the intervals that no file has
    (line,) = [figure for line, figure in read_result(results.pope[0]).lines.items() if line == Line("random, %", "F1")]
    assert line.interval[0] <= line.value <= line.interval[1]
    zero = read_result(results.zero_shot[0]).lines[Line("accuracy, %", "top-1")]
    assert zero.interval == tuple(scores_of_science_qa.wilson(round(10 * said[8]["top1"]), 10))


def test_results_with_less_in_them(results, tmp_path):
    """Answers that nobody has judged, reviews of no known answers, one split of answers of unknown making, one file alone."""
    folder, coco = results.folder, results.folder / "bench" / "coco"
    bench = [
        "--bench",
        "coco",
        "--data",
        folder / "bench",
        "--model",
        results.model,
        "--device",
        "cpu",
        "--judge",
        "none",
    ]
    bench += ["--output", folder / "rouge.jsonl", "--max_new_tokens", 6]
    run_program("llava_bench.py", *bench, "--json", tmp_path / "answers.json")
    run_program(
        "llava_bench.py", "--reviews", folder / "plain.judge.reviews.jsonl", "--json", tmp_path / "reviews.json"
    )
    rows = [{"question_id": i, "text": ("Yes.", "No.", "Yes.", "Maybe.", "No.", "No.")[i]} for i in range(6)]
    answers = write_rows(tmp_path / "theirs.jsonl", rows)
    given = [
        "--questions",
        folder / "coco_pope_random.json",
        "--predictions",
        answers,
        "--json",
        tmp_path / "theirs.json",
    ]
    run_program("pope.py", *given)
    flags = ["--samples", 1, "--device", "cpu", "--images", coco / "images"]
    page, markdown, done = report(tmp_path, [tmp_path / "answers.json"], *flags)
    assert len(page.all("img")) == 2 and "Nobody has judged these answers." in page.text and "warning" not in done.err
    page, markdown, done = report(
        tmp_path, [tmp_path / f"{name}.json" for name in ("reviews", "theirs", "answers")], *flags
    )
    assert "50.0" in page.text and "does not say where its questions lie" in done.err
    # yes no yes yes no no, where it is yes no yes no yes no: 4 of 6, Wilson's by hand 30.0 to 90.3
    assert (
        "66.67" in page.text and "30.00 to 90.32" in page.text and "1 of 6 answers say neither yes nor no" in markdown
    )
    assert "theirs: no pictures: " in done.err and "records no hash" in done.err


def test_tables_can_be_read_without_seeing_them(results, tmp_path):
    page, _, _ = report(tmp_path, [*results.science_qa, *results.judged], "--samples", 1, "--device", "cpu")
    assert len(page.all("caption")) == len(page.all("table")) >= 6
    assert all(head.get("scope") in ("col", "row", "rowgroup") for head in page.all("th"))
    assert page.all("img") and all(image["alt"].strip() for image in page.all("img"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [link["href"].removeprefix("#") for link in page.all("a")]
    targets += [attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes]
    assert set(targets) <= set(ids)
    assert not page.all("script") and page.all("html") == [{"lang": "en"}]


def test_a_paired_difference_is_that_of_the_programs_own(results):
    """science_qa.difference, which the program prints for --against, of the same two files."""
    found = compared(results.science_qa)
    problems = load_problems(results.folder / "scienceqa", "test")
    chosen = [read_predictions(path.with_suffix(".jsonl"), problems)[0] for path in results.science_qa]
    expected = scores_of_science_qa.difference(problems, chosen[1], chosen[0])
    whole = found.differences[0]
    assert found.paired and whole.line == Line("accuracy, %", "AVG")
    assert whole.value == pytest.approx(expected["points"]) and list(whole.interval) == pytest.approx(
        expected["interval"]
    )
    assert list(reversed(whole.only)) == expected["only"] and whole.p == mcnemar(*whole.only)
    assert any("generate and likelihood" in note for note in found.notes)
    assert ("compression", "none", "16.0") in found.settings and (
        "asking: scoring",
        "generate",
        "likelihood",
    ) in found.settings
    answers = [
        json.loads(line) for path in results.science_qa for line in path.with_suffix(".jsonl").read_text().splitlines()
    ]
    texts = [{row["question_id"]: row["text"].strip() for row in answers[start : start + 12]} for start in (0, 12)]
    differ = {key for key, text in texts[0].items() if texts[1][key] != text}
    assert {own.key for own, _ in found.changed} == differ and found.same == 12 - len(differ)


def test_a_difference_of_relative_scores(results):
    """Answers get 4 of 8, the better ones 7 to questions 0, 2, 4 and 6: 50 % and 100 * (4 * 7 + 3 * 4) / 7 / 8 %."""
    found = compared(results.judged)
    whole = found.differences[0]
    assert (whole.first, whole.second) == pytest.approx((50, 100 * 40 / 7 / 8)) and whole.only is whole.p is None
    assert 0 <= whole.interval[0] < whole.value < whole.interval[1] <= 37.5
    conv = next(one for one in found.differences if one.line.name == "conv")  # questions 0, 3 and 6
    assert conv.value == pytest.approx(100 * (7 + 4 + 7) / 3 / 8 - 50)
    assert [own.key for own, _ in found.changed] == ["10", "12", "14", "16", "11", "13", "15"]  # by how much it matters


def test_a_difference_of_pope_has_every_share(results):
    first, second = (read_result(path) for path in results.pope)
    found = compared(results.pope)
    defined = [line for line in first.lines if None not in (first.lines[line].value, second.lines[line].value)]
    assert [one.line for one in found.differences] == defined and len(defined) >= 12
    for one in found.differences:
        assert (one.first, one.second) == pytest.approx((first.lines[one.line].value, second.lines[one.line].value))
        assert one.interval[0] <= one.value <= one.interval[1]
        assert (one.p is None) == (one.line.name != "accuracy" or one.line.group.startswith("mean"))
    assert any("pictures are drawn anew" in note for note in found.notes)


def test_without_single_questions_the_intervals_are_those_of_independent_samples(results):
    found = compared(results.zero_shot, read=False)
    assert not found.paired and found.same is None
    assert any("independent samples" in note for note in found.notes)
    one = found.differences[0]
    assert one.interval[0] <= one.value <= one.interval[1] and one.interval[0] < one.interval[1]


@pytest.mark.parametrize(("only", "p"), [((0, 0), 1.0), ((5, 5), 1.0), ((1, 9), 0.021484375), ((9, 1), 0.021484375)])
def test_mcnemar_by_hand(only, p):
    assert mcnemar(*only) == pytest.approx(p)  # 2 * (1 + 10) / 1024


def test_other_data_are_not_compared(results, tmp_path):
    science_qa_data(tmp_path / "scienceqa")
    problems = json.loads((tmp_path / "scienceqa" / "problems.json").read_text())
    problems["2"]["question"] = "Another?"
    (tmp_path / "scienceqa" / "problems.json").write_text(json.dumps(problems))
    other = science_qa(tmp_path, results.model, "other", "--max_new_tokens", 4)
    page, markdown, done = report(tmp_path, [results.science_qa[0], other])
    for text in (page.text, markdown.replace("**", "")):
        assert "Not compared. Their data differ: problems" in text and "only" not in text
    assert "other is not to be set beside sqa: Their data differ" in done.err
    few = science_qa(results.folder, results.model, "few", "--limit", 5, "--max_new_tokens", 4)
    assert "different numbers of questions: 12 and 5" in compared([results.science_qa[0], few]).refused[0]
    blind = science_qa(results.folder, results.model, "blind", "--blind", "--max_new_tokens", 4)
    found = compared([results.science_qa[0], blind])
    assert not found.refused and any("prompts differ" in note for note in found.notes)


def test_other_judges_are_not_compared(results):
    harsh = judged(results.folder, "harsh", 0, judge="another")
    found = compared([results.judged[0], harsh])
    assert "judges differ" in found.refused[0] and "another" in found.refused[0] and not found.differences
    both = judged(results.folder, "both", 0, "--both-orders")
    assert "both orders" in compared([results.judged[0], both]).refused[0]


def test_answers_of_another_time_are_not_taken(results, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(results.folder, folder)
    path = folder / "pope.json"
    content = json.loads(path.read_text())
    content["run"]["files"]["answers"] = {split: f"pope/{split}.jsonl" for split in ("random", "popular")}
    path.write_text(json.dumps(content))
    assert read_records(read_result(path)).keys() == read_records(read_result(results.pope[0])).keys()
    answers = folder / "pope" / "random.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    rows[0]["text"] = "no" if "no" not in rows[0]["text"].split() else "yes"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="answers: .* is not what it was when"):
        read_records(read_result(path))
    del content["run"]["data"]["answers"]  # as results of earlier versions are: the figures alone tell
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the answers give .* for accuracy \(random, %\), where .*pope.json says"):
        read_records(read_result(path))
    (folder / "coco_pope_random.json").write_text("")
    content["run"]["files"]["questions"]["random"] = str(folder / "coco_pope_random.json")
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="questions: .* is not what it was when"):
        read_records(read_result(path))
    answers.unlink()
    page, _, _ = report(tmp_path, [path, results.pope[1]])
    assert "pope: questions: " in page.text and "independent samples" in page.text


def jpegs(urls: list[str]) -> list[Image.Image]:
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def test_samples_show_the_segments_that_the_model_saw(results, tmp_path):
    files = [*results.science_qa, *results.pope, *results.rouge]
    page, markdown, done = report(tmp_path, files, "--samples", 2, "--device", "cpu")
    pictures = jpegs([image["src"] for image in page.all("img")])
    assert len(pictures) == 3 * 2 * 3 and not done.err.count("warning")  # benchmarks, samples, the picture and two runs
    assert [image.size for image in pictures[:3]] == [(80, 60), (448, 448), (448, 448)]
    assert len(re.findall(r"!\[[^]]+\]\(data:image/jpeg;base64,", markdown)) == len(pictures)
    # the tokens are those that the run counted
    rows = {row["question_id"]: row for row in map(json.loads, (results.folder / "sqa.jsonl").read_text().splitlines())}
    counts = re.findall(r"(\d+) visual tokens of 64 patches", page.text)
    assert len(counts) == 12 and "in the run" not in page.text
    assert [int(counts[0]), int(counts[2])] == [rows[key]["metadata"]["visual_tokens"] for key in ("1", "7")]
    assert counts[1] == counts[3] == "4"  # 64 patches at 16x


def test_what_is_another_by_now_is_not_shown(results, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(results.folder / "bench" / "coco" / "images", folder / "images")
    shutil.copytree(results.model, folder / "assistant")
    path = tmp_path / "rouge.json"
    content = json.loads(results.rouge[0].read_text())
    content["run"]["files"]["images"], content["run"]["checkpoint"]["path"] = "/nowhere/images", "/nowhere/assistant"
    path.write_text(json.dumps(content))
    flags = ["--samples", 1, "--device", "cpu"]
    page, _, done = report(tmp_path, [path], *flags)
    assert not page.all("img") and "no pictures: its pictures, /nowhere/images, are not there (--images)" in done.err
    page, _, done = report(tmp_path, [path], *flags, "--images", folder / "images")
    assert len(page.all("img")) == 1 and "is not there any more (/nowhere/assistant) (--checkpoints)" in done.err
    flags += ["--images", folder / "images", "--checkpoints", folder / "assistant"]
    page, _, done = report(tmp_path, [path], *flags)
    assert len(page.all("img")) == 2 and "warning" not in done.err
    picture(folder / "images" / "0.jpg", 5)
    (folder / "assistant" / "generation_config.json").write_text("{}")
    page, _, done = report(tmp_path, [path], *flags)
    assert not page.all("img") and "no pictures" in done.err
    page, _, done = report(tmp_path, [results.rouge[0]], *flags)  # where they were, nothing has changed
    assert len(page.all("img")) == 2 and "warning" not in done.err


def test_nobodys_text_is_markup(results, tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    shutil.copytree(results.folder / "scienceqa", folder / "scienceqa")
    answers = folder / "theirs.jsonl"
    rows = [{"question_id": str(n), "text": HOSTILE + "\n# g\n1. h\n- i\n```\nj \ud800"} for n in range(1, 13)]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", folder / "scienceqa", "--predictions", answers, "--json", folder / "<b>theirs.json"]
    run_program("science_qa.py", *flags)
    page, markdown, _ = report(tmp_path, [results.science_qa[0], folder / "<b>theirs.json"])
    allowed = (
        '<script>alert(1)</script> & "a" | *b* [c](http://d.invalid/) `e` <img src=x onerror=alert(2)> \ufffd\ufffd #f'
    )
    assert allowed in page.text and "# g 1. h - i ``` j \ufffd" in page.text
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert all(link["href"].startswith("#") for link in page.all("a"))
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    shown = tmp_path / "shown.html"
    shown.write_text(html)
    rendered = Page(shown)
    assert allowed in rendered.text and "# g 1. h - i ``` j \ufffd" in rendered.text
    ours = "h1 h2 h3 p table thead tbody tr th td ul li strong blockquote br pre code"
    assert {tag for tag, _ in rendered.tags} <= set(ours.split())
    assert "<b>theirs" in rendered.text and len(rendered.all("h3")) == 1 + 2  # the comparison, and a heading a file
    for table in re.findall(r"<table>.*?</table>", html, re.S):  # no row is cut by a bar in somebody's text
        assert len({len(re.findall("<t[dh]", row)) for row in re.findall(r"<tr>.*?</tr>", table, re.S)}) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere.json"], "/nowhere.json: no such file"),
        (["{bench}/rule.json"], "no result of eval/llava_bench"),
        (["{folder}/names.txt"], "names.txt: not JSON"),
        (["{old}"], "has no 'run'"),
        (["{broken}"], "not as its program writes it (no 'interval')"),
        (["{good}", "--labels", "a", "b"], "--labels: 2 for 1 result files"),
        (["{good}", "{good}"], "two runs are called"),
        (["{good}", "--output", "report.pdf"], "--output report.pdf: must end in .html or .md"),
        (["{good}", "--output", "/nowhere/report.md"], "no folder /nowhere"),
        (["{good}", "--images", "{folder}"], "--images is for --samples"),
        (["{good}", "--samples", "1", "--checkpoints", "/nowhere"], "--checkpoints /nowhere: not there"),
        (["{good}", "--samples", "-1"], "--samples -1: must be 0 or more"),
    ],
)
def test_a_mistake_is_one_line(results, tmp_path, arguments, words):
    good = json.loads(results.science_qa[0].read_text())
    (tmp_path / "old.json").write_text(json.dumps({**good, "run": None}))
    (tmp_path / "broken.json").write_text(json.dumps({name: own for name, own in good.items() if name != "interval"}))
    places = {"folder": results.folder, "bench": results.folder / "bench", "good": results.science_qa[0]}
    places |= {"old": tmp_path / "old.json", "broken": tmp_path / "broken.json"}
    done = run_program("report.py", *(word.format(**places) for word in arguments), code=None)
    (line,) = [line for line in done.err.splitlines() if line.startswith("report: error:")]
    assert done.code and words in line and not list(tmp_path.glob("*.html"))
