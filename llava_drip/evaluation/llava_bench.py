"""LLaVA-Bench's own files (Liu et al., 2023): questions and images, reference answers, contexts, and the judge's prompts.

coco/          30 photos of COCO val2014, each with a question of "conv", "detail" and "complex"; contexts are captions and boxes
in_the_wild/   24 images, 60 questions; contexts are descriptions
rule.json      the judge's prompts by category, beside them or inside one of them
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llava_drip.jsonl import read_jsonl

CATEGORIES = ("conv", "detail", "complex")
# Published questions → published reference answers; the first questions that are there are asked.
PUBLISHED = {
    "coco": {
        "questions_30x3.jsonl": "answers_gpt4_30x3.jsonl",
        "qa90_questions.jsonl": "qa90_gpt4_answer.jsonl",
        "questions.jsonl": "answers_gpt4.jsonl",
    },
    "in_the_wild": {"questions.jsonl": "answers_gpt4.jsonl"},
}
CONTEXT = {"coco": "caps_boxes_coco2014_val_80.jsonl", "in_the_wild": "context.jsonl"}
RULES = "rule.json"


@dataclass(frozen=True)
class Places:
    """Where the benchmark's files lie. Those that a task does not need may be None.

    Attributes:
        questions, images: a file and a folder.
        references, context, rules: of judging.
    """

    questions: Path
    images: Path
    references: Path | None = None
    context: Path | None = None
    rules: Path | None = None


def find(bench: str, data: Path | None, judged: bool = False, scored: bool = False, **given: Path | None) -> Places:
    """The files of one half, by their published names below `data` or as `given`.

    bench: "coco" or "in_the_wild". data: the half's folder, or the one that holds both.
    judged: references, context and rules are needed; scored: references alone.
    given: questions, image_folder, references, context, rules: flags that name a file themselves.
    ValueError names the flag that would help.
    """
    if data is None and (given.get("questions") is None or given.get("image_folder") is None):
        raise ValueError("--data is missing (or give both --questions and --image_folder)")
    folder = data / bench if data is not None and (data / bench).is_dir() else data
    questions = given.get("questions") or _first(folder, tuple(PUBLISHED[bench]), "--questions")
    images = given.get("image_folder") or folder / "images"
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder of images (--image_folder)")
    beside = [questions.parent] if folder is None else [folder, questions.parent]

    def file(name: str, flag: str, *folders: Path) -> Path:
        path = given.get(flag)
        if path is None:
            path = next((place / name for place in folders if (place / name).is_file()), None)
        if path is None:
            raise ValueError(f"{folders[0]}: has no {name} (--data, or --{flag} FILE)")
        if not path.is_file():
            raise ValueError(f"{path}: no such file (--{flag})")
        return path

    answers = PUBLISHED[bench].get(questions.name, "answers_gpt4.jsonl")
    return Places(
        questions,
        images,
        file(answers, "references", *beside) if judged or scored else None,
        file(CONTEXT[bench], "context", *beside) if judged else None,
        file(RULES, "rules", *beside, *(place.parent for place in beside)) if judged else None,
    )


def _first(folder: Path, names: tuple[str, ...], flag: str) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"{folder}: has none of {', '.join(names)} (--data, or {flag} FILE)")
    return found


def read_questions(path: Path, image_folder: Path) -> list[dict]:
    """Questions with their images' paths ("path") and their places in the file ("place", from 0).

    ValueError names the line, the missing key, or the missing image.
    """
    questions = []
    for where, row in _rows(path, {"question_id": (int, str), "image": str, "text": str}):
        image = image_folder / row["image"]
        if not image.is_file():
            raise ValueError(f"{where}: {image}: no such image file (--image_folder)")
        questions.append({**row, "path": image, "place": len(questions)})
    if not questions:
        raise ValueError(f"{path}: holds no questions")
    return questions


def read_references(path: Path, questions: list[dict]) -> dict:
    """question_id → the reference answer's row. ValueError: one is missing, empty, or to another question."""
    found = {row["question_id"]: (where, row) for where, row in _rows(path, {"question_id": (int, str), "text": str})}
    for question in questions:
        if question["question_id"] not in found:
            raise ValueError(f"{path}: has no answer to question_id {question['question_id']!r} (--references)")
        where, row = found[question["question_id"]]
        for key, own in (("prompt", "text"), ("category", "category")):
            if key in row and own in question and row[key] != question[own]:
                raise ValueError(f"{where}: {key} is {row[key]!r}, of the question {question[own]!r} (--references)")
    return {question["question_id"]: found[question["question_id"]][1] for question in questions}


def read_contexts(path: Path, bench: str, questions: list[dict]) -> dict[str, str]:
    """Image → what the judge is told of it: for "coco" captions, then a box a line; for "in_the_wild" the description.

    ValueError names the line, or the image that has none.
    """
    contexts = {}
    for where, row in read_jsonl(path):
        try:
            if bench == "coco":
                boxes = [f"{instance['category']}: {instance['bbox']}" for instance in row["instances"]]
                contexts[row["image"]] = "\n".join(row["captions"]) + "\n\n" + "\n".join(boxes)
            else:
                caption = row["caption"]
                contexts[row["image"]] = caption if isinstance(caption, str) else "\n".join(caption)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: no context as of LLaVA-Bench {bench} ({error!r})") from error
    for question in questions:
        if question["image"] not in contexts:
            raise ValueError(f"{path}: has no context of image {question['image']!r} (--context)")
    return contexts


def read_rules(path: Path, bench: str, questions: list[dict]) -> dict[str, dict]:
    """Category → {"key", "role", "prompt"} of rule.json. ValueError names the question whose category has none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    prefix = "" if bench == "coco" else "llava_bench_"
    rules = {}
    for question in questions:
        category = question.get("category")
        key = f"{prefix}{category}"
        rule = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rule, dict) or not all(isinstance(rule.get(part), str) for part in ("role", "prompt")):
            raise ValueError(f"{path}: has no rule {key!r}, for question_id {question['question_id']!r} (--rules)")
        rules[category] = {"key": key, "role": rule["role"], "prompt": rule["prompt"]}
    return rules


def _rows(path: Path, needed: dict):
    """Rows with the keys of `needed`, not empty, each question_id once. ValueError names the line."""
    seen = {}
    for where, row in read_jsonl(path):
        for key, kinds in needed.items():
            if key not in row:
                raise ValueError(f"{where}: has no {key!r}")
            if not isinstance(row[key], kinds) or row[key] == "":
                raise ValueError(f"{where}: {key!r} is {row[key]!r}")
        if row["question_id"] in seen:
            raise ValueError(f"{where}: question_id {row['question_id']!r} again, first at {seen[row['question_id']]}")
        seen[row["question_id"]] = where
        yield where, row
