"""One file over plain HTTP, whole or not at all, however often the connection breaks on the way.

What has come so far lies beside the goal as .NAME.part, with what the server said of it (address, ETag, date, length) in
.NAME.part.json. A later attempt, or a later program, asks for the rest with Range and If-Range (RFC 9110): a server that has
another file by then sends that from its start, so two versions are never joined.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import httpx
from tqdm import tqdm

from llava_drip.cli import one_line
from llava_drip.files import lock, write_whole

ATTEMPTS = 6  # in a row that bring nothing
LONGEST_WAIT = 600  # seconds that a server may ask for
PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that may be better in a moment
TIMEOUT = httpx.Timeout(30.0, read=60.0)
BLOCK = 2**20


class Unreachable(ValueError):
    """A file that cannot be had from its address, now or at all. The message says why, without the address."""


class Changed(ValueError):
    """A file that is not the one that was published: another size or checksum."""


class _Again(Exception):
    """This attempt failed; another may not. wait: seconds the server asks for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


@dataclass
class _Known:
    """What the server said of the file that .part is the beginning of. total: bytes, None where it did not say."""

    url: str
    etag: str | None = None
    modified: str | None = None
    total: int | None = None

    @property
    def validator(self) -> str | None:
        """For If-Range: a strong ETag, else the date."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified


def fetch(url: str, target: Path, size: int | None = None, backoff: float = 1.0) -> None:
    """Downloads `url` to `target`, going on with what an earlier attempt left; returns when all of it is there.

    Args:
        size: bytes that it must have, if known. Checked before anything is downloaded, and after.
        backoff: seconds before the second attempt; doubled for each further one that brings nothing, at most a minute.
    Raises:
        Unreachable: refused by the server (404, ...), or after six attempts in a row there is not more of it than before.
        Changed: the server's file has another size.
        ValueError: another program downloads the same file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(target)
    notes = part.with_name(f"{part.name}.json")
    with open(part, "ab") as file, _alone(file, target), httpx.Client(follow_redirects=True, timeout=TIMEOUT) as client:
        failures, most = 0, file.seek(0, os.SEEK_END)
        while True:
            try:
                _attempt(client, url, file, notes, size, target.name)
                break
            except _Again as again:
                # Bytes alone are no progress: a server without Range sends the same ones from the start, for ever.
                have = file.seek(0, os.SEEK_END)
                failures, most = (1, have) if have > most else (failures + 1, most)
                if failures >= ATTEMPTS:
                    raise Unreachable(f"{again}, {failures} times in a row; what came so far is kept") from again
                wait = again.wait if again.wait is not None else min(60.0, backoff * 2 ** (failures - 1))
                tqdm.write(f"{target.name}: {again}; goes on in {wait:.0f} s")
                time.sleep(wait)
        os.replace(part, target)
    notes.unlink(missing_ok=True)


def part_of(target: Path) -> Path:
    """Where what has come of a file so far is kept."""
    return target.with_name(f".{target.name}.part")


@contextlib.contextmanager
def _alone(file: BinaryIO, target: Path) -> Iterator[None]:
    try:
        lock(file, part_of(target))  # which the other may by now have made the target
    except BlockingIOError as error:
        raise ValueError(f"{target}: another program is downloading it") from error
    except OSError as error:
        tqdm.write(f"{target}: cannot be locked ({error.strerror}); let no second program download it")
    yield


def _attempt(client: httpx.Client, url: str, file: BinaryIO, notes: Path, size: int | None, name: str) -> None:
    """One request, from where `file` ends; it is complete when this returns."""
    known = _read_notes(notes, url)
    have = file.seek(0, os.SEEK_END)
    if have and known is None:  # of another address, or without notes: of unknown origin
        have = _empty(file)
    if have and known.total == have:
        return
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if known.validator:
            headers["If-Range"] = known.validator
    got = 0
    try:
        with client.stream("GET", url, headers=headers) as answer:
            have, total = _accepted(answer, file, have, known, url, notes, size, name)
            with tqdm(desc=name, total=total, initial=have, unit="B", unit_scale=True, miniters=1) as bar:
                for block in answer.iter_raw():
                    file.write(block)
                    got += len(block)
                    bar.update(len(block))
    except httpx.HTTPError as error:
        file.flush()
        raise _Again(f"{type(error).__name__} ({one_line(error, 120)})") from error
    except httpx.InvalidURL as error:
        raise Unreachable(f"not an address ({error})") from error
    file.flush()
    if total is not None and have + got != total:  # a server that says nothing of length may end early without an error
        raise _Again(f"the connection ended at {have + got:,} of {total:,} bytes")


def _accepted(
    answer: httpx.Response,
    file: BinaryIO,
    have: int,
    known: _Known | None,
    url: str,
    notes: Path,
    size: int | None,
    name: str,
) -> tuple[int, int | None]:
    """Where the answer's bytes belong in `file`, and how many it will have; `file` is emptied if they begin anew."""
    status = answer.status_code
    if status in PASSING:
        raise _Again(f"HTTP {status}", wait=_retry_after(answer))
    if status == 416:  # nothing behind what we have: more of it than the server has
        _empty(file)
        raise _Again("the file has become shorter on the server: starting anew", wait=0)
    if status not in (200, 206):
        raise Unreachable(f"HTTP {status} {answer.reason_phrase}".strip())
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise Unreachable(f"the server compresses it ({answer.headers['Content-Encoding']}), unasked")
    etag, modified = answer.headers.get("ETag"), answer.headers.get("Last-Modified")
    if status == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        start, total = (int(span[1]), None if span[2] == "*" else int(span[2])) if span else (-1, None)
        other = known.total not in (None, total) or (known.etag and etag and etag != known.etag)
        if start != have or other:  # a server without If-Range
            _empty(file)
            raise _Again("the file has changed on the server: starting anew", wait=0)
        total = total or size
    else:
        if have:
            same = known.etag == etag and known.modified == modified
            why = "the server cannot go on in the middle" if same else "the file has changed on the server"
            tqdm.write(f"{name}: {why}: starting anew")
            have = _empty(file)
        length = answer.headers.get("Content-Length")
        total = int(length) if length else size
    if size is not None and total != size:
        raise Changed(f"the server's file has {total:,} bytes, {size:,} are published")
    write_whole(notes, json.dumps(asdict(_Known(url, etag, modified, total))))
    return have, total


def _empty(file: BinaryIO) -> int:
    file.truncate(0)
    return 0


def _read_notes(notes: Path, url: str) -> _Known | None:
    try:
        known = _Known(**json.loads(notes.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return known if known.url == url else None


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds that the server asks to wait: a number or a date. Unreachable: longer than anybody waits."""
    value = answer.headers.get("Retry-After")
    if value is None:
        return None
    if value.strip().isdigit():
        wait = float(value)
    else:
        try:
            wait = max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return None
    if wait > LONGEST_WAIT:
        raise Unreachable(f"HTTP {answer.status_code}, to be asked again in {wait / 60:.0f} minutes")
    return wait


def digest(path: Path, kind: str) -> str:
    """Checksum of a file, hexadecimal. kind: of hashlib, such as "md5"."""
    checksum = hashlib.new(kind, usedforsecurity=False)
    with (
        open(path, "rb") as file,
        tqdm(
            desc=f"{path.name}: {kind}", total=path.stat().st_size, unit="B", unit_scale=True, delay=2, leave=False
        ) as bar,
    ):
        while block := file.read(BLOCK):
            checksum.update(block)
            bar.update(len(block))
    return checksum.hexdigest()


def check_digest(path: Path, kind: str, published: str, target: Path | None = None) -> None:
    """Changed, and the file is put aside as .NAME.wrong beside `target` (default: `path`), where its checksum is not the
    published one."""
    found = digest(path, kind)
    if found != published:
        target = target or path
        aside = target.with_name(f".{target.name}.wrong")
        os.replace(path, aside)
        raise Changed(f"{kind} {found}, published is {published}; it was put aside as {aside}")
