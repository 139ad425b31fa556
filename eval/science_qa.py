"""python eval/science_qa.py --data DIR (--model DIR | --predictions FILE) [--split test] [--json OUT]

ScienceQA (Lu et al., 2022): asks an assistant, or scores answers that there are, and prints the accuracy by category.

    --data          the folder of problems.json and pid_splits.json; pictures beside them, or --images (folders or a tar file)
    --model         the assistant's folder. Its answers go into --output, in LLaVA's form; run again after an interruption, it
                    goes on where it stopped. A file holds the answers of one checkpoint to one set of questions.
    --predictions   a result file of LLaVA or ScienceQA ("results", "outputs"), or lines of answers ("question_id", "text")

Prompts are LLaVA's: CQM-A (LLaVA-1.5's; its --single_pred_prompt adds a sentence that asks for the letter), QCM-A and QCM-LEA.
Answers are written greedily and their letter is read as LLaVA reads it; an answer without one is wrong. --scoring likelihood
compares the letters' likelihoods instead, so that every problem is answered; with QCM-T, ours, those of the choices' texts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from rich.console import Console

from llava_drip import cli
from llava_drip.assistant.build import check_checkpoint
from llava_drip.engine import Engine, placement
from llava_drip.evaluation.provenance import check_inputs
from llava_drip.evaluation.resumable import locked
from llava_drip.evaluation.science_qa import answer_prior, chance, difference, gaps, remarks, score, table
from llava_drip.evaluation.science_qa_ask import FORMATS, SCORINGS, Asking, answered, ask, described_answers
from llava_drip.evaluation.science_qa_files import read_predictions, read_rows
from llava_drip.evaluation.science_qa_images import check_pictures, files_of, pictures_of
from llava_drip.files import write_whole
from llava_drip.fingerprint import fingerprint
from llava_drip.instruct.scienceqa import Problem, load_problems
from llava_drip.instruct.scienceqa_rows import find_place
from llava_drip.record import described, hashed, text_hash


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(prog="science_qa", description="ScienceQA; see the top of this file.")
    parser.add_argument("--data", required=True, type=Path, help="folder of problems.json and pid_splits.json")
    parser.add_argument("--split", default="test", help="of pid_splits.json")
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--model", type=Path, help="folder of an assistant (config.json, *.safetensors)")
    parser.add_argument("--predictions", type=Path, help="score this file of answers; no model is asked")
    parser.add_argument("--prior", metavar="SPLIT", help="show too what this split's commonest letters would get")
    parser.add_argument("--against", type=Path, help="another file of answers to the same problems, to compare with")
    parser.add_argument("--json", type=Path, help="write the scores there")
    asking = parser.add_argument_group("with --model")
    asking.add_argument("--images", type=Path, help="folder or tar file of pictures, unless beside problems.json")
    asking.add_argument("--output", type=Path, help="answers; default answers/science_qa_<split>/<model>.jsonl")
    asking.add_argument("--format", choices=FORMATS, help="prompt; default CQM-A")
    asking.add_argument("--scoring", choices=SCORINGS, help="default generate")
    asking.add_argument("--single_pred_prompt", action="store_true", help="ask for the letter, as LLaVA-1.5 is asked")
    asking.add_argument("--blind", action="store_true", help="ask without the pictures")
    asking.add_argument("--max_new_tokens", type=int, help="default 1024 for QCM-LEA, as LLaVA's, else 32")
    asking.add_argument("--compression", type=float, help="patches per visual token; default: as the checkpoint says")
    asking.add_argument("--batch_size", type=int, help="default 16")
    asking.add_argument("--device", help="default: cuda where there is one, else cpu")
    asking.add_argument("--dtype", help="float32, bfloat16 or float16; default bfloat16 on cuda, else float32")
    args = parser.parse_args()
    if (args.model is None) == (args.predictions is None):
        parser.error("give --model, to ask it, or --predictions, to score what is answered")
    for action in asking._group_actions:
        given = getattr(args, action.dest)
        if args.model is None and given not in (None, False):
            parser.error(f"{action.option_strings[0]} is for --model; --predictions are answered already")
    for flag in ("limit", "batch_size", "max_new_tokens"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: must be at least 1")
    return args


def answer(args: argparse.Namespace, problems: list[Problem], everything: list[Problem]) -> tuple[Path, dict]:
    """Asks what is not answered yet. Returns the answers' file, and {"place", "hashed"} of the pictures, None without any.

    everything: the whole split, so that --limit is no other run.
    """
    scoring = args.scoring or "generate"
    asking = Asking(args.format or "CQM-A", scoring, args.single_pred_prompt, args.blind, args.max_new_tokens)
    check_checkpoint(args.model, assistant=True)
    device, dtype = placement(args.device, args.dtype)
    pictures, shown = {}, {"place": None, "hashed": None}
    if any(asking.sees(problem) for problem in everything):
        place = args.images or find_place(args.data, args.split)
        pictures = pictures_of(place, everything)
        shown = {"place": str(place), "hashed": hashed(files_of(place, pictures))}
    prompts = {problem.id: asking.prompt(problem) for problem in everything}
    settings = {
        "checkpoint": fingerprint(args.model),
        "problems": fingerprint(problems_file(args.data)),
        **({"images": shown["hashed"]["sha256"]} if shown["hashed"] else {}),
        "prompts": text_hash(prompts.values()),
        **vars(asking),
        "compression": args.compression,
        "dtype": str(dtype).removeprefix("torch."),
    }
    model_id = args.model.resolve().name
    safe_name = re.sub(r"[^\w.-]+", "_", model_id)
    output = args.output or Path("answers") / f"science_qa_{args.split}" / f"{safe_name}.jsonl"
    with locked(output, "science_qa") as file:
        done = answered(output, settings, prompts)
        if done:
            print(f"{output}: {len(done):,} of {len(everything):,} problems are answered already")
        todo = [problem for problem in problems if problem.id not in done]
        if todo:
            check_pictures(pictures[problem.id] for problem in todo if asking.sees(problem))
            engine = Engine.load(args.model, device, dtype, args.compression)
            ask(engine, problems, pictures, asking, file, done, settings, model_id, args.batch_size or 16)
    return output, shown


def problems_file(data: Path) -> Path:
    data = data.expanduser()
    return data / "problems.json" if data.is_dir() else data


def header(args: argparse.Namespace, source: Path, known: dict, shown: dict) -> dict:
    """The record of a result. known: described_answers of the file; shown: the pictures, see `answer`."""
    data = {"problems": problems_file(args.data), "answers": source}
    splits = data["problems"].with_name("pid_splits.json")
    if splits.is_file():
        data["pid_splits"] = splits
    run = described(
        data=data,
        device=str(cli.checked_device(args.device)) if args.model else "cpu",
        split=args.split,
        files={"answers": str(source), "images": shown["place"]},
        **known,
    )
    if shown["hashed"]:
        run["data"]["images"] = shown["hashed"]
    return run


def theirs(args: argparse.Namespace, problems: list[Problem], flag: str) -> tuple[dict[str, int], list[str]]:
    """read_predictions of the flag's file. ValueError too where its answers say that they are to other problems than --data's."""
    path = getattr(args, flag.removeprefix("--"))
    found = read_predictions(path, problems, flag)
    check_inputs(read_rows(path), {"problems": fingerprint(problems_file(args.data))}, path)
    return found


def main() -> None:
    args = parse_args()
    everything = load_problems(args.data, args.split)
    problems = everything[: args.limit]
    known = load_problems(args.data, args.prior) if args.prior else None
    said, others, shown = [], {}, {"place": None, "hashed": None}
    if args.against:  # before the first question: a mistake in it costs nothing then
        against, said_of_it = theirs(args, problems, "--against")
    if args.model is not None:
        source, shown = answer(args, problems, everything)
        chosen, _ = read_predictions(source, problems)
    else:
        source = args.predictions
        chosen, said = theirs(args, problems, "--predictions")
    made = described_answers(source, problems, args.model)
    own, guesses = score(problems, chosen), {"random letter": chance(problems)}
    scores = {"answers": own}
    if args.prior:
        prior_name = f"commonest letters of {args.prior}"
    if args.against:
        name = args.against.stem
        if name in (*scores, *guesses) or args.prior and name == prior_name:
            name = str(args.against.resolve())
        others[name], scores[name] = against, score(problems, against)
        said += [f"{name}: {line}" for line in (*gaps(scores[name]), *said_of_it)]
    if known is not None:
        others[prior_name] = answer_prior(problems, known)
        prior = score(problems, others[prior_name])
        guesses[prior_name] = {category: prior[category]["acc"] for category in guesses["random letter"]}
    differences = {name: difference(problems, chosen, other) for name, other in others.items()}
    Console().print(table(scores, guesses))
    for name, found in differences.items():
        low, high = found["interval"]
        print(
            f"{found['points']:+.2f} points against {name}, 95 % interval {low:+.2f} to {high:+.2f} (paired bootstrap)"
        )
    for line in [*remarks(own), *said]:
        print(line)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {**own, "guesses": guesses, "differences": differences, "run": header(args, source, made, shown)}
        write_whole(args.json, json.dumps(result, indent=1) + "\n")
        print(f"scores: {args.json}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, "science_qa")
