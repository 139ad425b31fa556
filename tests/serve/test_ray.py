"""Two replicas on the real Ray Serve: who answers, streams, clients that leave, a replica that is killed, the end.

Ray is no part of `make test`'s installation. Another environment's Python that has it, beside what we need, is given by
LLAVA_DRIP_RAY (`.ci/run all` makes one).
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from api_server import chat, client_of, data_url, picture, until
from gradio_page import free_port

PYTHON = os.environ.get("LLAVA_DRIP_RAY") or (sys.executable if importlib.util.find_spec("ray") else None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None,
        reason="Ray is not installed here, and LLAVA_DRIP_RAY names no Python that has it (docs/guides/scaling.md)",
    ),
]
KEY = "of-the-environment"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(checkpoint, repository) -> Iterator[subprocess.Popen]:
    """`python -m serve.ray_app` with two replicas: its `url`, its `log`, and `http`, a client that has the key."""
    port = free_port()
    command = [PYTHON, "-m", "serve.ray_app", "--model", checkpoint, "--device", "cpu", "--port", str(port)]
    command += ["--num-replicas", "2", "--num-cpus", "0.5", "--time-limit", "100", "--drain-seconds", "30"]
    scratch = Path(tempfile.mkdtemp(prefix="ray_"))  # short: Ray puts sockets there
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository), "RAY_TMPDIR": str(scratch)}
    environment["LLAVA_DRIP_API_KEY"] = KEY
    with open(scratch / "log", "w+") as log:
        options = {"cwd": repository, "env": environment, "stdout": subprocess.PIPE, "stderr": log, "text": True}
        server = subprocess.Popen(command, **options)
        server.log, server.url = Path(log.name), f"http://127.0.0.1:{port}"
        try:
            line = server.stdout.readline()
            assert line == f"api at {server.url}/v1\n", f"{line}{server.log.read_text()}"
            headers = {"Authorization": f"Bearer {KEY}"}
            with httpx.Client(base_url=server.url, headers=headers, timeout=60, trust_env=False) as server.http:
                yield server
        finally:
            if server.poll() is None:
                family = psutil.Process(server.pid).children(recursive=True)
                server.kill()
                for process in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            server.wait(30)
            server.stdout.close()
    shutil.rmtree(scratch, ignore_errors=True)


def family(server: subprocess.Popen) -> list[psutil.Process]:
    return [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]


def replicas_seen(server: subprocess.Popen, requests: int = 8) -> set[str]:
    return {server.http.get("/v1/models").headers["x-replica"] for _ in range(requests)}


def running(server: subprocess.Popen) -> dict[str, float]:
    """How many requests each replica works on, as far as /metrics was answered by it."""
    found = {}
    for _ in range(8):
        answer = server.http.get("/metrics")
        line = next(line for line in answer.text.splitlines() if line.startswith("llava_drip_engine_running "))
        found[answer.headers["x-replica"]] = float(line.split()[1])
    return found


class Stream(threading.Thread):
    """A streamed answer in the making: its `replica`, `events`, whether it `ended` as it should, what `error` its client got."""

    def __init__(self, server: subprocess.Popen, tokens: int):
        super().__init__(daemon=True)
        self.server, self.tokens, self.replica, self.events, self.ended, self.error = (
            server,
            tokens,
            None,
            0,
            False,
            None,
        )
        self.start()

    def run(self) -> None:
        body = chat("Go on", max_tokens=self.tokens, stream=True)
        try:
            with self.server.http.stream("POST", CHAT, json=body) as answer:
                assert answer.status_code == 200, answer.read()
                self.replica = answer.headers["x-replica"]
                for line in answer.iter_lines():
                    self.events += line.startswith("data: ")
                    self.ended = self.ended or line == "data: [DONE]"
        except httpx.TransportError as error:
            self.error = error


def test_requests_spread_over_both(server):
    """And each has a picture, one number, and the key."""
    body = chat("What is this?", data_url(picture(1)))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.http.post(CHAT, json=body), range(16)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1
    assert len({answer.headers["x-replica"] for answer in answers}) == 2
    numbers = [answer.headers.get_list("x-request-id") for answer in answers]
    assert all(len(number) == 1 for number in numbers) and len({number[0] for number in numbers}) == 16
    assert until(
        lambda: all(f"request {number[0]} POST {CHAT} 200" in server.log.read_text() for number in numbers), 10
    )

    odd = server.http.get("/health", headers={"x-request-id": "two words"}).headers
    assert odd.get_list("x-request-id")[-1] == "two words" and len(odd.get_list("x-request-id")) == 2
    refused = httpx.get(f"{server.url}/v1/models", trust_env=False)
    assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
    unknown = server.http.post(CHAT, json={**body, "model": "another"})
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"


def test_streams_and_those_who_leave_them(server):
    client = client_of(server.url, KEY)
    stream = client.chat.completions.create(**chat("Hello", max_tokens=12, stream=True))
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"

    stream = client.chat.completions.create(**chat("Go on", max_tokens=1900, stream=True))
    next(stream)
    assert until(lambda: sum(running(server).values()) == 1, 5)
    stream.close()
    assert until(lambda: len(running(server)) == 2 and not sum(running(server).values()), 5)


def test_a_killed_replica_takes_only_its_own_requests_along(server):
    """`pytest -s` shows the record of docs/results/scaling.md."""
    streams = [Stream(server, 900) for _ in range(8)]
    assert until(lambda: all(stream.events > 2 for stream in streams), 30)
    assert len({stream.replica for stream in streams}) == 2
    killed = next(process for process in family(server) if "ServeReplica" in "".join(process.cmdline()))
    started = time.monotonic()
    killed.kill()
    with ThreadPoolExecutor(8) as pool:
        after = list(pool.map(lambda _: server.http.post(CHAT, json=chat()), range(16)))
    asked = time.monotonic() - started
    for stream in streams:
        stream.join(60)
    lost = [stream for stream in streams if not stream.ended]
    assert until(lambda: len(replicas_seen(server)) == 2, 60)
    back = time.monotonic() - started

    (dead,) = {stream.replica for stream in lost}
    for replica in sorted({stream.replica for stream in streams}):
        of_it = [stream.ended for stream in streams if stream.replica == replica]
        answered = [answer.status_code for answer in after if answer.headers.get("x-replica") == replica]
        print(
            f"\n{replica}: {len(of_it)} streams, {sum(of_it)} ended; of 16 sent after the kill {answered.count(200)}",
            end="",
        )
    print(f"\n{dead} was killed; the 16 were answered within {asked:.1f} s, a second replica after {back:.1f} s")
    assert all(stream.error for stream in lost) and len(lost) == sum(stream.replica == dead for stream in streams)
    assert [answer.status_code for answer in after] == [200] * 16
    assert dead not in {answer.headers["x-replica"] for answer in after} | replicas_seen(server)


def test_ports_are_this_machines_or_ask_for_a_token(server):
    """A port of each replica, which Ray Serve opens on every address, takes pickles: not from one who has no token."""
    replicas, open_ports = 0, {}
    for process in family(server):
        replicas += (replica := "ServeReplica" in "".join(process.cmdline()))
        for socket in process.net_connections("inet"):
            address = ipaddress.ip_address(socket.laddr.ip.removeprefix("::ffff:"))  # IPv4's within IPv6's
            if socket.status == psutil.CONN_LISTEN and not address.is_loopback:
                assert replica, (process.cmdline(), socket)
                open_ports.setdefault(process.pid, []).append(socket.laddr.port)
    assert replicas == 2 and all(len(ports) == 1 for ports in open_ports.values())
    for (port,) in open_ports.values():
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refusal:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=20)
        assert refusal.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_sigterm_lets_answers_end_and_leaves_nothing(server):
    everyone = family(server)
    assert any("raylet" in process.name() for process in everyone)
    stream = Stream(server, 1800)
    assert until(lambda: stream.events > 2, 20)
    server.send_signal(signal.SIGTERM)
    assert until(lambda: server.http.get("/ready").status_code == 404, 10)  # Ray's own answer
    assert server.poll() is None and not stream.ended
    stream.join(30)
    assert stream.ended and stream.error is None
    assert server.wait(60) == 0
    assert not [process for process in everyone if process.is_running()]
    log = server.log.read_text()
    assert "Go on" not in log and KEY not in log and "Traceback" not in log
