"""Every bad row of a file is found, named and counted, and what is kept of it can be trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from llava_drip.instruct.data import load_records, read_records
from llava_drip.instruct.data_check import Report, check_rows_of, encoder_for, histogram, quantiles

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_data.py"


def row(key: str, question: str = "<image>\nWhat?", answer: str = "A cat.", image: str | list | None = "a.png") -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": key, "conversations": turns, **({} if image is None else {"image": image})}


BAD = {  # row → (kind, words of its message)
    1: ("missing image", "row 1 (id 'gone') image file 'none.png' not found"),
    2: ("placeholders", "row 2 (id 'two') has 2 <image> and 1 images"),
    3: ("empty turn", "row 3 (id 'mute') turn 1 (gpt) has no text"),
    4: ("roles out of turn", "row 4 (id 'turns') turn 0 is from 'gpt'"),
    5: ("not a row", "row 5 a row must be an object"),
    6: ("image cannot be decoded", "row 6 (id 'torn') "),
    7: ("no conversation", "row 7 has no 'conversations'"),
    8: ("'image'", "row 8 (id 'image') 'image' must be a file name"),
}


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 20), "red").save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "torn.png").write_bytes((tmp_path / "images" / "a.png").read_bytes()[:60])
    turned = row("turns")
    turned["conversations"].reverse()
    rows = [
        row("good"),
        row("gone", image="none.png"),
        row("two", "<image><image>\nWhat?"),
        row("mute", answer=" "),
        turned,
        "text",
        row("torn", image="torn.png"),
        {"image": "a.png"},
        row("image", image={"path": "a.png"}),
        row("good", "What else?", image=None),
    ]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    return tmp_path / "chat.json"


def test_every_bad_row_is_found_once(data):
    report = check_rows_of(data, read_records(data), data.parent / "images", decode=True)
    assert {p.row: p.kind for p in report.problems} == {i: kind for i, (kind, _) in BAD.items()}
    for problem in report.problems:
        assert problem.message.startswith(BAD[problem.row][1]), problem.message
    assert report.rows == 10 and report.bad_rows == set(BAD) and set(report.counts(report.problems).values()) == {1}
    assert [(note.row, note.kind) for note in report.notes] == [(9, "duplicate id")]
    assert "has the id of row 0" in report.notes[0].message
    assert report.lengths == [4, 4, 4, 4] and report.unit == "words"  # of well-formed rows: 0, 1, 6, 9


def test_decoding_and_unique_ids_are_asked_for(data):
    records = read_records(data)
    assert 6 not in check_rows_of(data, records, data.parent / "images").bad_rows
    assert 9 in check_rows_of(data, records, data.parent / "images", unique_ids=True).bad_rows


def test_workers_find_the_same(data):
    one, two = (
        check_rows_of(data, read_records(data), data.parent / "images", True, workers=workers) for workers in (0, 2)
    )
    assert one.record() == two.record()


def test_what_the_length_cuts(tiny_checkpoint, tiny_language_model, data):
    long = " ".join(["word"] * 200)
    rows = [
        row("fits"),
        row("short", answer=long),
        row("lost", f"<image>\n{long * 10}"),
        row("image", f"{long * 10} <image>"),
    ]
    encoder = encoder_for(rows, str(tiny_checkpoint), "vicuna_v1", max_length=400)
    assert encoder.image_tokens == 64  # of the tower, at most: each picture decides
    report = check_rows_of("f", rows, data.parent / "images", encoder=encoder)
    assert [(p.row, p.kind) for p in report.problems] == [(2, "cut off by the length")] + [
        (3, "cut off by the length")
    ] * 1
    assert "nothing of an answer is left within --model_max_length 400" in report.problems[0].message
    (note,) = report.notes
    assert note.row == 1 and note.kind == "shortened by the length" and "of its answers' are lost" in note.message
    ids, _ = encoder.encode(0, whole=True)
    assert report.unit == "tokens" and report.lengths[0] == len(ids) + 63
    assert encoder_for(rows, str(tiny_checkpoint), elastic=(4, 8)).image_tokens == 16
    alone = encoder_for(rows, str(tiny_language_model), image_tokens=10)
    assert alone.image_tokens == 10 and len(alone.encode(0, whole=True)[0]) == len(ids)
    with pytest.raises(ValueError, match="is a language model; say --image_tokens"):
        encoder_for(rows, str(tiny_language_model))


def test_a_kind_does_not_hang_on_words(tiny_checkpoint):
    refusing = "{{ raise_exception('is cut off: ' + messages[0]['role']) }}"
    encoder = encoder_for([row("a: b", image=None, question="What?")], str(tiny_checkpoint))
    encoder.template = refusing
    (problem,) = check_rows_of("f", encoder.records, encoder=encoder).problems
    assert problem.kind == "chat template"
    assert problem.message.startswith("row 0 (id 'a: b') ") and problem.message.count("row 0") == 1


def test_numbers():
    assert histogram([]) == [] and histogram([5]) == [(5, 5, 1)]
    steps = histogram(list(range(100)), bins=10)
    assert steps == [(10 * i, 10 * i + 9, 10) for i in range(10)]
    assert sum(rows for _, _, rows in histogram([1, 7, 7, 1000])) == 4
    assert quantiles([1, 2, 3], "words") == {
        "unit": "words", "rows": 3, "min": 1.0, "p50": 2.0, "p95": 2.9, "p99": 2.98, "max": 3.0, "mean": 2.0
    }  # fmt: skip
    assert Report("f", 0).record()["lengths"] == {"unit": "words", "rows": 0}


def test_the_program(data, run_script, tmp_path):
    flags = [data, "--image_folder", data.parent / "images", "--decode", "--workers", 0]
    done = run_script(SCRIPT, *flags, "--json", tmp_path / "report.json", "--write_good", tmp_path / "good.json")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("chat.json: 8 of 10 rows are bad (above)")
    for _, words in BAD.values():
        assert words in done.stdout
    assert "note: duplicate id: 1 rows" in done.stdout and "words of a row" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["bad_rows"] == 8 and len(report["problems"]) == 8 and report["counts"]["missing image"] == 1
    good = load_records(tmp_path / "good.json", data.parent / "images")  # as training reads it
    assert [(one["id"], "image" in one) for one in good] == [("good", True), ("good", False)]
    again = run_script(SCRIPT, tmp_path / "good.json", *flags[1:], "--write_good", tmp_path / "good.jsonl")
    assert again.returncode == 0 and load_records(tmp_path / "good.jsonl", data.parent / "images") == good


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["none.json"], "none.json: no such data file"),
        (["chat.json", "--image_folder", "none"], "--image_folder none: no such folder"),
        (["chat.json", "--version", "plain"], "--version: goes with --model_name_or_path"),
        (["chat.json", "--show", "-1"], "--show -1: must be at least 0"),
        (["chat.json", "--write_good", "chat.json"], "--write_good chat.json: is the file that is checked"),
        (["chat.json", "--json", "chat.json"], "--json chat.json: is the file that is checked"),
        (["chat.json", "--json", "none/r.json"], "--json none/r.json: there is no folder none"),
        (["chat.json", "--json", "images"], "--json images: is a folder"),
        (["chat.json", "--write_good", "images/a.png"], "--write_good images/a.png: exists; give another"),
        (["chat.json", "--write_good", "a.json", "--json", "a.json"], "--json a.json: is --write_good's file too"),
        (["chat.json", "--elastic_compression", "1", "4"], "--elastic_compression: goes with --model_name_or_path"),
        (
            ["chat.json", "--model_name_or_path", "x", "--elastic_compression", "4", "1"],
            "--elastic_compression 4 1: must be LOW HIGH",
        ),
        (["chat.json", "--model_name_or_path", "none"], "none"),
    ],
)
def test_mistakes(data, run_script, monkeypatch, flags, words):
    monkeypatch.chdir(data.parent)
    done = run_script(SCRIPT, *flags, "--workers", 0)
    assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr
    assert "rows" not in done.stdout  # before the check, which may take hours
