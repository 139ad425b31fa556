"""Files of answers in LLaVA-Bench's format, of POPE too: written batch by batch, gone on with, and read again to be judged.

    {"question_id", "prompt", "text", "answer_id", "model_id", "metadata", "image", "category", "visual_tokens"}

`metadata` has the settings that shape the answer, the batch size, device, machine, versions and date that it was made with (which
a run that goes on may change), patches, new tokens, why it ended, and seconds (a batch's, pictures read included, divided).
"""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from textwrap import shorten
from typing import BinaryIO

from tqdm import tqdm

from llava_drip.conversation import user_turn
from llava_drip.engine import Engine, RequestError
from llava_drip.evaluation.provenance import made_here
from llava_drip.evaluation.resumable import cut, torn_tail
from llava_drip.images import load_image
from llava_drip.jsonl import read_jsonl


def answered(path: Path, model_id: str, settings: dict, questions: list[dict]) -> set:
    """question_ids that the answer file holds, after cutting off a last line that a killed run did not finish.

    ValueError, with the file left as it is, if a line is no answer, or one to another question, of another checkpoint or
    with other settings.
    """
    torn = torn_tail(path, b'{"question_id"', "an answer")
    asked = {question["question_id"]: question for question in questions}
    ids = set()
    for where, row in read_jsonl(path, torn) if path.stat().st_size else ():
        metadata = row.get("metadata")
        recorded = metadata.get("settings") if isinstance(metadata, dict) else None
        if not isinstance(row.get("question_id"), (int, str)) or "text" not in row or not isinstance(recorded, dict):
            raise ValueError(f"{where}: not an answer (no question_id, text or settings); choose another --output")
        question = asked.get(row["question_id"])
        theirs = {"model_id": row.get("model_id"), **recorded}
        ours = {"model_id": model_id, "bench": settings["bench"]}
        if question is not None:
            theirs |= {"prompt": row.get("prompt"), "image": row.get("image")}
            ours |= {"prompt": question["text"], "image": question["image"]}
        for key, value in {**ours, **settings}.items():
            if theirs.get(key) != value:
                was, now = (shorten(str(text), 60) for text in (theirs.get(key), value))
                raise ValueError(f"{where}: {key} was {was}, is now {now}; choose another --output")
        ids.add(row["question_id"])
    cut(path, torn)
    return ids


def answer(
    engine: Engine,
    questions: list[dict],
    file: BinaryIO,
    model_id: str,
    settings: dict,
    *,
    batch_size: int,
    seed: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> None:
    """Appends one line for each question, a batch at a time. ValueError names a question that cannot be answered."""
    made = {"batch_size": batch_size, **made_here(engine.device)}
    with tqdm(total=len(questions), desc=settings["bench"], unit="answer") as bar:
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            started = time.perf_counter()
            requests = [([user_turn(question["text"])], [load_image(question["path"])]) for question in batch]
            # The seed follows the question: a run that goes on samples anew, not what its first batch sampled.
            batch_seed = seed + batch[0]["place"]
            try:
                replies = engine.answer_batch(requests, max_new_tokens, temperature, top_p, seed=batch_seed)
            except RequestError as error:
                raise ValueError(f"question_id {batch[error.number]['question_id']!r}: {error.reason}") from error
            seconds = (time.perf_counter() - started) / len(batch)
            lines = [
                {
                    "question_id": question["question_id"],
                    "prompt": question["text"],
                    "text": reply.text,
                    "answer_id": uuid.uuid4().hex,
                    "model_id": model_id,
                    "metadata": {
                        "settings": settings,
                        **made,
                        "patches": reply.usage.patches,
                        "new_tokens": reply.usage.new_tokens,
                        "finish": reply.usage.finish,
                        "seconds": round(seconds, 4),
                    },
                    "image": question["image"],
                    "category": question.get("category"),
                    "visual_tokens": reply.usage.visual_tokens,
                }
                for question, reply in zip(batch, replies)
            ]
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            file.flush()
            bar.update(len(batch))


def read_answers(path: Path, questions: list[dict]) -> dict:
    """question_id → row, for each question, of a file that this program or another one wrote (LLaVA's `model_vqa.py`).

    A row needs question_id and text, which may be empty: a model that says nothing is judged for that.
    ValueError names the line that is no answer or answers another question, and the first question without an answer.
    """
    rows = {}
    asked = {question["question_id"]: question for question in questions}
    for where, row in read_jsonl(path):
        key = row.get("question_id")
        if not isinstance(key, (int, str)) or not isinstance(row.get("text"), str):
            raise ValueError(f"{where}: not an answer (needs question_id and text)")
        if key in rows:
            raise ValueError(f"{where}: question_id {key!r} is answered twice")
        for name, own in (("prompt", "text"), ("image", "image")):
            theirs = row.get(name)
            # Other programs record the prompt with more around the question.
            if key in asked and theirs is not None and asked[key][own].strip() not in str(theirs):
                was, now = (shorten(str(text), 60) for text in (theirs, asked[key][own]))
                raise ValueError(f"{where}: {name} was {was}, of the question it is {now}")
        rows[key] = row
    missing = [key for key in asked if key not in rows]
    if missing:
        raise ValueError(f"{path}: {len(missing)} questions have no answer, such as question_id {missing[0]!r}")
    return {key: rows[key] for key in asked}
