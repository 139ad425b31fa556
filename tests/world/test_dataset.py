import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_drip.world import dataset
from llava_drip.world.dataset import WorldPaths, build_world
from llava_drip.world.scenes import QUADRANTS, render, scene_at

TRAIN, TEST, QUESTIONS = 30, 12, 5


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> WorldPaths:
    return build_world(tmp_path_factory.mktemp("world") / "w", TRAIN, TEST, seed=4, questions_per_scene=QUESTIONS)


def digest(root: Path) -> dict[str, str]:
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_images_are_the_scenes(world):
    assert len(list(world.images.iterdir())) == TRAIN + TEST
    for split, number in (("train", TRAIN), ("test", TEST)):
        for index in range(number):
            written = np.asarray(Image.open(world.images / f"{split}_{index:06d}.png"))
            assert np.array_equal(written, render(scene_at(4, split, index))[0])


def test_caption_rows(world):
    rows = json.loads(world.caption_train.read_text())
    assert len({row["id"] for row in rows}) == len(rows) == TRAIN
    placed = set()
    for row in rows:
        human, gpt = row["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].count("<image>") == 1 and "<image>" not in gpt["value"]
        placed.add(human["value"].startswith("<image>\n"))
        assert (world.images / row["image"]).is_file()
    assert placed == {True, False}


def test_instruction_rows(world):
    rows = json.loads(world.instruct_train.read_text())
    assert len({row["id"] for row in rows}) == len(rows) == 2 * TRAIN
    for row in rows:
        turns = row["conversations"]
        detail = row["id"].endswith("_detail")
        number = 1 if detail else len(turns) // 2
        assert 4 <= number <= QUESTIONS or detail  # a scene with one shape has four questions
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * number
        assert [turn["value"].count("<image>") for turn in turns] == [1] + [0] * (2 * number - 1)
        assert (world.images / row["image"]).is_file()


def test_test_questions_and_answers_belong_together(world):
    asked, right = read_lines(world.test_questions), read_lines(world.test_answers)
    assert [row["question_id"] for row in asked] == list(range(TEST * QUESTIONS))
    assert all(set(row) == {"question_id", "image", "text", "category"} for row in asked)
    assert all(set(row) == {"question_id", "text", "category"} for row in right)
    for question, answer in zip(asked, right, strict=True):
        assert (question["question_id"], question["category"]) == (answer["question_id"], answer["category"])
        if question["category"] == "count":
            scene = scene_at(4, "test", int(re.search(r"\d+", question["image"])[0]))
            assert answer["text"] == ["one", "two", "three", "four"][len(scene.objects) - 1]


def test_shards_hold_image_and_text(world):
    found = {}
    for shard in world.clip_shards:
        with tarfile.open(shard) as tar:
            files = {entry.name: tar.extractfile(entry).read() for entry in tar}
        for name, data in files.items():
            if name.endswith(".txt"):
                found[name[:-4]] = data.decode()
                pixels = np.asarray(Image.open(io.BytesIO(files[name[:-4] + ".png"])))
                assert np.array_equal(pixels, render(scene_at(4, "pretrain", int(name[-10:-4])))[0])
    assert sorted(found) == [f"pretrain_{index:06d}" for index in range(TRAIN)]
    for name, text in found.items():
        things = scene_at(4, "pretrain", int(name[-6:])).objects
        told = {f"{t.quadrant} {t.size} {t.texture} {t.colour} {t.shape}" for t in things}
        assert set(text.split(", ")) == told
    sizes = json.loads((world.root / "clip" / "sizes.json").read_text())
    assert sizes == {shard.name: TRAIN for shard in world.clip_shards}


def test_shards_load_with_webdataset(world):
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset([str(p) for p in world.clip_shards], shardshuffle=False).decode("pil"))
    assert len(samples) == TRAIN
    assert samples[0]["png"].size == (64, 64) and samples[0]["txt"].split()[0] in QUADRANTS


def test_training_has_every_word_of_the_test(tmp_path):
    larger = build_world(tmp_path / "w", 300, 50)
    rows = json.loads(larger.caption_train.read_text()) + json.loads(larger.instruct_train.read_text())
    said = " ".join(turn["value"] for row in rows for turn in row["conversations"])
    words = set(re.findall(r"\w+", said.lower()))
    assert len(words) < 80
    for row in read_lines(larger.test_questions) + read_lines(larger.test_answers):
        assert set(re.findall(r"\w+", row["text"].lower())) <= words
    counts = json.loads(larger.manifest.read_text())["counts"]
    asked = sum(turn["from"] == "human" for row in rows[300:] for turn in row["conversations"])
    assert counts == {"train_questions": asked, "test_questions": len(read_lines(larger.test_questions))}


def test_same_parameters_same_bytes(world, tmp_path):
    again = build_world(tmp_path / "w", TRAIN, TEST, seed=4, questions_per_scene=QUESTIONS)
    assert digest(again.root) == digest(world.root)
    assert digest(build_world(tmp_path / "v", TRAIN, TEST, seed=5).root) != digest(world.root)


def test_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD_SIZE", 4)
    world = build_world(tmp_path / "w", 10, 1)
    assert [p.name for p in world.clip_shards] == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    assert list(json.loads((world.root / "clip" / "sizes.json").read_text()).values()) == [4, 4, 2]


def test_a_complete_world_is_reused_and_another_replaced(tmp_path, monkeypatch):
    root = tmp_path / "w"
    build_world(root, 3, 2)
    before = (root / "manifest.json").stat().st_mtime_ns
    time.sleep(0.01)
    build_world(root, 3, 2)
    assert (root / "manifest.json").stat().st_mtime_ns == before
    assert len(list(build_world(root, 5, 2).images.iterdir())) == 7
    (root / "caption_train.json").write_text("old")
    monkeypatch.setattr(dataset, "_code_version", lambda: "newer")
    build_world(root, 5, 2)  # was written by other code: written anew
    assert (root / "caption_train.json").read_text() != "old"
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


def test_foreign_folders_and_bad_numbers_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="mine exists and is not a rendered world"):
        build_world(tmp_path / "mine", 3, 2)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with pytest.raises(ValueError, match="num_test must be at least 1, got 0"):
        build_world(tmp_path / "w", 3, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]


def test_nothing_is_left_behind_when_writing_fails(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(dataset, "_write_test", fail)
    with pytest.raises(OSError, match="disk full"):
        build_world(tmp_path / "w", 3, 2)
    assert list(tmp_path.iterdir()) == []


BUILD = "import sys; from llava_drip.world.dataset import build_world; build_world(sys.argv[1], 20000, 2)"


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_what_a_killed_run_left_is_removed_and_what_a_live_one_needs_is_not(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", BUILD, tmp_path / "w"])
    try:
        while process.poll() is None and not list(tmp_path.glob(".w.partial-*/images")):
            time.sleep(0.02)
        at_work = leftovers(tmp_path)
        assert len(at_work) == 1
        build_world(tmp_path / "w", 3, 2)
        assert leftovers(tmp_path) == at_work and process.poll() is None
    finally:
        process.kill()
        process.wait()
    (tmp_path / ".w.partial-mine").mkdir()  # not a name that we give
    build_world(tmp_path / "w", 3, 2)
    assert leftovers(tmp_path) == [".w.partial-mine"]


def test_leftovers_stay_where_no_lock_tells_a_live_run(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    live = tmp_path / ".w.partial-0123abcd"
    live.mkdir()
    dataset.clear_leftovers(tmp_path / "w")
    assert live.is_dir()
    build_world(tmp_path / "w", 3, 2)
    assert leftovers(tmp_path) == [live.name]


@pytest.mark.parametrize("when", ["locked", "removed before the lock", "removed after it was opened"])
def test_another_process_may_clear_a_new_folder_before_it_is_locked(when, tmp_path, monkeypatch):
    taken, open_, flock = [], os.open, fcntl.flock

    def remove(moment: str) -> None:
        if when == moment and not taken:
            taken.extend(leftovers(tmp_path))
            shutil.rmtree(tmp_path / taken[0])

    def opens(path, *arguments, **options):
        if ".partial-" in str(path):
            remove("removed before the lock")
        return open_(path, *arguments, **options)

    def locks(handle, operation):
        remove("removed after it was opened")
        if not taken:
            taken.extend(leftovers(tmp_path))
            raise BlockingIOError
        flock(handle, operation)

    monkeypatch.setattr(os, "open", opens)
    monkeypatch.setattr(fcntl, "flock", locks)
    build_world(tmp_path / "w", 3, 2)
    assert len(taken) == 1 and [path.name for path in tmp_path.iterdir()] == ["w"]


@pytest.mark.parametrize("end", [lambda: os._exit(9), lambda: os.kill(os.getpid(), 2)], ids=["killed", "Ctrl-C"])
def test_a_run_that_ends_between_two_renames_loses_no_world(end, tmp_path, monkeypatch):
    root = tmp_path / "w"
    before = digest(build_world(root, 3, 2).root)
    rename = os.rename

    def one_rename(source, target):
        if ".partial-" in str(source):
            end()
            time.sleep(5)
        rename(source, target)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(os, "rename", one_rename)
        try:
            build_world(root, 4, 2)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    dataset.clear_leftovers(root)
    assert digest(root) == before and leftovers(tmp_path) == []
    assert len(list(build_world(root, 4, 2).images.iterdir())) == 6
