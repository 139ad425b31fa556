"""Image-text pairs as the trainer reads them: captions, what is left out and counted, tables, parquet, weights, validation."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_helpers import COLOURS, MODEL, SHORT, picture, write_tar
from open_clip import get_tokenizer
from torchvision.transforms.functional import pil_to_tensor, resize

from llava_drip.contrastive import pairs
from llava_drip.contrastive.arguments import parse
from llava_drip.contrastive.train import TrainingError, train
from llava_drip.training.skips import BadSample

TOKENIZER = get_tokenizer(MODEL)


def transform(image):
    return pil_to_tensor(resize(image, [16, 16]))


def arguments(**changes) -> Namespace:
    """What the readers look at, as the parser calls it."""
    args = parse([f"--model={MODEL}", "--batch-size=4", "--workers=0", "--device=cpu"])
    return Namespace(**vars(args) | {"world_size": 1, "rank": 0} | changes)


def loader_of(train: bool = True, kind: str = "webdataset", **changes):
    args = arguments(**changes)
    return pairs.dataset_of(args.train_data or args.val_data, kind)(args, transform, train, tokenizer=TOKENIZER)


def captions_of(loader) -> list[str]:
    """Decoded captions of all its batches."""
    texts = [text for _, batch in loader for text in batch]
    return [
        TOKENIZER.decode(text.tolist()).split("<start_of_text>")[1].split("<end_of_text>")[0].strip() for text in texts
    ]


def shard(path: Path, captions: list, key: str | None = None) -> str:
    """A tar of pictures with captions, in .txt or under a key of .json; None: a picture alone."""
    rng, files = np.random.default_rng(0), {}
    for i, caption in enumerate(captions):
        files[f"{i:03}.jpg"] = picture(rng, "red")
        if caption is not None:
            name = f"{i:03}.{'txt' if key is None else 'json'}"
            files[name] = caption if isinstance(caption, bytes) else json.dumps({key: caption}).encode()
    write_tar(path, files)
    return str(path)


@pytest.mark.parametrize(
    "sample, key, found",
    [
        ({"txt": b"a dog"}, None, "a dog"),
        ({"txt": "ein Hündchen".encode()}, None, "ein Hündchen"),
        ({"json": b'{"caption": "a dog"}', "txt": b"not me"}, "caption", "a dog"),
        ({"json": b'{"captions": ["a dog", " "]}'}, "captions", "a dog"),
        ({"sentence": "a dog"}, "sentence", "a dog"),  # a parquet column
        ({"sentence": ["", "a dog"]}, "sentence", "a dog"),
        ({}, None, "missing caption"),
        ({"txt": b" \n"}, None, "missing caption"),
        ({"json": b'{"caption": null}'}, "caption", "missing caption"),
        ({"json": b'{"captions": []}'}, "captions", "missing caption"),
        ({"json": b"[1]"}, "caption", "missing caption"),
        ({"txt": b"\xff\xfe"}, None, "unreadable caption"),
        ({"json": b"{"}, "caption", "unreadable caption"),
        ({"json": b"\xff"}, "caption", "unreadable caption"),
        ({"json": b'{"caption": 3}'}, "caption", "unreadable caption"),
        ({"json": b'{"caption": ["a", 3]}'}, "caption", "unreadable caption"),
    ],
)
def test_captions(sample, key, found):
    sample = {"__key__": "a.tar: 7", **sample}
    if "caption" in found:
        with pytest.raises(BadSample, match="a.tar: 7: ") as error:
            pairs.caption_of(sample, key)
        assert error.value.cause == found
    else:
        assert pairs.caption_of(sample, key) == found


def test_one_of_several_captions_is_drawn_by_the_samples_own_randomness(tmp_path):
    texts = [f"caption {word}" for word in ("one", "two", "three", "four", "five")]
    data = shard(tmp_path / "a.tar", [texts] * 8, "captions")
    drawn = []
    for seed in (0, 0, 1):
        loader = loader_of(train_data=data, train_num_samples=8, caption_key="captions", seed=seed).dataloader
        random.seed(len(drawn))  # of no account
        epochs = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            epochs.append(captions_of(loader))
        drawn.append(epochs)
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1] and len({*drawn[0][0], *drawn[0][1]}) >= 4


def test_what_cannot_be_read_is_counted_by_cause(tmp_path, data):
    """A corrupt picture, one that is missing, captions that are missing or unreadable, and a tar cut short."""
    rng = np.random.default_rng(0)
    files = {f"{i:03}.{end}": b"" for i in range(10) for end in ("jpg", "txt")}
    for i in range(10):
        files[f"{i:03}.jpg"], files[f"{i:03}.txt"] = picture(rng, "red"), b"a red square"
    files["000.jpg"] = files["000.jpg"][:400]  # cut short
    files["001.jpg"] = b"no picture"
    files["002.txt"] = b""
    files["003.txt"] = b"\xff\xfe"
    del files["004.jpg"], files["005.txt"]
    write_tar(tmp_path / "train-0.tar", files)
    whole = (data / "train-0.tar").read_bytes()
    (tmp_path / "train-1.tar").write_bytes(whole[: len(whole) // 2])
    flags = [f"--model={MODEL}", f"--train-data={tmp_path}/train-{{0..1}}.tar", "--train-num-samples=16", *SHORT]
    run = train([*flags, "--batch-size=8", "--epochs=1", f"--logs={tmp_path}", "--name=run", "--workers=1"])
    (row,) = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
    counts = row["skipped"]["counts"]
    expected = {
        "corrupt picture": 2,
        "missing picture": 1,
        "missing caption": 2,
        "unreadable caption": 1,
        "unreadable shard": 1,
    }
    assert {cause: counts[cause] for cause in expected} == expected
    assert len(row["skipped"]["examples"]) == 5 and all("train-" in example for example in row["skipped"]["examples"])
    log = (run / "out.log").read_text()
    assert "7 skipped (" in log and "2 corrupt picture" in log and row["skipped"]["examples"][0] in log


def test_all_bad_is_an_error_that_says_why(tmp_path):
    files = {"000.jpg": picture(np.random.default_rng(0), "red")[:400], "000.txt": b"a red square"}
    write_tar(tmp_path / "a.tar", files)  # a corrupt picture is seen only when it is decoded
    flags = [f"--model={MODEL}", f"--train-data={tmp_path}/a.tar", "--train-num-samples=8", *SHORT, "--epochs=1"]
    for workers in (0, 1):
        with pytest.raises(TrainingError, match=r"no usable sample.*1 corrupt picture.*a.tar: 000") as error:
            train([*flags, f"--workers={workers}", f"--logs={tmp_path}/logs", "--name=run"])
        assert "\n" not in str(error.value)
    assert not (tmp_path / "logs" / "run").exists()


def test_parquet(tmp_path, data):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    rows = [{"image": {"bytes": picture(rng, c), "path": None}, "texts": [f"a {c} square", "x"]} for c in COLOURS] * 4
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=10)
    (tmp_path / "train-folder").mkdir()
    (tmp_path / "train.parquet").rename(tmp_path / "train-folder" / "0.parquet")
    for where in (tmp_path / "train-folder", tmp_path / "train-folder" / "0.parquet"):
        flags = [
            f"--model={MODEL}",
            f"--train-data={where}",
            "--caption-key=texts",
            *SHORT,
            "--workers=2",
            "--batch-size=5",
        ]
        run = train([*flags, "--epochs=1", f"--logs={tmp_path}", f"--name={where.name}"])
        assert json.loads((run / "run.json").read_text())["data"]["samples"] == 20  # from the file's own metadata
        assert len((run / "epochs.jsonl").read_text().splitlines()) == 1
    with pytest.raises(TrainingError, match="--train-data: .* no picture with a caption .*'text'.* see --caption-key"):
        train([*flags, "--caption-key=text", f"--logs={tmp_path}", "--name=bad"])


def test_tables_leave_out_what_is_missing(pictures, tmp_path):
    lines = pictures.read_text().splitlines()
    lines[1] = f"{tmp_path}/none.jpg\ta red square"
    lines[2] = lines[2].split("\t")[0] + "\t"
    lines[3] = lines[3].split("\t")[0] + "\tNA"  # a caption, not a missing value
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    info = loader_of(kind="csv", train_data=str(tmp_path / "pairs.csv"), batch_size=24, workers=1)
    info.set_epoch(0)
    captions = captions_of(info.dataloader)
    assert len(captions) == 24 and captions.count("na") == 3  # in place of the two before it too
    skips = info.dataloader.all_skips()
    assert skips.counts == {"missing picture": 1, "missing caption": 1}
    assert any("data row 1: no picture" in example for example in skips.examples)


def test_weights_of_parts(tmp_path):
    parts = [shard(tmp_path / f"{name}.tar", [f"a {name} square".encode()] * 8) for name in ("red", "blue")]
    info = loader_of(
        train_data="::".join(parts), train_num_samples=400, dataset_resampled=True, train_data_upsampling_factors="9::1"
    )
    info.set_epoch(0)
    captions = captions_of(info.dataloader)
    assert len(captions) == 400 and 0.8 < captions.count("a red square") / 400 < 0.98


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_sees_every_sample_once(workers, tmp_path, caplog):
    caplog.set_level("INFO")
    files = [f"caption {i}".encode() for i in range(7)] + [b""]
    data = [shard(tmp_path / f"{name}.tar", files) for name in "ab"]
    loader = loader_of(False, val_data="::".join(data), workers=workers).dataloader
    for _ in range(2):
        batches = list(loader)
        assert sorted(captions_of(batches)) == sorted(f"caption {i}" for i in range(7) for _ in "ab")
        assert all(len(images) <= 4 and images.dtype == torch.uint8 for images, _ in batches)
    assert caplog.messages.count(caplog.messages[0]) == 2 and "--val-data: 2 skipped (2 missing caption)" in caplog.text


def test_validation_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="--val-data: no usable sample: 2 skipped"):
        list(loader_of(False, val_data=shard(tmp_path / "a.tar", [b"", b" "])).dataloader)
