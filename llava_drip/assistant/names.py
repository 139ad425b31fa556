"""Language models and assistants by name: a directory, or a repository of the Hugging Face Hub, NAME or NAME@REVISION.

    model_directory("HuggingFaceTB/SmolLM2-360M-Instruct")      # its files in the Hub's cache, downloaded where they are missing

Only weights in safetensors, configurations and tokenizers are fetched. What is in the cache is taken as it is, so that a run
does not change under its user; HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are huggingface_hub's own.
"""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

from llava_drip.cli import one_line
from llava_drip.towers.open_models import HUB_ID

_TEXTS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
WEIGHTS, BIN_WEIGHTS = ("*.safetensors",), ("pytorch_model*.bin",)
# Folders hold other formats (onnx/), and consolidated* the same weights once more.
_IGNORED = ("*/*", "consolidated*")
_NETWORK = (ConnectionError, TimeoutError, socket.gaierror)
CONVERT = "python scripts/convert_weights.py"


def hub_name(name: str) -> tuple[str, str | None] | None:
    """(repository, revision or None) of ORGANISATION/NAME[@REVISION]; None: the name is none of the Hub's, or begins with a
    folder that is there, and is a mistyped path."""
    found = re.fullmatch(rf"({HUB_ID})(?:@([\w.][\w./-]*))?", name)
    if found is None or Path(name).is_dir() or Path(name).parent.is_dir():
        return None
    return found[1], found[2]


def model_directory(name: str | Path, weights: tuple[str, ...] = WEIGHTS) -> Path:
    """The directory that a name means.

    name: a directory, or a repository of the Hub. weights: patterns of the files of weights to fetch from there.
    Raises:
        ValueError: no such directory; or a repository that is neither in the cache nor to be had, in one line.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    asked = hub_name(str(name))
    if asked is None:
        raise ValueError(f"{name}: no such folder, a model directory is needed")
    return _cached(*asked, weights) or _fetched(str(name), *asked, weights)


def _cached(repository: str, revision: str | None, weights: tuple[str, ...]) -> Path | None:
    """The repository's snapshot in the cache, if it is whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = {"allow_patterns": [*_TEXTS, *weights], "ignore_patterns": list(_IGNORED)}
    try:
        path = Path(snapshot_download(repository, revision=revision, local_files_only=True, **patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError):
        return None
    return path if _is_whole(path, weights) else None


def _is_whole(path: Path, weights: tuple[str, ...]) -> bool:
    """Whether a snapshot has a configuration, weights (every shard of its index), and something of a tokenizer."""
    indexes = [index for pattern in weights for index in path.glob(f"{pattern}.index.json")]
    try:
        shards = {shard for index in indexes for shard in json.loads(index.read_text())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    there = any(path.glob("token*")) and any(file for pattern in weights for file in path.glob(pattern))
    return there and all((path / name).is_file() for name in ("config.json", *shards))


def _fetched(name: str, repository: str, revision: str | None, weights: tuple[str, ...]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = {"allow_patterns": [*_TEXTS, *weights], "ignore_patterns": list(_IGNORED)}
    start = f"{name}: no such folder, and "
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"{start}not (whole) in the cache {constants.HF_HUB_CACHE}, with HF_HUB_OFFLINE set: run once without it, or "
            f"`hf download {repository}` elsewhere and give the directory"
        )
    try:
        path = Path(snapshot_download(repository, revision=revision, **patterns))
    except GatedRepoError:
        raise ValueError(
            f"{start}the Hub gives {repository} only to who has accepted its licence: do so on its page, then hf auth login"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{start}{repository} has no revision {revision!r} on the Hub") from None
    except RepositoryNotFoundError:
        raise ValueError(f"{start}no repository of that name on the Hub (a private one needs hf auth login)") from None
    except Exception as error:  # of the network: httpx's and huggingface_hub's own; of this machine: OSError
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, _NETWORK):
            raise ValueError(
                f"{start}the Hub's cache {constants.HF_HUB_CACHE} cannot be written: {one_line(error, 160)}; make room or "
                "give it rights, or set HF_HOME to another folder"
            ) from error
        cause = error.__cause__ or error
        raise ValueError(
            f"{start}the Hub ({constants.ENDPOINT}) cannot be reached for it: {one_line(cause, 160)}; download it elsewhere, "
            f"and give its directory"
        ) from error
    if weights == WEIGHTS and not any(path.glob("*.safetensors")):
        raise ValueError(
            f"{name}: has no *.safetensors on the Hub; where it has pytorch_model*.bin (as Vicuna has): "
            f"{CONVERT} {name} --output DIR, and give DIR"
        )
    return path
