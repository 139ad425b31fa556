"""What stands before the routes: key, host, size, queue, time, draining; errors that tell nothing. Real HTTP on loopback."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time

import httpx
import openai
import pytest
from api_server import MODEL, chat, client_of, data_url, picture, until

from serve import guard
from serve.api import api_key
from serve.service import Settings

ENDLESS = {"max_tokens": 1800, "temperature": 2.0, "seed": 1}


ROUTES = ["/v1/models", "/health", "/ready", "/metrics", "/openapi.json", "/nowhere", "/docs"]


def test_the_key_is_asked_for_everywhere(serve):
    http = serve(api_key="a-long-key", docs=True)
    for path in ROUTES:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer"},
            {"Authorization": "Basic a-long-key"},
        ):
            answer = http.get(path, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert http.get(path, headers={"Authorization": "Bearer a-long-key"}).status_code == (
            404 if "no" in path else 200
        )
    url = str(http.base_url).rstrip("/")
    with pytest.raises(openai.AuthenticationError):
        client_of(url, "a-long-kez").models.list()
    assert client_of(url, "a-long-key").models.list().data[0].id == MODEL
    assert client_of(url, "a-long-key").chat.completions.create(**chat()).choices


def test_where_the_key_is_from(tmp_path, monkeypatch):
    monkeypatch.delenv("LLAVA_DRIP_API_KEY", raising=False)
    file = tmp_path / "key"
    file.write_text("of-the-file\n")
    assert api_key(None) is None and api_key(file) == "of-the-file"
    monkeypatch.setenv("LLAVA_DRIP_API_KEY", "of-the-environment")
    with pytest.raises(ValueError, match="both given"):
        api_key(file)
    monkeypatch.setenv("LLAVA_DRIP_API_KEY", "of-the-environment")
    assert api_key(None) == "of-the-environment"
    monkeypatch.setenv("LLAVA_DRIP_API_KEY", " ")
    with pytest.raises(ValueError, match="empty"):
        api_key(None)
    file.write_text("\nsecond")
    with pytest.raises(ValueError, match="first line has no key"):
        api_key(file)
    with pytest.raises(ValueError, match="ASCII"):
        Settings(MODEL, api_key="schlüssel")


def test_other_names_for_this_machine_are_refused(serve):
    http = serve(loopback_only=True)
    for host in ("127.0.0.1:80", "localhost", "LOCALHOST:8000", "[::1]:5", "127.3.2.1"):
        assert http.get("/health", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "10.0.0.1", ""):
        answer = http.get("/health", headers={"Host": host})
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed"
    assert serve().get("/health", headers={"Host": "my.example"}).status_code == 200


def test_bodies_are_counted(serve):
    http = serve(max_body=10_000)

    def sent(body: bytes, pieces: bool, headers: dict | None = None) -> httpx.Response:
        content = (body[i : i + 1000] for i in range(0, len(body), 1000)) if pieces else body
        return http.post(
            "/v1/chat/completions", content=content, headers={"Content-Type": "application/json", **(headers or {})}
        )

    body = json.dumps(chat("x")).encode()
    for pieces in (False, True):
        assert sent(body + b" " * (10_000 - len(body)), pieces).status_code == 200
        answer = sent(body + b" " * (10_001 - len(body)), pieces)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    assert until(lambda: http.service.held_bytes == 0, 5)  # given back once the answer is out
    default = serve()
    assert default.service.settings.max_body == 32 * 2**20
    with socket.create_connection((default.base_url.host, default.base_url.port)) as line:  # refused before it is sent
        line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 33554433\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 413")


def test_bodies_and_requests_of_all_are_bounded(serve, monkeypatch):
    http = serve()
    monkeypatch.setattr(guard, "HELD_BODIES", 1000)
    assert http.post("/v1/chat/completions", json=chat("x")).status_code == 200
    answer = http.post("/v1/chat/completions", json=chat("x" * 1000))
    assert answer.status_code == 429 and "retry-after" in answer.headers
    monkeypatch.setattr(guard, "MAX_RUNNING", 0)
    assert http.get("/v1/models").status_code == 429 and http.get("/ready").status_code == 200
    assert until(lambda: http.service.held_bytes == 0, 5)


def test_choices_share_their_pictures(serve, monkeypatch):
    http = serve()
    body = chat("What is it?", data_url(picture(1)), data_url(picture(2)), temperature=1.5, seed=1, max_tokens=8)
    alone = [http.post("/v1/chat/completions", json=body | {"seed": 1 + number}).json() for number in range(3)]
    processor, made = http.service.engine.processor.image_processor, []
    preprocess = type(processor).preprocess
    monkeypatch.setattr(type(processor), "preprocess", lambda *args, **kw: made.append(1) or preprocess(*args, **kw))
    answer = http.post("/v1/chat/completions", json=body | {"n": 3}).json()
    assert len(made) == 2
    assert [choice["message"] for choice in answer["choices"]] == [one["choices"][0]["message"] for one in alone]
    full = serve({"max_waiting": 0, "max_rows": 1})
    with full.service.engine.lock:
        stream = full.service.engine.stream([{"role": "user", "content": "Go"}])
        assert full.post("/v1/chat/completions", json=body | {"n": 3}).status_code == 429 and len(made) == 2
        stream.close()


def test_a_body_that_does_not_come_is_not_waited_for(serve, monkeypatch):
    http = serve()
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    with socket.create_connection((http.base_url.host, http.base_url.port), timeout=5) as line:
        line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        assert line.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("content", "kind", "code"),
    [
        (b"{", "application/json", "invalid_json"),
        (b"[]", "application/json", "invalid_json"),
        (b"", "application/json", "invalid_json"),
        (b"{}", "text/plain", "invalid_json"),  # what a web page may send without being asked
        (b"[" * 200_000, "application/json", "invalid_json"),
        (b"\xff\xfe", "application/json", "invalid_json"),
        (b'{"model": ' + b"9" * 5000 + b"}", "application/json", "invalid_json"),
        (b'{"model": "small-model", "\\ud800": 1}', "application/json", "invalid_value"),
        (b'{"model": "small-model", "messages": [{"role": "user", "content": "\\udfff"}]}', "application/json", "invalid_value"),
        (json.dumps(chat(temperature=float("nan"))).encode(), "application/json", "invalid_value"),
    ],
)  # fmt: skip
def test_bodies_that_are_none(serve, content, kind, code):
    answer = serve().post("/v1/chat/completions", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == code


def test_a_full_queue_says_when_to_come_again(serve):
    http = serve({"max_waiting": 1, "max_rows": 1, "quantum": 10_000}, time_limit=4)

    def ask() -> None:
        http.post("/v1/chat/completions", json=chat("Go", **ENDLESS))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for state, thread in zip(("running", "waiting"), threads):
        thread.start()
        assert until(lambda: http.service.engine.stats()[state] == 1, 3)  # noqa: B023
    for stream in (False, True):
        answer = http.post("/v1/chat/completions", json=chat("One more", stream=stream))
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
    assert http.get("/health").status_code == 200
    for thread in threads:
        thread.join(20)
    assert http.post("/v1/chat/completions", json=chat()).status_code == 200


def test_how_long_an_answer_may_be(serve):
    for most, default, fields, written in ((6, 3, {}, 3), (6, 9, {}, 6), (6, 3, {"max_completion_tokens": 6}, 6)):
        http = serve(max_new_tokens=default, most_new_tokens=most)
        body = {key: value for key, value in chat("x", **fields).items() if key != "max_tokens"}
        assert http.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == written
    for name in ("max_tokens", "max_completion_tokens"):
        error = http.post("/v1/chat/completions", json={**body, "max_completion_tokens": None, name: 7}).json()["error"]
        assert error["param"] == name and "at most 6 tokens" in error["message"]
    with pytest.raises(ValueError, match="most new tokens: must be at least 1"):
        Settings(MODEL, most_new_tokens=0)


def test_a_time_limit_ends_the_answer(serve):
    http = serve({"max_rows": 1, "quantum": 10_000}, time_limit=1.0)
    first = {}
    thread = threading.Thread(
        target=lambda: first.update(http.post("/v1/chat/completions", json=chat("Go", **ENDLESS)).json())
    )
    started = time.monotonic()
    thread.start()
    assert until(lambda: http.service.engine.stats()["running"] == 1 or first, 5)  # on a busy machine it may be over
    waiting = http.post("/v1/chat/completions", json=chat("Go", **ENDLESS))
    thread.join(20)
    assert first and time.monotonic() - started < 20
    assert first["choices"][0]["finish_reason"] == "length" and 0 < first["usage"]["completion_tokens"] < 1800
    assert waiting.status_code in (200, 503)  # a word or none, of one that came later and waited
    if waiting.status_code == 503:
        assert waiting.json()["error"]["code"] == "timeout" and "retry-after" in waiting.headers


def test_an_error_of_ours_tells_nothing(serve, caplog):
    http = serve()

    def explode(*_):
        raise RuntimeError("secret words of a prompt")

    model = http.service.engine.model
    parts = (model.vision_tower.patch_embed, model.language_model)
    handles = [part.register_forward_pre_hook(explode) for part in parts]
    caplog.set_level(logging.INFO)
    url = data_url(picture(5))
    try:
        one = http.post("/v1/chat/completions", json=chat("secret question", url))
        other = http.post("/v1/images/segments", json={"model": MODEL, "image": url})
        third = http.post("/v1/chat/completions", json=chat("secret question"))
    finally:
        for handle in handles:
            handle.remove()
    for answer in (one, other, third):
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert "secret" not in answer.text and "Traceback" not in answer.text and ".py" not in answer.text
    assert "secret" not in caplog.text and url[30:] not in caplog.text and "Traceback" not in caplog.text
    assert "RuntimeError at " in caplog.text and other.headers["x-request-id"] in caplog.text
    assert http.post("/v1/chat/completions", json=chat("x", url)).status_code == 200


def test_draining(serve):
    http = serve()
    url, got = str(http.base_url).rstrip("/"), []
    body = chat("Go", max_tokens=200, stream=True)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        http.service.draining = True
        assert http.get("/ready").status_code == 503 and http.get("/health").status_code == 200
        refused = http.post("/v1/chat/completions", json=chat())
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        got = list(lines)
    assert "data: [DONE]" in got
    assert until(lambda: http.service.running == 0, 1)


def test_what_does_not_end_in_time_is_cut_off(serve):
    http, got = serve(), []
    client = client_of(str(http.base_url).rstrip("/"))
    stream = client.chat.completions.create(**chat("Go", **ENDLESS, stream=True))
    next(stream)
    thread = threading.Thread(target=lambda: got.append(http.post("/v1/chat/completions", json=chat("Go", **ENDLESS))))
    thread.start()
    assert until(lambda: http.service.engine.stats()["running"] == 2, 5)
    asyncio.run(http.service.drain(0.1))
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    thread.join(5)
    assert got[0].status_code == 503 and got[0].json()["error"]["code"] == "shutting_down"
    assert until(lambda: http.service.running == 0 and not http.service.cancels, 1)


def test_no_other_origin_is_let_in(serve):
    http = serve()
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = http.options("/v1/chat/completions", headers=headers)
    assert answer.status_code == 405 and not [name for name in answer.headers if name.startswith("access-control")]
