"""A small LLaVA-Bench in the published form, with judge's prompts and references of our own, and what its tests share."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PROGRAM = Path(__file__).parents[2] / "eval" / "llava_bench.py"
CATEGORIES = ("conv", "detail", "complex")


def write_bench(folder: Path) -> Path:
    """3 images, 7 questions, both halves."""
    rules = {}
    for category in CATEGORIES:
        for prefix, told in (("", "sentences and boxes"), ("llava_bench_", "sentences")):
            rules[prefix + category] = {"role": "Assistant", "prompt": f"Rate both ({category}, {told}), 1 to 10."}
    rows = [
        {"question_id": 10 + i, "image": f"{i % 3}.jpg", "text": f"Question {i}?", "category": CATEGORIES[i % 3]}
        for i in range(7)
    ]
    references = [{"question_id": row["question_id"], "text": f"Reference of {row['text']}"} for row in rows]
    boxes = [{"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}, {"category": "mat", "bbox": [0.0, 0.5, 1.0, 1.0]}]
    captions = [{"image": f"{i}.jpg", "captions": [f"Cat {i}.", "On a mat."], "instances": boxes} for i in range(3)]
    written = {
        "coco/questions_30x3.jsonl": rows,
        "coco/answers_gpt4_30x3.jsonl": references,
        "coco/caps_boxes_coco2014_val_80.jsonl": captions,
        "in_the_wild/questions.jsonl": rows,
        "in_the_wild/answers_gpt4.jsonl": references,
        "in_the_wild/context.jsonl": [{"image": f"{i}.jpg", "caption": f"Cat {i} on a mat."} for i in range(3)],
    }
    for half in ("coco", "in_the_wild"):
        images = folder / half / "images"
        images.mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (2 + 6 * i, 2 + 6 * i, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((80, 60), Image.Resampling.NEAREST).save(images / f"{i}.jpg")
    for name, content in written.items():
        write_rows(folder / name, content)
    (folder / "rule.json").write_text(json.dumps(rules))
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def flags(values: dict) -> list[str]:
    """--key=value of each, a bare --key of True, nothing of None."""
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in values.items() if value is not None]


def assert_one_line_error(result: subprocess.CompletedProcess, *words: str) -> None:
    errors = [line for line in result.stderr.splitlines() if line.startswith("llava_bench: error:")]
    assert result.returncode not in (0, None) and len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0], errors[0]


def judge_scores(question: str, first: str, second: str) -> tuple[float, float]:
    """Reference answers get 8, others 1 to 7 by the question's number, and whoever stands first half a point more."""
    own = 1 + int(question.removeprefix("Question ").removesuffix("?"))
    marks = [8.0 if text.startswith("Reference of") else float(own) for text in (first, second)]
    return marks[0] + 0.5, marks[1]


def check_right(summary: dict, n: int = 7) -> None:
    """What judge_scores come to, reference first: 8.5 for each reference, 1 .. 7 for the answers."""
    group = summary["all"]
    assert (group["n"], group["model"], group["reference"]) == (n, 4.0, 8.5)
    assert group["relative"] == pytest.approx(100 * 4 / 8.5)
    assert summary["conv"]["model"] == pytest.approx((1 + 4 + 7) / 3) and summary["conv"]["n"] == 3
    assert summary["detail"]["model"] == pytest.approx((2 + 5) / 2)
    assert summary["complex"]["relative"] == pytest.approx(100 * (3 + 6) / 2 / 8.5)
