"""python scripts/measure_answers.py --language_model tinyllama-1.1b --layers 6 --rounds 5 --output measured

Measures one answer at a time: seconds to the first token, tokens a second after it, peak memory. One language model is put behind
a dense ViT of CLIP's kind, behind a DRIP of the same weights at each of --compressions, and into transformers' own
LlavaForConditionalGeneration, whose `generate` answers there; ours answer as they are served. All in turn, round after round,
each with a picture and words that are new; nothing is kept from one answer to the next. Writes to --output

    answers.json   every round, with what was asked for, where, and how busy the machine was
    answers.md     the table: medians and ranges over rounds, and of the ratios within a round
    answers.png    first token and tokens a second, side by side

Weights are random, as what an answer costs does not depend on them; --language_model takes a shape by name, or a directory with a
config.json of a LLaMA, and --layers the first so many of it.

    python scripts/measure_answers.py --language_model vicuna-7b --dtype bfloat16 --device cuda --new_tokens 128 --output measured
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_drip import cli


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.ArgumentParser(prog="measure_answers.py", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add(
        "--language_model",
        default="tinyllama-1.1b",
        metavar="NAME_OR_DIR",
        help="vicuna-7b, vicuna-13b, tinyllama-1.1b, or a directory with a config.json (tinyllama-1.1b)",
    )
    add("--layers", type=int, metavar="N", help="of it, so many only")
    add("--tower", default="large", choices=["tiny", "small", "base", "large"], help="size of the ViT (large)")
    add("--image_size", type=int, default=336, help="pixels of a side (336)")
    add("--patch_size", type=int, default=14, help="of which a patch has so many (14)")
    add(
        "--compressions", type=float, nargs="+", default=[4.0, 10.0], help="patches per visual token of the DRIP (4 10)"
    )
    add("--new_tokens", type=int, default=32, help="of each answer, at least 2 (32)")
    add("--rounds", type=int, default=5, help="(5), after one to warm up")
    add("--device", help="(cuda if there is one, else cpu)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="(float32)")
    add("--threads", type=int, help="of a CPU (default: torch's own)")
    add("--no_memory", action="store_true", help="leave out peak memory, which takes a process for each case on a CPU")
    add("--seed", type=int, default=0, help="of all that is random (0)")
    add("--output", type=Path, help="folder of the results (default: they are printed only)")
    args = parser.parse_args(argv)
    args.compressions = tuple(dict.fromkeys(args.compressions))
    least = {
        "layers": 1,
        "image_size": 1,
        "patch_size": 1,
        "compressions": 1,
        "new_tokens": 2,
        "rounds": 1,
        "threads": 1,
    }
    parser.check_least(args, {**least, "seed": 0})
    return args


def main() -> None:
    args = parse()
    import torch  # after parsing: --help is quick

    from llava_drip.draw.serving import Bar, draw_bars
    from llava_drip.files import write_results
    from llava_drip.serving_cost.answers import Plan
    from llava_drip.serving_cost.answers_report import survey, table

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    names = (
        "language_model",
        "layers",
        "tower",
        "image_size",
        "patch_size",
        "compressions",
        "new_tokens",
        "dtype",
        "seed",
    )
    plan = Plan(**{name: getattr(args, name) for name in names}, device=str(cli.checked_device(args.device)))
    result = survey(plan, args.rounds, memory=not args.no_memory)
    print(table(result))
    cases = [case for case in result["cases"] if not case["error"]]
    if not cases:
        raise ValueError(f"all {len(result['cases'])} cases failed, the first with {result['cases'][0]['error']}")
    if args.output is not None:
        write_results(args.output, "answers", result, table(result))
        panels = [
            (title, [Bar(case["label"], *(case[name][which] for which in ("median", "low", "high"))) for case in cases])
            for title, name in (("first token (ms)", "first_ms"), ("tokens a second after it", "tokens_per_second"))
        ]
        draw_bars(args.output / "answers.png", panels)


if __name__ == "__main__":
    cli.run(main, "measure_answers.py")
