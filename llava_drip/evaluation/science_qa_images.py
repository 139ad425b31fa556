"""The pictures of the problems that are asked: found before the first question, read when it is their turn."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from llava_drip.instruct.scienceqa import Problem
from llava_drip.instruct.scienceqa_rows import ScienceQAImages
from llava_drip.training.pictures import File, Picture


def pictures_of(place: str | Path, problems: Iterable[Problem]) -> dict[str, Picture]:
    """id → picture, of the problems that have one. ValueError names the first whose picture is not there, or --images."""
    try:
        images = ScienceQAImages(place)
        return {problem.id: images.find(problem) for problem in problems if problem.image is not None}
    except ValueError as error:
        raise ValueError(f"{error} (--images)") from None


def check_pictures(pictures: Iterable[Picture]) -> None:
    """Decodes each once: a broken one is named (ImageError, BadSample) now, not after an hour of answers."""
    for picture in tqdm(list(pictures), desc="pictures", unit="", leave=False):
        picture.load()


def files_of(place: str | Path, pictures: dict[str, Picture]) -> Path | list[Path]:
    """What to hash to know the pictures: each file, or the tar."""
    files = [Path(picture.path) for picture in pictures.values() if isinstance(picture, File)]
    return files or Path(place)
