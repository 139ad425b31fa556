"""The questions behind a result, one by one: read again from the files that it names, where these still are what they were."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_drip.evaluation import pope
from llava_drip.evaluation.answers import read_answers
from llava_drip.evaluation.overlap import rouge_l
from llava_drip.evaluation.provenance import metadata_of
from llava_drip.evaluation.relative import read_reviews
from llava_drip.evaluation.science_qa import AVERAGE
from llava_drip.evaluation.science_qa_files import read_predictions, read_rows
from llava_drip.instruct.scienceqa import LETTERS, Problem, categories, load_problems
from llava_drip.jsonl import read_jsonl
from llava_drip.record import hashed
from llava_drip.reports.evaluation.results import Line, Result

# Kind of a question's values → the figure of many: [..., questions, values] → [...].
STATISTICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "right": lambda values: 100 * values[..., 0].mean(-1),
    "relative": lambda values: 100 * values[..., 1].mean(-1) / values[..., 0].mean(-1),
    "rouge_l": lambda values: values[..., 0].mean(-1),
}
WHOLE = 1e-6  # by how much a figure of the questions may miss that of the result


@dataclass(frozen=True)
class Record:
    """One question.

    Attributes:
        key: its name, the same in every run.
        expected: the right answer, or the reference's.
        values: what the benchmark's statistic is of: 1.0 or 0.0 for right or wrong, in POPE for yes or no beside it; the
            reference's and the assistant's score; ROUGE-L. Empty: nobody has judged it.
        lines: those of the result that it counts in.
        image: the name of its picture, where one was shown.
        metadata: what the answers file says of it beside.
    """

    key: str
    question: str
    expected: str | None
    answer: str
    values: tuple[float, ...]
    lines: tuple[Line, ...]
    image: str | None
    metadata: Mapping
    visual_tokens: int | None


def read_records(result: Result) -> dict[str, Record]:
    """Key → record, in the order in which the questions were asked.

    Raises:
        ValueError: the result keeps no questions, a file is not where it was or another by now, or the questions do not
            give the figures of the result. The message names the file.
    """
    if not keeps_questions(result):
        raise ValueError(f"{result.benchmark.program} keeps no answer to a single question")
    records = {record.key: record for record in _READERS[result.benchmark.program](result)}
    _check(result, records.values())
    return records


def keeps_questions(result: Result) -> bool:
    """Whether the program that wrote it keeps an answer to each question at all."""
    return result.benchmark.program in _READERS


def _check(result: Result, records: Iterable[Record]) -> None:
    """ValueError where the records do not add up to the result."""
    values = defaultdict(list)
    for record in records:
        if record.values:
            for line in record.lines:
                values[line].append(record.values)
    statistic = STATISTICS.get(result.benchmark.kind)
    for line, own in values.items():
        if line not in result.lines:
            continue
        found, said = float(statistic(np.array(own))), result.lines[line].value
        if said is None or abs(found - said) > WHOLE:
            raise ValueError(
                f"the answers give {found:.4f} for {line.name} ({line.group}), where {result.path} says {said}: are they "
                "of another time? evaluate again"
            )


def place_of(result: Result, path: str | None, what: str) -> Path:
    """Where a file or folder that the result names lies: as written there, or beside the result. ValueError: nowhere."""
    if not path:
        raise ValueError(f"{result.path} does not say where its {what} lie; evaluate again")
    tried = [Path(path).expanduser(), result.path.parent / path, result.path.parent / Path(path).name]
    found = next((place for place in tried if place.exists()), None)
    if found is None:
        raise ValueError(f"its {what}, {path}, are not there")
    return found


def same_data(result: Result, name: str, paths: Path | list[Path]) -> None:
    """ValueError: the files are not those that the result has recorded under data."""
    recorded = (result.run.get("data") or {}).get(name) or {}
    if recorded.get("sha256") != hashed(paths)["sha256"]:
        place = paths if isinstance(paths, Path) else ", ".join(map(str, paths[:3]))
        raise ValueError(f"{name}: {place} is not what it was when {result.path} was written; evaluate again")


def _recorded(result: Result, name: str) -> Path:
    """The single file of the result's data of that name, unchanged."""
    path = place_of(result, ((result.run.get("data") or {}).get(name) or {}).get("path"), name)
    same_data(result, name, path)
    return path


def _files(result: Result, name: str):
    return (result.run.get("files") or {}).get(name)


def _kept(result: Result, name: str) -> Path:
    """The result's file of answers or reviews, unchanged as far as the result has recorded its hash."""
    path = place_of(result, _files(result, name), name)
    for recorded in (name, *(["predictions"] if name == "answers" else [])):  # as earlier results call them
        if recorded in (result.run.get("data") or {}):
            same_data(result, recorded, path)
    return path


def science_qa_problems(result: Result) -> list[Problem]:
    """All problems of the result's split. ValueError: problems.json is not there, or it or pid_splits.json another by now."""
    path = _recorded(result, "problems")
    if "pid_splits" in result.run["data"]:
        same_data(result, "pid_splits", path.with_name("pid_splits.json"))
    return load_problems(path, result.run.get("split"))


def _science_qa(result: Result) -> Iterable[Record]:
    problems = science_qa_problems(result)[: result.content[AVERAGE]["count"]]
    path = _kept(result, "answers")
    chosen, _ = read_predictions(path, problems)
    rows = read_rows(path)
    blind = (result.run.get("asking") or {}).get("blind", False)
    for problem in problems:
        row = rows.get(problem.id, {})
        text = row.get("text", "")
        if problem.id not in rows and problem.id in chosen:  # a file that has the choices alone
            text = LETTERS[chosen[problem.id]] if chosen[problem.id] >= 0 else "no choice"
        metadata = metadata_of(row)
        choices = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem.choices))
        yield Record(
            key=problem.id,
            question="\n".join([*filter(None, [problem.hint]), problem.question, *choices]),
            expected=f"{problem.letter}. {problem.choices[problem.answer]}",
            answer=text,
            values=(float(chosen.get(problem.id) == problem.answer),),
            lines=tuple(Line("accuracy, %", name) for name in (AVERAGE, *categories(problem))),
            image=None if blind else problem.image,
            metadata=metadata,
            visual_tokens=metadata.get("visual_tokens"),
        )


def pope_questions(result: Result) -> dict[str, list[dict]]:
    """Split → all its questions. ValueError: a file is not there, or another by now."""
    named = _files(result, "questions") or {}
    files = {split: place_of(result, named.get(split), "questions") for split in result.content["splits"]}
    same_data(result, "questions", list(files.values()))
    return {split: pope.read_questions(path) for split, path in files.items()}


def _pope(result: Result) -> Iterable[Record]:
    named = _files(result, "answers") or {}
    own = pope_questions(result)
    files = {split: place_of(result, named.get(split), "answers") for split in own}
    if "answers" in result.run["data"]:
        same_data(result, "answers", list(files.values()))
    for split, questions in own.items():
        asked = questions[: result.content["splits"][split]["n"]]
        answers = read_answers(files[split], asked)
        for question in asked:
            row = answers[question["question_id"]]
            said = pope.parse_answer(row["text"])
            yield Record(
                key=f"{split} {question['question_id']}",
                question=row.get("prompt") or question["text"],
                expected=question["label"],
                answer=row["text"],
                values=(float(said == question["label"]), float(said == "yes")),
                lines=(Line(f"{split}, %", "accuracy"),),
                image=question["image"],
                metadata=metadata_of(row),
                visual_tokens=row.get("visual_tokens"),
            )


def _llava_bench(result: Result) -> Iterable[Record]:
    questions = [row for _, row in read_jsonl(_recorded(result, "questions"))][: result.run["prompts"]["count"]]
    answers = read_answers(_kept(result, "answers"), questions)
    references, values = {}, {}
    if "references" in result.run["data"]:
        references = {row["question_id"]: row for _, row in read_jsonl(_recorded(result, "references"))}
    if result.benchmark.kind == "rouge_l":
        values = {key: found[:1] for key, found in rouge_l(questions, answers, references).items()}
    elif result.benchmark.kind == "relative":
        values = _judged(_kept(result, "reviews"))
    group = result.benchmark.headline.group if result.benchmark.headline else None
    for question in questions:
        key, category = question["question_id"], question.get("category")
        row = answers[key]
        own = tuple(values.get(key, ()))
        names = ["all", category] if category else ["all"]
        yield Record(
            key=str(key),
            question=question["text"],
            expected=(references.get(key) or {}).get("text"),
            answer=row["text"],
            values=own,
            lines=tuple(Line(group, name) for name in names) if own else (),
            image=question["image"],
            metadata=metadata_of(row),
            visual_tokens=row.get("visual_tokens"),
        )


def _judged(path: Path) -> dict:
    """question_id → mean (reference's, assistant's) score over the orders, of the questions that every order has scored."""
    reviews = read_reviews(path)
    orders, scores = {review.order for review in reviews}, defaultdict(list)
    for review in reviews:
        if review.scores is not None:
            scores[review.question].append(review.scores)
    return {key: tuple(np.mean(own, axis=0)) for key, own in scores.items() if len(own) == len(orders)}


_READERS = {"eval/science_qa.py": _science_qa, "eval/pope.py": _pope, "eval/llava_bench.py": _llava_bench}
