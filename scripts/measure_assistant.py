"""python scripts/measure_assistant.py --lengths chat.json --tokenizer VICUNA --language_model vicuna-7b --dtype bfloat16

Measures what visual tokens cost the two stages of training: samples and tokens a second, where the time of a step goes, peak
memory, at several compressions of a tower; and what packing gains over padding. Steps are those of the Trainer that training
uses, all cases in turn, round after round. Writes to --output

    assistant.json   every figure, with what was asked for, where, and how busy the machine was
    assistant.md     the tables
    assistant.png    samples a second against visual tokens

Weights, pictures and text are random: their cost is that of real ones. What is real are lengths: --lengths takes a conversation
file in LLaVA's format, with --tokenizer, or a list [{"text": 61, "learned": 35, "images": 1}, ...]: tokens of a sample without
the visual ones, how many of them have a label, and pictures.

    python scripts/measure_assistant.py --lengths captions.json chat.json --tokenizer VICUNA --language_model tinyllama-1.1b \\
        --layers 4 --batch_size 4 --output measured                    # a CPU; captions for stage 1, conversations for stage 2
    python scripts/measure_assistant.py --lengths chat.json --tokenizer VICUNA --stages finetune --compressions 4 \\
        --packing packed padded grouped --batch_size 8 --rounds 8       # packing against padding
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_drip import cli
from llava_drip.files import write_results


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked: whatever is wrong with them is said before minutes of measuring."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.ArgumentParser(prog="measure_assistant.py", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--lengths", nargs="+", required=True, metavar="FILE", help="conversations or lengths: one, or one a stage")
    add("--tokenizer", metavar="DIR", help="of conversations (default: --language_model, where that is a directory)")
    add(
        "--language_model",
        default="tinyllama-1.1b",
        metavar="NAME_OR_DIR",
        help="vicuna-7b, vicuna-13b, tinyllama-1.1b, or a directory with a config.json (tinyllama-1.1b)",
    )
    add("--layers", type=int, metavar="N", help="of it, so many only")
    add("--vision_tower", default="drip_large_patch14_336", help="a name or directory (drip_large_patch14_336)")
    add("--mm_projector_type", default="mlp2x_gelu", choices=["mlp2x_gelu", "linear"], help="(mlp2x_gelu)")
    add("--compressions", type=float, nargs="+", default=[1.0, 4.0, 10.0], help="the first is compared with (1 4 10)")
    add(
        "--packing",
        nargs="+",
        default=["packed"],
        choices=["packed", "padded", "grouped"],
        help="how batches are arranged (packed)",
    )
    add("--stages", nargs="+", default=["pretrain", "finetune"], choices=["pretrain", "finetune"], help="(both)")
    add("--batch_size", type=int, default=4, help="samples of a step (4)")
    add("--rounds", type=int, default=5, help="counted steps of each case, each with other samples (5)")
    add("--warmup", type=int, default=1, help="steps of each before them (1)")
    add("--spread", type=float, default=0.25, help="std / mean of an image's tokens, where they vary (0.25)")
    add("--device", choices=["cpu", "cuda"], help="(cuda if there is one)")
    add(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="bfloat16: as --bf16 true of a stage (float32)",
    )
    add("--gradient_checkpointing", action="store_true", help="of the language model")
    add("--optim", help="as of a stage (transformers' default)")
    add("--no_memory", action="store_true", help="leave out peak memory, which takes a process for each case on a CPU")
    add("--threads", type=int, help="of a CPU (default: torch's own)")
    add("--seed", type=int, default=0, help="of the samples drawn, and of all that is random (0)")
    add("--output", type=Path, help="folder of the results (default: they are printed only)")
    args = parser.parse_args(argv)
    for flag in ("compressions", "packing", "stages"):
        setattr(args, flag, list(dict.fromkeys(getattr(args, flag))))
    least = {"compressions": 1, "batch_size": 1, "rounds": 1, "warmup": 0, "spread": 0, "threads": 1, "seed": 0}
    parser.check_least(args, least)
    if len(args.lengths) not in (1, len(args.stages)):
        parser.error(f"--lengths: {len(args.lengths)} files for {len(args.stages)} stages; give one, or one a stage")
    return args


def main() -> None:
    args = parse()
    import torch  # after parsing: --help is quick

    from llava_drip.draw.comparison import TokenPoint, draw_comparison
    from llava_drip.instruct.stage_cost.lengths import read_samples
    from llava_drip.instruct.stage_cost.plan import LANGUAGE_MODELS, Plan
    from llava_drip.instruct.stage_cost.survey import survey
    from llava_drip.instruct.stage_cost.tables import markdown

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    tokenizer = args.tokenizer or (None if args.language_model in LANGUAGE_MODELS else args.language_model)
    names = (
        "language_model",
        "layers",
        "vision_tower",
        "mm_projector_type",
        "batch_size",
        "rounds",
        "warmup",
        "spread",
        "dtype",
    )
    options = {name: getattr(args, name) for name in (*names, "gradient_checkpointing", "optim", "seed")}
    options |= {"compressions": tuple(args.compressions), "arrangements": tuple(args.packing)}
    options |= {"device": str(cli.checked_device(args.device)), "memory": not args.no_memory}
    files = args.lengths if len(args.lengths) > 1 else args.lengths * len(args.stages)
    plans = [
        Plan(stage, read_samples(file, stage, tokenizer), **options)
        for stage, file in zip(args.stages, files, strict=True)
    ]

    def keep(result: dict) -> None:
        if args.output is not None:
            write_results(args.output, "assistant", result, markdown(result))

    result = survey(plans, keep)
    print(markdown(result))
    if errors := [case["error"] for stage in result["stages"] for case in stage["cases"] if case["error"]]:
        cases = sum(len(stage["cases"]) for stage in result["stages"])
        if len(errors) == cases:
            raise ValueError(f"all of {cases} cases failed, the first with {errors[0]}")
    points = [
        TokenPoint(f"{stage['stage']}, {case['arrangement']}", case["tokens"], case["samples_per_second"])
        for stage in result["stages"]
        for case in stage["cases"]
        if case["tokens"] and not case["error"]
    ]
    if args.output is not None and points:
        draw_comparison(args.output / "assistant.png", "samples a second", points, percent=False)


if __name__ == "__main__":
    cli.run(main, "measure_assistant.py")
