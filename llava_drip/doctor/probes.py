"""Probes: each library does a tiny piece of its real work. `run_probes` runs this file in a process for each, for a broken
extension may crash it.

A probe yields (section, name, state, value, advice), as checks.Check has them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

OK, NOTE, PROBLEM = "ok", "note", "problem"  # checks.py's, which this file does not see as a program
TIMEOUT = 180.0  # seconds of a probe that hangs; an idle machine needs 3 to 10
_MARK = "llava_drip.doctor "  # before the line of JSON, whatever else a library prints


def probe_torch() -> Iterator[tuple[str, ...]]:
    """Version, devices, NCCL."""
    import torch

    built = (
        f"for CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"for ROCm {torch.version.hip}"
        if torch.version.hip
        else "for CPUs"
    )
    cuda = torch.cuda.is_available()
    yield ("devices", "torch", OK, f"{torch.__version__}, built {built}, {torch.get_num_threads()} threads")
    if not cuda:
        yield (
            "devices",
            "CUDA",
            NOTE,
            "torch sees no GPU",
            "if nvidia-smi lists one, install a torch for its driver: pytorch.org/get-started",
        )
    for i in range(torch.cuda.device_count()):
        free, total = (value / 2**30 for value in torch.cuda.mem_get_info(i))
        major, minor = torch.cuda.get_device_capability(i)
        bf16 = "bf16" if major >= 8 else "no bf16: give --fp16 true in place of --bf16"
        yield (
            "devices",
            f"cuda:{i}",
            OK if major >= 8 else NOTE,
            f"{torch.cuda.get_device_name(i)}, {total:.0f} GiB ({free:.0f} free), {major}.{minor}, {bf16}",
        )
    for backend in ("nccl", "gloo"):
        there = torch.distributed.is_available() and getattr(torch.distributed, f"is_{backend}_available")()
        version = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" and there and cuda else ""
        needed = backend == "gloo" or cuda
        yield (
            "devices",
            backend,
            OK if there else PROBLEM if needed else NOTE,
            f"{version or 'there'}" if there else "not in this torch",
        )


def probe_attention() -> Iterator[tuple[str, ...]]:
    """Kernels of scaled_dot_product_attention, and the way that packed tokens take, forward and backward."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from llava_drip.tokens import Packing
    from llava_drip.towers.attention import packed_attention, ragged_way

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    half = torch.bfloat16 if not cuda or torch.cuda.is_bf16_supported() else torch.float16
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ):
        works = []
        for dtype in (half, torch.float32):
            x = torch.randn(1, 2, 16, 64, device=device, dtype=dtype, requires_grad=True)
            with contextlib.suppress(RuntimeError), sdpa_kernel([backend]):
                scaled_dot_product_attention(x, x, x, is_causal=True).sum().backward()
                works.append(str(dtype).removeprefix("torch."))
        needed = backend is SDPBackend.MATH
        state = OK if works or not needed else PROBLEM
        yield (
            "attention",
            f"SDPA {backend.name.removesuffix('_ATTENTION').lower()}",
            state,
            ", ".join(works) or f"not on this {device}",
        )
    packing = Packing.of(torch.tensor([70, 20, 30], device=device))
    for dtype in (half, torch.float32):
        q = torch.randn(packing.total, 4, 64, device=device, dtype=dtype, requires_grad=True)
        name = f"packed tokens, {str(dtype).removeprefix('torch.')}"
        try:
            out = packed_attention(q, q, q, packing, causal=True)
            out.sum().backward()
        except RuntimeError as error:
            yield (
                "attention",
                name,
                PROBLEM,
                f"{ragged_way(q, packing, 0.0)}: fails, {str(error).splitlines()[0]}",
                "train with --packing false",
            )
            continue
        rows = [t.transpose(0, 1)[None].float() for t in q.detach().split(packing.lengths)]
        wanted = torch.cat([scaled_dot_product_attention(r, r, r, is_causal=True)[0].transpose(0, 1) for r in rows])
        off = float((out.detach().float() - wanted).abs().max())
        right = off < (0.05 if dtype is half else 1e-4)
        yield (
            "attention",
            name,
            OK if right else PROBLEM,
            f"{ragged_way(q, packing, 0.0)}, off by {off:.0e}",
            "" if right else "report this",
        )


def probe_compile() -> Iterator[tuple[str, ...]]:
    import torch

    start = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.linspace(-1, 1, 64, device=device)
    try:
        done = torch.compile(lambda x: torch.sin(x) * 2 + x)(x)
        right = torch.allclose(done, torch.sin(x) * 2 + x, atol=1e-5)
    except Exception as error:  # torch's many
        yield (
            "compilers",
            "torch.compile",
            NOTE,
            f"fails: {_line(error)}",
            "leave out --torch_compile; it needs a C++ compiler (and triton on a GPU)",
        )
        return
    yield ("compilers", "torch.compile", OK if right else NOTE, f"works on {device} ({time.monotonic() - start:.0f} s)")


def probe_flash_attn() -> Iterator[tuple[str, ...]]:
    if importlib.util.find_spec("flash_attn") is None:
        yield ("attention", "flash-attn", OK, "not installed, and not needed: torch's own kernels are used")
        return
    import torch

    if not torch.cuda.is_available():
        yield ("attention", "flash-attn", NOTE, "installed, but there is no GPU", "pip uninstall flash-attn")
        return
    from flash_attn import flash_attn_func

    q = torch.randn(1, 16, 2, 64, device="cuda", dtype=torch.float16)
    good = bool(flash_attn_func(q, q, q, causal=True).isfinite().all())
    yield ("attention", "flash-attn", OK if good else NOTE, "works; packed tokens use torch's own all the same")


def probe_bitsandbytes() -> Iterator[tuple[str, ...]]:
    """A product with a matrix in NF4, doubly quantised, as QLoRA's is; and a step of 8-bit AdamW where there is a GPU."""
    import torch
    from bitsandbytes import functional, matmul_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    weight, x = torch.randn(128, 128, device=device), torch.randn(4, 128, device=device)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    off = float((matmul_4bit(x, packed.t(), quant_state=state) - x @ weight.t()).norm() / (x @ weight.t()).norm())
    good = off < 0.2  # the error of 4 bits is about 0.1
    yield (
        "quantisation",
        "bitsandbytes nf4",
        OK if good else PROBLEM,
        f"works on {device}, off by {off:.0%}",
        "" if good else "reinstall bitsandbytes",
    )
    if device == "cuda":
        from bitsandbytes.optim import AdamW8bit

        p = torch.nn.Parameter(torch.ones(8192, device=device))
        p.grad = torch.ones_like(p)
        AdamW8bit([p], lr=0.1).step()
        moved = bool((p < 1).all())
        yield (
            "quantisation",
            "bitsandbytes AdamW8bit",
            OK if moved else PROBLEM,
            "works" if moved else "moves nothing",
        )


def probe_deepspeed() -> Iterator[tuple[str, ...]]:
    """Which of its operators can be built here."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from deepspeed.ops import op_builder

    yield ("DeepSpeed", "deepspeed", OK, f"{deepspeed.__version__} on {os.environ['DS_ACCELERATOR']}")
    for name, what in (
        ("CPUAdamBuilder", "Adam of ZeRO-offload"),
        ("FusedAdamBuilder", "fused Adam"),
        ("AsyncIOBuilder", "offload to NVMe"),
    ):
        builder = getattr(op_builder, name, None)
        with contextlib.suppress(Exception):
            builder = builder() if builder is not None else None
        try:
            fits = builder is not None and bool(builder.is_compatible(verbose=False))
            reason = "can be built here" if fits else getattr(builder, "error_log", None) or "cannot be built here"
        except Exception as error:  # of a missing compiler or toolkit
            fits, reason = False, _line(error)
        yield ("DeepSpeed", what, OK if fits else NOTE, str(reason)[:160])


PROBES: dict[str, tuple[Callable[[], Iterator[tuple[str, ...]]], str | None]] = {
    "torch": (probe_torch, "torch"),
    "attention": (probe_attention, "torch"),
    "flash_attn": (probe_flash_attn, "torch"),
    "bitsandbytes": (probe_bitsandbytes, "bitsandbytes"),
    "deepspeed": (probe_deepspeed, "deepspeed"),
    "compile": (probe_compile, "torch"),
}  # name → probe, and the package without which it is left out
QUICK = tuple(name for name in PROBES if name != "compile")  # which takes half a minute of a CPU
TRAINING = ("bitsandbytes", "deepspeed")  # probes of what only the extra `train` asks for


def run_probes(
    names: Iterable[str] = QUICK, timeout: float = TIMEOUT, optional: Iterable[str] = ()
) -> list[tuple[str, ...]]:
    """What the probes yield, each in a process of its own, all at once; those whose package is missing are left out.

    optional: probes whose problems are notes.
    """
    names = [name for name in names if importlib.util.find_spec(PROBES[name][1]) is not None]
    with ThreadPoolExecutor(len(names) or 1) as pool:
        found = dict(zip(names, pool.map(lambda name: _run(name, timeout), names)))
    for name in set(optional) & set(found):
        found[name] = [(*line[:2], NOTE if line[2] == PROBLEM else line[2], *line[3:]) for line in found[name]]
    return [line for lines in found.values() for line in lines]


def _run(name: str, timeout: float) -> list[tuple[str, ...]]:
    # Nothing is fetched: bitsandbytes asks the Hub for a CPU kernel, which takes a minute where it cannot be reached.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, name]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return [("probes", name, NOTE, f"gave no answer within {timeout:g} s", "try again when the machine is idle")]
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return [tuple(found) for found in json.loads(line.removeprefix(_MARK))]
    if done.returncode < 0:
        what = f"crashed ({signal.Signals(-done.returncode).name})"
    else:
        what = f"fails: {(done.stderr.strip().splitlines() or ['says nothing'])[-1][:200]}"
    package = PROBES[name][1]
    return [
        ("probes", name, NOTE if name == "flash_attn" else PROBLEM, what, f"pip install --force-reinstall {package}")
    ]


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder, whose names are none of the libraries'
    print(f"{_MARK}{json.dumps(list(PROBES[sys.argv[1]][0]()))}")
