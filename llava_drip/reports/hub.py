"""Upload to the Hugging Face Hub, by huggingface_hub: a repository, one commit. What goes wrong there comes back in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from llava_drip.cli import one_line

# What huggingface_hub's HTTP library raises: requests, httpx or httpx2, by its version.
_NETWORK = [base for base in HfHubHTTPError.__mro__ if base.__name__ in ("HTTPError", "RequestException")]


def check_repo(repo: str) -> None:
    """ValueError unless it is user/name as the Hub takes it."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--repo {repo}: {one_line(error, 200)}") from error
    if repo.count("/") != 1:
        raise ValueError(f"--repo {repo}: must be user/name")


def check_token() -> None:
    """ValueError where huggingface_hub finds no token (HF_TOKEN, or the login's file)."""
    if get_token() is None:
        raise ValueError("no token of the Hugging Face Hub: run `hf auth login` or set HF_TOKEN (--dry-run needs none)")


def upload(
    folder: Path, repo: str, private: bool = False, revision: str | None = None, message: str = "Upload model"
) -> str:
    """Makes the model repository `repo` where there is none, and uploads a folder's files in one commit. Returns its address.

    private: of a repository that is made. revision: branch, made where there is none; default main.
    Raises:
        ValueError: no token, a token without the right, no network, or what else the Hub refuses.
    """
    check_repo(repo)
    check_token()
    api = HfApi()
    with in_one_line(repo):
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, revision=revision, commit_message=message)
    return str(address) + (f"/tree/{revision}" if revision else "")


@contextmanager
def in_one_line(repo: str) -> Iterator[None]:
    """The Hub's and the network's errors as a ValueError that says what to do."""
    later = f"or make the folder with --dry-run, and upload it later with `hf upload {repo} FOLDER`"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ValueError(f"HF_HUB_OFFLINE is set, which forbids uploads: unset it, {later}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        advice = {
            401: "; the token is not valid: run `hf auth login` anew",
            403: "; the token may not write there: take one with write access to that user or organisation",
            404: "; no such repository, or the token does not see it",
        }.get(status, "")
        said = error.server_message or one_line(error, 200)
        raise ValueError(f"{repo}: the Hub refused (HTTP {status}: {said}){advice}") from error
    except tuple(_NETWORK) as error:
        reason = one_line(error, 120)
        raise ValueError(f"{constants.ENDPOINT}: not reachable ({reason}): check the network, {later}") from error
    except RuntimeError as error:  # of one file, with the reason as its cause
        reason = one_line(error.__cause__ or error, 200)
        raise ValueError(
            f"{repo}: {one_line(error, 200)} ({reason}); start again, what is there already is kept"
        ) from error


def link(source: Path, goal: Path) -> None:
    """Instead of a copy, for a folder that is uploaded and removed."""
    os.symlink(source, goal)
