"""Files of ScienceQA answers that others wrote, or we: which choice each names.

{"results": {"4": 1, ...}, "outputs": {"4": "The answer is B.", ...}}  LLaVA's and ScienceQA's result files, or one of the two
{"question_id": "4", "text": "B", ...}                                 a line a problem: LLaVA's answers, and ours
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llava_drip.evaluation.science_qa import NO_LETTER, parse_letter
from llava_drip.instruct.scienceqa import Problem
from llava_drip.jsonl import read_jsonl


def read_predictions(
    path: str | Path, problems: Sequence[Problem], flag: str = "--predictions"
) -> tuple[dict[str, int], list[str]]:
    """The choices in a file of answers to `problems`.

    "results" are taken as they are; "outputs" and "text" are read by `parse_letter`. flag: what named the file.

    Returns:
        id → index of the choice or NO_LETTER; and what is worth a remark, a sentence each.
    Raises:
        ValueError: naming the file and the line or problem that cannot be used, or that none of the problems is in it.
    """
    path = Path(path).expanduser()
    choices = {problem.id: len(problem.choices) for problem in problems}
    content = _as_one_object(path, flag)
    if content is not None:
        chosen, said = _of_result_file(path, content, choices)
    else:
        chosen, said = _of_lines(path, choices), []
    others = len(chosen) - sum(name in choices for name in chosen)
    if others == len(chosen):
        raise ValueError(f"{path}: answers none of these problems; is it of another split? (--split)")
    if others:
        said.append(f"{others:,} answers in {path} are to problems that were not asked for")
    return {name: index for name, index in chosen.items() if name in choices}, said


def read_rows(path: Path) -> dict[str, dict]:
    """id → its line, of a file that read_predictions takes; of a result file's "outputs" {"text"} each."""
    content = _as_one_object(path, "--predictions")
    if content is not None:
        return {name: {"text": text} for name, text in (content.get("outputs") or {}).items()}
    return {str(row["question_id"]): row for _, row in read_jsonl(path)}


def _as_one_object(path: Path, flag: str) -> dict | None:
    """A result file's object; None where the file holds lines."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file ({flag})") from error
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None  # lines, or what read_jsonl will name
    if isinstance(content, dict) and not {"results", "outputs"} & set(content):
        if "question_id" in content:  # a single line
            return None
        raise ValueError(
            f'{path}: has neither "results" nor "outputs", and is no line of answers ("question_id", "text")'
        )
    if not isinstance(content, dict):
        raise ValueError(f'{path}: must hold {{"results": ...}}, {{"outputs": ...}} or a line for each answer')
    return content


def _of_result_file(path: Path, content: dict, choices: dict[str, int]) -> tuple[dict[str, int], list[str]]:
    parts = {}
    for key in ("results", "outputs"):
        parts[key] = content.get(key) or {}
        if not isinstance(parts[key], dict):
            raise ValueError(f"{path}: {key!r} must be an object of problem ids, got {type(parts[key]).__name__}")
    read = {}
    for name, text in parts["outputs"].items():
        if not isinstance(text, str):
            raise ValueError(f"{path}: outputs of problem {name!r} must be a text, got {text!r:.80}")
        read[name] = parse_letter(text, choices.get(name, 0))
    if not parts["results"]:
        return read, []
    chosen = {}
    for name, index in parts["results"].items():
        try:
            chosen[name] = int(index)
            usable = not isinstance(index, (bool, float)) and chosen[name] >= NO_LETTER
        except (TypeError, ValueError, OverflowError):
            usable = False
        if not usable:
            raise ValueError(f"{path}: results of problem {name!r} must be the number of a choice, got {index!r:.80}")
    differ = sum(read.get(name, chosen[name]) != chosen[name] for name in choices if name in chosen)
    said = []
    if differ:
        said.append(
            f'{path}: "results" and the letters in "outputs" differ in {differ:,} problems; "results" are scored '
            "(LLaVA's first version drew a choice where an answer had no letter)"
        )
    return chosen, said


def _of_lines(path: Path, choices: dict[str, int]) -> dict[str, int]:
    chosen: dict[str, int] = {}
    for where, row in read_jsonl(path):
        name, text = row.get("question_id"), row.get("text")
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise ValueError(f'{where}: has no "question_id"')
        if not isinstance(text, str):
            raise ValueError(f'{where}: has no "text"')
        if str(name) in chosen:
            raise ValueError(f"{where}: question_id {name!r} is answered a second time")
        chosen[str(name)] = parse_letter(text, choices.get(str(name), 0))
    if not chosen:
        raise ValueError(f"{path}: holds no answers")
    return chosen
