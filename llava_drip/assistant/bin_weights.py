"""Weights of torch's older format (pytorch_model*.bin) → safetensors, the only one that is loaded here.

    from llava_drip.assistant.bin_weights import convert_weights
    convert_weights("lmsys/vicuna-7b-v1.5", "vicuna-7b-v1.5")

A .bin is a pickle, which may run code when it is read; torch's `weights_only` unpickler takes tensors and plain containers alone.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from llava_drip.assistant.names import BIN_WEIGHTS, model_directory
from llava_drip.cli import one_line
from llava_drip.files import whole_folder

_INDEX = "pytorch_model.bin.index.json"


def convert_weights(name: str | Path, output: str | Path) -> Path:
    """A model directory with safetensors, and all else that the original has in texts (configurations, tokenizer).

    One file is in memory at a time. The directory appears when it is whole.

    Args:
        name: a directory with pytorch_model*.bin, or a repository of the Hub that has them.
        output: a directory that is not there yet.
    Raises:
        ValueError: it is there; the original has no such weights, lacks a shard, or one cannot be read as tensors alone.
    """
    output = Path(output).expanduser()
    if output.exists():
        raise ValueError(f"--output {output}: exists already; remove it, or give another")
    source = model_directory(name, BIN_WEIGHTS)
    files = _files(source, str(name))
    with whole_folder(output) as partial:
        places, total = {}, 0
        for number, file in enumerate(tqdm(files, desc="converting", unit="file", disable=len(files) < 2), 1):
            state = {key: value.contiguous() for key, value in _read(file).items()}
            # Tied weights are two names of one storage, which safetensors has not; each gets its own.
            state = {key: value.clone() for key, value in state.items()}
            target = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
            save_file(state, partial / target, metadata={"format": "pt"})
            places |= dict.fromkeys(state, target)
            total += sum(value.nbytes for value in state.values())
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for file in sorted(source.iterdir()):
            if (
                file.is_file()
                and file.suffix in (".json", ".jinja", ".model", ".txt", ".tiktoken")
                and file.name != _INDEX
            ):
                shutil.copyfile(file, partial / file.name)
    return output


def _files(source: Path, name: str) -> list[Path]:
    """The files of weights, in order."""
    index = source / _INDEX
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: no index of weights ({one_line(error)})") from error
        missing = [shard for shard in shards if not (source / shard).is_file()]
        if missing:
            raise ValueError(
                f"{source}: {len(missing)} of {len(shards)} files of weights are missing, first {missing[0]}"
            )
        return [source / shard for shard in shards]
    files = sorted(source.glob(BIN_WEIGHTS[0]))
    if not files:
        raise ValueError(f"{name}: has no {BIN_WEIGHTS[0]}, nothing is to be converted")
    return files


def _read(file: Path) -> dict[str, torch.Tensor]:
    mapped = zipfile.is_zipfile(file)  # files of torch before 1.6 are none, and are read into memory
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # pickle's, zipfile's and torch's own
        raise ValueError(f"{file}: cannot be read as tensors alone: {one_line(error, 200)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file}: holds something other than named tensors")
    return state
