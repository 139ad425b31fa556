"""What stands beside every score: the command that made it, of which checkpoint, from which data, with which versions."""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from llava_drip.fingerprint import fingerprint
from llava_drip.machine import where

PACKAGES = ("torch", "transformers", "timm", "numpy", "pillow")
SHOWN_FROM = 1000  # files to hash, that this shows its progress


def described(
    *,
    checkpoint: str | Path | Mapping | None = None,
    data: Mapping[str, str | Path | Iterable[Path]] | None = None,
    prompts: Iterable[str] = (),
    compression: float | None = None,
    tokens_per_image: float | None = None,
    seconds: float | None = None,
    device: str = "cpu",
    packages: Sequence[str] = (),
    command: Sequence[str] | None = None,
    **more,
) -> dict:
    """The header of a result file, ready for JSON.

    Args:
        checkpoint: the assistant's folder, or {"path", "sha256"} where the hash is known; None: there was none to ask.
        data: what was read, {"questions": file, "images": files, ...}.
        prompts: the texts that the model (or the judge) was given, in their order.
        compression: patches per visual token that were asked for; None: as the checkpoint says, or each image decides.
        tokens_per_image: mean visual tokens of an image, measured. None: nothing was asked.
        seconds: of the work itself, all sessions of a resumed run together; loading left out.
        device: where it was computed.
        packages: others whose version matters.
        command: default sys.argv.
        more: further entries, as they are.

    Returns:
        "command", "checkpoint", "data" (name → "sha256", "files", and the "path" of a single file), "prompts" ("sha256",
        "count"), "compression", "tokens_per_image", "seconds", "machine", "versions", "date", and `more`. Hashes are the
        first 16 hex digits of a SHA-256.

    Raises:
        OSError: a file that cannot be read.
    """
    if checkpoint is not None and not isinstance(checkpoint, Mapping):
        checkpoint = {"path": str(checkpoint), "sha256": fingerprint(checkpoint)}
    prompts, here = list(prompts), where([device])
    return {
        "command": shlex.join(["python", *(sys.argv if command is None else command)]),
        "checkpoint": None if checkpoint is None else dict(checkpoint),
        "data": {name: hashed(value) for name, value in (data or {}).items()},
        "prompts": {"sha256": text_hash(prompts), "count": len(prompts)} if prompts else None,
        "compression": compression,
        "tokens_per_image": tokens_per_image,
        "seconds": None if seconds is None else round(seconds, 2),
        "machine": here["machine"][device],
        "versions": {"python": sys.version.split()[0], **versions(("llava_drip", *PACKAGES, *packages))},
        "date": here["date"],
        **more,
    }


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Package → its installed version, None where there is none."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def text_hash(texts: Iterable[str]) -> str:
    """SHA-256 (first 16 hex digits) of texts in their order; where one ends counts."""
    sha = hashlib.sha256()
    for text in texts:
        data = text.encode(errors="surrogatepass")  # JSON may hold lone halves of pairs
        sha.update(len(data).to_bytes(8, "big") + data)
    return sha.hexdigest()[:16]


def hashed(value: str | Path | Iterable[Path]) -> dict:
    """{"sha256", "files", and the "path" of a single one}; of several, in any order, contents and names below
    the folder that they share."""
    if isinstance(value, (str, Path)):
        return {"path": str(value), "sha256": fingerprint(value), "files": 1}
    paths = sorted({Path(path).absolute() for path in value})
    if not paths:
        return {"sha256": None, "files": 0}
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    bar = tqdm(paths, desc="hashing what was read", unit="file", leave=False, disable=len(paths) < SHOWN_FROM)
    lines = [f"{path.relative_to(folder).as_posix()} {fingerprint(path)}" for path in bar]
    return {"sha256": text_hash(lines), "files": len(paths)}
