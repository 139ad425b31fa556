"""Not `tests/datasets`: tests/ is on the path, where such a folder would stand for Hugging Face's package `datasets`."""

from __future__ import annotations

import pytest
from data_server import running_files
from huggingface_hub import close_session, constants


@pytest.fixture
def files():
    with running_files() as served:
        yield served


@pytest.fixture
def online(monkeypatch, tmp_path):
    """huggingface_hub as on a machine that may use the network, without a login; its constants were read at import."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    close_session()
    yield
    close_session()
