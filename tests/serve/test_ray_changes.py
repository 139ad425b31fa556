"""A Ray cluster of this machine, and `serve deploy` on it, as docs/guides/scaling.md has them: replicas come and go with
requests, share a GPU (one that Ray is told of), take settings without a restart, and are replaced while requests go on.

Ray is needed as in test_ray.py.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from api_server import chat, data_url, picture, until
from gradio_page import free_port
from test_ray import CHAT, PYTHON, Stream, pytestmark, replicas_seen  # noqa: F401

STARTS = 150  # seconds that replicas may take, which import torch and transformers beside each other


class Cluster:
    """One node, with a GPU that it only believes in. `http` asks the API; `deploy` gives it a changed serve/deploy/ray.yaml."""

    def __init__(self, repository: Path, model: Path, folder: Path):
        self.file, self.log = folder / "serve.yaml", folder / "log"
        self.config = yaml.safe_load((repository / "serve" / "deploy" / "ray.yaml").read_text())
        self.config["http_options"]["port"] = port = free_port()
        self.args["model"], self.args["num_cpus"], self.args["device"] = str(model), 0.5, "cpu"
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        self.programs, self.dashboard, self.repository = Path(PYTHON).parent, free_port(), repository
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(folder)}
        head = ["--head", "--block", "--port", free_port(), "--dashboard-host", "127.0.0.1"]
        head += ["--dashboard-port", self.dashboard, "--num-cpus", 4, "--num-gpus", 1, "--temp-dir", folder]
        command = [self.programs / "ray", "start", *head]
        options = {"stderr": subprocess.STDOUT, "start_new_session": True, "env": self.environment, "cwd": repository}
        with open(self.log, "w") as log:
            self.node = subprocess.Popen(list(map(str, command)), stdout=log, **options)

    @property
    def args(self) -> dict:
        return self.config["applications"][0]["args"]

    @property
    def deployment(self) -> dict:
        return self.config["applications"][0]["deployments"][0]

    def deploy(self) -> None:
        self.file.write_text(yaml.safe_dump(self.config))
        command = [self.programs / "serve", "deploy", "--address", f"http://127.0.0.1:{self.dashboard}", self.file]
        options = {"env": self.environment, "cwd": self.repository, "capture_output": True, "text": True}
        done = subprocess.run(list(map(str, command)), **options, timeout=120)
        assert done.returncode == 0, done.stderr + self.log.read_text()

    def answers(self) -> bool:
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, **fields) -> httpx.Response:
        return self.http.post(CHAT, json=chat("What is this?", data_url(picture(1)), **fields))

    def stop(self) -> None:
        family = psutil.Process(self.node.pid).children(recursive=True)
        self.node.send_signal(signal.SIGTERM)
        try:
            self.node.wait(30)
        except subprocess.TimeoutExpired:
            self.node.kill()
        for process in family:
            if process.is_running():
                process.kill()
        self.http.close()


@pytest.fixture(scope="module")
def cluster(checkpoint, repository) -> Iterator[Cluster]:
    """With one replica on half a GPU, or two of them where there is that much to do."""
    folder = Path(tempfile.mkdtemp(prefix="ray_"))  # short: Ray puts sockets there
    cluster = Cluster(repository, checkpoint, folder)
    try:
        assert until(lambda: reached(cluster.dashboard), 60), cluster.log.read_text()
        cluster.args.update({"num_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "num_gpus": 0.5})
        times = {"upscale_delay_s": 1, "downscale_delay_s": 5, "metrics_interval_s": 1, "look_back_period_s": 2}
        bounds = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2}
        cluster.deployment["autoscaling_config"] = {**bounds, **times}
        cluster.deploy()
        assert until(cluster.answers, STARTS), cluster.log.read_text()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def reached(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/api/version", trust_env=False).status_code < 500
    except httpx.TransportError:
        return False


def test_replicas_come_and_go_with_requests(cluster):
    """And two of them fit on one GPU, half of it each."""
    assert len(replicas_seen(cluster)) == 1
    started, streams = time.monotonic(), []

    def busy() -> bool:
        streams[:] = [stream for stream in streams if stream.is_alive()]
        streams.extend(Stream(cluster, 900) for _ in range(8 - len(streams)))
        return len(replicas_seen(cluster)) == 2

    assert until(busy, STARTS)
    print(f"\na second replica answers {time.monotonic() - started:.1f} s after the requests came", end="")
    for stream in streams:
        stream.join(60)
    assert all(stream.ended for stream in streams)
    idle = time.monotonic()
    assert until(lambda: time.sleep(1) or len(replicas_seen(cluster)) == 1, 90)
    print(f"\none is left {time.monotonic() - idle:.1f} s after the last")


def test_settings_are_taken_without_a_restart(cluster):
    before = replicas_seen(cluster)
    for limit in (3, 5):
        cluster.deployment["user_config"] = {"max_new_tokens": limit}
        cluster.deploy()
        asked = {"max_tokens": None}
        assert until(lambda: cluster.ask(**asked).json()["usage"]["completion_tokens"] == limit, 30)  # noqa: B023
    assert replicas_seen(cluster) == before


def test_an_update_loses_nothing(cluster):
    """New replicas, with another budget, before the old ones stop, which let their streams end."""
    (old,) = replicas_seen(cluster)
    cluster.args["num_gpus"] = 0  # there would be no room for two and two
    cluster.args.update({"num_replicas": 2, "max_replicas": None, "target_ongoing_requests": None})
    del cluster.deployment["autoscaling_config"]
    cluster.deployment["max_surge_percent"] = 100
    before = cluster.ask().json()["usage"]["visual_tokens"]
    cluster.args["compression"] = 8.0
    stream, over, answers = Stream(cluster, 1800), threading.Event(), []

    def ask_on() -> None:
        while not over.is_set():
            answers.append(cluster.ask())
            time.sleep(0.1)

    asking = threading.Thread(target=ask_on)
    asking.start()
    try:
        assert until(lambda: stream.events > 2, 30)
        assert stream.replica == old
        cluster.deploy()
        assert until(lambda: len(seen := replicas_seen(cluster)) == 2 and old not in seen, STARTS)
    finally:
        over.set()
        asking.join(60)
    stream.join(60)
    assert stream.ended and stream.error is None
    assert {answer.status_code for answer in answers} == {200}
    tokens, after = (
        [answer.json()["usage"]["visual_tokens"] for answer in asked]
        for asked in (answers, [cluster.ask(), cluster.ask()])
    )
    print(
        f"\n{len(tokens)} requests, {tokens.count(before)} at {before} visual tokens, then at {after[0]}; all answered"
    )
    assert set(tokens) == {before, after[0]} and before > after[0] == after[1]
