"""Which directories hold a tower: in timm's format, in open_clip's or Hugging Face's, or within the folder of a run."""

from __future__ import annotations

import json
from pathlib import Path

TOWER_FILES = ("config.json", "model.safetensors")  # timm's format
RUN_TOWERS = ("best", "last", "tower")  # where a run of train_imagenet.py or train_clip.py keeps its tower


def tower_directory(name: str) -> Path | None:
    """The directory that a name means: itself, where it holds a tower or a model in open_clip's or Hugging Face's format, or the
    tower within a run's folder. None: the name is no directory.

    Raises:
        ValueError: a directory without a tower.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        return None
    for place in (path, *(path / part for part in RUN_TOWERS)):
        if all((place / file).is_file() for file in TOWER_FILES):
            return place
    if is_foreign_directory(path):
        return path
    raise ValueError(f"{name} holds no tower ({' and '.join(TOWER_FILES)}), nor do {', '.join(RUN_TOWERS)} in it")


def is_foreign_directory(path: Path) -> bool:
    """Whether a directory is in open_clip's format or Hugging Face's (config.json with a model_type), and no run's folder, in
    which a tower lies beside the CLIP."""
    if any((path / name / "config.json").is_file() for name in RUN_TOWERS):
        return False
    if (path / "open_clip_config.json").is_file():
        return True
    try:
        return "model_type" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
