"""Result files of every evaluation program, made by the programs themselves on tiny checkpoints, for the tests of the report."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from bench_helpers import write_bench, write_rows
from judge_server import JudgeServer, serving
from PIL import Image
from safetensors.torch import save_file

EVAL = Path(__file__).parents[2] / "eval"
CLIP = "DRIP-mini-8-4x"
HOSTILE = '<script>alert(1)</script> & "a" | *b* [c](http://d.invalid/) `e` <img src=x onerror=alert(2)> \u202e\x07 #f'


def run_program(name: str, *arguments: object, code: int | None = 0) -> SimpleNamespace:
    """A program of eval/ in this process, as its own `python` would run it: what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"eval/{name}", *map(str, arguments)])
        patch.setenv("OPENAI_API_KEY", "none")
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EVAL / name), run_name="__main__")
    assert code is None or end.value.code == code, err.getvalue()
    return SimpleNamespace(code=end.value.code, out=out.getvalue(), err=err.getvalue())


def picture(path: Path, seed: int, size: tuple[int, int] = (80, 60)) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (6 + seed % 7, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)


def science_qa_data(folder: Path) -> Path:
    """12 problems, every second with a picture, in the published form; the first is hostile to pages."""
    problems = {}
    for number in range(1, 13):
        pictured = number % 2 == 1
        problems[str(number)] = {
            "question": HOSTILE if number == 1 else f"Which of these {number} things floats?",
            "choices": ["a stone", "a cork", "a feather"][: 2 + number % 2],
            "answer": number % 2,
            "hint": "",
            "image": "image.png" if pictured else None,
            "subject": ("natural science", "social science", "language science")[number % 3],
            "grade": f"grade{number}",
        }
        if pictured:
            picture(folder / "images" / "test" / str(number) / "image.png", number)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    return folder


def science_qa(folder: Path, model: Path, name: str, *flags: object) -> Path:
    common = ["--data", folder / "scienceqa", "--model", model, "--device", "cpu", "--batch_size", 6]
    out = folder / f"{name}.json"
    run_program("science_qa.py", *common, "--output", folder / f"{name}.jsonl", "--json", out, *flags)
    return out


def pope(folder: Path, model: Path, name: str, *flags: object) -> Path:
    questions = [folder / f"coco_pope_{split}.json" for split in ("random", "popular")]
    for file in questions:
        rows = [{"question_id": i, "image": f"{i % 3}.jpg", "text": f"Is {i} in it?"} for i in range(6)]
        write_rows(file, [{**row, "label": ("yes", "no")[row["question_id"] % 2]} for row in rows])
    common = ["--images", folder / "bench" / "coco" / "images", "--model", model, "--device", "cpu"]
    common += ["--max_new_tokens", 4, "--output", folder / name, "--json", folder / f"{name}.json"]
    run_program("pope.py", "--questions", *questions, *common, *flags)
    return folder / f"{name}.json"


def rouge(folder: Path, model: Path, name: str, *flags: object) -> Path:
    common = ["--bench", "coco", "--data", folder / "bench", "--model", model, "--device", "cpu", "--judge", "rules"]
    out = folder / f"{name}.json"
    common += ["--max_new_tokens", 6, "--output", folder / f"{name}.jsonl", "--json", out]
    run_program("llava_bench.py", *common, *flags)
    return out


def judged(folder: Path, name: str, better: int, *flags: object, judge: str = "judge") -> Path:
    """A real judge, over HTTP: the reference gets 8, an answer 4 and `better` more where its question's number is even."""
    answers = [{"question_id": 10 + i, "text": f"{name} says {i}."} for i in range(7)]
    path = write_rows(folder / f"{name}.jsonl", answers)

    def scores(question: str, first: str, second: str) -> tuple[float, float]:
        number = int(question.removeprefix("Question ").removesuffix("?"))
        own = 4.0 + (better if number % 2 == 0 else 0)
        return tuple(8.0 if text.startswith("Reference of") else own for text in (first, second))

    with serving(JudgeServer(scores)) as server:
        common = ["--answers", path, "--bench", "coco", "--data", folder / "bench", "--judge", judge]
        common += ["--judge-base-url", server.url, "--json", folder / f"{name}.json"]
        run_program("llava_bench.py", *common, *flags)
    return folder / f"{name}.json"


def clip_model(folder: Path) -> Path:
    torch.manual_seed(0)
    model = open_clip.create_model(CLIP)
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": open_clip.get_model_config(CLIP), "preprocess_cfg": model.visual.preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def zero_shot(folder: Path, clip: Path, name: str, *flags: object, classes: Path | None = None) -> Path:
    for label in range(5):
        picture(folder / "classes" / str(label) / "0.png", label)
        picture(folder / "classes" / str(label) / "1.png", label + 10)
    (folder / "names.txt").write_text("red\ngreen\nblue\nwhite\nblack\n")
    common = ["--checkpoint", clip, "--data", folder / "classes", "--device", "cpu"]
    common += ["--classes", classes or folder / "names.txt"]
    out = folder / f"{name}.json"
    run_program("zero_shot.py", *common, "--templates", "simple", "--workers", 0, "--json", out, *flags)
    return out


def retrieval(folder: Path, clip: Path, name: str) -> Path:
    shard = folder / "pairs.tar"
    with tarfile.open(shard, "w") as tar:
        for i in range(8):
            picture(folder / "pairs" / f"{i}.png", i)
            (folder / "pairs" / f"{i}.txt").write_text(f"picture {i}\nthe same, {i}")
            for ending in ("png", "txt"):
                tar.add(folder / "pairs" / f"{i}.{ending}", f"{i}.{ending}")
    flags = [
        "--checkpoint",
        clip,
        "--data",
        shard,
        "--device",
        "cpu",
        "--workers",
        0,
        "--json",
        folder / f"{name}.json",
    ]
    run_program("retrieval.py", *flags)
    return folder / f"{name}.json"


def everything(folder: Path, model: Path) -> SimpleNamespace:
    """A folder with two runs of each benchmark, but one of retrieval."""
    write_bench(folder / "bench")
    science_qa_data(folder / "scienceqa")
    clip = clip_model(folder / "clip")
    return SimpleNamespace(
        folder=folder,
        model=model,
        science_qa=[
            science_qa(folder, model, "sqa", "--max_new_tokens", 4),
            science_qa(folder, model, "sqa_16x", "--compression", 16, "--scoring", "likelihood"),
        ],
        pope=[pope(folder, model, "pope"), pope(folder, model, "pope_16x", "--compression", 16)],
        rouge=[rouge(folder, model, "rouge"), rouge(folder, model, "rouge_16x", "--compression", 16)],
        judged=[judged(folder, "plain", 0), judged(folder, "better", 3)],
        zero_shot=[zero_shot(folder, clip, "zero"), zero_shot(folder, clip, "zero_16x", "--compression", 16)],
        retrieval=[retrieval(folder, clip, "retrieval")],
    )
