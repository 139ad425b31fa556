"""Data sets as a user asks for them: what is there already, what is missing and whether it fits, the download, the checks."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from llava_drip.cli import one_line
from llava_drip.datasets import http, hub
from llava_drip.datasets.counts import bytes_below, count_pictures, count_rows, named_pictures
from llava_drip.datasets.registry import DataSet, Source
from llava_drip.datasets.unpack import is_unpacked, marker_of, unpack

SPARE = 10**9  # bytes to leave free on the disk


@dataclass(frozen=True)
class Place:
    """Where to put data sets, and how to reach them.

    folder: --dir. endpoint: of a mirror of the Hugging Face Hub. mirrors: (beginning of an address, what to put for it).
    accept_changes: take files whose size, checksum or rows are not the published ones, with a word on it.
    keep_zips: leave them after they are unpacked. backoff: see http.fetch.
    """

    folder: Path
    endpoint: str | None = None
    mirrors: tuple[tuple[str, str], ...] = ()
    accept_changes: bool = False
    keep_zips: bool = False
    backoff: float = 1.0

    def address(self, url: str) -> str:
        for begins, instead in self.mirrors:
            if url.startswith(begins):
                return instead + url.removeprefix(begins)
        return url


@dataclass(frozen=True)
class Step:
    """A file of the plan. state: "there", "to unpack", "begun" or "missing". download: bytes to come; room: bytes to stay."""

    dataset: DataSet
    source: Source
    state: str
    download: int
    room: int


def plan(datasets: list[DataSet], place: Place) -> list[Step]:
    """What there is to do, in order; nothing is downloaded. A file that two data sets share is there once."""
    steps, seen = [], set()
    for dataset in datasets:
        for source in dataset.sources:
            if source.place not in seen:
                seen.add(source.place)
                steps.append(_step(dataset, source, place))
    return steps


def _step(dataset: DataSet, source: Source, place: Place) -> Step:
    target = place.folder / source.place
    part = http.part_of(target)
    begun = part.stat().st_size if part.is_file() else bytes_below(hub.aside_of(target))
    room = left = max(0, source.size - begun)
    state = "begun" if begun else "missing"
    if source.unzip:
        # Of pictures, a zip is about as large as what is in it.
        room = max(0, source.size - bytes_below(place.folder / source.unzip.pictures))
        if is_unpacked(target) or (not target.is_file() and _unpacked_by_hand(source, place)):
            state, left, room = "there", 0, 0
        elif target.is_file():
            state, left = "to unpack", 0
    elif source.each:
        held = bytes_below(target)
        room = left = max(0, source.size - held)
        state = "begun" if held else "missing"
        if _has_each(source, place):
            state, left, room = "there", 0, 0
    elif target.is_file():
        state, left, room = "there", 0, 0
    return Step(dataset, source, state, left, room)


def _has_each(source: Source, place: Place) -> bool:
    """Whether all pictures of a list are there. False where it cannot be read: what is wrong with it is said by `run`."""
    listing = place.folder / source.each
    try:
        return listing.is_file() and all(
            (place.folder / source.place / name).is_file() for name in named_pictures(listing)
        )
    except ValueError:
        return False


def _unpacked_by_hand(source: Source, place: Place) -> bool:
    """Whether a zip's folder has all its pictures. False where no number is published: it could be half of them."""
    count = source.unzip.count
    return count is not None and count_pictures(place.folder / source.unzip.pictures) >= count


def check_room(steps: list[Step], place: Place) -> int:
    """Bytes that the plan needs at its worst moment: all that stays, and the largest zip beside it (or all, if they are kept).

    Raises:
        ValueError: they are not free where `place` is.
    """
    zips = [step.download for step in steps if step.source.unzip and step.state != "there"]
    needed = sum(step.room for step in steps) + (sum(zips) if place.keep_zips else max(zips, default=0))
    above = place.folder.absolute()
    while not above.exists():
        above = above.parent
    free = shutil.disk_usage(above).free
    if needed + SPARE > free:
        raise ValueError(
            f"{place.folder}: about {needed / 1e9:.1f} GB are needed, {max(0, free - SPARE) / 1e9:.1f} GB are free there; "
            "choose another --dir or fewer data sets"
        )
    return needed


def run(steps: list[Step], place: Place) -> list[str]:
    """Carries out a plan. One file that cannot be had does not keep the others.

    Returns:
        What is wrong, a line each: files that could not be had, with what to put where by hand, and counts that are not the
        published ones. Empty: all is there.
    """
    problems = []
    for step in steps:
        try:
            if step.source.each:
                _fetch_each(step.source, place)
            else:
                _fetch_one(step, place)
            problem = check_counts(step.source, place)
        except (http.Unreachable, http.Changed) as error:
            problems.append(f"{step.source.place}: {error}. {by_hand(step.source, place)}")
            continue
        except ValueError as error:
            problems.append(str(error))
            continue
        except OSError as error:  # a full disk, say; or huggingface_hub's, of a file that came with another length
            problems.append(
                f"{step.source.place}: {one_line(error, 200)}; start this command again when that is mended"
            )
            continue
        if problem and place.accept_changes:
            print(f"{problem}: accepted")
        elif problem:
            problems.append(problem)
    return problems


def _fetch_one(step: Step, place: Place) -> None:
    source, target = step.source, place.folder / step.source.place
    if step.state == "there":
        return
    ours = not target.is_file()
    if ours:
        size = source.size if source.exact and not place.accept_changes else None
        _fetch(source.url, target, place, size)
    if source.md5 and not place.accept_changes:
        http.check_digest(target, "md5", source.md5)
    if source.unzip:
        unpack(target, place.folder / source.unzip.folder)
        if ours and not place.keep_zips:
            target.unlink()


def _fetch(url: str, target: Path, place: Place, size: int | None = None) -> None:
    if not hub.is_hub(url):
        return http.fetch(place.address(url), target, size, place.backoff)
    file = hub.look_up(url, place.endpoint)
    if size is not None and file.size != size:
        raise http.Changed(f"the Hub's file has {file.size:,} bytes, {size:,} are published")
    target.parent.mkdir(parents=True, exist_ok=True)
    hub.fetch(file, target, place.endpoint)


def _fetch_each(source: Source, place: Place) -> None:
    listing = place.folder / source.each
    if not listing.is_file():
        raise ValueError(f"{source.place}: its list, {listing}, is not there")
    for name in named_pictures(listing):
        target = place.folder / source.place / name
        if not target.is_file():
            _fetch(source.url.format(image=name), target, place)


def check_counts(source: Source, place: Place) -> str | None:
    """What is wrong with the numbers of rows and pictures, naming the file or folder; None: nothing.

    Where no number is published, a list must still be JSON, and a zip's folder hold something.
    Raises:
        ValueError: a file that cannot be read as what it is.
    """
    target = place.folder / source.place
    if source.each:
        there = sum((target / name).is_file() for name in named_pictures(place.folder / source.each))
        if there != source.rows:
            return f"{target}: {there:,} of the pictures that are listed are there, {source.rows:,} are published"
    elif target.suffix in (".json", ".jsonl"):
        try:
            rows = count_rows(target)
        except ValueError as error:
            raise ValueError(f"{error}; remove it to have it downloaded again") from error
        if source.rows not in (None, rows):
            return f"{target}: {rows:,} rows, {source.rows:,} are published"
    if source.unzip:
        folder, again = place.folder / source.unzip.pictures, f"; remove {marker_of(target)} to have it unpacked again"
        if source.unzip.count is None:
            return None if bytes_below(folder) else f"{folder}: is empty, or not there{again}"
        there = count_pictures(folder)
        if there < source.unzip.count:
            return f"{folder}: {there:,} pictures, {source.unzip.count:,} are published{again}"
    return None


def by_hand(source: Source, place: Place) -> str:
    """What to put where, for a file that the program cannot get."""
    url = source.url
    if hub.is_hub(url):
        owner, name, path = url.removeprefix(hub.SCHEME).split("/", 2)
        url = f"https://huggingface.co/datasets/{owner}/{name}/resolve/main/{path}"
    target = place.folder / source.place
    if source.each:
        return f"By hand: each picture that {place.folder / source.each} names, from {url}, into {target}/"
    known = source.unzip and source.unzip.count is not None
    also = f", or unpacked as {place.folder / source.unzip.pictures}/" if known else ""
    return f"By hand: put {url} at {target}{also}; then start this command again"
