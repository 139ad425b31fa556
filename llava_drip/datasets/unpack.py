"""A zip into its folder: nothing outside it, each file whole, on with what an earlier attempt left.

While it is not done there is no .NAME.unpacked beside the zip's place; so a half-unpacked folder is never taken for a whole one.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from llava_drip.files import whole, write_whole


def marker_of(zip_path: Path) -> Path:
    """Of the note that says that this zip has been unpacked; it outlives the zip."""
    return zip_path.with_name(f".{zip_path.name}.unpacked")


def is_unpacked(zip_path: Path) -> bool:
    """Whether all of the zip has been unpacked; False again when another zip has taken its place."""
    try:
        note = json.loads(marker_of(zip_path).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return not zip_path.is_file() or note.get("bytes") == zip_path.stat().st_size


def unpack(zip_path: Path, folder: Path) -> int:
    """Unpacks all files of a zip below `folder`, and leaves those that are there already with the right size.

    Returns:
        How many files the zip holds.
    Raises:
        ValueError: no zip, damaged (a member's CRC does not fit), members that lead out of the folder, or are links, or too
            little room on the disk. Nothing is written before all names have been checked.
    """
    try:
        with zipfile.ZipFile(zip_path) as archive:
            members = [(info, _inside(info, zip_path)) for info in archive.infolist() if not info.is_dir()]
            missing = [(info, path) for info, path in members if not _is_there(folder / path, info)]
            _check_room(folder, sum(info.file_size for info, _ in missing), zip_path)
            note = (
                f"{zip_path.name} ({len(members) - len(missing):,} files are there)"
                if missing != members
                else zip_path.name
            )
            for info, path in tqdm(missing, desc=f"unpacking {note}", unit=" files", unit_scale=True):
                _write(archive, info, folder / path)
    except (
        zipfile.BadZipFile,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        RuntimeError,  # encrypted, or packed by a method that zipfile does not know
    ) as error:
        raise ValueError(f"{zip_path}: not a zip that can be read ({error}); remove it to download it again") from error
    names = hashlib.sha256("\n".join(sorted(str(path) for _, path in members)).encode()).hexdigest()
    record = {"zip": zip_path.name, "bytes": zip_path.stat().st_size, "files": len(members), "names_sha256": names}
    write_whole(marker_of(zip_path), json.dumps(record))
    return len(members)


def _inside(info: zipfile.ZipInfo, zip_path: Path) -> PurePosixPath:
    """A member's path, which stays in its folder."""
    path, name = PurePosixPath(info.filename), info.filename
    kind = stat.S_IFMT(info.external_attr >> 16)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in path.parts[0]:
        raise ValueError(f"{zip_path}: member {name!r} leads out of its folder; nothing was unpacked")
    if kind not in (0, stat.S_IFREG):
        raise ValueError(f"{zip_path}: member {name!r} is a link or a device; nothing was unpacked")
    return path


def _is_there(path: Path, info: zipfile.ZipInfo) -> bool:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == info.file_size


def _check_room(folder: Path, needed: int, zip_path: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{zip_path}: unpacked it takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {folder}"
        )


def _write(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    """One member; whole or not at all, its CRC checked by zipfile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial, archive.open(info) as source, open(partial, "wb") as target:
        shutil.copyfileobj(source, target, 2**20)
