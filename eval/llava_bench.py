"""python eval/llava_bench.py --model DIR --bench coco|in_the_wild --data DIR --judge none|rules|MODEL [--json FILE]

LLaVA-Bench (Liu et al., 2023): an assistant's answers, and what a judge makes of them beside GPT-4's reference answers.

    --judge none       answers only, a line for each question in the benchmark's format:
        {"question_id", "prompt", "text", "answer_id", "model_id", "metadata", "image", "category", "visual_tokens"}
    --judge MODEL      answers, then a review of each by a model behind an OpenAI-compatible endpoint: the relative score
    --judge rules      answers, then ROUGE-L against the reference answers: word overlap, offline, no relative score
    --answers FILE     judges answers that exist, of whatever program, instead of --model
    --reviews FILE     prints what existing reviews in LLaVA's format come to; nothing is asked
    --estimate         prints what the judge would cost, without its key; with --model nothing is answered either: the answers
                       are taken to be as long as the reference's

`--data` is the benchmark's folder, with coco/ and in_the_wild/ inside (or one of these itself), as published. The judge's key
is read from the environment variable OPENAI_API_KEY. Run again after an interruption, it goes on where it stopped: no
question and no review is asked for twice. A file of answers holds those of one checkpoint to one file of questions with one
set of settings; anything else is refused. A review that cannot be had is no number: the program says so and ends with exit
code 1. More: docs/guides/evaluation.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_drip import cli
from llava_drip.evaluation import bench_run, llava_bench
from llava_drip.evaluation.judge import Judge

# What a flag is for: those that a run would not read are refused. All others are for every run that asks or judges.
READ_BY = {
    "--model": (
        "output",
        "batch_size",
        "max_new_tokens",
        "temperature",
        "top_p",
        "compression",
        "device",
        "dtype",
    ),
    "--judge rules or --judge MODEL": ("references",),
    "--judge MODEL": (
        "context",
        "rules",
        "judge_base_url",
        "judge_key_env",
        "judge_temperature",
        "judge_max_tokens",
        "judge_options",
        "judge_retries",
        "judge_in_flight",
        "judge_timeout",
        "judge_price_in",
        "judge_price_out",
        "both_orders",
        "estimate",
        "reviews_output",
    ),
}


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(prog="llava_bench", description="LLaVA-Bench; see the top of this file.")

    def add(name: str, **options) -> None:
        """A flag, with dashes or, as LLaVA and the HF Trainer write them, with underscores."""
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **options)

    add("model", type=Path, help="folder of an assistant (config.json, *.safetensors)")
    add("bench", choices=sorted(llava_bench.PUBLISHED))
    add("data", type=Path, help="the benchmark's folder")
    add("questions", type=Path, help="questions file, instead of the one in --data")
    add("image_folder", type=Path, help="folder of images, instead of the one in --data")
    add("references", type=Path, help="reference answers, instead of those in --data")
    add("context", type=Path, help="contexts of the images, instead of those in --data")
    add("rules", type=Path, help="the judge's prompts, instead of rule.json in --data")
    add("answers", type=Path, help="file of answers to judge, instead of --model")
    add("reviews", type=Path, nargs="+", help="files of reviews to summarise; nothing is asked")
    add("output", type=Path, help="answer file; default answers/llava_bench_<bench>/<model>.jsonl")
    add("json", type=Path, help="file to write the scores and their record to")
    add("limit", type=int, help="ask only the first so many questions")
    add("batch_size", type=int, default=8)
    add("max_new_tokens", type=int, default=512)
    add("temperature", type=float, default=0.0, help="0 is greedy")
    add("top_p", type=float, default=1.0, help="nucleus sampled from, where temperature > 0")
    add("seed", type=int, default=0, help="of the sampling, and of the bootstrap")
    add(
        "compression",
        type=float,
        help="patches per visual token; default: as the checkpoint says, else each image decides",
    )
    add("device", help="default: cuda where there is one, else cpu")
    add("dtype", help="float32, bfloat16 or float16; default bfloat16 on cuda, else float32")
    add("judge", default="none", metavar="none|rules|MODEL", help="see above")
    add("judge_base_url", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1; default OpenAI's own")
    add("judge_key_env", default="OPENAI_API_KEY", help="environment variable that holds the key")
    add("judge_temperature", type=float, default=0.2)
    add("judge_max_tokens", type=int, default=1024, help="of a review")
    add("judge_options", nargs="+", default=[], metavar="KEY=VALUE", help="more of the request; KEY=null takes one out")
    add("judge_retries", type=int, default=5, help="of a request that fails, and of a reply that is no review")
    add("judge_in_flight", type=int, default=4, help="requests at once")
    add("judge_timeout", type=float, default=120.0, help="seconds for one request")
    add("judge_price_in", type=float, help="US dollars a million tokens read")
    add("judge_price_out", type=float, help="US dollars a million tokens written")
    add("both_orders", action="store_true", help="judge twice, with either answer first")
    add("estimate", action="store_true", help="say what judging costs, and ask nothing of the judge")
    add(
        "reviews_output",
        type=Path,
        help="file of reviews; default beside the answers, --limit and --both-orders in its name. Raw replies lie beside it",
    )
    args, flags = parser.parse_given()
    for name in ("limit", "batch_size", "max_new_tokens", "judge_max_tokens", "judge_in_flight"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.judge_retries < 0 or args.judge_timeout <= 0:
        parser.error("--judge-retries must be 0 or more, --judge-timeout above 0")
    if (args.judge_price_in is None) != (args.judge_price_out is None):
        parser.error("--judge-price-in and --judge-price-out belong together")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: no folder {args.json.parent}")
    args.judge_options = cli.key_values(args.judge_options, "--judge-options")
    given = [f"--{name}" for name in ("model", "answers", "reviews") if getattr(args, name)]
    if len(given) != 1:
        parser.error(f"give one of --model, --answers and --reviews{', not ' + ' and '.join(given) if given else ''}")
    if args.reviews and args.json and len(args.reviews) > 1:
        parser.error("--json takes the scores of one --reviews file")
    if not args.reviews and args.bench is None:
        parser.error("--bench is missing")
    if args.answers and args.judge == "none":
        parser.error("--answers: say who judges them, --judge rules or --judge MODEL")
    refuse_unread(parser, args, flags)
    return args


def refuse_unread(parser: cli.ArgumentParser, args: argparse.Namespace, given: set[str]) -> None:
    """Ends the program for a flag that this run would take no notice of."""
    if args.reviews and (others := sorted(given - {"reviews", "json", "seed"})):
        parser.error(f"--{others[0]} is not for --reviews, which are there already")
    happens = {
        "--model": args.model is not None,
        "--judge rules or --judge MODEL": args.judge != "none",
        "--judge MODEL": args.judge not in ("none", "rules"),
    }
    for what, names in READ_BY.items():
        if not happens[what] and (unread := sorted(given.intersection(names))):
            parser.error(f"--{unread[0]} is for {what}")


def main() -> None:
    args = parse_args()
    if args.reviews:
        return bench_run.summarise_reviews(args)
    # What is wrong with the data is found before the model is loaded, which may take minutes, and before anything is paid.
    judged, scored = args.judge not in ("none", "rules"), args.judge == "rules"
    given = {name: getattr(args, name) for name in ("questions", "image_folder", "references", "context", "rules")}
    places = llava_bench.find(args.bench, args.data, judged, scored, **given)
    questions = llava_bench.read_questions(places.questions, places.images)
    asked = questions[: args.limit]
    if args.answers:
        bench_run.check_given(args, places, questions, asked)
    references = llava_bench.read_references(places.references, asked) if places.references else None
    if judged:
        contexts = llava_bench.read_contexts(places.context, args.bench, asked)
        told = (references, contexts, llava_bench.read_rules(places.rules, args.bench, asked))
        settings = bench_run.judge_settings(args)
        if args.estimate and args.model:
            return bench_run.estimate_unanswered(args, asked, settings, told)
        judge = None if args.estimate else Judge(settings)
    path = args.answers or bench_run.answer_questions(args, places, questions)
    if args.estimate:
        bench_run.estimate_answered(args, asked, path, settings, told)
    elif judged:
        bench_run.judge_answers(args, places, asked, path, judge, told)
    elif scored:
        bench_run.score_by_rules(args, places, asked, path, references)
    else:
        bench_run.write_answers_record(args, places, asked, path)


if __name__ == "__main__":
    cli.run(main, "llava_bench")
