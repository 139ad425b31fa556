"""ScienceQA put to an assistant, a batch at a time, into a file that a stopped run goes on with."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from textwrap import shorten
from typing import BinaryIO

from tqdm import tqdm

from llava_drip.assistant.processing import IMAGE_TOKEN
from llava_drip.conversation import user_turn
from llava_drip.engine import Engine, RequestError
from llava_drip.evaluation.likelihood import answer_likelihoods
from llava_drip.evaluation.provenance import made, made_here, metadata_of, settings_of
from llava_drip.evaluation.resumable import cut, torn_tail
from llava_drip.evaluation.science_qa_files import read_rows
from llava_drip.instruct.scienceqa import ASK_FOR_LETTER, LETTERS, Problem, prompt, target
from llava_drip.jsonl import read_jsonl
from llava_drip.training.pictures import Picture

FORMATS = ("CQM-A", "QCM-A", "QCM-T", "QCM-LEA")
SCORINGS = ("generate", "likelihood")


@dataclass(frozen=True)
class Asking:
    """How problems are put.

    Attributes:
        format: of FORMATS.
        scoring: "generate": the model writes, greedily, and a letter is looked for in it; "likelihood": the choice whose letter
            is likeliest where the answer's letter stands, or in QCM-T whose text is, by the mean over its tokens.
        single_pred_prompt: LLaVA-1.5's sentence behind the question, which asks for the letter.
        blind: without the pictures.
        max_new_tokens: of what is written. None: 1024 for QCM-LEA, as LLaVA has it, 32 for a letter; 0 where nothing is written.
    """

    format: str = "CQM-A"
    scoring: str = "generate"
    single_pred_prompt: bool = False
    blind: bool = False
    max_new_tokens: int | None = None

    def __post_init__(self):
        writes = self.scoring == "generate"
        if writes and self.format == "QCM-T":
            raise ValueError("--format QCM-T: answers have no letter to be read; give --scoring likelihood")
        if not writes and self.format == "QCM-LEA":
            raise ValueError(
                "--scoring likelihood: a QCM-LEA answer has its reasons before the letter; give QCM-A or CQM-A"
            )
        if not writes and self.max_new_tokens is not None:
            raise ValueError(f"--max_new_tokens {self.max_new_tokens}: with --scoring likelihood nothing is written")
        if self.max_new_tokens is None:
            usual = 1024 if self.format == "QCM-LEA" else 32
            object.__setattr__(self, "max_new_tokens", usual if writes else 0)

    def prompt(self, problem: Problem) -> str:
        """What LLaVA writes as "prompt" beside an answer: the question, <image> where a picture goes with it."""
        text = prompt(problem, self.format, image=not self.blind)
        return f"{text}\n{ASK_FOR_LETTER}" if self.single_pred_prompt else text

    def answers(self, problem: Problem) -> list[str]:
        """The answers to choose from by likelihood."""
        return [target(replace(problem, answer=index), self.format) for index in range(len(problem.choices))]

    def sees(self, problem: Problem) -> bool:
        return problem.image is not None and not self.blind


def answered(path: Path, settings: Mapping, prompts: Mapping[str, str]) -> set[str]:
    """Ids of the problems that the file answers, after cutting off a last line that a killed run did not finish.

    settings: what all answers must have been made with. prompts: id → what is asked now.
    ValueError, with the file left as it is, if a line is no answer, or one to other questions or of another run.
    """
    torn = torn_tail(path, b'{"question_id"', "an answer")
    ids: set[str] = set()
    for where, row in read_jsonl(path, torn) if path.stat().st_size else ():
        metadata = row.get("metadata")
        theirs = metadata.get("settings") if isinstance(metadata, dict) else None
        if not isinstance(row.get("question_id"), str) or "text" not in row or not isinstance(theirs, dict):
            raise ValueError(f"{where}: not an answer (no question_id, text or settings); choose another --output")
        for key, value in settings.items():
            if theirs.get(key) != value:
                was, now = (shorten(str(text), 60) for text in (theirs.get(key), value))
                raise ValueError(f"{where}: {key} was {was}, is now {now}; choose another --output")
        name = row["question_id"]
        if name in prompts and row.get("prompt") != prompts[name]:
            raise ValueError(f"{where}: problem {name!r} was asked in other words; choose another --output")
        if name in ids:
            raise ValueError(f"{where}: problem {name!r} is answered a second time; choose another --output")
        ids.add(name)
    cut(path, torn)
    return ids


def batches(problems: Sequence[Problem], asking: Asking, size: int) -> Iterator[list[Problem]]:
    """Problems of like length together, so that little is padding. They do not depend on what is answered already: a resumed
    run puts the same batches."""
    ordered = sorted(problems, key=lambda problem: (asking.sees(problem), len(asking.prompt(problem))))
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


def ask(
    engine: Engine,
    problems: Sequence[Problem],
    pictures: Mapping[str, Picture],
    asking: Asking,
    file: BinaryIO,
    done: set[str],
    settings: Mapping,
    model_id: str,
    batch_size: int,
) -> None:
    """Appends a line for each problem that is not in `done`, a batch at a time. ValueError names one that cannot be answered.

    pictures: id → its picture, of all that `asking` shows.
    """
    here = {"batch_size": batch_size, **made_here(engine.device)}
    with tqdm(
        total=len(problems), initial=sum(p.id in done for p in problems), desc="science_qa", unit="problem"
    ) as bar:
        for batch in batches(problems, asking, batch_size):
            batch = [problem for problem in batch if problem.id not in done]
            if not batch:
                continue
            started = time.perf_counter()
            requests = []
            for problem in batch:
                shown = [pictures[problem.id].load()] if asking.sees(problem) else []
                text = asking.prompt(problem).replace(IMAGE_TOKEN, "").strip()
                requests.append(([user_turn(text, len(shown))], shown))
            try:
                if asking.scoring == "likelihood":
                    rows = _by_likelihood(engine, batch, requests, asking)
                else:
                    rows = _by_writing(engine, requests, asking)
            except RequestError as error:
                raise ValueError(f"problem {batch[error.number].id!r}: {error.reason}") from error
            seconds = (time.perf_counter() - started) / len(batch)
            lines = [
                {
                    "question_id": problem.id,
                    "prompt": asking.prompt(problem),
                    "text": row.pop("text"),
                    "answer_id": uuid.uuid4().hex,
                    "model_id": model_id,
                    "metadata": {"settings": dict(settings), **here, "seconds": round(seconds, 4), **row},
                }
                for problem, row in zip(batch, rows)
            ]
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            file.flush()
            bar.update(len(batch))


def _by_writing(engine: Engine, requests: Sequence, asking: Asking) -> list[dict]:
    rows = []
    for reply in engine.answer_batch(requests, max_new_tokens=asking.max_new_tokens):
        usage = {name: getattr(reply.usage, name) for name in ("visual_tokens", "new_tokens", "finish")}
        rows.append({"text": reply.text, **usage})
    return rows


def _by_likelihood(engine: Engine, batch: Sequence[Problem], requests: Sequence, asking: Asking) -> list[dict]:
    found = answer_likelihoods(
        engine, requests, [asking.answers(problem) for problem in batch], asking.format == "QCM-T"
    )
    rows = []
    for one in found:
        best = max(range(len(one.log_probabilities)), key=one.log_probabilities.__getitem__)
        log_probabilities = [round(value, 5) for value in one.log_probabilities]
        rows.append({"text": LETTERS[best], "visual_tokens": one.visual_tokens, "log_probabilities": log_probabilities})
    return rows


def described_answers(source: Path, problems: Sequence[Problem], model: Path | None = None) -> dict:
    """What a result's header says of a file of answers to these problems, see provenance.made; beside that "prompts", those that
    the problems were put in, and "asking", how (Asking's attributes). None, and () for prompts, where the file does not tell.

    model: the checkpoint's folder, where it was asked just now. ValueError: the answers are of different runs.
    """
    rows = read_rows(source)
    rows = {problem.id: rows[problem.id] for problem in problems if problem.id in rows}
    settings = settings_of(rows, source)
    blind = (settings or {}).get("blind")
    pictured = [problem.id for problem in problems if problem.image is not None and problem.id in rows]
    tokens = {} if blind else {name: metadata_of(rows[name]).get("visual_tokens") for name in pictured}
    found = made(rows, tokens, source, model)
    del found["answering"]
    prompts = [row.get("prompt") for row in rows.values()]
    told = all(isinstance(prompt, str) for prompt in prompts)
    asking = settings and {field.name: settings.get(field.name) for field in fields(Asking)}
    return {**found, "prompts": prompts if told else (), "asking": asking}
