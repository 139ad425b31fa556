"""The API with its model in a process of its own: killed, left by clients, without room for its log, told to end, damaged."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import psutil
import pytest
from api_server import MODEL, chat, client_of, metric, on_loopback, process, until
from fastapi import FastAPI, Request

from llava_drip.engine import Engine
from serve.api import make_app
from serve.guard import Guard
from serve.relay import Relay
from serve.settings import Settings
from serve.supervisor import Front
from serve.worker_process import Worker

KEY = "a-key-of-the-front"
BEARER = {"Authorization": f"Bearer {KEY}"}
ENDLESS = {"max_tokens": 1800, "temperature": 2.0}
CLIENTS, AT_ONCE = 100, 10


@pytest.fixture(scope="module")
def supervised(checkpoint, repository) -> Iterator[subprocess.Popen]:
    """The front's process, whose model works on two requests at once."""
    flags = ("--max-rows", "2")
    with process(repository, checkpoint, *flags, program="serve.supervisor", LLAVA_DRIP_API_KEY=KEY) as server:
        yield server


@pytest.fixture
def http(supervised) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=supervised.url, headers=BEARER, trust_env=False, timeout=60) as http:
        yield http


def worker_of(server: subprocess.Popen) -> psutil.Process:
    (worker,) = psutil.Process(server.pid).children()
    return worker


def engine(server: subprocess.Popen, state: str) -> float:
    return metric(server.url, f"llava_drip_engine_{state}", BEARER)


def answer(http: httpx.Client) -> str:
    return http.post("/v1/chat/completions", json=chat(max_tokens=12)).json()["choices"][0]["message"]["content"]


def test_the_key_is_the_fronts_and_the_rest_the_workers(supervised, http):
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/nowhere"):
        refused = httpx.get(supervised.url + path, headers={"Authorization": "Bearer wrong"}, trust_env=False)
        assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert http.get(path).status_code == (404 if path == "/nowhere" else 200)
    assert KEY not in " ".join(worker_of(supervised).cmdline()) and KEY not in str(worker_of(supervised).environ())
    found = http.get("/v1/models", headers={"Host": "some.example"})
    assert len(found.headers.get_list("x-request-id")) == len(found.headers.get_list("date")) == 1
    assert f"request {found.headers['x-request-id']} GET /v1/models 200" in supervised.log.read_text()
    assert http.post("/v1/chat/completions", json=chat(temperature=5)).json()["error"]["param"] == "temperature"
    assert http.post("/v1/chat/completions", content=b"x" * (32 * 2**20 + 1)).status_code == 413
    chunks = client_of(supervised.url, KEY).chat.completions.create(**chat(max_tokens=12), stream=True)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == answer(http) and len(texts) > 3


def test_a_killed_worker(supervised, http, capsys):
    """SIGKILL in the middle of a stream and of a whole answer: both clients are told, and it comes back."""
    before, killed, whole = answer(http), worker_of(supervised), []
    stream = client_of(supervised.url, KEY).chat.completions.create(**chat("Go", **ENDLESS), stream=True)
    next(stream)
    thread = threading.Thread(
        target=lambda: whole.append(http.post("/v1/chat/completions", json=chat("Go", **ENDLESS)))
    )
    thread.start()
    assert until(lambda: engine(supervised, "running") == 2, 5)
    killed.kill()
    started = time.monotonic()
    with pytest.raises(openai.APIError, match="started again") as caught:
        list(stream)
    assert caught.value.code == "worker_lost" and caught.value.type == "server_error"
    thread.join(10)
    assert whole[0].status_code == 503 and whole[0].json()["error"]["code"] == "worker_lost"
    assert int(whole[0].headers["retry-after"]) >= 1 and time.monotonic() - started < 2
    assert until(lambda: http.get("/ready").status_code == 503, 2)
    for path in ("/ready", "/v1/models"):
        missing = http.get(path)
        assert missing.status_code == 503 and missing.json()["error"]["code"] == "worker_starting"
        assert "retry-after" in missing.headers
    assert http.get("/health").status_code == 200 and metric(supervised.url, "llava_drip_worker_up", BEARER) == 0
    assert httpx.get(f"{supervised.url}/health", trust_env=False).status_code == 401
    assert until(lambda: http.get("/ready").status_code == 200, 120)
    with capsys.disabled():
        print(f"\nworker back after {time.monotonic() - started:.1f} s")
    assert answer(http) == before and worker_of(supervised).pid != killed.pid
    assert metric(supervised.url, "llava_drip_worker_restarts", BEARER) == 1
    assert until(lambda: metric(supervised.url, "llava_drip_front_running", BEARER) == 0, 2)


def leave(server: subprocess.Popen, chance: random.Random) -> None:
    """Asks, and hangs up: within the body, before or after the first token, or after some; politely or not."""
    fields = {**ENDLESS, "stream": chance.random() < 0.6, "n": chance.choice([1, 1, 2])}
    body = json.dumps(chat("Go on and on.", **fields)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        kind = chance.choice(["body", "early", "late"])
        line.sendall(head.encode() + (body[: chance.randrange(len(body))] if kind == "body" else body))
        time.sleep(chance.uniform(0, 0.2))
        if kind == "late":
            line.settimeout(chance.uniform(0.05, 1.0))
            with contextlib.suppress(TimeoutError):
                for _ in range(chance.randrange(1, 20)):
                    line.recv(200)
        if chance.random() < 0.5:  # a reset instead of an end
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_clients_that_leave(supervised, http, capsys):
    """100 of them, ten at once, while others are asked and answered; nothing of them is left."""
    before, processes = answer(http), [psutil.Process(supervised.pid), worker_of(supervised)]
    chances = [random.Random(seed) for seed in range(CLIENTS + AT_ONCE)]
    sizes, queued = [], 0
    for start in range(0, len(chances), AT_ONCE):
        group = [
            threading.Thread(target=leave, args=(supervised, chance)) for chance in chances[start : start + AT_ONCE]
        ]
        for thread in group:
            thread.start()
        while any(thread.is_alive() for thread in group):
            queued = max(queued, engine(supervised, "waiting"))
            time.sleep(0.05)
        if not sizes:  # the first ten warm up
            assert until(lambda: engine(supervised, "running") == 0, 10)
        sizes.append(sum(process.memory_info().rss for process in processes))
    assert until(lambda: engine(supervised, "running") == engine(supervised, "waiting") == 0, 10)
    assert until(lambda: metric(supervised.url, "llava_drip_front_running", BEARER) == 0, 2)
    with capsys.disabled():
        print(f"\n{CLIENTS} left, up to {queued:.0f} waited; memory grew by {(sizes[-1] - sizes[0]) / 2**20:.1f} MiB")
    assert queued > 0 and sizes[-1] - sizes[0] < 30 * 2**20
    assert answer(http) == before


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of a running process are Linux'")
def test_a_log_that_cannot_grow(supervised, http):
    """As on a full disk: what is written fails. Both processes write to one file."""
    before, processes = answer(http), [supervised.pid, worker_of(supervised).pid]
    size = supervised.log.stat().st_size
    limits = [resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in processes]
    try:
        for pid, (_, most) in zip(processes, limits):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, most))
        size = supervised.log.stat().st_size  # what came before the limit
        assert [answer(http) for _ in range(3)] == [before] * 3
        assert httpx.get(f"{supervised.url}/v1/models", trust_env=False).status_code == 401  # which the front logs
        assert supervised.log.stat().st_size == size
    finally:
        for pid, limit in zip(processes, limits):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
    answer(http)
    assert until(lambda: supervised.log.stat().st_size > size, 2)


def test_sigterm_lets_answers_end(supervised, http):
    """The last of this server."""
    worker = worker_of(supervised)
    stream = client_of(supervised.url, KEY).chat.completions.create(**chat("Go on", max_tokens=300, stream=True))
    next(stream)
    supervised.send_signal(signal.SIGTERM)
    assert until(lambda: http.get("/ready").status_code == 503, 5)
    assert http.get("/ready").json()["error"]["code"] == "shutting_down"
    assert http.post("/v1/chat/completions", json=chat()).json()["error"]["code"] == "shutting_down"
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert supervised.wait(20) == 0 and not worker.is_running()
    assert "Traceback" not in supervised.log.read_text()


@pytest.mark.slow
def test_a_model_that_was_damaged_meanwhile(checkpoint, repository, tmp_path):
    """It cannot be started again: the program ends, and the file's name is said."""
    model = tmp_path / "small-model"
    shutil.copytree(checkpoint, model)
    with process(repository, model, "--attempts", "1", program="serve.supervisor") as server:
        worker, weights = worker_of(server), model / "model.safetensors"
        os.truncate(weights, 1000)
        worker.kill()
        assert server.wait(120) == 1
        log = server.log.read_text().splitlines()
    assert log[-1] == "supervisor: error: the worker ended before it was ready, with status 1"
    assert log[-2].startswith("api: error: ") and "model.safetensors" in log[-2]


@pytest.mark.slow
def test_a_worker_that_answers_nothing_is_started_again(checkpoint, repository):
    with process(repository, checkpoint, "--hang-seconds", "2", program="serve.supervisor") as server:
        stopped, got = worker_of(server), []
        with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as http:
            before = answer(http)
            time.sleep(4)
            assert worker_of(server).pid == stopped.pid  # nobody asked anything, and it was well
            stopped.suspend()
            asked = threading.Thread(target=lambda: got.append(http.post("/v1/chat/completions", json=chat())))
            asked.start()
            asked.join(10)
            assert got[0].status_code == 503 and got[0].json()["error"]["code"] == "worker_lost"
            assert until(lambda: http.get("/ready").status_code == 200, 120)
            assert answer(http) == before and worker_of(server).pid != stopped.pid
        assert "does not answer" in server.log.read_text()


def test_a_start_that_takes_too_long_has_failed(tmp_path):
    async def started() -> None:
        worker = Worker([], tmp_path, start_limit=0.5)
        worker.command = [sys.executable, "-c", "import time; print('loading' * 20_000, flush=True); time.sleep(60)"]
        with pytest.raises(ChildProcessError, match=r"not ready after 0.5 s \(--start-seconds\) and was killed"):
            await worker.start()
        assert worker.process.returncode == -signal.SIGKILL and not worker.up

    asyncio.run(started())


def test_a_worker_that_gets_nowhere_is_killed(checkpoint, tmp_path):
    """The API as a worker serves it, and another process in its place to be killed."""
    engine = Engine.load(checkpoint, device="cpu")

    async def watched() -> int:
        worker = Worker([], tmp_path)
        worker.socket = tmp_path / "1.sock"
        worker.process = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=subprocess.PIPE)
        worker.connect()
        watch = asyncio.create_task(worker.watch(1.0))
        try:
            await asyncio.sleep(2)
            assert worker.up and worker.process.returncode is None  # it has nothing to do
            with engine.lock:  # as something has it that never gives the model back
                stream = engine.stream([{"role": "user", "content": [{"type": "text", "text": "Go"}]}])
                status = await asyncio.wait_for(worker.process.wait(), 10)
            stream.close()
            return status
        finally:
            watch.cancel()

    with on_loopback(make_app(engine, Settings(MODEL)), uds=str(tmp_path / "1.sock")):
        assert asyncio.run(watched()) == -signal.SIGKILL


def test_what_a_connection_names_is_of_that_connection(tmp_path):
    """RFC 9110, 7.6.1: a relay takes those headers off."""
    app = FastAPI()

    @app.post("/v1/heads")
    async def heads(request: Request) -> dict[str, str]:
        return {**request.headers, "read": str(len(await request.body()))}

    async def asked(**headers: str) -> dict[str, str]:
        worker = Worker([], tmp_path)
        worker.socket = tmp_path / "1.sock"
        worker.connect()
        front = Front(Settings(MODEL), worker)
        transport = httpx.ASGITransport(Guard(Relay(front), front))
        async with httpx.AsyncClient(transport=transport, base_url="http://front.example") as client:
            return (await client.post("/v1/heads", content=b"12345", headers=headers)).json()

    with on_loopback(app, uds=str(tmp_path / "1.sock")):
        got = asyncio.run(asked(Connection="keep-alive, X-Mine", **{"X-Mine": "a", "X-Other": "b", "TE": "trailers"}))
    assert got["x-other"] == "b" and got["host"] == "front.example" and got["read"] == got["content-length"] == "5"
    assert not {"x-mine", "te", "keep-alive"} & got.keys()


def test_a_worker_ends_with_its_front(repository, tmp_path):
    """However the front ended: what holds the worker's stdin open is gone. The socket and its folder go too."""
    place = tmp_path / "folder" / "1.sock"
    place.parent.mkdir()
    place.touch()
    program = f"""
import time
from pathlib import Path
from serve.server import end_with_stdin
end_with_stdin(Path({str(place)!r}))
print("up", flush=True)
time.sleep(60)"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], cwd=repository, **pipes) as worker:
        assert worker.stdout.readline() and worker.poll() is None and place.exists()
        worker.stdin.close()
        assert worker.wait(10) == -signal.SIGTERM and not place.parent.exists()


def test_what_is_not_served_is_said_at_once(repository, run_script):
    program = repository / "serve" / "supervisor.py"
    for flag, value in (("--port", "70000"), ("--attempts", "0"), ("--hang-seconds", "inf"), ("--start-seconds", "-1")):
        done = run_script(program, "--model", "x", flag, value)
        assert done.returncode == 2 and f"{flag} {value}" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("program", ["api", "supervisor", "gradio_app"])
def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(
    program, repository, run_script, monkeypatch, tmp_path
):
    monkeypatch.syspath_prepend(repository)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_script(repository / "serve" / f"{program}.py", "--model", tmp_path / "nowhere", "--port", port)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert f"{program}: error: --host 127.0.0.1 --port {port}: Address already in use" in done.stderr
