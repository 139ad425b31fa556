"""What --train-data and --val-data name: an image folder, Hugging Face parquet files or webdataset shards, and their classes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from llava_drip.images import load_image
from llava_drip.training import units
from llava_drip.training.class_names import read_names

LABEL_KEYS = ("cls", "label")


@dataclass
class Source:
    """One set of labelled pictures. `names` are the classes by label, None where only their number is known."""

    data: str
    kind: str
    names: list[str] | None
    folder: ImageFolder | Unlabelled | None = None
    units: list[str] | None = None
    label_key: str | None = None

    @property
    def num_classes(self) -> int | None:
        return None if self.names is None else len(self.names)


class Unlabelled:
    """The pictures in a folder and all folders below it, as an ImageFolder has them; the label is 0."""

    def __init__(self, folder: Path):
        """ValueError: there is none."""
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        if not paths:
            raise ValueError(f"{folder}: no picture in it, nor in a folder below it")
        self.samples = [(str(path), 0) for path in paths]
        self.classes: list[str] = []


def open_source(
    flag: str, data: str, kind: str = "auto", classes: str | None = None, label_key: str | None = None
) -> Source:
    """What `data` names.

    Raises:
        ValueError: with the flag in front: nothing there, no class, or another number of classes than the file has names.
    """
    path = Path(data).expanduser()
    kind = _kind_of(path) if kind == "auto" else kind
    try:
        names = read_names(classes) if classes else None
    except ValueError as error:
        raise ValueError(f"--classes: {error}") from error
    try:
        if kind == "folder":
            if label_key is not None:
                raise ValueError(f"{data}: a folder's labels are its sub-folders; leave out --label-key")
            folder = ImageFolder(str(path), loader=load_image)
            if names is not None and len(names) != len(folder.classes):
                raise ValueError(f"{data}: {len(folder.classes)} class folders, but --classes has {len(names)} names")
            return Source(data, kind, names or folder.classes, folder=folder)
        found = units.expand(data)
    except (ValueError, OSError) as error:  # ImageFolder's own words name the folder
        raise ValueError(f"{flag}: {error}") from error
    if names is None and kind == "parquet":
        names = _names_in_parquet(found[0].rpartition("#")[0], label_key)
    return Source(data, kind, names, units=found, label_key=label_key)


def open_pictures(flag: str, data: str, kind: str = "auto") -> Source:
    """The same without labels, whether there are any or not.

    Raises:
        ValueError: with the flag in front: nothing there.
    """
    path = Path(data).expanduser()
    kind = _kind_of(path) if kind == "auto" else kind
    try:
        if kind == "folder":
            return Source(data, kind, None, folder=Unlabelled(path))
        return Source(data, kind, None, units=units.expand(data))
    except (ValueError, OSError) as error:
        raise ValueError(f"{flag}: {error}") from error


def _kind_of(path: Path) -> str:
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        return "parquet"
    return "folder" if path.is_dir() and not any(path.glob("*.tar")) else "webdataset"


def check_same_classes(train: Source, val: Source) -> None:
    """ValueError naming a class that only one of the two has, or that has another label in each."""
    pairs = [(train.names, val.names)]
    if train.folder and val.folder:  # --classes may have renamed both
        pairs.append((train.folder.classes, val.folder.classes))
    for ours, theirs in pairs:
        if ours == theirs:
            continue
        for names, others, has, lacks in (
            (ours, theirs, "--train-data", "--val-data"),
            (theirs, ours, "--val-data", "--train-data"),
        ):
            for name in names or ():
                if name not in (others or ()):
                    raise ValueError(f"--val-data: class {name!r} is in {has}, but not in {lacks}")
        raise ValueError("--val-data: has the classes of --train-data in another order")


def _names_in_parquet(path: str, label_key: str | None) -> list[str] | None:
    """Names of Hugging Face's ClassLabel, which `datasets` keeps in the file's schema."""
    from pyarrow import parquet  # units.expand has found it

    metadata = json.loads((parquet.read_schema(path).metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    for key in [label_key] if label_key else LABEL_KEYS:
        if "names" in features.get(key, {}):
            return list(features[key]["names"])
    return None
