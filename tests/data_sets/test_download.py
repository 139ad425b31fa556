"""Whole data sets from a server on this machine: over plain HTTP and the Hub's protocol, and the program on the real names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from data_server import zipped

from llava_drip.datasets.download import Place, check_room, plan, run
from llava_drip.datasets.registry import DATASETS, DataSet, Source, Unpacked, chosen

ROWS = [{"id": str(i), "image": f"{i}.jpg"} for i in range(3)]
PICTURES = zipped({f"train/{i}.jpg": bytes([i]) * 50 for i in range(3)})


@pytest.fixture
def tiny(files, online) -> DataSet:
    """A data set of a list on the Hub, a zip over HTTP, and pictures one by one."""
    files.files["set/train.zip"] = PICTURES
    files.files.update({f"one/COCO_{i}.jpg": bytes([i]) * 40 for i in range(3)})
    files.repos["owner/name"] = {"main": {"chat.json": json.dumps(ROWS).encode(), "q.jsonl": jsonl(ROWS)}}
    md5 = hashlib.md5(PICTURES).hexdigest()
    unzip = Unpacked("set", "set/train", 3)
    sources = (
        Source("set/chat.json", "hub://owner/name/chat.json", 200, rows=3),
        Source("set/train.zip", "http://far.example/set/train.zip", len(PICTURES), True, md5, unzip=unzip),
        Source("set/q.jsonl", "hub://owner/name/q.jsonl", 100, rows=3),
        Source("set/few", "http://far.example/one/COCO_{image}", 100, rows=3, each="set/q.jsonl"),
    )
    return DataSet("tiny", "three pictures", "none", ("https://example.org",), sources)


@pytest.fixture
def place(files, tmp_path) -> Place:
    mirrors = (("http://far.example", files.endpoint),)
    return Place(tmp_path / "data", files.endpoint, mirrors, backoff=0.01)


def jsonl(rows: list[dict]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


LAYOUT = {"set/chat.json", "set/q.jsonl", "set/.train.zip.unpacked"}
LAYOUT |= {f"set/{folder}/{i}.jpg" for folder in ("train", "few") for i in range(3)}


def test_all_of_it_comes_and_a_second_run_asks_for_nothing(tiny, place, files):
    assert [step.state for step in plan([tiny], place)] == ["missing"] * 4
    assert run(plan([tiny], place), place) == []
    assert contents(place.folder) == LAYOUT
    assert (place.folder / "set/few/2.jpg").read_bytes() == b"\2" * 40
    asked = len(files.asked)
    steps = plan([tiny], place)
    assert {step.state for step in steps} == {"there"} and sum(step.download + step.room for step in steps) == 0
    assert run(steps, place) == [] and len(files.asked) == asked


def test_what_cannot_be_had_keeps_nothing_else_and_says_what_to_put_where(tiny, place, files):
    del files.files["set/train.zip"], files.repos["owner/name"]["main"]["chat.json"]
    chat, pictures = run(plan([tiny], place), place)
    assert chat.startswith("set/chat.json: the Hub has no file chat.json in owner/name. By hand: put ")
    assert "https://huggingface.co/datasets/owner/name/resolve/main/chat.json at " in chat
    assert pictures.startswith("set/train.zip: HTTP 404") and "put http://far.example/set/train.zip at " in pictures
    assert f"or unpacked as {place.folder}/set/train/; then start this command again" in pictures
    assert len(contents(place.folder) & LAYOUT) == 4  # the rest came
    # By hand, the one as a file and the other unpacked.
    (place.folder / "set/chat.json").write_text(json.dumps(ROWS))
    shutil.copytree(place.folder / "set/few", place.folder / "set/train")
    assert run(plan([tiny], place), place) == []


def test_a_zip_put_there_by_hand_is_checked_unpacked_and_kept(tiny, place):
    (place.folder / "set").mkdir(parents=True)
    (place.folder / "set/train.zip").write_bytes(PICTURES[:-1] + b"x")
    problems = run(plan([tiny], place), place)
    assert len(problems) == 1 and "set/train.zip: md5 " in problems[0]
    assert f"put aside as {place.folder}/set/.train.zip.wrong" in problems[0]
    (place.folder / "set/train.zip").write_bytes(PICTURES)
    steps = plan([tiny], place)
    assert steps[1].state == "to unpack" and run(steps, place) == []
    assert (place.folder / "set/train.zip").exists() and (place.folder / "set/train/2.jpg").exists()


def test_counts_are_compared_and_name_the_file(tiny, place, files):
    files.repos["owner/name"]["main"]["chat.json"] = json.dumps(ROWS[:2]).encode()
    (problem,) = run(plan([tiny], place), place)
    assert problem == f"{place.folder}/set/chat.json: 2 rows, 3 are published"
    (place.folder / "set/train/1.jpg").unlink()
    problems = run(plan([tiny], place), place)
    assert "set/train: 2 pictures, 3 are published; remove " in problems[1] and ".train.zip.unpacked" in problems[1]
    assert run(plan([tiny], place), dataclasses.replace(place, accept_changes=True)) == []


def test_a_published_size_and_checksum_hold(tiny, place, files):
    files.files["set/train.zip"] = PICTURES + b"x"
    (problem,) = run(plan([tiny], place), place)
    assert f"the server's file has {len(PICTURES) + 1:,} bytes, {len(PICTURES):,} are published" in problem
    files.server.stated_sha = "0" * 64
    (place.folder / "set/chat.json").unlink()
    problems = run(plan([tiny], place), place)
    assert "sha256 " in problems[0] and f"published is {'0' * 64}" in problems[0]
    assert not (place.folder / "set/chat.json").exists()
    assert f"put aside as {place.folder}/set/.chat.json.wrong" in problems[0]
    assert json.loads((place.folder / "set/.chat.json.wrong").read_text()) == ROWS


def test_lists_that_cannot_be_read_keep_nothing_else(tiny, place, files):
    branch = files.repos["owner/name"]["main"]
    branch["chat.json"] = branch["q.jsonl"] = b"<html>sign in</html>"
    unnumbered = dataclasses.replace(tiny.sources[0], rows=None)
    tiny = dataclasses.replace(tiny, sources=(unnumbered, *tiny.sources[1:]))
    for _ in range(2):  # the second time the lists are there
        chat, listing, few = run(plan([tiny], place), place)
        assert "set/chat.json: not valid JSON (" in chat and "; remove it to have it downloaded again" in chat
        assert "set/q.jsonl: line 1: not JSON" in listing and "q.jsonl: line 1: not JSON" in few
        assert (place.folder / "set/train/2.jpg").is_file()


def test_an_error_of_the_file_system_keeps_nothing_else(tiny, place):
    (place.folder / "set").mkdir(parents=True)
    (place.folder / "set/.hub-chat.json").write_text("in the way")
    (problem,) = run(plan([tiny], place), place)
    assert problem.startswith("set/chat.json: ") and "start this command again" in problem
    assert (place.folder / "set/few/2.jpg").is_file()


def test_an_unpacked_folder_without_a_published_number_must_hold_something(tiny, place):
    unzip = dataclasses.replace(tiny.sources[1].unzip, count=None)
    tiny = dataclasses.replace(tiny, sources=(dataclasses.replace(tiny.sources[1], unzip=unzip),))
    assert run(plan([tiny], place), place) == []
    shutil.rmtree(place.folder / "set/train")
    (problem,) = run(plan([tiny], place), place)
    assert "set/train: is empty, or not there; remove " in problem


def test_the_hub_out_of_reach(tiny, place, monkeypatch):
    gone = dataclasses.replace(place, endpoint="http://127.0.0.1:9")
    problems = run(plan([tiny], place), gone)
    assert "set/chat.json: the Hub is not reachable (" in problems[0]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in run(plan([tiny], place), place)[0]
    assert "set/few: its list" in problems[-1]  # the pictures one by one need it


def test_it_must_fit_before_it_starts(tiny, place, monkeypatch):
    large = dataclasses.replace(tiny.sources[1], size=10**15)
    steps = plan([dataclasses.replace(tiny, sources=(large,))], place)
    with pytest.raises(ValueError, match=r"data: about 2000000.0 GB are needed, .* GB are free there"):
        check_room(steps, place)
    assert not place.folder.exists()
    assert check_room(plan([tiny], place), place) == 400 + 2 * len(PICTURES)
    for name in ("set/.hub-chat.json/.cache/x.incomplete", "set/train/0.jpg", "set/few/0.jpg"):
        (place.folder / name).parent.mkdir(parents=True)
        (place.folder / name).write_bytes(b"x" * 30)
    assert check_room(plan([tiny], place), place) == 400 + 2 * len(PICTURES) - 90
    assert [step.state for step in plan([tiny], place)] == ["begun", "missing", "missing", "begun"]


def test_names_outside_the_folder_are_refused(tiny, place, files):
    files.repos["owner/name"]["main"]["q.jsonl"] = jsonl([{"image": "../1.jpg"}] * 3)
    problems = run(plan([tiny], place), place)
    assert any("q.jsonl: line 1: 'image' must be a bare file name, got '../1.jpg'" in problem for problem in problems)


def test_the_registry_is_whole():
    places = [(source.place, source.url) for dataset in DATASETS.values() for source in dataset.sources]
    assert len({place for place, _ in places}) == len(set(places)), "one place for two files"
    for dataset in DATASETS.values():
        assert dataset.licence and dataset.about and dataset.sources and set(dataset.needs) <= set(DATASETS)
        for source in dataset.sources:
            assert source.size > 0 and not Path(source.place).is_absolute()
            assert source.url.startswith(("http://", "https://", "hub://"))
            assert not source.unzip or source.url.endswith(".zip")
            assert source.md5 is None or (source.exact and len(source.md5) == 32)
            assert not source.each or ("{image}" in source.url and source.each in {s.place for s in dataset.sources})
    names = [dataset.name for dataset in chosen(["llava-mix-665k", "gqa"])]
    assert names == ["llava-mix-665k", "coco-train2017", "gqa", "ocr-vqa", "textvqa", "visual-genome"]
    (alone,) = chosen(["llava-pretrain"], with_pictures=False)
    assert [source.place for source in alone.sources] == ["LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"]
    with pytest.raises(ValueError, match="gqa: has nothing but pictures"):
        chosen(["gqa"], with_pictures=False)
    with pytest.raises(ValueError, match="no data set 'coco'; there are llava-pretrain"):
        chosen(["coco"])


def test_the_program(files, tmp_path, repository, run_script, monkeypatch):
    """LLaVA-Bench (COCO) by its real name, from a mirror that has it in small."""
    questions = [{"question_id": i, "image": f"{i % 30:012d}.jpg", "text": "What?"} for i in range(90)]
    raw = "haotian-liu/LLaVA/main"
    for name, content in (
        ("playground/data/coco2014_val_qa_eval/qa90_questions.jsonl", jsonl(questions)),
        ("playground/data/coco2014_val_qa_eval/qa90_gpt4_answer.jsonl", jsonl(questions)),
        ("llava/eval/table/caps_boxes_coco2014_val_80.jsonl", jsonl(questions[:80])),
        ("llava/eval/table/rule.json", b"{}"),
    ):
        files.files[f"{raw}/{name}"] = content
    files.files.update({f"val2014/COCO_val2014_{i:012d}.jpg": b"picture" for i in range(30)})
    script, flags = repository / "scripts/download_data.py", ["llava-bench-coco", "--dir", tmp_path / "data"]
    flags += ["--mirror", f"https://raw.githubusercontent.com={files.endpoint}"]
    flags += ["--mirror", f"http://images.cocodataset.org={files.endpoint}"]
    monkeypatch.setenv("COLUMNS", "200")
    program = partial(run_script, script, *flags)
    refused = program()
    assert refused.returncode == 1 and "give --yes to download under these licences" in refused.stderr
    assert "llava-bench-coco: licence: Apache-2.0" in refused.stdout and "4.92 MB to download" in refused.stdout
    assert not (tmp_path / "data").exists()
    files.faults["val2014/COCO_val2014_000000000007.jpg"] = [404]
    short = program("--yes")
    assert short.returncode == 1 and "By hand: each picture that" in short.stderr and "Traceback" not in short.stderr
    assert short.stderr.splitlines()[-1].endswith("error: 1 of 5 files are missing or not as published (above)")
    done = program("--yes")
    assert done.returncode == 0 and "all 5 files are there" in done.stdout, done.stderr
    assert len(list((tmp_path / "data/llava_bench/coco/images").iterdir())) == 30


def test_flags_of_the_program(run_script, repository):
    script = repository / "scripts/download_data.py"
    assert "give NAMEs of data sets" in run_script(script).stderr
    assert "--mirror x: must be FROM=TO" in run_script(script, "gqa", "--mirror", "x").stderr
    assert "no data set 'cocoo'" in run_script(script, "cocoo").stderr
    listed = run_script(script, "--list")
    assert listed.returncode == 0 and all(name in listed.stdout for name in DATASETS)
