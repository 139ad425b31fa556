"""python eval/pope.py --questions coco_pope_random.json --images val2014 (--model DIR | --predictions FILE) [--json OUT]

POPE (Li et al., 2023): asks an assistant whether objects are in pictures, or scores answers that there are.

    --questions     files in POPE's form, {"question_id", "image", "text", "label"} a line; each is a split (random, popular,
                    adversarial)
    --model         the assistant's folder. Its answers go into --output, a file for each split; run again after an interruption,
                    it goes on where it stopped. A file holds the answers of one checkpoint to one file of questions.
    --predictions   a file of answers ("question_id", "text") for each of --questions, in their order: LLaVA's, or ours

Answers are written greedily, after LLaVA-1.5's sentence that asks for a single word (--suffix). An answer with "no" or "not" in
its first sentence is no, any other is yes, as POPE and LLaVA have it; those with neither word are counted as unclear beside.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

from rich.console import Console

from llava_drip import cli
from llava_drip.engine import Engine, placement
from llava_drip.evaluation import bench_run, pope
from llava_drip.evaluation.answers import read_answers
from llava_drip.evaluation.llava_bench import Places
from llava_drip.evaluation.provenance import check_inputs, made
from llava_drip.files import write_whole
from llava_drip.fingerprint import fingerprint
from llava_drip.record import described

ASKING = (
    "images",
    "output",
    "suffix",
    "max_new_tokens",
    "compression",
    "batch_size",
    "device",
    "dtype",
)


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(prog="pope", description="POPE; see the top of this file.")
    parser.add_argument("--questions", required=True, nargs="+", type=Path, help="files in POPE's form, one a split")
    parser.add_argument("--limit", type=int, help="only the first so many questions of each split")
    parser.add_argument("--model", type=Path, help="folder of an assistant (config.json, *.safetensors)")
    parser.add_argument("--predictions", nargs="+", type=Path, help="score these; no model is asked")
    parser.add_argument("--json", type=Path, help="write the scores there")
    asking = parser.add_argument_group("with --model")
    asking.add_argument("--images", type=Path, help="folder of the pictures, COCO's val2014")
    asking.add_argument("--output", type=Path, help="folder of answers; default answers/pope/<model>")
    asking.add_argument("--suffix", default=pope.SUFFIX, help="line behind each question; '' for none")
    asking.add_argument("--max_new_tokens", type=int, default=16)
    asking.add_argument("--compression", type=float, help="patches per visual token; default: as the checkpoint says")
    asking.add_argument("--batch_size", type=int, default=16)
    asking.add_argument("--device", help="default: cuda where there is one, else cpu")
    asking.add_argument("--dtype", help="float32, bfloat16 or float16; default bfloat16 on cuda, else float32")
    args, given = parser.parse_given()
    if (args.model is None) == (args.predictions is None):
        parser.error("give --model, to ask it, or --predictions, to score what is answered")
    for name in ASKING:
        if args.model is None and name in given:
            parser.error(f"--{name} is for --model; --predictions are answered already")
    if args.model and not args.images:
        parser.error("--images is missing: the folder of the pictures")
    if args.predictions and len(args.predictions) != len(args.questions):
        parser.error(f"--predictions: {len(args.predictions)} files for {len(args.questions)} of --questions")
    for name in ("limit", "batch_size", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    splits = [pope.split_of(path) for path in args.questions]
    if len(set(splits)) < len(splits):
        parser.error(f"--questions: two files of one split among {', '.join(splits)}")
    return args


def main() -> None:
    args = parse_args()
    suffix = args.suffix if args.model else ""
    questions = {pope.split_of(path): pope.read_questions(path, args.images, suffix) for path in args.questions}
    if args.model:
        files = ask(args, questions)
    else:
        files = args.predictions
    scores, rows, tokens = {}, {}, {}
    for (split, own), path, file in zip(questions.items(), args.questions, files):
        asked = own[: args.limit]
        answers = read_answers(file, asked)
        check_inputs(answers, {"bench": bench_of(split), "questions": fingerprint(path)}, file)
        scores[split] = pope.score(asked, {name: row["text"] for name, row in answers.items()})
        rows |= {(split, name): row for name, row in answers.items()}
        tokens |= {question["image"]: answers[question["question_id"]].get("visual_tokens") for question in asked}
    known = made(rows, tokens, ", ".join(map(str, files)), args.model)
    Console().print(pope.table(scores))
    if args.json:
        prompts = [row.get("prompt") for row in rows.values()]
        data = {"questions": args.questions, "answers": files}
        if args.model:
            data["images"] = [question["path"] for own in questions.values() for question in own]
        run = described(
            data=data,
            prompts=prompts if all(isinstance(prompt, str) for prompt in prompts) else (),
            device=str(cli.checked_device(args.device)) if args.model else "cpu",
            files={
                "questions": {split: str(path) for split, path in zip(questions, args.questions)},
                "answers": {split: str(path) for split, path in zip(questions, files)},
                "images": args.images and str(args.images),
            },
            **known,
        )
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.json, json.dumps({"splits": scores, "mean": pope.mean(scores), "run": run}, indent=1) + "\n")


def bench_of(split: str) -> str:
    """What the answers' settings call it."""
    return f"pope_{split}"


def ask(args: argparse.Namespace, questions: dict[str, list[dict]]) -> list[Path]:
    """Asks what is not answered yet, with one loaded model; returns the files of answers."""
    device, dtype = placement(args.device, args.dtype)
    load = functools.cache(lambda: Engine.load(args.model, device, dtype, args.compression))
    folder = args.output or Path("answers") / "pope" / args.model.resolve().name
    files = []
    for path, (split, own) in zip(args.questions, questions.items()):
        fixed = {"bench": bench_of(split), "output": folder / f"{split}.jsonl"}
        fixed |= {"temperature": 0.0, "top_p": 1.0, "seed": 0}
        each = argparse.Namespace(**{**vars(args), **fixed})
        files.append(bench_run.answer_questions(each, Places(path, args.images), own, load))
    return files


if __name__ == "__main__":
    cli.run(main, "pope")
