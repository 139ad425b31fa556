from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_captions.py"


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def convert(run_script):
    return partial(run_script, SCRIPT)


@pytest.fixture
def shards(tmp_path) -> Path:
    for shard in range(2):
        members = {}
        for i in range(3):
            key = f"p{shard}{i}"
            members[f"{key}.jpg"] = jpeg(shard * 3 + i)
            members[f"{key}.txt"] = f"  picture {key}\n of <image> noise ".encode()
        write_shard(tmp_path / f"train-{shard:05d}.tar", members)
    return tmp_path


def assert_one_line_error(result: subprocess.CompletedProcess, *words: str) -> None:
    errors = [line for line in result.stderr.splitlines() if line.startswith("convert_captions: error:")]
    assert result.returncode != 0 and len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in errors[0], errors[0]


def assert_nothing_left(folder: Path, output: str) -> None:
    assert [name for name in os.listdir(folder) if output in name] == []


def test_shards(shards, convert):
    result = convert("--input", shards / "train-{00000..00001}.tar", "--output", shards / "out")
    assert result.returncode == 0, result.stderr
    rows = json.loads((shards / "out" / "chat.json").read_text())
    assert [row["id"] for row in rows] == ["p00", "p01", "p02", "p10", "p11", "p12"]
    for seed, row in enumerate(rows):
        assert (shards / "out" / "images" / row["image"]).read_bytes() == jpeg(seed)  # the original bytes
        human, gpt = row["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].count("<image>") == 1 and "\n" in human["value"]
        assert gpt["value"] == f"picture {row['id']} of image noise"  # one line, and no marker of its own
    assert len({row["conversations"][0]["value"] for row in rows}) > 1
    assert_nothing_left(shards, "partial")


def test_limit_stops_across_shards(shards, convert):
    result = convert("--input", shards / "train-{00000..00001}.tar", "--output", shards / "out", "--limit", 4)
    assert result.returncode == 0, result.stderr
    assert len(json.loads((shards / "out" / "chat.json").read_text())) == 4
    assert len(os.listdir(shards / "out" / "images")) == 4


def test_folder_with_captions_jsonl(tmp_path, convert):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "in" / "b.jpeg").write_bytes(jpeg(1))
    rows = [{"image": "sub/a.jpg", "captions": ["first", "second"]}, {"image_id": "b", "comment": "the other"}]
    (tmp_path / "in" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    result = convert("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "out" / "chat.json").read_text())
    assert [(row["image"], row["conversations"][1]["value"]) for row in rows] == [
        ("sub/a.jpg", "first"),
        ("b.jpeg", "the other"),
    ]
    assert (tmp_path / "out" / "images" / "sub" / "a.jpg").read_bytes() == jpeg(0)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"good.jpg": jpeg(0), "good.txt": b"x", "cut.jpg": jpeg(1)[:-300], "cut.txt": b"x"}, ["'cut'", "truncated"]),
        ({"bare.jpg": jpeg(0)}, ["'bare'", ".txt"]),
        ({"words.txt": b"x"}, ["'words'", "no picture"]),
        ({"latin.jpg": jpeg(0), "latin.txt": b"caf\xe9"}, ["'latin'", "UTF-8"]),
        ({"mute.jpg": jpeg(0), "mute.txt": b" \n"}, ["'mute'", "empty"]),
        ({"../out.jpg": jpeg(0), "../out.txt": b"x"}, ["leads out of its folder"]),
    ],
)
def test_a_bad_sample_names_shard_and_sample_and_leaves_nothing(tmp_path, members, words, convert):
    write_shard(tmp_path / "bad-00000.tar", members)
    result = convert("--input", tmp_path / "bad-{00000..00000}.tar", "--output", tmp_path / "target")
    assert_one_line_error(result, "bad-00000.tar", *words)
    assert_nothing_left(tmp_path, "target")


def test_no_samples(tmp_path, convert):
    write_shard(tmp_path / "none.tar", {})
    assert_one_line_error(convert("--input", tmp_path / "none.tar", "--output", tmp_path / "target"), "no samples")
    assert_nothing_left(tmp_path, "target")


def test_truncated_shard(shards, convert):
    data = (shards / "train-00001.tar").read_bytes()
    (shards / "train-00001.tar").write_bytes(data[:2000])
    result = convert("--input", shards / "train-{00000..00001}.tar", "--output", shards / "target")
    assert_one_line_error(result, "train-00001.tar", "not a readable tar")
    assert_nothing_left(shards, "target")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["line 2", "not JSON"]),
        ('{"caption": "x"}', ["line 2", "names no picture"]),
        ('{"image": "a.jpg"}', ["line 2", "no caption"]),
        ('{"image": "none.jpg", "caption": "x"}', ["line 2", "none.jpg: no such image file"]),
        ('{"image": "../a.jpg", "caption": "x"}', ["line 2", "leads out of its folder"]),
        ('{"image": "a.jpg", "caption": "again"}', ["line 2", "same key", "line 1"]),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words, convert):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "captions.jsonl").write_text('{"image": "a.jpg", "caption": "x"}\n' + line + "\n")
    result = convert("--input", tmp_path, "--output", tmp_path / "target")
    assert_one_line_error(result, "captions.jsonl", *words)
    assert_nothing_left(tmp_path, "target")


def test_flags(shards, convert):
    pattern = shards / "train-{00000..00001}.tar"
    assert_one_line_error(convert("--input", pattern, "--output", shards / "o", "--limt", 3), "--limt")
    assert_one_line_error(convert("--input", pattern, "--output", shards / "o", "--limit", 0), "--limit 0")
    assert_one_line_error(convert("--input", shards / "none.tar", "--output", shards / "o"), "none.tar: no such shard")
    assert_one_line_error(convert("--input", shards / "none.tar", "--output", shards), "not an empty folder")


@pytest.mark.slow
def test_as_a_program(shards):
    command = [sys.executable, SCRIPT, "--input", shards / "train-00000.tar", "--output", shards / "out"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "3 pictures" in result.stdout and len(os.listdir(shards / "out" / "images")) == 3


def listing_rows(result: subprocess.CompletedProcess, output: Path) -> list[tuple]:
    assert result.returncode == 0, result.stderr
    rows = json.loads((output / "chat.json").read_text())
    return [(row["id"], row["image"], row["conversations"][1]["value"]) for row in rows]


@pytest.fixture
def pictures(tmp_path) -> Path:
    for i in range(2):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / f"{i:012d}.jpg").write_bytes(jpeg(i))
    return tmp_path / "pictures"


def test_coco_captions_stay_where_they_are(tmp_path, pictures, convert):
    images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(2)]
    said = [(1, "One."), (0, "Zero."), (1, "One again.")]
    notes = [{"image_id": image, "id": i, "caption": caption} for i, (image, caption) in enumerate(said)]
    listing = tmp_path / "captions_val2017.json"
    listing.write_text(json.dumps({"images": images, "annotations": notes}))
    call = ["--input", listing, "--images", pictures, "--output"]
    first = listing_rows(convert(*call, tmp_path / "a"), tmp_path / "a")
    assert first == [("000000000001", "000000000001.jpg", "One."), ("000000000000", "000000000000.jpg", "Zero.")]
    assert os.listdir(tmp_path / "a") == ["chat.json"]
    each = listing_rows(convert(*call, tmp_path / "b", "--captions", "all"), tmp_path / "b")
    assert [(key, caption) for key, _, caption in each] == [
        ("000000000001#0", "One."),
        ("000000000001#1", "One again."),
        ("000000000000#0", "Zero."),
    ]
    drawn = {
        listing_rows(
            convert(*call, tmp_path / f"c{seed}", "--captions", "random", "--seed", seed), tmp_path / f"c{seed}"
        )[0]
        for seed in range(8)
    }
    assert {caption for _, _, caption in drawn} == {"One.", "One again."}
    assert (tmp_path / "c0" / "chat.json").read_text() != (tmp_path / "c1" / "chat.json").read_text()
    again = convert(*call, tmp_path / "d", "--captions", "random", "--seed", 1)
    assert (
        again.returncode == 0
        and (tmp_path / "d" / "chat.json").read_text() == (tmp_path / "c1" / "chat.json").read_text()
    )


def test_flickr8k_as_published(tmp_path, pictures, convert):
    lines = [f"{i:012d}.jpg#{n}\tPicture {i}, caption {n} ." for i in range(2) for n in range(2)]
    (tmp_path / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    result = convert("--input", tmp_path / "Flickr8k.token.txt", "--images", pictures, "--output", tmp_path / "out")
    assert [caption for _, _, caption in listing_rows(result, tmp_path / "out")] == [
        "Picture 0, caption 0 .",
        "Picture 1, caption 0 .",
    ]
    (tmp_path / "Flickr8k.token.txt").write_text(f"{lines[0]}\nno caption\n")
    bad = convert("--input", tmp_path / "Flickr8k.token.txt", "--images", pictures, "--output", tmp_path / "o")
    assert_one_line_error(bad, "Flickr8k.token.txt: line 2: not NAME#NUMBER")


def test_a_listing_with_splits_over_shards(shards, convert):
    rows = [
        {"image_id": f"p{s}{i}", "split": "train" if i else "test", "captions": [f"{s}{i}"]}
        for s in range(2)
        for i in range(3)
    ]
    (shards / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    call = [
        "--input",
        shards / "captions.jsonl",
        "--images",
        shards / "train-{00000..00001}.tar",
        "--output",
        shards / "out",
    ]
    assert_one_line_error(convert(*call), "has the splits test, train; name one (--split)")
    assert_one_line_error(convert(*call, "--split", "dev"), "no picture of the split 'dev'; there are test, train")
    assert_nothing_left(shards, "out")
    made = listing_rows(convert(*call, "--split", "train"), shards / "out")
    assert [(key, caption) for key, _, caption in made] == [("p01", "01"), ("p02", "02"), ("p11", "11"), ("p12", "12")]
    assert (shards / "out" / "images" / "p12.jpg").read_bytes() == jpeg(5)
    write_shard(shards / "bare.tar", {"p01.txt": b"x", "p02.jpg": jpeg(0)})
    bare = convert(*call[:3], shards / "bare.tar", "--output", shards / "o", "--split", "train")
    assert_one_line_error(bare, "captions.jsonl: line 2: no picture p01 in ")
    lost = convert(*call[:3], shards / "train-00000.tar", "--output", shards / "o", "--split", "train")
    assert_one_line_error(lost, "captions.jsonl: line 5: no picture p11 in ")
    assert_one_line_error(
        convert("--input", shards / "train-00000.tar", "--images", shards, "--output", shards / "o"), "--images"
    )
