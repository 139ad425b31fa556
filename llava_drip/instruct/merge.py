"""A result that stands on a base → a whole assistant."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_drip.assistant.adapter import bases_of, is_adapted, load_adapted, read_base
from llava_drip.assistant.build import check_checkpoint, dtype_of
from llava_drip.assistant.processing import LlavaDripProcessor
from llava_drip.files import PARTIAL, fresh_folder
from llava_drip.instruct.result import put_in_place
from llava_drip.instruct.standing import write_projector


def merge(adapter: str | Path, output: str | Path, base: str | Path | None = None, dtype: str | None = None) -> str:
    """Write the whole assistant, as save_pretrained does; returns a line that says what was done.

    Args:
        adapter: directory of a LoRA run's result, or of one of its checkpoints.
        base: where its base lies now; None: where the adapter says.
        dtype: "float32", "bfloat16" or "float16", of what is written (the sums are made in fp32); None: the base's.
    Raises:
        ValueError: no such adapter, a base that is missing or changed, or an output directory that either of them needs or that
            holds something.
    """
    source, target = check_checkpoint(adapter, assistant=True), Path(output).expanduser()
    if not is_adapted(source):
        raise ValueError(f"{source}: a whole assistant already, there is nothing to merge")
    given = read_base(source, base, check=False)
    needed = [("the adapter", source), *(("its base", path) for path in (given.path, *bases_of(given.path)))]
    for name, path in needed:
        if target.resolve() == path.resolve():
            raise ValueError(f"--output {output}: is {name}, which the result would replace; give another")
    if target.exists() and not target.is_dir():
        raise ValueError(f"--output {output}: is a file; give a directory")
    held = sorted(path.name for path in target.iterdir() if path.name != PARTIAL) if target.exists() else []
    if held:  # a model, a run, or what has nothing to do with it
        raise ValueError(f"--output {output}: holds {held[0]} already; remove it, or give another")
    kind = getattr(torch, dtype) if dtype else dtype_of(given.path)
    model = load_adapted(source, torch.float32, base=base).to(kind)
    with fresh_folder(target / PARTIAL) as partial:
        model.save_pretrained(partial)
        LlavaDripProcessor.from_pretrained(source, local_files_only=True).save_pretrained(partial)
        write_projector(partial)
    put_in_place(partial, target)
    word = str(kind).removeprefix("torch.")
    quantised = f", which it was trained on in {given.quantization['bits']} bits" if given.quantization else ""
    return f"{target}: {source} merged into {given.path}{quantised}, {word}"
