"""Speed of DRIP against timm's dense ViT, wall clock beside what the FLOPs promise.

python scripts/benchmark_tower.py [--batches 1 8 32] [--rounds 7] [--json OUT.json]
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table

from llava_drip import cli
from llava_drip.files import write_whole
from llava_drip.measure.speed import compare

SIZES, PATCHES = ("tiny", "small", "base", "large"), (16, 32)


def parse_args() -> argparse.Namespace:
    """The flags, checked: whatever is wrong with them is said before minutes of measuring."""
    parser = cli.ArgumentParser(prog="benchmark_tower.py", description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="base", choices=SIZES)
    parser.add_argument("--patch", type=int, default=16, choices=PATCHES)
    parser.add_argument("--compression", type=float, nargs="+", default=[4.0, 10.0], help="patches per token")
    parser.add_argument("--pool_after", type=int, nargs="+", default=[2, 4], help="dense blocks before pooling")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds of each setting")
    parser.add_argument("--spread", type=float, default=0.25, help="std / mean of an image's tokens, in inference")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    for flag, least in (("batches", 1), ("rounds", 1), ("spread", 0)):
        value = getattr(args, flag)
        if not all(number >= least for number in (value if isinstance(value, list) else [value])):
            parser.error(f"--{flag} {value}: must be at least {least}")
    sizes = {patch: [size for size in SIZES if timm.is_model(dense_name(size, patch))] for patch in PATCHES}
    if args.size not in sizes[args.patch]:
        there_are = "; ".join(f"--patch {patch} with --size {', '.join(sizes[patch])}" for patch in PATCHES)
        parser.error(
            f"--size {args.size} --patch {args.patch}: timm has no such dense ViT to compare with; {there_are}"
        )
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: no folder {args.json.parent}")
    return args


def dense_name(size: str, patch: int) -> str:
    """timm's ViT that has the sizes of a DRIP."""
    return f"vit_{size}_patch{patch}_224"


def main() -> None:
    args = parse_args()
    device = cli.checked_device(args.device)
    towers = {
        f"DRIP {c:g}x, {n} dense blocks": {
            "model_name": f"drip_{args.size}_patch{args.patch}_224",
            "compression": c,
            "pool_after": n,
        }
        for n in args.pool_after
        for c in args.compression
    }
    dense = dense_name(args.size, args.patch)
    dtype = getattr(torch, args.dtype)
    results = compare(towers, dense, args.batches, args.rounds, str(device), dtype, args.spread)
    on_cuda = device.type == "cuda"
    where = (
        torch.cuda.get_device_name(device) if on_cuda else f"{device.type.upper()}, {torch.get_num_threads()} threads"
    )
    versions = f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"
    table = Table(title=f"Against timm's {dense} ({where}, {args.dtype}; {versions})")
    for column in ("tower", "mode", "batch", "ms", "speed-up", "range", "by FLOPs", "share"):
        table.add_column(column, justify="left" if column in ("tower", "mode") else "right")
    for r in sorted(results, key=lambda r: (r.mode, r.tower, r.batch)):
        share, span = f"{r.speed_up / r.flop_speed_up:.2f}", f"{r.low:.2f} - {r.high:.2f}"
        cells = (f"{r.milliseconds:.0f}", f"{r.speed_up:.2f}x", span, f"{r.flop_speed_up:.2f}x", share)
        table.add_row(r.tower, r.mode, str(r.batch), *cells)
    Console(width=120).print(table)
    if args.json:
        record = {"dense": dense, "where": where, "versions": versions, "arguments": _plain(args)}
        write_whole(args.json, json.dumps({**record, "results": [asdict(r) for r in results]}, indent=1))


def _plain(args: argparse.Namespace) -> dict:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


if __name__ == "__main__":
    cli.run(main, "benchmark_tower.py")
