"""Pictures that cannot be read are counted and done without; evaluation counts every other one exactly once."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from llava_drip.classification import data as loaders
from llava_drip.classification.sources import open_source
from llava_drip.training.skips import Skips

from .helpers import MODEL, SHORT, fresh, program, rows, run, samples, write_parquet, write_tar
from .test_flags import parsed


@pytest.fixture(scope="module")
def bad(data, tmp_path_factory) -> Path:
    """Two shards: a corrupt JPEG, a sample without label, one whose label is a word; the second is cut short."""
    folder = tmp_path_factory.mktemp("bad")
    good = samples(40)
    first = [*good[:10], (b"\xff\xd8 no picture", 1), (good[0][0], None), (good[0][0], "tench"), *good[10:20]]
    write_tar(folder / "0.tar", first)
    write_tar(folder / "1.tar", good[20:], first=100)
    content = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(content[: len(content) // 2])
    return folder


def shard_flags(folder: Path, data: Path, output: Path, *more: str) -> list[str]:
    flags = [f"--train-data={folder}", f"--classes={data}/shards/names.txt", "--train-num-samples=32", *SHORT]
    return [f"--model={MODEL}", *flags, "--batch-size=8", "--epochs=1", f"--output={output}", *more]


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_shards_are_trained_on_and_counted(workers, bad, data, tmp_path, caplog):
    caplog.set_level("INFO", "llava_drip.train")
    run(*shard_flags(bad, data, tmp_path, f"--val-data={bad}", f"--workers={workers}"))
    row = rows(tmp_path, "epochs")[0]
    assert {"corrupt picture", "missing label", "unreadable label", "unreadable shard"} == set(row["skipped"]["counts"])
    once = {"corrupt picture": 1, "missing label": 1, "unreadable label": 1, "unreadable shard": 1}
    assert row["val_skipped"]["counts"] == once
    assert 20 < row["val_images"] < 40
    line = next(record.message for record in caplog.records if record.message.startswith("epoch 1/1"))
    assert "skipped (" in line and "corrupt picture" in line and "1.tar" in line and "of --val-data 4 skipped" in line


def test_bad_pictures_of_a_folder(data, tmp_path):
    pictures = shutil.copytree(data / "train", tmp_path / "train")
    for path in sorted(pictures.rglob("*.jpg"))[::12]:
        path.write_bytes(path.read_bytes()[:200])
    flags = [f"--train-data={pictures}", f"--val-data={pictures}", *SHORT, "--batch-size=8", "--epochs=1"]
    row = rows(run(f"--model={MODEL}", *flags, f"--output={tmp_path}/out"), "epochs")[0]
    assert row["skipped"]["counts"] == row["val_skipped"]["counts"] == {"corrupt picture": 4}
    assert row["val_images"] == 44 and row["step"] == 6


def test_parquet(data, tmp_path):
    pictures = [*samples(30), (b"no picture", 3), (samples(1)[0][0], None)]
    path = write_parquet(tmp_path / "train.parquet", pictures)
    flags = [f"--train-data={path}", f"--val-data={path}", *SHORT, "--batch-size=8", "--epochs=1"]
    row = rows(run(f"--model={MODEL}", *flags, f"--output={tmp_path}/out"), "epochs")[0]
    assert row["val_skipped"]["counts"] == {"corrupt picture": 1, "missing label": 1}
    assert (row["val_images"], row["step"]) == (30, 4)


def test_nothing_but_bad_data(data, tmp_path):
    write_tar(tmp_path / "0.tar", [(b"no picture", 0)] * 8)
    with pytest.raises(
        ValueError, match=r"no usable sample in any shard: 8 skipped \(8 corrupt picture\); 0.tar: 0000"
    ):
        run(*shard_flags(tmp_path, data, tmp_path / "out"))
    with pytest.raises(ValueError, match="--val-data: no readable picture: 8 skipped"):
        run(*shard_flags(data / "shards", data, tmp_path / "out", f"--val-data={tmp_path}"))
    result = program("scripts/train_imagenet.py", *shard_flags(tmp_path, data, tmp_path / "other", "--workers=1"))
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("train_imagenet.py: error: no usable sample in any shard: 8 skipped")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("label", [6, -1])
def test_a_label_out_of_range_names_its_sample(label, data, tmp_path):
    write_tar(tmp_path / "0.tar", [*samples(8), (samples(1)[0][0], label)])
    with pytest.raises(ValueError, match=f"0.tar: 00008: label {label}, but there are 6 classes; see --classes"):
        run(*shard_flags(tmp_path, data, tmp_path / "out"))


def test_labels_that_are_no_whole_numbers_are_not_rounded(data, tmp_path):
    path = write_parquet(tmp_path / "train.parquet", [*samples(16), (samples(1)[0][0], 2.5)])
    output = tmp_path / "out"
    run(f"--model={MODEL}", f"--train-data={path}", f"--val-data={path}", *SHORT, "--epochs=1", "--batch-size=8",
        f"--output={output}")  # fmt: skip
    assert rows(output, "epochs")[0]["val_skipped"]["counts"] == {"unreadable label": 1}


def counted(source: str, classes: str, ranks: int, workers: int) -> tuple[Counter, Skips]:
    """Every picture that evaluation sees, by its mean colour and label, and what it skips, over all ranks."""
    fresh()
    args = parsed("--model=x", "--train-data=x", "--output=y", f"--workers={workers}", "--batch-size=4")
    opened = open_source("--val-data", source, classes=classes)
    config = {"input_size": (3, 64, 64), "mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bicubic", "crop_pct": 1}
    transform, seen, skips = loaders.evaluation_transform(config), Counter(), Skips()
    for rank in range(ranks):
        for batch in loaders.evaluation_loader(args, opened, transform, 6, rank, ranks, False):
            skips.merge(batch.skips)
            if batch.data is not None:
                pixels, labels = batch.data
                seen.update(zip(pixels.mean((1, 2, 3)).tolist(), labels.tolist(), strict=True))
    return seen, skips


@pytest.mark.parametrize("ranks, workers", [(1, 2), (2, 0), (2, 2)])
@pytest.mark.parametrize("kind", ["val", "val_shards", "train.parquet", "bad"])
def test_evaluation_counts_every_picture_once(kind, ranks, workers, data, bad):
    source = str(bad if kind == "bad" else data / kind)
    classes = f"{data}/shards/names.txt"
    alone, skipped = counted(source, classes, 1, 0)
    assert max(alone.values()) == 1
    assert len(alone) == {"val": 22, "val_shards": 22, "train.parquet": 48, "bad": len(alone)}[kind]
    again, skips = counted(source, classes, ranks, workers)
    assert again == alone and skips.counts == skipped.counts
