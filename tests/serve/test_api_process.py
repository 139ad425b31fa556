"""The API's process from its start to its end: a damaged model, a key from the environment, SIGTERM, what it logs."""

from __future__ import annotations

import shutil
import signal
import sys

import httpx
import pytest
from api_server import chat, client_of, data_url, picture, process, until
from transformers.utils import logging as transformers_logging

from llava_drip.engine import Engine
from serve.server import bars_for_terminals_alone


def test_sigterm_lets_answers_end(checkpoint, repository):
    """And nothing of a request is in the log."""
    url = data_url(picture(3))
    with process(repository, checkpoint, LLAVA_DRIP_API_KEY="of-the-environment") as server:
        client, key = client_of(server.url, "of-the-environment"), {"Authorization": "Bearer of-the-environment"}
        assert httpx.get(f"{server.url}/ready", trust_env=False).status_code == 401
        assert httpx.get(f"{server.url}/ready", headers=key, trust_env=False).status_code == 200
        with pytest.raises(Exception, match="API key"):
            client_of(server.url, "wrong").models.list()
        client.chat.completions.create(**chat("unheard-of words", url))

        stream = client.chat.completions.create(**chat("Go on", max_tokens=600, stream=True))
        next(stream)
        server.send_signal(signal.SIGTERM)
        assert until(lambda: httpx.get(f"{server.url}/ready", headers=key, trust_env=False).status_code == 503, 5)
        refused = httpx.post(f"{server.url}/v1/chat/completions", headers=key, json=chat(), trust_env=False)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert server.poll() is None
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
        assert reasons[-1] == "length" and len(reasons) > 2
        assert server.wait(20) == 0
        log = server.log.read_text()
    assert "POST /v1/chat/completions 200" in log and "GET /ready 503" not in log
    assert (
        "unheard-of" not in log and url[40:] not in log and "of-the-environment" not in log and "Traceback" not in log
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_model_is_not_served(checkpoint, repository, tmp_path, run_script, name):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / name).write_bytes((broken / name).read_bytes()[:1000])
    done = run_script(repository / "serve" / "api.py", "--model", broken, "--device", "cpu", "--port", "0")
    assert (
        done.returncode == 1 and f"broken/{name}: " in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    )
    assert done.stderr.splitlines()[-1].startswith("api: error: ") and "api at" not in done.stdout


def test_pickled_weights_are_not_served(checkpoint, repository, tmp_path, run_script):
    pickled = tmp_path / "pickled"
    shutil.copytree(checkpoint, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    done = run_script(repository / "serve" / "api.py", "--model", pickled, "--device", "cpu", "--port", "0")
    assert done.returncode == 1 and "no *.safetensors weights" in done.stderr


@pytest.mark.parametrize(
    "flags",
    [["--port", "70000"], ["--time-limit", "0"], ["--bits", "3"], ["--max-rows", "0"], ["--image-cache-mib", "-1"]],
)
def test_bad_flags_are_named(checkpoint, repository, run_script, flags):
    done = run_script(repository / "serve" / "api.py", "--model", checkpoint, "--device", "cpu", *flags)
    assert done.returncode in (1, 2) and done.stderr.splitlines()[-1].startswith("api: error: ")
    assert flags[0].strip("-").replace("-", " ").split()[-1] in done.stderr.splitlines()[-1].replace("_", " ")


def test_a_model_loads_where_nothing_can_be_logged(checkpoint, monkeypatch):
    """As a worker that is started again on a full disk."""
    try:
        with open("/dev/full", "w", buffering=1) as full:
            monkeypatch.setattr(sys, "stderr", full)
            bars_for_terminals_alone()
            assert Engine.load(checkpoint, device="cpu").patches == 64
    finally:
        transformers_logging.enable_progress_bar()  # it is this process's
