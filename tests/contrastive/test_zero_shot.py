"""Zero-shot classification through open_clip's evaluator."""

from __future__ import annotations

import io
import json
import runpy
import sys
import tarfile

import open_clip
import pytest
import torch
from clip_helpers import COLOURS, MODEL, ROOT, run_program, write_tar
from PIL import Image

from llava_drip.contrastive.checkpoint import load_clip
from llava_drip.contrastive.zero_shot import classify, read_class_names
from llava_drip.fingerprint import fingerprint
from llava_drip.record import hashed

TEMPLATES = open_clip.SIMPLE_IMAGENET_TEMPLATES


@pytest.fixture(scope="module")
def clip(run):
    model, transform = load_clip(run, MODEL)
    return model, transform, open_clip.get_tokenizer(MODEL)


def labelled_pictures(data) -> list[tuple[Image.Image, int]]:
    pairs = []
    for shard in range(2):
        with tarfile.open(data / f"cls-{shard}.tar") as tar:
            files = {name: tar.extractfile(name).read() for name in tar.getnames()}
        keys = sorted({name.split(".")[0] for name in files})
        pairs += [(Image.open(io.BytesIO(files[f"{key}.jpg"])), int(files[f"{key}.cls"])) for key in keys]
    return pairs


def test_agrees_with_counting_by_hand_on_shards_and_folders(clip, data, tmp_path):
    model, transform, tokenizer = clip
    names, pairs = sorted(COLOURS), labelled_pictures(data)
    for i, (image, label) in enumerate(pairs):
        folder = tmp_path / "images" / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:02}.png")
    pixels, labels = torch.stack([transform(image) for image, _ in pairs]), torch.tensor([label for _, label in pairs])
    with torch.no_grad():
        classifier = open_clip.build_zero_shot_classifier(model, tokenizer, names, TEMPLATES)
        top1 = ((model.encode_image(pixels, normalize=True) @ classifier).argmax(1) == labels).float().mean()
        tokens = model.visual.trunk.forward_features(pixels).lengths.float().mean()
    for where in (str(data / "cls-{0..1}.tar"), str(tmp_path / "images")):
        result = classify(model, transform, tokenizer, where, names, templates=TEMPLATES, batch_size=8, workers=0)
        assert result["top1"] == pytest.approx(top1.item()) and result["top5"] == 1.0
        assert result["tokens_per_image"] == pytest.approx(tokens.item())
        assert (result["images"], result["classes"], result["patches_per_image"]) == (20, 5, 64)
        assert result["compression"] == pytest.approx(64 / tokens.item())
        low, high = (
            result["compression_p5"],
            result["compression_p95"],
        )  # of pictures; the other is that of the mean count
        assert 0.9 * low <= result["compression"] <= 1.1 * high
        assert result["skipped"]["counts"] == {}


def test_corrupt_pictures_are_counted_and_change_nothing(clip, data, tmp_path):
    expected = classify(*clip, str(data / "cls-0.tar"), sorted(COLOURS), templates=TEMPLATES, workers=0)
    with tarfile.open(data / "cls-0.tar") as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames()}
    cut = {"cut.jpg": files["0000.jpg"][:300], "cut.cls": b"1", "junk.jpg": b"junk", "junk.cls": b"0"}
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "a.tar", cut | files)
    names = sorted(COLOURS)
    for name, content in (cut | files).items():
        key, _, ending = name.partition(".")
        if ending == "jpg":
            label = int((cut | files)[f"{key}.cls"])
            (tmp_path / "images" / names[label]).mkdir(parents=True, exist_ok=True)
            (tmp_path / "images" / names[label] / name).write_bytes(content)
    for where, workers in (("shards", 0), ("shards", 1), ("images", 0)):
        result = classify(
            *clip, str(tmp_path / where), names, templates=TEMPLATES, workers=workers, batch_size=2
        )  # the first batch of the shard has nothing
        assert result.pop("skipped")["counts"] == {"corrupt picture": 2}, where
        assert result == pytest.approx({name: expected[name] for name in result})


def test_parquet_and_mode_and_randomness(clip, data, tmp_path):
    from pyarrow import Table, parquet

    model, transform, tokenizer = clip
    pairs = labelled_pictures(data)
    encoded = []
    for image, _ in pairs:
        image.save(buffer := io.BytesIO(), "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    table = Table.from_pydict({"image": encoded, "label": [label for _, label in pairs]})
    parquet.write_table(table, tmp_path / "val.parquet", row_group_size=8)
    expected = classify(*clip, str(data / "cls-{0..1}.tar"), sorted(COLOURS), templates=TEMPLATES, workers=0)
    model.train()
    model.text.eval()  # locked
    torch.manual_seed(1)
    before = torch.get_rng_state()
    result = classify(model, transform, tokenizer, str(tmp_path), sorted(COLOURS), templates=TEMPLATES, workers=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and model.visual.training and not model.text.training
    model.eval()
    assert result.pop("skipped") == expected.pop("skipped")
    assert result == pytest.approx(expected)


def test_program_writes_its_result(run, data, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(COLOURS))
    flags = [
        "--model",
        MODEL,
        "--checkpoint",
        str(run),
        "--data",
        str(data / "cls-{0..1}.tar"),
        "--templates",
        "simple",
    ]
    files = ["--classes", str(tmp_path / "names.txt"), "--json", str(tmp_path / "out.json"), "--device", "cpu"]
    result = run_program("eval/zero_shot.py", *flags, *files, "--compression", "8")
    assert result.returncode == 0, result.stderr[-3000:]
    written = json.loads((tmp_path / "out.json").read_text())
    assert f"top-1 {written['top1']:.4f}" in result.stdout
    assert written["tokens_per_image"] == 8 and "8.00 visual tokens per image of 64 patches" in result.stdout
    assert written["compression"] == written["compression_p5"] == written["compression_p95"] == 8
    assert {file.name for file in tmp_path.iterdir()} == {"names.txt", "out.json"}
    record = written["run"]
    assert record["command"].startswith("python eval/zero_shot.py") and record["versions"]["open_clip_torch"]
    assert record["checkpoint"] == {"path": written["checkpoint"], "sha256": fingerprint(written["checkpoint"])}
    assert record["data"]["data"] == hashed([data / "cls-0.tar", data / "cls-1.tar"])
    assert record["data"]["classes"]["sha256"] == fingerprint(tmp_path / "names.txt")
    assert record["seconds"] > 0 and record["machine"] and (record["compression"], record["tokens_per_image"]) == (8, 8)


def test_a_runs_folder_names_its_model(run, data, tmp_path, repository, monkeypatch):
    (tmp_path / "names.txt").write_text("\n".join(COLOURS))
    data_flags = ["--data", str(data / "cls-0.tar"), "--classes", str(tmp_path / "names.txt"), "--templates", "simple"]
    results = []
    for model_flags in ([], ["--model", MODEL]):
        out = tmp_path / f"{len(results)}.json"
        flags = ["--checkpoint", str(run), *model_flags, *data_flags, "--json", str(out), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["zero_shot.py", *flags])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(repository / "eval" / "zero_shot.py"), run_name="__main__")
        assert end.value.code == 0
        results.append(json.loads(out.read_text()))
    assert results[0].pop("run")["data"] == results[1].pop("run")["data"]
    assert results[0].pop("model") is None and results[1].pop("model") == MODEL
    assert results[0] == results[1]


def test_program_ends_in_one_line(data, tmp_path, run_script):
    (tmp_path / "names.txt").write_text("\n".join(COLOURS))
    flags = ["--model", MODEL, "--checkpoint", "none.pt", "--data", str(data), "--classes", str(tmp_path / "names.txt")]
    result = run_script(ROOT / "eval" / "zero_shot.py", *flags, "--json", str(tmp_path / "out.json"))
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1 and "none.pt: no such checkpoint" in result.stderr
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        "a\nb\nc\nd\ne\n",
        json.dumps(list("abcde")),
        json.dumps({str(i): name for i, name in enumerate("abcde")}),
        json.dumps([{"index": 4 - i, "class_name": name} for i, name in enumerate("edcba")]),
    ],
    ids=["lines", "list", "by index", "rows"],
)
def test_class_names(content, tmp_path):
    path = tmp_path / ("names.json" if content[0] in "[{" else "names.txt")
    path.write_text(content)
    assert read_class_names(path) == list("abcde")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("few.txt", "a\nb", "few.txt: 2 class names; top-5"),
        ("gap.json", '{"0": "a", "2": "b"}', "gap.json: .*indices are not 0 .. 1"),
        ("bad.json", "{", "bad.json: not a list of class names"),
        ("odd.json", "7", "odd.json: not a list of class names"),
        ("none.txt", None, "none.txt: no such file"),
    ],
)
def test_bad_class_names(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_class_names(tmp_path / name)


def test_bad_data_is_named(clip, data, tmp_path):
    with tarfile.open(data / "cls-0.tar") as tar:
        picture = tar.extractfile("0000.jpg").read()
    write_tar(tmp_path / "label.tar", {"1.jpg": picture, "1.cls": b"5"})
    write_tar(tmp_path / "word.tar", {"1.jpg": picture, "1.cls": b"red"})
    write_tar(tmp_path / "lacking.tar", {"1.jpg": picture})
    write_tar(tmp_path / "cut.tar", {"1.jpg": picture[:300], "1.cls": b"0"})
    write_tar(tmp_path / "other.tar", {"1.cls": b"0"})
    write_tar(tmp_path / "empty.tar", {})
    (tmp_path / "junk.tar").write_bytes(b"junk")
    (tmp_path / "folder" / "red").mkdir(parents=True)
    (tmp_path / "folder" / "red" / "1.jpg").write_bytes(picture)
    cases = {
        "label.tar": "label.tar: 1: the label is 5, there are 5",
        "word.tar": "word.tar: 1: the label b'red' is not a number",
        "lacking.tar": "lacking.tar: 1: lacks its label",
        "cut.tar": "cut.tar: holds no readable picture: 1 skipped .1 corrupt picture.; cut.tar: 1",
        "other.tar": "other.tar: 1: no picture among cls",
        "empty.tar": "empty.tar: holds no readable picture",
        "junk.tar": "junk.tar: .*(header|file could not be opened)",
        "none.tar": "no shard .*none.tar",
        "folder": "folder: 1 class folders, but 5 class names",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            classify(*clip, str(tmp_path / name), list(COLOURS), templates=TEMPLATES, workers=0)
