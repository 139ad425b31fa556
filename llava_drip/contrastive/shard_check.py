"""Are image-text shards (webdataset tars, as img2dataset writes them) whole? Each tar is read to its end, its pairs are counted,
a few of its pictures are decoded. The good ones are listed in sizes.json, which training reads its number of samples from.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm
from webdataset.tariterators import base_plus_ext

from llava_drip.cli import one_line
from llava_drip.images import IMAGE_KEYS, ImageError, decode_image

SIZES, SUMMARY, DAMAGED = "sizes.json", "summary.json", "damaged"
END = bytes(1024)  # what a tar that was closed ends with
CAUSES = 20  # of failed downloads that the summary lists one by one


@dataclass
class Shard:
    """What was found in a tar.

    Attributes:
        pairs: samples with a picture and a caption (.txt): what training gets.
        incomplete: samples without one of them.
        tried, corrupt: pictures decoded, and how many could not be.
        damage: why training should not read it; None: it may.
    """

    name: str
    pairs: int = 0
    incomplete: int = 0
    tried: int = 0
    corrupt: int = 0
    examples: list[str] = field(default_factory=list)
    damage: str | None = None


def check_shard(path: Path, decode: int) -> Shard:
    """Read a tar to its end and decode `decode` of its pictures, evenly spread."""
    shard = Shard(path.name)
    try:
        _read(path, shard, decode)
    except (tarfile.TarError, OSError) as error:
        shard.damage = f"cannot be read to its end ({one_line(error, 200)})"
        return shard
    with path.open("rb") as file:
        file.seek(-min(len(END), path.stat().st_size), os.SEEK_END)
        if file.read() != END:
            shard.damage = "has no end: its writer was stopped"
            return shard
    stats = _stats(path)
    if stats is not None and stats.get("successes") != shard.pairs + shard.incomplete:
        shard.damage = f"holds {shard.pairs + shard.incomplete} samples, img2dataset wrote {stats.get('successes')}"
    elif not shard.pairs:
        shard.damage = "holds no pair of a picture and a .txt caption"
    elif shard.tried and shard.corrupt == shard.tried:
        shard.damage = f"none of {shard.tried} pictures can be decoded; {shard.examples[-1]}"
    return shard


def _read(path: Path, shard: Shard, decode: int) -> None:
    samples: dict[str, set[str]] = {}  # key → "picture", "caption"
    pictures = 0
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()  # reads headers; what they promise has to be there as well
        step = max(1, sum(_is_picture(member) for member in members) // max(1, decode))
        for member in members:
            key, ending = base_plus_ext(member.name)
            if key is None or not member.isfile():
                continue
            data = tar.extractfile(member).read()
            if len(data) != member.size:
                raise tarfile.ReadError(f"{member.name} is cut short")
            parts = samples.setdefault(key, set())
            if _is_picture(member):
                pictures += 1
                if decode and (pictures - 1) % step == 0 and shard.tried < decode:
                    _decode(data, f"{path.name}: {member.name}", shard)
            elif ending.lower() != "txt" or not data.strip():
                continue
            parts.add("picture" if _is_picture(member) else "caption")
    for key, found in samples.items():
        if len(found) == 2:
            shard.pairs += 1
        else:
            shard.incomplete += 1
            lacks = ", ".join(sorted({"picture", "caption"} - found))
            shard.examples = [*shard.examples, f"{path.name}: {key} lacks its {lacks}"][-5:]


def _is_picture(member: tarfile.TarInfo) -> bool:
    return (base_plus_ext(member.name)[1] or "").lower() in IMAGE_KEYS


def _decode(data: bytes, name: str, shard: Shard) -> None:
    shard.tried += 1
    try:
        decode_image(data, name)
    except ImageError as error:
        shard.corrupt += 1
        shard.examples = [*shard.examples, str(error)][-5:]


def _stats(tar: Path) -> dict | None:
    """img2dataset's record of a shard: {"count", "successes", "failed_to_download", "failed_to_resize", "status_dict", ...}."""
    path = tar.with_name(f"{tar.stem}_stats.json")
    try:
        stats = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); remove it and its .tar, and run the download again") from error
    return stats if isinstance(stats, dict) else None


def check(folder: Path, decode: int = 20, processes: int = 1, move: bool = False) -> dict:
    """Check all tars of a folder; write sizes.json, of the good ones, and summary.json.

    Args:
        decode: pictures of each to decode.
        move: put damaged tars, with img2dataset's notes on them, into folder/damaged; the next download makes them again.
    Returns:
        What summary.json holds: {"shards", "pairs", "incomplete", "pictures_tried", "pictures_corrupt", "examples", "damaged":
        {name: why}, "downloads": {"rows", "successes", "failed_to_download", "failed_to_resize", "causes"} or None}.
    Raises:
        ValueError: no tar there; no good one.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ValueError(f"{folder}: holds no .tar shards")
    recorded = [_stats(tar) for tar in tars]
    job = partial(check_shard, decode=decode)
    if processes > 1 and len(tars) > 1:
        with ProcessPoolExecutor(min(processes, len(tars))) as pool:
            shards = list(tqdm(pool.map(job, tars), total=len(tars), desc="checking", unit="shard"))
    else:
        shards = [job(tar) for tar in tqdm(tars, desc="checking", unit="shard")]
    if any(stats is not None for stats in recorded):
        for shard, stats in zip(shards, recorded):
            if stats is None and shard.damage is None:
                shard.damage = "is unfinished: img2dataset left no record of it"
    good = [shard for shard in shards if shard.damage is None]
    summary = {
        "shards": len(good),
        **{name: sum(asdict(shard)[name] for shard in good) for name in ("pairs", "incomplete")},
        "pictures_tried": sum(shard.tried for shard in good),
        "pictures_corrupt": sum(shard.corrupt for shard in good),
        "examples": [example for shard in good for example in shard.examples][:5],
        "damaged": {shard.name: shard.damage for shard in shards if shard.damage is not None},
        "downloads": _downloads([stats for stats in recorded if stats is not None]),
    }
    if move:
        for name in summary["damaged"]:
            _move(folder, Path(name).stem)
    _write(folder / SIZES, {shard.name: shard.pairs for shard in good})
    _write(folder / SUMMARY, summary)
    if not good:
        name, why = next(iter(summary["damaged"].items()))
        raise ValueError(f"{folder}: no shard is whole; {name} {why}")
    return summary


def _move(folder: Path, stem: str) -> None:
    target = folder / DAMAGED
    target.mkdir(exist_ok=True)
    for file in (f"{stem}_stats.json", f"{stem}.tar", f"{stem}.parquet"):  # without its record it is downloaded again
        if (folder / file).is_file():
            os.replace(folder / file, target / file)


def _write(path: Path, content: dict) -> None:
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(content, indent=1))
    os.replace(unfinished, path)


def _downloads(stats: Sequence[dict]) -> dict | None:
    if not stats:
        return None
    causes = Counter()
    for one in stats:
        for message, number in one.get("status_dict", {}).items():
            if message != "success":
                causes[cause_of(message)] += number
    most = dict(causes.most_common(CAUSES))
    other = causes.total() - sum(most.values())
    names = {"count": "rows", **{name: name for name in ("successes", "failed_to_download", "failed_to_resize")}}
    totals = {ours: sum(int(one.get(theirs, 0)) for one in stats) for theirs, ours in names.items()}
    return {**totals, "causes": {**most, **({"others": other} if other else {})}}


def cause_of(message: str) -> str:
    """What many failures share: "HTTP 404", "timed out", without addresses and numbers of errors."""
    if match := re.search(r"HTTP Error (\d{3})", message):
        return f"HTTP {match[1]}"
    if "timed out" in message:
        return "timed out"
    if "CERTIFICATE_VERIFY_FAILED" in message or "SSL" in message:
        return "TLS"
    message = re.sub(r"^<urlopen error (.*)>$", r"\1", message)
    return re.sub(r"\[Errno -?\d+\] ?", "", message)[:60].strip() or "unnamed"


def braces(names: Sequence[str]) -> str:
    """Shard names as one pattern: "{00000..00003}.tar", or with gaps "{{00000..00003},00005}.tar".

    Names that are not numbers of one width are joined by commas.
    """
    stems = sorted(Path(name).stem for name in names)
    if len({len(stem) for stem in stems}) > 1 or not all(stem.isdigit() for stem in stems):
        parts = stems
    else:
        runs: list[list[str]] = []
        for stem in stems:
            if runs and int(stem) == int(runs[-1][-1]) + 1:
                runs[-1].append(stem)
            else:
                runs.append([stem])
        parts = [run[0] if len(run) == 1 else f"{{{run[0]}..{run[-1]}}}" for run in runs]
    if len(parts) == 1:
        return f"{parts[0]}.tar"
    return f"{{{','.join(parts)}}}.tar"
