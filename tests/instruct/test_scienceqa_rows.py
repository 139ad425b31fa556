"""ScienceQA's problems as a conversation file, with their pictures from its own layouts."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from llava_drip.instruct.data import load_records
from llava_drip.instruct.scienceqa import load_problems
from llava_drip.instruct.scienceqa_rows import ScienceQAImages, convert

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_scienceqa.py"


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Problems 1 and 3 with a picture; the pictures as the zips unpack."""
    problems = {}
    for number, color in (("1", "red"), ("2", None), ("3", "blue")):
        problems[number] = {"question": "Which?", "choices": ["x", "y"], "answer": 1, "hint": "", "image": None}
        problems[number] |= {"lecture": "L.", "solution": "S."}
        if color:
            problems[number]["image"] = "image.png"
            path = tmp_path / "sqa" / "images" / "train" / number / "image.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(png(color))
    (tmp_path / "sqa" / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "sqa" / "pid_splits.json").write_text(json.dumps({"train": ["3", "2", "1"], "val": ["2"]}))
    return tmp_path / "sqa"


def write_tar(path: Path, names: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("pattern", ["{}.png", "{}/image.png", "train/{}/image.png", "train/{}.png"])
def test_pictures_are_found_in_every_layout(folder, tmp_path, pattern):
    problems = [problem for problem in load_problems(folder) if problem.image]
    members = {pattern.format(number): png(color) for number, color in (("1", "red"), ("3", "blue"))}
    for name, data in members.items():
        (tmp_path / "plain" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "plain" / name).write_bytes(data)
    for place in (tmp_path / "plain", write_tar(tmp_path / "images.tar", members)):
        images = ScienceQAImages(place)
        assert [images.find(problem).load().getpixel((0, 0)) for problem in problems] == [(255, 0, 0), (0, 0, 255)]


def test_rows_out_of_a_folder(folder, tmp_path):
    made = convert(folder, "train", "QCM-LEA", tmp_path / "out")
    assert (made.rows, made.pictures, made.image_folder) == (3, 2, folder / "images")
    rows = load_records(made.data_path, made.image_folder)  # as training reads it
    assert [(row["id"], row.get("image")) for row in rows] == [
        ("3", "train/3/image.png"), ("2", None), ("1", "train/1/image.png")
    ]  # fmt: skip
    assert rows[0]["conversations"][0]["value"].endswith("Options: (A) x (B) y\n<image>")
    assert rows[1]["conversations"][1] == {"from": "gpt", "value": "L. S. The answer is B."}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["llava_train_QCM-LEA.json"]


def test_rows_out_of_a_tar(folder, tmp_path):
    tar = write_tar(tmp_path / "images.tar", {"1.png": png("red"), "3.png": png("blue")})
    made = convert(folder, "train", "CQM-A", tmp_path / "out", str(tar))
    rows = load_records(made.data_path, made.image_folder)
    assert made.image_folder == tmp_path / "out" / "images"
    assert (made.image_folder / rows[0]["image"]).read_bytes() == png("blue")
    assert rows[0]["conversations"][0]["value"] == "<image>\nWhich?\nA. x\nB. y"


def test_pictures_are_found_beside_the_problems_and_shared_by_splits_and_formats(folder, tmp_path):
    """As evaluation finds them."""
    (folder / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="has none of images_train.tar, images.tar, images, train; say where"):
        convert(folder, "train", "QCM-LEA", tmp_path / "out")
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["3", "2"], "val": ["1", "3"]}))
    write_tar(folder / "images.tar", {"1.png": png("red"), "3.png": png("blue")})
    kept = tmp_path / "out" / "images" / "3" / "image.png"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(png("blue"))  # as a call that was stopped leaves it
    before = kept.stat().st_mtime_ns
    for split, format in (("train", "QCM-LEA"), ("train", "QCM-A"), ("val", "QCM-LEA")):
        made = convert(folder, split, format, tmp_path / "out")
        assert len(load_records(made.data_path, made.image_folder)) == 2
    assert kept.stat().st_mtime_ns == before
    kept.write_bytes(png("green"))
    with pytest.raises(ValueError, match="3/image.png: is there already, and is not that of .*images.tar; choose"):
        convert(folder, "val", "QCM-A", tmp_path / "out")
    assert not (tmp_path / "out" / "llava_val_QCM-A.json").exists()


def test_a_sample_of_a_tar_without_a_picture_is_not_found(folder, tmp_path):
    tar = write_tar(tmp_path / "images.tar", {"1.png": png("red"), "3.txt": b"x"})
    with pytest.raises(ValueError, match="problem '3': no picture 3/image.png or 3"):
        convert(folder, "train", "QCM-LEA", tmp_path / "out", str(tar))


def test_without_pictures(folder, tmp_path):
    made = convert(folder, "train", "QCM-A", tmp_path / "out", pictures=False)
    rows = load_records(made.data_path)
    assert made.image_folder is None and not any("image" in row for row in rows)
    assert "<image>" not in json.dumps(rows)


def test_the_program_and_its_mistakes(folder, tmp_path, run_script):
    call = ["--input", folder, "--output", tmp_path / "out"]
    done = run_script(SCRIPT, *call, "--split", "train", "--prompt_format", "QCM-LEPA")
    assert done.returncode == 0 and "3 rows, 2 with a picture: " in done.stdout, done.stderr
    assert (
        "there is a llava_train_QCM-LEPA.json in it already"
        in run_script(SCRIPT, *call, "--split", "train", "--prompt_format", "QCM-LEPA").stderr
    )
    assert "no split 'dev'; there are train, val" in run_script(SCRIPT, *call, "--split", "dev").stderr
    none = run_script(SCRIPT, *call, "--split", "train", "--images", tmp_path / "none")
    assert "none: no such folder or tar of pictures" in none.stderr
    tar = write_tar(tmp_path / "torn.tar", {"3.png": png("red")[:40], "1.png": png("red")})
    torn = run_script(SCRIPT, *call, "--split", "train", "--images", tar)
    assert torn.returncode == 1 and "torn.tar: problem '3': 3/image.png: " in torn.stderr
    (folder / "images" / "train" / "3" / "image.png").unlink()
    lost = run_script(SCRIPT, *call, "--split", "train")
    assert "problem '3': no picture 3/image.png or 3.* in " in lost.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["llava_train_QCM-LEPA.json"]  # nothing half done
