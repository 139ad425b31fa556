"""Where the pictures of ScienceQA's problems lie: `5/image.png` as published, or `5.jpg`, in folders or in a tar file."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from llava_drip.images import MAX_BYTES, ImageError, decode_image, load_image
from llava_drip.instruct.scienceqa import Problem


class ProblemImages:
    """The pictures of some problems. All are looked for when it is made, and decoded when asked for."""

    def __init__(self, path: str | Path, problems: Sequence[Problem]):
        """path: a folder, at whose top or below it the pictures are, or a tar file of such names.

        Raises:
            ValueError: no such place; a problem whose picture is not there, named.
        """
        self.path = Path(path).expanduser()
        self.members: dict[str, tuple[int, int]] | None = None  # of a tar file: name → offset, bytes
        if self.path.is_dir():
            there = _by_problem(str(file.relative_to(self.path)) for file in self.path.rglob("*.*"))
        elif self.path.is_file():
            try:
                with tarfile.open(self.path, "r:") as tar:
                    self.members = {found.name: (found.offset_data, found.size) for found in tar if found.isfile()}
            except tarfile.TarError as error:
                raise ValueError(f"{self.path}: not a whole, uncompressed tar file ({error}) (--images)") from error
            there = _by_problem(self.members)
        else:
            raise ValueError(f"{self.path}: no such folder or tar file of pictures (--images)")
        self.names: dict[str, str] = {}
        for problem in problems:
            if problem.image is None:
                continue
            names = there.get(problem.id, [])
            own = [name for name in names if PurePosixPath(name).name == problem.image]
            loose = [name for name in names if PurePosixPath(name).stem == problem.id]
            if not own and not loose:
                like = f"{problem.id}/{problem.image}, {problem.id}.jpg or {problem.id}.png"
                raise ValueError(f"{self.path}: has no picture of problem {problem.id!r}; looked for {like}")
            self.names[problem.id] = (own or loose)[0]

    def load(self, problem: Problem) -> Image.Image:
        """The picture, RGB. ImageError names it."""
        name = self.names[problem.id]
        if self.members is None:
            return load_image(self.path / name)
        where, (offset, size) = f"{self.path}: {name}", self.members[name]
        if size > MAX_BYTES:
            raise ImageError(f"{where}: {size:,} bytes; at most {MAX_BYTES:,} are allowed")
        with self.path.open("rb") as tar:
            tar.seek(offset)
            return decode_image(tar.read(size), where)

    def files(self) -> Path | list[Path]:
        """What has to be hashed to know the pictures: the tar file, or each picture."""
        return self.path if self.members is not None else [self.path / name for name in self.names.values()]


def find_images(data: str | Path, split: str) -> Path:
    """The pictures that lie beside problems.json, in any of the usual places. ValueError lists these."""
    folder = Path(data).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    usual = (f"images_{split}.tar", "images.tar", f"images/{split}", "images", split)
    for name in usual:
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder}: has none of {', '.join(usual)}; say where the pictures are (--images)")


def _by_problem(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of files by the problem they belong to: `5.jpg` → 5, `5/image.png` → 5; sorted."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        found.setdefault(path.stem if path.stem.isdigit() else path.parent.name, []).append(name)
    return found
