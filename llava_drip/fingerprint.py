"""What lies under a path, as a few digits: the same wherever it is moved, others when what a run reads of it changes."""

from __future__ import annotations

import hashlib
from pathlib import Path

# What is read of a model directory: weights, configurations, tokenizer (of any kind), chat templates, image processor.
_READ = (
    *(
        "*.safetensors",
        "*.json",
        "*.jinja",
        "*.model",
        "*.spm",
        "*.tiktoken",
        "*vocab*.txt",
        "*merges*.txt",
        "dict.txt",
    ),
    "additional_chat_templates/*.jinja",
)
_DIARY = ("trainer_state.json", "*_results.json")  # of the training that made it
_CHUNK = 1 << 22


def fingerprint(path: str | Path) -> str:
    """SHA-256 (first 16 hex digits) of a file's contents, or of the names and contents of the files in `model_files`.

    Every byte is read, about as long as it takes to load the model: of two assistants that differ in their projector alone, a
    sample of large files would miss that. A file's own name does not count, nor does the directory's.
    Raises:
        OSError: there is nothing at that path, or it cannot be read.
    """
    path = Path(path).expanduser()
    whole = path.is_dir()
    sha = hashlib.sha256()
    for file in model_files(path) if whole else [path]:
        sha.update(f"{file.relative_to(path).as_posix() if whole else ''}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as data:
            while chunk := data.read(_CHUNK):
                sha.update(chunk)
    return sha.hexdigest()[:16]


def model_files(directory: Path) -> list[Path]:
    """The files of a model directory that its answers depend on, sorted. Of no account: what is hidden, what the training
    kept for itself (trainer state, optimizer, checkpoints, logs, results), and notes."""
    found = {file for pattern in _READ for file in directory.glob(pattern)}
    left_out = {file for pattern in _DIARY for file in directory.glob(pattern)}
    return sorted(file for file in found - left_out if file.is_file() and not file.name.startswith("."))
