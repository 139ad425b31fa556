"""python scripts/measure_serving.py --random 96x2 --streams 16 --output measured

Measures what the running batch of llava_drip/engine.py is worth: tokens a second of many streams at once against one after the
other, and the time of one stream against `generate` of transformers. Everything in turn, round after round, each request with a
picture and words of its own. Writes to --output

    serving.json   every round, with what was asked for, where, and how busy the machine was
    serving.md     the table: medians over rounds, and of the ratios within a round

--model takes an assistant; --random WIDTHxLAYERS makes one with random weights and a DRIP tower of 64 patches: how long a step
takes does not depend on what the weights are. Replies never end by themselves, so that all
runs write alike many tokens. CPU seconds are this process's own: they matter where others use the machine too.

    python scripts/measure_serving.py --model demo_output/drip-4x/assistant --new_tokens 8 64 --rounds 5 --output measured
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from llava_drip import cli, machine
from llava_drip.assistant import build_assistant
from llava_drip.conversation import user_turn
from llava_drip.engine import Engine
from llava_drip.files import write_results
from llava_drip.instruct.language import train_tokenizer
from llava_drip.instruct.templates import VICUNA_V1
from llava_drip.towers.io import save_tower
from llava_drip.world.scenes import sample_scene
from llava_drip.world.texts import caption


def parse() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.ArgumentParser(prog="measure_serving.py", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--model", metavar="DIR", help="a trained assistant")
    add("--random", metavar="WIDTHxLAYERS", help="a LLaMA of random weights instead")
    add("--streams", type=int, nargs="+", default=[16], help="at once (16)")
    add("--requests", type=int, default=32, help="of a round (32)")
    add("--new_tokens", type=int, nargs="+", default=[8, 64], help="of each reply (8 64)")
    add("--rounds", type=int, default=5, help="(5), after one to warm up")
    add("--device", help="(cuda if there is one, else cpu)")
    add("--threads", type=int, help="of a CPU (default: torch's own)")
    add("--output", type=Path, help="folder of the results (default: they are printed only)")
    args = parser.parse_args()
    if bool(args.model) == bool(args.random):
        parser.error("give one of --model and --random")
    return args


def random_assistant(shape: str, directory: Path) -> Path:
    """A LLaMA of WIDTHxLAYERS with random weights behind drip_mini_patch8_64_4x, saved."""
    try:
        width, layers = map(int, shape.split("x"))
    except ValueError:
        raise ValueError(f"--random {shape}: give WIDTHxLAYERS, as 96x2") from None
    torch.manual_seed(0)
    chance = np.random.default_rng(0)
    tokenizer = train_tokenizer([caption(sample_scene(chance, "train"), chance) for _ in range(500)], 768)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(4, width // 64),
        initializer_range=0.8 * width**-0.5,
    )
    language_model, tower = LlamaForCausalLM(config), timm.create_model("drip_mini_patch8_64_4x", num_classes=0)
    language_model.save_pretrained(directory / "llm")
    tokenizer.save_pretrained(directory / "llm")
    save_tower(tower, directory / "tower", mean=(0.5,) * 3, std=(0.5,) * 3)
    model, processor = build_assistant(str(directory / "llm"), str(directory / "tower"), chat_template=VICUNA_V1)
    model.save_pretrained(directory / "assistant")
    processor.save_pretrained(directory / "assistant")
    return directory / "assistant"


def random_requests(count: int, seed: int) -> list[tuple[list[dict], list[Image.Image]]]:
    chance = np.random.default_rng(seed)
    pictures = chance.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    texts = (" ".join(caption(sample_scene(chance, "train"), chance) for _ in range(2)) for _ in range(count))
    return [([user_turn(text)], [Image.fromarray(pixels)]) for text, pixels in zip(texts, pictures)]


def streamed(engine: Engine, request: tuple, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first piece of text, and to the end; as its caller sees it."""
    started, first = time.perf_counter(), None
    for event in engine.stream(*request, max_new_tokens=new_tokens):
        first, last = first or time.perf_counter() - started, event
    assert last.usage.new_tokens == new_tokens, last.usage
    return first, time.perf_counter() - started


def measured_round(engine: Engine, new_tokens: int, streams: list[int], count: int, seed: int) -> dict:
    """Seconds of each way to answer `count` requests, and medians over requests of what one takes."""
    batches = [random_requests(count, 1000 * seed + number) for number in range(2 + len(streams))]
    record = {"new_tokens": new_tokens, "alone_cpu_s": 0.0}
    alone, generate = [], []
    for request, other in zip(batches[0], batches[1]):  # in turn
        cpu = time.process_time()
        alone.append(streamed(engine, request, new_tokens))
        record["alone_cpu_s"] += time.process_time() - cpu
        started = time.perf_counter()
        engine.answer_batch([other], new_tokens)
        generate.append(time.perf_counter() - started)
    record["alone_s"] = sum(total for _, total in alone)
    record["first_ms"] = 1000 * statistics.median(first for first, _ in alone)
    record["alone_ms"] = 1000 * statistics.median(total for _, total in alone)
    record["generate_ms"] = 1000 * statistics.median(generate)
    for number, requests in zip(streams, batches[2:]):
        with ThreadPoolExecutor(number) as pool:
            started, cpu = time.perf_counter(), time.process_time()
            times = list(pool.map(lambda request: streamed(engine, request, new_tokens), requests))
            record[f"streams_{number}_s"] = time.perf_counter() - started
            record[f"streams_{number}_cpu_s"] = time.process_time() - cpu
        firsts = sorted(1000 * first for first, _ in times)
        record[f"streams_{number}_first_ms"] = firsts[len(firsts) // 2]
        record[f"streams_{number}_first_p95_ms"] = firsts[min(len(firsts) - 1, round(0.95 * len(firsts)))]
    return record


def table(result: dict) -> str:
    lines = [
        "| tokens of a reply | streams | tokens/s | x one at a time | x, by CPU seconds | first text p50 (ms) | p95 (ms) |"
    ]
    lines += ["| ---: " * 7 + "|"]
    middle = statistics.median
    single = ["| tokens of a reply | one stream (ms) | generate (ms) | one stream / generate |", "| ---: " * 4 + "|"]
    for new_tokens in result["new_tokens"]:
        rounds = [record for record in result["rounds"] if record["new_tokens"] == new_tokens]
        written = new_tokens * result["requests"]
        per_second = middle(written / record["alone_s"] for record in rounds)
        first = middle(record["first_ms"] for record in rounds)
        lines.append(f"| {new_tokens} | 1 | {per_second:.0f} | 1.00 | 1.00 | {first:.1f} | |")
        for number in result["streams"]:
            name = f"streams_{number}"
            per_second = middle(written / record[f"{name}_s"] for record in rounds)
            ratios = sorted(record["alone_s"] / record[f"{name}_s"] for record in rounds)
            by_cpu = middle(record["alone_cpu_s"] / record[f"{name}_cpu_s"] for record in rounds)
            first, late = (middle(record[f"{name}_first{which}_ms"] for record in rounds) for which in ("", "_p95"))
            lines.append(
                f"| {new_tokens} | {number} | {per_second:.0f} | {middle(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f}) "
                f"| {by_cpu:.2f} | {first:.1f} | {late:.1f} |"
            )
        ratios = sorted(record["alone_ms"] / record["generate_ms"] for record in rounds)
        ours, theirs = (middle(record[name] for record in rounds) for name in ("alone_ms", "generate_ms"))
        single.append(
            f"| {new_tokens} | {ours:.1f} | {theirs:.1f} | {middle(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f}) |"
        )
    return "\n".join([result["where"], "", *lines, "", *single, ""])


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    before = machine.load()
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.model or random_assistant(args.random, Path(scratch))
        engine = Engine.load(directory, device=args.device)
    engine.model.generation_config.eos_token_id = None
    rounds = []
    for number in range(args.rounds + 1):
        for new_tokens in args.new_tokens:
            count = args.requests if number else min(args.requests, 4)
            record = measured_round(engine, new_tokens, args.streams, count, number)
            rounds += [record] if number else []
    engine.close()
    result = {name: getattr(args, name) for name in ("model", "random", "streams", "requests", "new_tokens")}
    parameters = sum(parameter.numel() for parameter in engine.model.language_model.parameters())
    found = machine.where([str(engine.device)])
    result |= {"parameters": parameters, "rounds": rounds, **found, "stats": engine.stats()}
    result["where"] = f"{parameters / 1e6:.1f}M parameters. {machine.described(found, (before, machine.load()))}"
    print(table(result))
    if args.output is not None:
        write_results(args.output, "serving", result, table(result))


if __name__ == "__main__":
    cli.run(main, "measure_serving.py")
