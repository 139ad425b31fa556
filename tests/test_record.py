from __future__ import annotations

import json
import shlex
import shutil

import pytest

from llava_drip.fingerprint import fingerprint
from llava_drip.record import described, text_hash


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]))
    return paths


def test_says_what_was_run_on_what(tiny_checkpoint, files):
    record = described(
        checkpoint=tiny_checkpoint,
        data={"questions": files[0], "images": files},
        prompts=["a", "b c"],
        compression=4.0,
        tokens_per_image=17.5,
        seconds=1.2345,
        packages=("not-a-package",),
        command=["eval/llava_bench.py", "--data", "two words"],
        judge="x",
    )
    assert json.loads(json.dumps(record)) == record
    assert shlex.split(record["command"]) == ["python", "eval/llava_bench.py", "--data", "two words"]
    assert record["checkpoint"] == {"path": str(tiny_checkpoint), "sha256": fingerprint(tiny_checkpoint)}
    assert record["data"]["questions"]["sha256"] == fingerprint(files[0]) and record["data"]["images"]["files"] == 3
    assert record["prompts"] == {"sha256": text_hash(["a", "b c"]), "count": 2}
    assert (record["compression"], record["tokens_per_image"], record["seconds"]) == (4.0, 17.5, 1.23)
    assert record["versions"]["torch"] and record["versions"]["not-a-package"] is None and record["judge"] == "x"


def test_hashes_follow_names_and_contents(files, tmp_path):
    def images(paths) -> str:
        return described(data={"images": paths})["data"]["images"]["sha256"]

    first = images(files)
    assert images(reversed(files)) == first
    moved = tmp_path / "moved"
    moved.mkdir()
    assert images([shutil.copy(path, moved) for path in files]) == first
    classes = [tmp_path / name / "x.jpg" for name in ("cat", "dog")]
    for content, path in enumerate(classes):
        path.parent.mkdir()
        path.write_bytes(bytes([content]))
    labelled = images(classes)
    classes[1].parent.rename(tmp_path / "fox")
    assert images([classes[0], tmp_path / "fox" / "x.jpg"]) != labelled  # the folder's name is the label
    files[1].write_bytes(b"other")
    assert images(files) != first
    assert text_hash(["ab", "c"]) != text_hash(["a", "bc"]) != text_hash(["bc", "a"])
