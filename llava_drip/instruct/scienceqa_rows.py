"""ScienceQA's problems as rows of LLaVA's conversation format, with their pictures from its folders or from tars."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from llava_drip.files import whole, write_whole
from llava_drip.images import IMAGE_KEYS, ImageError, decode_image
from llava_drip.instruct.scienceqa import Problem, load_problems, prompt, reordered, target
from llava_drip.training.pictures import File, FolderOfPictures, Missing, Picture, tar_samples

# Beside problems.json: what other parts of the data come as, ScienceQA's zips or LLaVA's layout, a split's own folder.
_PLACES = ("images_{split}.tar", "images.tar", "images", "{split}")
_SPLITS = ("train", "val", "test")


def find_place(data: str | Path, split: str) -> Path:
    """The folder or tar of a split's pictures, in any of the usual places beside problems.json. ValueError lists these."""
    folder = Path(data).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    names = [place.format(split=split) for place in _PLACES]
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is None:
        raise ValueError(f"{folder}: has none of {', '.join(names)}; say where the pictures are (--images)")
    return found


class ScienceQAImages:
    """Where a problem's picture lies: below a folder as ID/image.png or ID.jpg, or so below SPLIT/ in it, or so in a tar.

    SPLIT/ID/image.png is how ScienceQA's zips unpack; ID is the problem's.
    """

    def __init__(self, place: str | Path):
        """place: a folder, or an uncompressed tar. ValueError: neither."""
        self.place = Path(place).expanduser()
        self.members: dict[str, Picture] | None = None
        if self.place.is_dir():
            self.folder = FolderOfPictures(self.place)
        elif self.place.is_file():
            samples = tar_samples(str(self.place))
            pictures = ((sample.key.removeprefix("./"), sample.picture()) for sample in samples)
            self.members = {key: picture for key, picture in pictures if not isinstance(picture, Missing)}
        else:
            raise ValueError(f"{self.place}: no such folder or tar of pictures")

    def find(self, problem: Problem) -> Picture:
        """The picture of a problem that has one. ValueError naming both: it is not there."""
        if self.members is None:
            found = self.folder.find(_names(problem.id, problem.image))
        else:
            keys = _names(problem.id, os.path.splitext(problem.image)[0])
            found = next((self.members[key] for key in keys if key in self.members), None)
        if found is None:
            raise ValueError(
                f"problem {problem.id!r}: no picture {problem.id}/{problem.image} or {problem.id}.* in {self.place}"
            )
        return found


def _names(id: str, image: str) -> list[str]:
    """Below a folder or in a tar, the likeliest first."""
    names = [f"{id}/{image}", id]
    return [f"{split}/{name}" for name in names for split in _SPLITS] + names


@dataclass(frozen=True)
class Converted:
    """rows, pictures: how many. data_path, image_folder: for the stage programs; image_folder None: no row has a picture."""

    rows: int
    pictures: int
    data_path: Path
    image_folder: Path | None


def to_row(problem: Problem, format: str, image: str | None) -> dict:
    """One row, with the problem's id. image: path of its picture below the image folder; None asks without the picture."""
    turns = (("human", prompt(problem, format, image is not None)), ("gpt", target(problem, format)))
    row = {"id": problem.id, "conversations": [{"from": role, "value": text} for role, text in turns]}
    return row if image is None else {**row, "image": image}


def convert(
    source: Path,
    split: str,
    format: str,
    output: Path,
    images: str | None = None,
    pictures: bool = True,
    orders: int = 1,
    seed: int = 0,
) -> Converted:
    """Writes `output`/llava_SPLIT_FORMAT.json, named as LLaVA does, and `output`/images of pictures that lie in a tar.

    Several splits and formats may share an `output`: pictures that are there are not written again. The .json comes last, so
    that there is none until all is well; pictures that a stopped call has left are of use to the next.

    Args:
        source: the folder of problems.json and pid_splits.json.
        images: folder or tar of the pictures; default: `find_place`, which then must find one.
        pictures: False asks every problem without its picture.
        orders: each problem so many times: as it is, and with its choices in random orders, under the ids 5, 5-1, 5-2, ...
        seed: of those orders.
    Raises:
        ValueError: naming the problem, file or flag that cannot be used. Pictures out of a tar are decoded once.
    """
    name = f"llava_{split}_{format}.json"
    if (output / name).exists():
        raise ValueError(f"{output}: there is a {name} in it already")
    problems = load_problems(source, split)
    some = pictures and any(problem.image for problem in problems)
    place = ScienceQAImages(images or find_place(source, split)) if some else None
    rows = []
    for problem in tqdm(problems, desc="problems", unit=""):
        found = place.find(problem) if place and problem.image else None
        image = found and _image_of(problem, found, place, output / "images")
        draw = random.Random(f"{seed} {problem.id}")
        for order in range(orders):
            other = replace(reordered(problem, draw), id=f"{problem.id}-{order}") if order else problem
            rows.append(to_row(other, format, image))
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / name, json.dumps(rows, ensure_ascii=False, indent=1))
    folder = None if place is None else place.place if place.members is None else output / "images"
    return Converted(len(rows), sum("image" in row for row in rows), output / name, folder)


def _image_of(problem: Problem, found: Picture, place: ScienceQAImages, folder: Path) -> str:
    """The picture's path below the image folder. One that lies in a tar is copied to `folder`, its bytes as they are."""
    if isinstance(found, File):
        return os.path.relpath(found.path, place.place)
    suffix = f".{found.name.rpartition('.')[2].lower()}"
    assert suffix[1:] in IMAGE_KEYS, found
    name, data = f"{problem.id}/{os.path.splitext(os.path.basename(problem.image))[0]}{suffix}", found.read()
    path = folder / name
    if path.exists():
        if path.read_bytes() != data:
            raise ValueError(f"{path}: is there already, and is not that of {place.place}; choose another --output")
        return name
    try:
        decode_image(data, name)
    except ImageError as error:
        raise ValueError(f"{place.place}: problem {problem.id!r}: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        partial.write_bytes(data)
    return name
