"""Pictures with captions, in every format that open_captions reads."""

from __future__ import annotations

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from clip_helpers import picture, write_tar
from PIL import Image

from llava_drip.contrastive.captions import open_captions
from llava_drip.images import ImageError
from llava_drip.training.skips import BadSample

NAMES = ("a", "b", "c")
CAPTIONS = {name: [f"{name} the {n}." for n in ("first", "second")] for name in NAMES}
JPEGS = {name: picture(np.random.default_rng(i), "red") for i, name in enumerate(NAMES)}


def pixels(name: str) -> bytes:
    return Image.open(io.BytesIO(JPEGS[name])).tobytes()


def assert_all(captions, names=NAMES) -> None:
    assert len(captions) == len(names)
    assert [list(own) for own in captions.captions] == [CAPTIONS[name] for name in names]
    again = pickle.loads(pickle.dumps(captions))  # data workers may be spawned
    assert [again.load(i).tobytes() for i in range(len(names))] == [pixels(name) for name in names]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures" / "val").mkdir(parents=True)
    for name in NAMES:
        (tmp_path / "pictures" / "val" / f"{name}.jpg").write_bytes(JPEGS[name])
    return tmp_path


def shard_files(name: str, **fields: bytes) -> dict[str, bytes]:
    return {f"{name}.jpg": JPEGS[name], **{f"{name}.{ending}": content for ending, content in fields.items()}}


SHARDS = {
    "a txt of one caption a line": lambda name: {"txt": "\n".join(CAPTIONS[name]).encode()},
    "a list wins over txt": lambda name: {"json": json.dumps({"captions": CAPTIONS[name]}).encode(), "txt": b"another"},
    "sentences": lambda name: {"json": json.dumps({"sentences": [{"raw": c} for c in CAPTIONS[name]]}).encode()},
    "a json list": lambda name: {"json": json.dumps(CAPTIONS[name]).encode()},
    "txt wins over caption": lambda name: {
        "json": json.dumps({"caption": "another", "width": 3}).encode(),
        "txt": "\n".join(CAPTIONS[name]).encode(),
    },
}


@pytest.mark.parametrize("kind", SHARDS)
def test_shards(kind, tmp_path):
    files = [shard_files(name, **SHARDS[kind](name)) for name in NAMES]
    write_tar(tmp_path / "test-0.tar", files[0] | files[1])
    write_tar(tmp_path / "test-1.tar", {"sub.dir/" + name: content for name, content in files[2].items()})
    assert_all(open_captions(str(tmp_path / "test-{0..1}.tar")))
    assert_all(open_captions(f"{tmp_path / 'test-0.tar'}::{tmp_path / 'test-1.tar'}"))
    assert_all(open_captions(str(tmp_path)))


@pytest.mark.parametrize("column", ["captions", "caption"])
def test_parquet(column, tmp_path):
    from pyarrow import Table, parquet

    rows = {"image": [{"bytes": JPEGS[name], "path": name} for name in NAMES]}
    rows[column] = [CAPTIONS[name] if column == "captions" else CAPTIONS[name][0] for name in NAMES]
    parquet.write_table(Table.from_pydict(rows), tmp_path / "test.parquet", row_group_size=2)
    captions = open_captions(str(tmp_path / "test.parquet"))
    assert captions.files() == {"pictures": [str(tmp_path / "test.parquet")]}
    if column == "captions":
        assert_all(captions)
    else:
        assert [list(own) for own in captions.captions] == [CAPTIONS[name][:1] for name in NAMES]
    assert captions.load(2).tobytes() == pixels("c") and captions.load(0).tobytes() == pixels("a")


def karpathy(with_folder: bool) -> dict:
    def image(name, split):
        row = {
            "filename": f"{name}.jpg",
            "split": split,
            "sentences": [{"raw": c, "tokens": []} for c in CAPTIONS[name]],
        }
        return row | ({"filepath": "val"} if with_folder else {})

    return {"dataset": "coco", "images": [image("a", "test"), image("b", "val"), image("c", "test")]}


@pytest.mark.parametrize("with_folder, images", [(True, "pictures"), (True, "pictures/val"), (False, "pictures/val")])
def test_karpathy(with_folder, images, folder):
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps(karpathy(with_folder)))
    assert_all(open_captions(str(path), images=str(folder / images)), ("a", "c"))
    assert_all(open_captions(str(path), images=str(folder / images), split="val"), ("b",))
    pictures = [str(folder / "pictures" / "val" / f"{name}.jpg") for name in ("a", "c")]
    assert open_captions(str(path), images=str(folder / images)).files() == {
        "captions": str(path),
        "pictures": pictures,
    }
    with pytest.raises(ValueError, match="dataset_coco.json: no picture of the split 'dev'; there are test, val"):
        open_captions(str(path), images=str(folder / images), split="dev")


def test_coco_and_lists_of_rows(folder):
    images = [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate(NAMES)]
    annotations = [{"image_id": i, "id": 9, "caption": c} for i, name in enumerate(NAMES) for c in CAPTIONS[name]]
    (folder / "captions_val2014.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    assert_all(open_captions(str(folder / "captions_val2014.json"), str(folder / "pictures" / "val")))
    rows = [{"image": f"val/{name}.jpg", "caption": CAPTIONS[name]} for name in NAMES]  # as BLIP's files
    (folder / "coco_test.json").write_text(json.dumps(rows))
    assert_all(open_captions(str(folder / "coco_test.json"), str(folder / "pictures")))


@pytest.mark.parametrize("images", ["folder", "shards"])
@pytest.mark.parametrize("split", [None, "test"])
def test_json_lines(images, split, folder):
    splits = {name: {"split": "train" if name == "b" and split else split} if split else {} for name in NAMES}
    rows = [{"image_id": name, "captions": CAPTIONS[name], **splits[name]} for name in NAMES]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_tar(folder / "test-0.tar", shard_files("c", txt=b"no") | shard_files("a", txt=b"no"))
    write_tar(folder / "test-1.tar", {f"deep/{name}": data for name, data in shard_files("b", txt=b"no").items()})
    where = {"folder": folder / "pictures" / "val", "shards": folder / "test-{0..1}.tar"}[images]
    expected = ("a", "c") if split else NAMES
    assert_all(open_captions(str(folder / "captions.jsonl"), str(where)), expected)


TABLES = {
    "openclip.csv": ("filepath\ttitle", "{path}\t{caption}"),
    "flickr8k.txt": ("image,caption", '{path},"{caption}"'),
    "flickr30k.csv": ("image_name| comment_number| comment", "{path}| 0| {caption}"),
    "pairs.tsv": ("caption\timage", "{caption}\t{path}"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables(kind, folder, monkeypatch):
    header, line = TABLES[kind]

    def write(prefix: str) -> str:
        pairs = [(name, i) for i in range(2) for name in NAMES]  # a picture's captions need not be neighbours
        lines = [line.format(path=f"{prefix}{name}.jpg", caption=CAPTIONS[name][i]) for name, i in pairs]
        (folder / kind).write_text("\n".join([header, *lines]))
        return str(folder / kind)

    assert_all(open_captions(write(f"{folder}/pictures/val/")))
    assert_all(open_captions(write("pictures/val/")))  # from the table's folder
    assert_all(open_captions(write("val/"), images=str(folder / "pictures")))
    monkeypatch.chdir(folder / "pictures")
    assert_all(open_captions(write("val/")))  # from the working directory, as open_clip


def test_single_bad_pictures_are_left_to_load(folder):
    rows = [{"image": f"{name}.jpg", "caption": "x"} for name in (*NAMES, "gone")]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "pictures" / "val" / "b.jpg").write_bytes(JPEGS["b"][:300])
    captions = open_captions(str(folder / "list.jsonl"), str(folder / "pictures" / "val"))
    with pytest.raises(BadSample, match="list.jsonl: line 4: no picture gone.jpg in .*val") as error:
        captions.load(3)
    assert error.value.cause == "missing picture"
    with pytest.raises(ImageError, match="b.jpg: broken header"):
        captions.load(1)
    write_tar(folder / "test.tar", {"k.txt": b"x", "m.jpg": JPEGS["a"][:300], "m.txt": b"y"})
    captions = open_captions(str(folder / "test.tar"))
    with pytest.raises(BadSample, match="test.tar: k has no picture"):
        captions.load(0)
    with pytest.raises(ImageError, match="test.tar: m.jpg: broken header"):
        captions.load(1)


MISTAKES = {
    "none.json: no such file": ("none.json", None, {}),
    "no shard .*none.tar": ("none.tar", None, {}),
    "split val: .* are shards": ("shards.tar", "a.jpg a.txt", {"split": "val"}),
    "images x: .* are shards": ("shards.tar", "a.jpg a.txt", {"images": "x"}),
    "shards.tar: a: no caption .*; there is nothing": ("shards.tar", "a.jpg", {}),
    "shards.tar: a: 'txt' holds no caption": ("shards.tar", "a.jpg a.txt=", {}),
    "shards.tar: holds no picture": ("shards.tar", "", {}),
    "junk.tar: not a readable": ("junk.tar", "junk", {}),
    "a.json: not JSON": ("a.json", "{", {}),
    "a.json: neither a list of rows": ("a.json", "{}", {}),
    "a.json: row 0: not a JSON object": ("a.json", "[3]", {}),
    "a.json: row 0: names no picture": ("a.json", '[{"caption": "x"}]', {}),
    "a.json: images 0: no caption .*; there is filename": ("a.json", '{"images": [{"filename": "x"}]}', {}),
    "a.json: not COCO's captions, .*7.* is missing": (
        "a.json",
        '{"images": [], "annotations": [{"image_id": 7, "caption": "x"}]}',
        {},
    ),
    "a.json: lists no picture": ("a.json", "[]", {}),
    "a.jsonl: line 2: 'captions' is neither": (
        "a.jsonl",
        '{"image": 1, "captions": "x"}\n{"image": 2, "captions": [3]}',
        {},
    ),
    "split dev: .*a.jsonl names no splits": ("a.jsonl", '{"image": "x", "caption": "x"}', {"split": "dev"}),
    "a.jsonl: line 1: no picture x in": ("a.jsonl", '{"image": "x", "caption": "x"}', {"images": "."}),
    "nowhere: no such folder of pictures": ("a.jsonl", '{"image": "x", "caption": "x"}', {"images": "nowhere"}),
    "a.csv: no column with the path": ("a.csv", "title,words\nx,y", {}),
    "a.csv: no column with the caption .* among image, words": ("a.csv", "image,words\nx,y", {}),
    "a.csv: line 2: 3 fields, the header has 2; put a caption that holds ',' in": (
        "a.csv",
        "image,title\nx,a dog, and a cat",
        {},
    ),  # fmt: skip
    "a.csv: line 3: no caption": ("a.csv", "image,title\nx,y\nz", {}),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message, tmp_path, monkeypatch):
    name, content, options = MISTAKES[message]
    monkeypatch.chdir(tmp_path)
    if name == "shards.tar":
        if content is not None:
            write_tar(tmp_path / name, {file.rstrip("="): b"" if "=" in file else b"x" for file in content.split()})
    elif content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        open_captions(name, **options)
    assert "\n" not in str(error.value)


def test_a_torn_shard_is_named(tmp_path):
    write_tar(tmp_path / "torn.tar", shard_files("a", txt=b"x") | shard_files("b", txt=b"y"))
    content = (tmp_path / "torn.tar").read_bytes()
    with tarfile.open(tmp_path / "torn.tar") as tar:
        cut = tar.getmember("b.jpg").offset_data + 100
    (tmp_path / "torn.tar").write_bytes(content[:cut])
    with pytest.raises(ValueError, match="torn.tar: not a readable uncompressed tar"):
        open_captions(str(tmp_path / "torn.tar"))
