"""Questions whose pictures are shown, with the segments that the model saw: of the run's own checkpoint and pictures.

Both are known by their hashes. A picture folder or a checkpoint that is another by now is not used, and the page says so.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from llava_drip.draw.overlay import draw_segments, enlarge
from llava_drip.engine import Engine
from llava_drip.evaluation.science_qa_images import files_of, pictures_of
from llava_drip.fingerprint import fingerprint
from llava_drip.record import hashed
from llava_drip.reports.evaluation.paired import Records, refusals
from llava_drip.reports.evaluation.records import Record, place_of, pope_questions, science_qa_problems
from llava_drip.reports.evaluation.results import Result
from llava_drip.training.pictures import File, Picture

_LONG_SIDE = 448  # pixels of a picture on the page
_QUALITY = 85


@dataclass(frozen=True)
class Drawing:
    """A picture for the page.

    Attributes:
        url: data URL of a JPEG file.
        width, height: pixels.
        alt: what is to be seen, for who does not see it.
        caption: how many tokens it became.
    """

    url: str
    width: int
    height: int
    alt: str
    caption: str


@dataclass(frozen=True)
class Sample:
    """A question that all runs of a benchmark have answered. picture: as it is; None: not there. views: a run, its record, and
    the picture as it saw it, if that can be drawn."""

    key: str
    question: str
    expected: str | None
    picture: Drawing | None
    views: tuple[tuple[Result, Record, Drawing | None], ...]


def usable(
    results: Sequence[Result], records: Sequence[Records]
) -> tuple[list[tuple[Result, Mapping[str, Record]]], list[str]]:
    """The results that can be shown beside each other, with their records, and why others are not, a sentence each.

    Left out is what has no records, and what is not to be set beside the first: its questions may be others by the same names.
    """
    found, said = [], []
    for result, own in zip(results, records):
        why = [f"{result.label} is left out here: {reason}" for reason in refusals(results[0], result)]
        if isinstance(own, str):
            why = [f"{result.label}: {own}."]
        said += why
        found += [] if why else [(result, own)]
    return found, said


def choose(records: Sequence[Mapping[str, Record]], count: int) -> list[str]:
    """Keys of so many questions that every run has answered, and some run with a picture: as far apart in their order as can be,
    whatever was answered."""
    common = [key for key in records[0] if all(key in own for own in records)]
    shown = [key for key in common if any(own[key].image for own in records)]
    count = min(count, len(shown))
    return [shown[number * len(shown) // count] for number in range(count)]


def take(
    results: Sequence[Result],
    records: Sequence[Mapping[str, Record]],
    count: int,
    folders: Sequence[Path] = (),
    checkpoints: Sequence[Path] = (),
    device: str | torch.device | None = None,
) -> tuple[list[Sample], list[str]]:
    """Samples of results of one benchmark, and what is missing from them, a sentence each.

    Args:
        records: of each result, see records.read_records.
        folders: of pictures, tried before the one that a result names.
        checkpoints: folders of assistants, tried before the one that a result names.
        device: where the assistants run; default cuda where there is one, else cpu.
    Raises:
        ImageError: a picture that has the right hash cannot be read.
    """
    keys, said = choose(records, count), []
    if not keys:
        return [], ["There is no question with a picture that all runs have answered."]
    drawings: list[dict[str, Drawing]] = []
    plain: dict[str, Drawing] = {}
    for result, own in zip(results, records):
        if not any(own[key].image for key in keys):
            said.append(f"{result.label} was asked without the pictures.")
            drawings.append({})
            continue
        try:
            pictures = _pictures(result, own, keys, folders)
        except ValueError as error:
            said.append(f"{result.label}: no pictures: {error}.")
            drawings.append({})
            continue
        try:
            engine = _engine(result, own[keys[0]], checkpoints, device)
        except ValueError as error:
            said.append(f"{result.label}: no segments: {error}.")
            engine = None
        images = {key: pictures[key].load() for key in keys}
        if not plain:
            plain = {key: _plain(image) for key, image in images.items()}
        drawings.append({} if engine is None else {key: _drawn(engine, images[key], own[key]) for key in keys})
    samples = []
    for key in keys:
        views = [(result, own[key], of.get(key)) for result, own, of in zip(results, records, drawings)]
        samples.append(Sample(key, views[0][1].question, views[0][1].expected, plain.get(key), tuple(views)))
    return samples, said


def _pictures(
    result: Result, records: Mapping[str, Record], keys: Sequence[str], folders: Sequence[Path]
) -> dict[str, Picture]:
    """Key → picture. ValueError: no folder has those that the run was shown."""
    places, said = list(folders), ""
    try:
        places.append(place_of(result, (result.run.get("files") or {}).get("images"), "pictures"))
    except ValueError as error:
        said = str(error)
    recorded = ((result.run.get("data") or {}).get("images") or {}).get("sha256")
    if recorded is None:
        raise ValueError(f"{result.path} records no hash of them")
    for place in places:
        try:
            found, files = _found_in(result, records, place)
            if hashed(files)["sha256"] == recorded:
                return {key: found[key] for key in keys}
            said = f"those in {place} are others than the run was shown"
        except (ValueError, OSError) as error:
            said = str(error)
    raise ValueError(f"{said} (--images)")


def _found_in(result: Result, records: Mapping[str, Record], place: Path) -> tuple[dict[str, Picture], object]:
    """Key → picture, and the files that the run has hashed. ValueError or OSError: they are not there."""
    if result.benchmark.program == "eval/science_qa.py":
        pictures = pictures_of(place, science_qa_problems(result))
        return pictures, files_of(place, pictures)
    names = [record.image for record in records.values()]
    if result.benchmark.program == "eval/pope.py":  # hashes those of questions beyond --limit too
        names = [question["image"] for own in pope_questions(result).values() for question in own]
    return {key: File(str(place / own.image)) for key, own in records.items()}, [place / name for name in names]


def _engine(result: Result, record: Record, checkpoints: Sequence[Path], device) -> Engine:
    """The run's assistant, at its compression and dtype. ValueError: it is not there, or another by now."""
    recorded = result.run.get("checkpoint") or {}
    if not recorded.get("sha256"):
        raise ValueError("the result records no checkpoint")
    places = [*checkpoints, *([Path(recorded["path"])] if recorded.get("path") else [])]
    place = next((place for place in places if place.is_dir() and fingerprint(place) == recorded["sha256"]), None)
    if place is None:
        tried = ", ".join(map(str, places)) or "no folder is recorded"
        raise ValueError(f"its checkpoint {recorded['sha256']} is not there any more ({tried}) (--checkpoints)")
    dtype = (record.metadata.get("settings") or {}).get("dtype")
    return Engine.load(place, device, dtype, result.run.get("compression"))


def _plain(image: Image.Image) -> Drawing:
    size, image = image.size, image.copy()
    image.thumbnail((_LONG_SIDE, _LONG_SIDE))
    return _drawing(image, "The picture that was asked about", f"{size[0]} × {size[1]} pixels")


def _drawn(engine: Engine, image: Image.Image, record: Record) -> Drawing:
    tokens, view = record.visual_tokens, engine.view(image)
    count, segments, grid_size = engine.segments(image)
    view.thumbnail((_LONG_SIDE, _LONG_SIDE))
    caption = f"{count} visual tokens of {engine.patches} patches"
    if tokens is not None and tokens != count:  # another machine rounds in another way
        caption += f" ({tokens} in the run)"
    if segments is None:
        return _drawing(
            enlarge(view, grid_size)[0], "What the model saw of the picture; its tokens are no segments", caption
        )
    drawn = draw_segments(view, segments, grid_size, fill="tint")
    return _drawing(drawn, f"What the model saw of the picture, cut into {count} segments", caption)


def _drawing(image: Image.Image, alt: str, caption: str) -> Drawing:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=_QUALITY)
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Drawing(url, *image.size, alt, caption)
