"""Pictures of shapes as a folder, tars or parquet; the trainer in this process and in others; what it wrote."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image, ImageDraw
from pyarrow import parquet

from llava_drip.classification import distill_arguments
from llava_drip.classification.arguments import parse
from llava_drip.classification.distill import distill
from llava_drip.classification.train import train

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ("ellipse", "rectangle")
COLOURS = {"blue": (60, 70, 200), "green": (60, 170, 70), "red": (190, 60, 60)}
NAMES = [f"{colour}_{shape}" for colour in COLOURS for shape in SHAPES]  # in the order of sorted folders
MODEL = "drip_mini_patch8_64_4x"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--"]
# The defaults are for GPUs and long runs.
SHORT = ["--device=cpu", "--precision=fp32", "--workers=0", "--warmup-epochs=0", "--lr=1e-3", "--log-every-n-steps=1"]


def picture(label: int, number: int, size: int = 72) -> bytes:
    """A JPEG of a coloured shape on noise."""
    rng = np.random.default_rng([label, number])
    image = Image.fromarray(rng.integers(60, 190, (size, size, 3), dtype=np.uint8))
    colour, shape = NAMES[label].split("_")
    left, top = rng.integers(2, size // 2, 2).tolist()
    getattr(ImageDraw.Draw(image), shape)((left, top, left + size // 3, top + size // 3), fill=COLOURS[colour])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def samples(count: int, first: int = 0) -> list[tuple[bytes, int]]:
    return [(picture(i % len(NAMES), first + i), i % len(NAMES)) for i in range(count)]


def write_folder(folder: Path, pictures: list[tuple[bytes, int]]) -> Path:
    for i, (content, label) in enumerate(pictures):
        path = folder / NAMES[label] / f"{i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_tar(path: Path, pictures: list[tuple[bytes, int | None]], first: int = 0) -> None:
    """A webdataset shard; a label of None has no file."""
    with tarfile.open(path, "w") as tar:
        for i, (content, label) in enumerate(pictures, first):
            for ending, data in (("jpg", content), ("cls", None if label is None else str(label).encode())):
                if data is not None:
                    member = tarfile.TarInfo(f"{i:05}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_shards(folder: Path, pictures: list[tuple[bytes, int]], shards: int) -> Path:
    """shard-N.tar, their sizes.json, and names.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for n in range(shards):
        part = pictures[n::shards]
        write_tar(folder / f"shard-{n}.tar", part, first=1000 * n)
        sizes[f"shard-{n}.tar"] = len(part)
    (folder / "sizes.json").write_text(json.dumps(sizes))
    (folder / "names.txt").write_text("\n".join(NAMES))
    return folder


def write_parquet(path: Path, pictures: list[tuple[bytes, object]]) -> Path:
    """As Hugging Face's `datasets` writes it, names of the classes included."""
    table = pa.table(
        {"image": [{"bytes": content, "path": None} for content, _ in pictures], "label": [x for _, x in pictures]}
    )
    features = {"label": {"names": NAMES, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=16)
    return path


def fresh() -> None:
    """Accelerate keeps one state for a process: as if this were a new one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(*flags: str) -> Path:
    """scripts/train_imagenet.py in this process; its output folder."""
    fresh()
    flags = [str(flag) for flag in flags]
    return train(parse(flags, "train_imagenet.py", "help"), ["train_imagenet.py", *flags])


def run_distillation(*flags: str) -> Path:
    """scripts/distill_tower.py in this process; its output folder."""
    fresh()
    flags = [str(flag) for flag in flags]
    return distill(distill_arguments.parse(flags, "distill_tower.py", "help"), ["distill_tower.py", *flags])


def start(*command: str, **environment: str) -> subprocess.Popen:
    """A program of the repository in its own process, one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=env, **options)


def finished(process: subprocess.Popen) -> subprocess.CompletedProcess:
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def program(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return finished(start(*command, **environment))


def killed(where: str, flags: list[str]) -> None:
    """A run in a process of its own that is killed there; forked from one that has imported everything, for speed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llava_drip.classification.distill"])
    from .killed_run import main

    process = context.Process(target=main, args=(where, [str(flag) for flag in flags]))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def rows(output: Path, name: str = "steps") -> list[dict]:
    return [json.loads(line) for line in (Path(output) / f"{name}.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in rows(output)]


def weights(output: Path, tower: str = "last") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(output) / tower / "model.safetensors")


def without_times(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in TIMES}


TIMES = ("step_seconds", "mean_step_seconds", "images_per_second", "peak_memory_gib", "mean_peak_memory_gib")
