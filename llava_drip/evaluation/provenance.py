"""What answers tell of how they were made: of which checkpoint, with which settings, where, with which versions.

The programs here write it into each line's `metadata`. Lines of other programs have none of it, or other things by the same
names: what is not of the kind that we write counts as not told.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import shorten

import torch

from llava_drip.evaluation.relative import is_number
from llava_drip.machine import where
from llava_drip.record import PACKAGES, versions

# Of the settings: which questions they were. Two splits of POPE differ in these, and are of one run.
_OF_QUESTIONS = ("bench", "questions", "images")


def made_here(device: torch.device | str) -> dict[str, str]:
    """What a line says of the process that answers: {"device", "machine", "versions", "date"}. A resumed run's may differ."""
    here = where([str(device)])
    found = versions(("llava_drip", *PACKAGES)).items()
    told = ", ".join(
        [f"python {platform.python_version()}", *(f"{name} {version}" for name, version in found if version)]
    )
    return {"device": str(device), "machine": here["machine"][str(device)], "versions": told, "date": here["date"]}


def metadata_of(row: Mapping) -> Mapping:
    """An answer's metadata; {} where there is none."""
    metadata = row.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def settings_of(rows: Mapping[object, Mapping], source: object) -> dict | None:
    """The settings that all answers were made with; None where they tell none.

    Args:
        rows: question_id → an answer's line.
        source: where they are from, for the message.
    Raises:
        ValueError: two answers are of different runs: what they come to is no score of either.
    """
    first: tuple | None = None
    for key, row in rows.items():
        settings = metadata_of(row).get("settings")
        known = isinstance(settings, dict) and bool(settings)
        told = settings if known else {"model_id": row.get("model_id")}
        own = {name: value for name, value in told.items() if name not in _OF_QUESTIONS}
        first = first or (key, own, settings if known else None)
        if own != first[1]:
            name = next(name for name in {**first[1], **own} if own.get(name) != first[1].get(name))
            was, now = (shorten(str(of.get(name)), 60) for of in (first[1], own))
            raise ValueError(
                f"{source}: the answers to {first[0]!r} and {key!r} are of different runs ({name} {was} and {now}); score "
                "them apart"
            )
    return first[2] if first else None


def check_inputs(rows: Mapping[object, Mapping], present: Mapping[str, str], source: object) -> None:
    """ValueError: an answer says that it was made of other questions or pictures.

    present: name in an answer's settings → the hash now.
    """
    for key, row in rows.items():
        settings = metadata_of(row).get("settings")
        for name, hash_ in present.items():
            theirs = settings.get(name) if isinstance(settings, dict) else None
            if theirs is not None and theirs != hash_:
                raise ValueError(
                    f"{source}: the answer to {key!r} was made of other {name} ({shorten(str(theirs), 60)}, now {hash_}); "
                    "give those that it was made of, or ask again"
                )


def made(rows: Mapping[object, Mapping], tokens: Mapping[object, object], source: object, model: Path | None) -> dict:
    """What a result's header says of its answers, for record.described.

    Args:
        rows: question_id → an answer's line. source: see settings_of.
        tokens: picture → its visual tokens, as an answer tells them.
        model: the checkpoint's folder, where it was asked just now.
    Returns:
        "checkpoint", "compression", "tokens_per_image", "seconds" (of all answers together), "answering" (settings_of),
        "batch_sizes", "devices", "machines", "answered_with" (versions), "answered_on" (dates). None where the answers do not
        tell.
    Raises:
        ValueError: see settings_of.
    """
    settings = settings_of(rows, source)
    metadata = [metadata_of(row) for row in rows.values()]
    checkpoint = (settings or {}).get("checkpoint")
    counts, seconds = [_number(count) for count in tokens.values()], [_number(one.get("seconds")) for one in metadata]
    return {
        "checkpoint": {"path": model and str(model), "sha256": checkpoint} if isinstance(checkpoint, str) else None,
        "compression": _number((settings or {}).get("compression")),
        "tokens_per_image": sum(counts) / len(counts) if counts and None not in counts else None,
        "seconds": sum(seconds) if seconds and None not in seconds else None,
        "answering": settings,
        "batch_sizes": made_with(metadata, "batch_size"),
        "devices": made_with(metadata, "device"),
        "machines": made_with(metadata, "machine"),
        "answered_with": made_with(metadata, "versions"),
        "answered_on": made_with(metadata, "date"),
    }


def made_with(metadata: Iterable[Mapping], name: str) -> list | None:
    """Which values the answers have, each once. None if one does not tell."""
    values = [one.get(name) for one in metadata]
    if not all(isinstance(value, str) or _number(value) is not None for value in values):
        return None
    return sorted(set(values), key=lambda value: (isinstance(value, str), value)) or None


def _number(value: object) -> float | None:
    return value if is_number(value) else None
