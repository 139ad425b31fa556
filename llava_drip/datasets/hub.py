"""Files of data sets on the Hugging Face Hub, by huggingface_hub: resumable, checked against the SHA-256 that the Hub states."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from llava_drip.cli import one_line
from llava_drip.datasets.http import Unreachable, check_digest

SCHEME = "hub://"
# What huggingface_hub's HTTP library raises: httpx or httpx2, by its version.
_NETWORK = tuple(base for base in HfHubHTTPError.__mro__ if base.__name__ in ("HTTPError", "RequestException"))


@dataclass(frozen=True)
class HubFile:
    """size: bytes. sha256: None of small files, which the Hub keeps in git. revision: the commit that both belong to."""

    repo: str
    path: str
    revision: str
    size: int
    sha256: str | None


def is_hub(url: str) -> bool:
    return url.startswith(SCHEME)


def look_up(url: str, endpoint: str | None = None) -> HubFile:
    """What the Hub says of hub://OWNER/NAME/PATH now. Unreachable: the Hub, the data set or the file cannot be had."""
    owner, name, path = url.removeprefix(SCHEME).split("/", 2)
    repo, api = f"{owner}/{name}", HfApi(endpoint=endpoint)
    with _named():
        revision = api.dataset_info(repo).sha
        found = api.get_paths_info(repo, [path], repo_type="dataset", revision=revision)
    if not found or not hasattr(found[0], "size"):
        raise Unreachable(f"the Hub has no file {path} in {repo}")
    return HubFile(repo, path, revision, found[0].size, found[0].lfs.sha256 if found[0].lfs else None)


def aside_of(target: Path) -> Path:
    """The folder in which what has come of a file so far is kept."""
    return target.with_name(f".hub-{target.name}")


def fetch(file: HubFile, target: Path, endpoint: str | None = None) -> None:
    """Downloads to `target`, going on with what an earlier attempt left (aside_of); whole or not at all.

    Raises:
        Unreachable: the network or the Hub's refusal.
        Changed: what came has not the Hub's SHA-256; it is put aside as .NAME.wrong beside `target`.
        OSError: no room, or what came has not the length that the Hub said.
    """
    aside = aside_of(target)
    with _named():
        came = hf_hub_download(
            file.repo, file.path, repo_type="dataset", revision=file.revision, local_dir=aside, endpoint=endpoint
        )
    if file.sha256 is not None:
        check_digest(Path(came), "sha256", file.sha256, target)
    os.replace(came, target)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _named() -> Iterator[None]:
    """The Hub's and the network's errors in one line."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise Unreachable("HF_HUB_OFFLINE is set, which forbids downloads") from error
    except EntryNotFoundError as error:
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        raise Unreachable(one_line(cause, 200)) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        raise Unreachable(f"the Hub refused: HTTP {status} ({error.server_message or one_line(error, 160)})") from error
    except (*_NETWORK, ConnectionError, TimeoutError) as error:
        raise Unreachable(f"the Hub is not reachable ({one_line(error, 160)})") from error
