"""LLaVA-Bench from end to end, as eval/llava_bench.py runs it: answers, a judge's reviews of them, what they come to."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from llava_drip import cli
from llava_drip.assistant.build import check_checkpoint
from llava_drip.engine import Engine, placement, sampling_arguments
from llava_drip.evaluation import llava_bench, overlap, relative
from llava_drip.evaluation.answers import answer, answered, read_answers
from llava_drip.evaluation.judge import SCORED, Judge, JudgeSettings, read_replies, usage_of
from llava_drip.evaluation.judging import Comparison, Prices, comparisons, estimate
from llava_drip.evaluation.provenance import check_inputs, made
from llava_drip.evaluation.resumable import locked
from llava_drip.files import write_whole
from llava_drip.fingerprint import fingerprint
from llava_drip.images import load_image
from llava_drip.record import described, hashed, text_hash

PROGRAM = "llava_bench"


def answer_questions(
    args: argparse.Namespace,
    places: llava_bench.Places,
    questions: list[dict],
    load: Callable[[], Engine] | None = None,
) -> Path:
    """Asks the assistant what it has not answered yet; returns the file of answers.

    load: gives the model, where several calls share it.
    """
    check_checkpoint(args.model, assistant=True)
    sampling_arguments(args.max_new_tokens, args.temperature, args.top_p)
    device, dtype = placement(args.device, args.dtype)
    model_id = args.model.resolve().name
    settings = {
        "bench": args.bench,
        "questions": fingerprint(places.questions),
        "images": hashed(question["path"] for question in questions)["sha256"],
        "checkpoint": fingerprint(args.model),
        "dtype": str(dtype).removeprefix("torch."),
        "compression": args.compression,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        # Greedy answers depend on no seed, and in fp32 on no batch; sampled ones are drawn a batch at a time.
        "seed": args.seed if args.temperature else None,
        "batch_size": args.batch_size if args.temperature else None,
    }
    output = args.output or Path("answers") / f"llava_bench_{args.bench}" / f"{_safe(model_id)}.jsonl"
    sampling = {name: getattr(args, name) for name in ("batch_size", "seed", "max_new_tokens", "temperature", "top_p")}
    with locked(output, PROGRAM) as file:
        done = answered(output, model_id, settings, questions)
        todo = [question for question in questions[: args.limit] if question["question_id"] not in done]
        if todo:
            if done:
                print(f"{output}: {len(done)} of {len(questions)} questions are answered already")
            for path in {question["path"]: None for question in todo}:
                load_image(path)  # a broken image is named now, not after an hour of answers
            engine = load() if load else Engine.load(args.model, device, dtype, args.compression)
            answer(engine, todo, file, model_id, settings, **sampling)
    print(f"{output}: {len(done) + len(todo)} answers")
    return output


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def header(
    args: argparse.Namespace, places: llava_bench.Places, questions: list[dict], answers: dict, files: dict, **more
) -> dict:
    """The record of a result. answers: question_id → row. files: name → path; "answers" is there already.

    ValueError: the answers are of different runs.
    """
    tokens = {question["image"]: answers[question["question_id"]].get("visual_tokens") for question in questions}
    data = {"questions": places.questions, "images": [question["path"] for question in questions]}
    data |= {name: path for name in ("references", "context", "rules") if (path := getattr(places, name)) is not None}
    return described(
        data={**data, "answers": files["answers"]},
        prompts=[question["text"] for question in questions],
        device=str(cli.checked_device(args.device)) if args.model else "cpu",
        packages=("openai", "rouge_score"),
        bench=args.bench,
        model_id=next(iter(answers.values())).get("model_id"),
        files={**files, "images": str(places.images)},
        **made(answers, tokens, files["answers"], args.model),
        **more,
    )


def check_given(args, places: llava_bench.Places, questions: list[dict], asked: list[dict]) -> None:
    """--answers: ValueError where they say that they were made of other questions or pictures than those given, all of them."""
    images = hashed(question["path"] for question in questions)["sha256"]
    present = {"bench": args.bench, "questions": fingerprint(places.questions), "images": images}
    check_inputs(read_answers(args.answers, asked), present, args.answers)


def write_json(args: argparse.Namespace, result: dict) -> None:
    if args.json:
        write_whole(args.json, json.dumps(result, indent=2, ensure_ascii=False))


def write_answers_record(args, places: llava_bench.Places, questions: list[dict], path: Path) -> None:
    """--judge none with --json: how many answers, and the record."""
    if args.json:
        answers = read_answers(path, questions)
        run = header(args, places, questions, answers, files={"answers": str(path)})
        write_json(args, {"answers": {"n": len(answers)}, "run": run})


def bootstrap_record(args: argparse.Namespace) -> dict:
    return {"resamples": relative.RESAMPLES, "level": relative.LEVEL, "seed": args.seed, "unit": "question"}


def score_by_rules(args, places: llava_bench.Places, questions: list[dict], path: Path, references: dict) -> None:
    """--judge rules: prints and writes the overlap with the reference answers."""
    answers = read_answers(path, questions)
    summary = overlap.overlap(questions, answers, references, args.seed)
    print(f"{overlap.NAME}\n{overlap.table(summary)}")
    more = {"score": overlap.NAME, "bootstrap": bootstrap_record(args)}
    run = header(args, places, questions, answers, files={"answers": str(path)}, **more)
    write_json(args, {**summary, "run": run})


def judge_settings(args: argparse.Namespace) -> JudgeSettings:
    """The judge that the flags name."""
    return JudgeSettings(
        model=args.judge,
        base_url=args.judge_base_url,
        temperature=args.judge_temperature,
        max_tokens=args.judge_max_tokens,
        options=args.judge_options,
        key_env=args.judge_key_env,
        retries=args.judge_retries,
        in_flight=args.judge_in_flight,
        timeout=args.judge_timeout,
    )


def estimate_unanswered(args, questions: list[dict], settings: JudgeSettings, told: tuple) -> None:
    """--estimate with --model: nothing is loaded and nothing answered; each answer is taken to be as long as the reference's."""
    check_checkpoint(args.model, assistant=True)
    references = told[0]
    answers = {question["question_id"]: {"text": references[question["question_id"]]["text"]} for question in questions}
    say_cost(args, settings, comparisons(questions, answers, *told, both_orders=args.both_orders))
    print("with answers as long as the reference's; --answers FILE --estimate counts those that there are")


def estimate_answered(args, questions: list[dict], path: Path, settings: JudgeSettings, told: tuple) -> None:
    """--estimate with --answers: what is not reviewed yet. Needs neither the key nor the eval extra."""
    _, replies_path = review_paths(args, path)
    wanted = wanted_reviews(args, questions, read_answers(path, questions), settings, told)
    with locked(replies_path, PROGRAM, "--reviews-output"):
        say_cost(args, settings, unreviewed(wanted, replies_path))


def say_cost(args: argparse.Namespace, settings: JudgeSettings, todo: list[Comparison]) -> None:
    print(f"{settings.endpoint} {args.judge}: {estimate(todo, settings.most_tokens, prices_of(args))}", flush=True)


def prices_of(args: argparse.Namespace) -> Prices | None:
    return None if args.judge_price_in is None else Prices(args.judge_price_in, args.judge_price_out)


def wanted_reviews(args, questions: list[dict], answers: dict, settings: JudgeSettings, told: tuple) -> dict:
    """Hash of the request → what to ask."""
    asked = comparisons(questions, answers, *told, both_orders=args.both_orders)
    return {settings.hash_of(comparison): comparison for comparison in asked}


def unreviewed(wanted: dict[str, Comparison], replies_path: Path) -> list[Comparison]:
    """Those that no reply of the file answers."""
    kept = {row["request"] for row in read_replies(replies_path) if row["outcome"] == SCORED}
    todo = [comparison for request, comparison in wanted.items() if request not in kept]
    if len(todo) < len(wanted):
        print(f"{replies_path}: {len(wanted) - len(todo)} of {len(wanted)} reviews are there already")
    return todo


def review_paths(args: argparse.Namespace, path: Path) -> tuple[Path, Path]:
    """The files of reviews and of replies, for the file of answers at `path`.

    By default reviews of a part (--limit) and of both orders have files of their own, and all share one file of replies.
    """
    stem = f"{path.stem}.{_safe(args.judge)}"
    part = (f".first_{args.limit}" if args.limit else "") + (".both_orders" if args.both_orders else "")
    reviews_path = args.reviews_output or path.with_name(f"{stem}{part}.reviews.jsonl")
    if reviews_path.resolve() == path.resolve():
        raise ValueError(f"--reviews-output {reviews_path}: holds the answers")
    if args.reviews_output:
        stem = reviews_path.stem.removesuffix(".reviews")
    return reviews_path, reviews_path.with_name(f"{stem}.replies.jsonl")


def refuse_to_shrink(path: Path, wanted: Iterable[Comparison]) -> None:
    """ValueError: the file holds reviews that this run would not write again, or something else than reviews."""
    if not path.exists() or not path.stat().st_size:
        return
    kept = {(review.question, review.order) for review in relative.read_reviews(path)}
    lost = len(kept - {(comparison.question_id, comparison.order) for comparison in wanted})
    if lost:
        raise ValueError(
            f"{path}: {lost} of its {len(kept)} reviews are none of this run's (--limit, --both-orders, --questions) and would "
            "be lost; choose another --reviews-output"
        )


def judge_answers(
    args, places: llava_bench.Places, questions: list[dict], path: Path, judge: Judge, told: tuple
) -> None:
    """Asks the judge what is not reviewed yet, prints and writes the relative scores.

    told: references, contexts and rules of the questions. ValueError, after everything is written: reviews that failed.
    """
    reviews_path, replies_path = review_paths(args, path)
    answers = read_answers(path, questions)
    files = {"answers": str(path), "reviews": str(reviews_path), "replies": str(replies_path)}
    # Made before the judge is asked: what cannot be recorded is found before it is paid for.
    run = header(args, places, questions, answers, files, bootstrap=bootstrap_record(args))
    wanted = wanted_reviews(args, questions, answers, judge.settings, told)
    refuse_to_shrink(reviews_path, wanted.values())
    with locked(replies_path, PROGRAM, "--reviews-output") as file:
        todo = unreviewed(wanted, replies_path)
        say_cost(args, judge.settings, todo)
        failed = judge.ask(todo, file, hopeful=len(todo) < len(wanted)) if todo else {}
        replies = [row for row in read_replies(replies_path) if row["request"] in wanted]
    relative.write_reviews(reviews_path, wanted, replies, failed)
    summary = relative.summarise(relative.read_reviews(reviews_path), args.seed)
    print(f"{reviews_path}\n{relative.table(summary)}")
    tokens = usage_of(replies)
    prices = prices_of(args)
    spent = None if prices is None else prices.of(tokens["read"], tokens["written"])
    cost = "" if spent is None else f", ${spent:.2f}"
    print(f"the judge read {tokens['read']:,} tokens and wrote {tokens['written']:,}, repetitions included{cost}")
    run["judge"] = {
        "model": args.judge,
        "answered_as": sorted({str(row["model"]) for row in replies if row["outcome"] == SCORED}),
        "base_url": judge.settings.endpoint,
        "request": judge.settings.parameters,
        "prompts": {
            "sha256": text_hash(m["content"] for one in wanted.values() for m in one.messages),
            "count": len(wanted),
        },
        "replies": len(replies),
        "failed": len(failed),
        "tokens": tokens,
        "cost": spent,
        "seconds": round(sum(row.get("seconds", 0) for row in replies), 2),
    }
    run["data"]["reviews"] = hashed(reviews_path)
    write_json(args, {**summary, "run": run})
    complain(summary, reviews_path, "; the same command asks for them again")


def complain(summary: dict, path: Path, advice: str = "") -> None:
    """ValueError if reviews failed: what the summary says is of the others alone."""
    failed = summary["all"]["failed"]
    if failed:
        reviews = relative.read_reviews(path)
        first = next((review for review in reviews if review.scores is None), None)
        example = "an order is missing" if first is None else f"question_id {first.question!r} ({first.reason})"
        raise ValueError(
            f"{path}: {failed} of {failed + summary['all']['n']} questions have a failed review and count in no score, such as "
            f"{example}{advice}"
        )


def summarise_reviews(args: argparse.Namespace) -> None:
    """--reviews: prints what existing reviews come to, and writes --json for one file. ValueError at the end: failed reviews."""
    summaries = {path: relative.summarise(relative.read_reviews(path), args.seed) for path in args.reviews}
    for path, summary in summaries.items():
        print(f"{path}\n{relative.table(summary)}")
    if args.json:
        ((path, summary),) = summaries.items()
        run = described(data={"reviews": path}, bootstrap=bootstrap_record(args))
        write_json(args, {**summary, "run": run})
    for path, summary in summaries.items():
        complain(summary, path)
