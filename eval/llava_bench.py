"""python eval/llava_bench.py --model DIR --bench coco|in_the_wild --data DIR --judge none [--output FILE]

Answers LLaVA-Bench (Liu et al., 2023) and writes one line for each question in the benchmark's answer format:

    {"question_id", "prompt", "text", "answer_id", "model_id", "metadata", "image", "category", "visual_tokens"}

`--data` is the benchmark's folder, with coco/ and in_the_wild/ inside (or one of these itself), as published: a
questions file and images/. Other places: --questions, --image_folder. Run again after an interruption, it goes on
where it stopped: answers are appended batch by batch, and questions that have one are not asked again. A file of
answers holds those of one checkpoint to one file of questions with one set of settings; anything else is refused, and so
is a second program that would write to it at the same time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import BinaryIO

from tqdm import tqdm

from llava_drip import cli
from llava_drip.conversation import user_turn
from llava_drip.fingerprint import fingerprint
from llava_drip.images import load_image
from llava_drip.jsonl import read_jsonl

QUESTION_FILES = {  # the published names, best first: of qa90_questions.jsonl not all images can be had
    "coco": ("questions_30x3.jsonl", "qa90_questions.jsonl", "questions.jsonl"),
    "in_the_wild": ("questions.jsonl",),
}


def read_questions(path: Path, image_folder: Path) -> list[dict]:
    """Questions with their images' paths. ValueError names the line, the missing key, or the missing image."""
    questions, seen = [], {}
    for where, row in read_jsonl(path):
        for key, kinds in {"question_id": (int, str), "image": str, "text": str}.items():
            if key not in row:
                raise ValueError(f"{where}: has no {key!r}")
            if not isinstance(row[key], kinds) or row[key] == "":
                raise ValueError(f"{where}: {key!r} is {row[key]!r}")
        if row["question_id"] in seen:
            raise ValueError(f"{where}: question_id {row['question_id']!r} again, first at {seen[row['question_id']]}")
        seen[row["question_id"]] = where
        image = image_folder / row["image"]
        if not image.is_file():
            raise ValueError(f"{where}: {image}: no such image file (--image_folder)")
        questions.append({**row, "path": image})
    if not questions:
        raise ValueError(f"{path}: holds no questions")
    return questions


@contextlib.contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """The answer file, opened to append, with nobody else at it. Nothing is left of one in which nothing was written.

    ValueError: another process writes to it. Where the file system knows no locks, a warning, and no lock.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:  # removed, as below, after it was opened here
                raise BlockingIOError
        except BlockingIOError as error:
            raise ValueError(
                f"{path}: another process writes answers to it; wait, or choose another --output"
            ) from error
        except OSError as error:
            warning = f"{path}: cannot be locked ({error.strerror}); let no second program write to it"
            print(f"llava_bench: warning: {warning}", file=sys.stderr)
        try:
            yield file
        finally:
            if not os.fstat(file.fileno()).st_size:
                with contextlib.suppress(OSError):
                    path.unlink()
                    for folder in made:
                        folder.rmdir()


def answered(path: Path, model_id: str, settings: dict, questions: list[dict]) -> set:
    """question_ids that the answer file holds, after cutting off a last line that a killed run did not finish.

    ValueError, with the file left as it is, if a line is no answer, or one to another question, of another checkpoint or
    with other settings.
    """
    data = path.read_bytes()
    torn = data[data.rfind(b"\n") + 1 :]
    opening = b'{"question_id"'
    if not torn.startswith(opening[: len(torn)]):
        raise ValueError(f"{path}: its last line is not an answer's beginning; choose another --output")
    asked = {question["question_id"]: question for question in questions}
    ids = set()
    for where, row in read_jsonl(path, torn) if data else ():
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
    if torn:
        os.truncate(path, len(data) - len(torn))
    return ids


def find_data(args) -> tuple[Path, Path]:
    """The questions file and the image folder. ValueError names the flag that would help."""
    if args.data is None and (args.questions is None or args.image_folder is None):
        raise ValueError("--data is missing (or give both --questions and --image_folder)")
    folder = args.data
    if folder is not None and (folder / args.bench).is_dir():
        folder = folder / args.bench
    questions = args.questions
    if questions is None:
        names = QUESTION_FILES[args.bench]
        questions = next((folder / name for name in names if (folder / name).is_file()), None)
        if questions is None:
            raise ValueError(f"{folder}: has none of {', '.join(names)} (--data, or --questions FILE)")
    image_folder = args.image_folder or folder / "images"
    if not image_folder.is_dir():
        raise ValueError(f"{image_folder}: no such folder of images (--image_folder)")
    return questions, image_folder


def answer(engine, questions: list[dict], file: BinaryIO, model_id: str, settings: dict, args) -> None:
    """Appends one line for each question, a batch at a time. ValueError names a question that cannot be answered."""
    from llava_drip.engine import RequestError

    with tqdm(total=len(questions), desc=f"llava_bench {args.bench}", unit="answer") as bar:
        for start in range(0, len(questions), args.batch_size):
            batch = questions[start : start + args.batch_size]
            requests = [([user_turn(question["text"])], [load_image(question["path"])]) for question in batch]
            # The seed follows the question: a run that goes on samples anew, not what its first batch sampled.
            seed = args.seed + batch[0]["place"]
            try:
                replies = engine.answer_batch(requests, args.max_new_tokens, args.temperature, args.top_p, seed=seed)
            except RequestError as error:
                raise ValueError(f"question_id {batch[error.number]['question_id']!r}: {error.reason}") from error
            lines = [
                {
                    "question_id": question["question_id"],
                    "prompt": question["text"],
                    "text": reply.text,
                    "answer_id": uuid.uuid4().hex,
                    "model_id": model_id,
                    "metadata": {
                        "settings": settings,
                        "patches": reply.usage.patches,
                        "new_tokens": reply.usage.new_tokens,
                        "finish": reply.usage.finish,
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


def parse_args():
    parser = cli.ArgumentParser(prog="llava_bench", description="Answers LLaVA-Bench; see the top of this file.")
    parser.add_argument("--model", required=True, type=Path, help="folder of an assistant (config.json, *.safetensors)")
    parser.add_argument("--bench", required=True, choices=sorted(QUESTION_FILES))
    parser.add_argument("--data", type=Path, help="the benchmark's folder")
    parser.add_argument("--questions", type=Path, help="questions file, instead of the one in --data")
    parser.add_argument("--image_folder", type=Path, help="folder of images, instead of the one in --data")
    parser.add_argument("--judge", required=True, choices=["none"], help="none: answers only; no judge is built in yet")
    parser.add_argument("--output", type=Path, help="answer file; default answers/llava_bench_<bench>/<model>.jsonl")
    parser.add_argument("--limit", type=int, help="ask only the first so many questions")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus sampled from, where temperature > 0")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument(
        "--compression",
        type=float,
        help="patches per visual token; default: as the checkpoint says, else each image decides",
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default bfloat16 on cuda, else float32")
    args = parser.parse_args()
    for flag in ("limit", "batch_size", "max_new_tokens"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    # All that can be wrong with the data is found before the model is loaded, which may take minutes.
    source, image_folder = find_data(args)
    questions = read_questions(source, image_folder)
    for place, question in enumerate(questions):
        question["place"] = place

    from llava_drip.assistant.build import check_checkpoint  # late: they bring transformers with them
    from llava_drip.engine import Engine, placement, sampling_arguments

    check_checkpoint(args.model, assistant=True)
    sampling_arguments(args.max_new_tokens, args.temperature, args.top_p)
    device, dtype = placement(args.device, args.dtype)
    model_id = args.model.resolve().name
    settings = {
        "bench": args.bench,
        "questions": fingerprint(source),
        "checkpoint": fingerprint(args.model),
        "dtype": str(dtype).removeprefix("torch."),
        "compression": args.compression,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        # Greedy answers depend on neither; sampled ones are drawn a batch at a time.
        "seed": args.seed if args.temperature else None,
        "batch_size": args.batch_size if args.temperature else None,
    }
    safe_name = re.sub(r"[^\w.-]+", "_", model_id)
    output = args.output or Path("answers") / f"llava_bench_{args.bench}" / f"{safe_name}.jsonl"
    with locked(output) as file:
        done = answered(output, model_id, settings, questions)
        todo = [question for question in questions[: args.limit] if question["question_id"] not in done]
        if todo:
            if done:
                print(f"{output}: {len(done)} of {len(questions)} questions are answered already")
            for path in {question["path"]: None for question in todo}:
                load_image(path)  # a broken image is named now, not after an hour of answers
            engine = Engine.load(args.model, device, dtype, args.compression)
            answer(engine, todo, file, model_id, settings, args)
    print(f"{output}: {len(done) + len(todo)} answers")


if __name__ == "__main__":
    cli.run(main, "llava_bench")
