"""Room for pictures and threads for them: bounded, given back as soon as may be, and not before."""

from __future__ import annotations

import base64
import gc
import io
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

from api_server import MODEL, chat, data_url, picture, until
from slow_engine import slow

from serve import pictures

ENDLESS = {"max_tokens": 1800, "temperature": 2.0, "seed": 1}


def test_pictures_are_held_in_bounds(serve, monkeypatch):
    http = serve()
    url = data_url(picture(0, (100, 100)))
    monkeypatch.setattr(pictures, "HELD_PIXELS", 10_000)
    assert http.post("/v1/chat/completions", json=chat("x", url)).status_code == 200
    answer = http.post("/v1/chat/completions", json=chat("x", url, url))
    assert answer.status_code == 429 and "pictures" in answer.json()["error"]["message"]
    assert http.post("/v1/chat/completions", json=chat("x", url, stream=True)).text.endswith("[DONE]\n\n")
    assert until(lambda: http.service.pictures.pixels == 0, 1)


def test_pictures_are_let_go_before_the_answer_is_there(serve):
    """The engine has made them small by then."""
    http = serve({"max_rows": 1, "quantum": 10_000})
    url = data_url(picture(0, (1000, 1000)))
    endless = chat("x", url, stream=True, **ENDLESS)
    with slow(http.service.engine), http.stream("POST", "/v1/chat/completions", json=endless) as answer:
        lines = answer.iter_lines()  # which would close the answer, were it let go
        next(lines)
        assert until(lambda: http.service.pictures.pixels == 0, 1)
        with ThreadPoolExecutor(3) as clients:  # these wait for a place
            body = chat("x", url, url, n=2)
            asked = [clients.submit(http.post, "/v1/chat/completions", json=body) for _ in range(3)]
            assert until(lambda: http.service.engine.stats()["waiting"] == 6, 10)
            assert until(lambda: http.service.pictures.pixels == 0, 1)
            answer.close()
            assert [reply.result().status_code for reply in asked] == [200] * 3


def test_who_leaves_early_does_not_free_a_decoder(serve, monkeypatch):
    """No more pictures are decoded at once, and what is decoded for nobody counts."""
    at_once, most, go_on, lock = 0, 0, threading.Event(), threading.Lock()
    decode = pictures.decode_image

    def watched(*args, **options):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        go_on.wait(20)
        with lock:
            at_once -= 1
        return decode(*args, **options)

    monkeypatch.setattr(pictures, "decode_image", watched)
    http = serve()
    body = json.dumps(chat("x", data_url(picture(0, (1000, 1000))))).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    try:
        for _ in range(8):
            with socket.create_connection((http.base_url.host, http.base_url.port)) as line:
                line.sendall(f"{head}\r\n\r\n".encode() + body)
                assert until(lambda: http.service.running == 1, 5)
            assert until(lambda: http.service.running == 0, 5)
        assert until(lambda: at_once == 2, 5) and http.service.pictures.pixels >= 2_000_000
        assert http.service.pictures.decoders.count == 8  # those that nobody wants any more lie in its queue
    finally:
        go_on.set()
    assert until(lambda: http.service.pictures.pixels == http.service.pictures.decoders.count == 0, 10) and most == 2


def test_what_failed_holds_no_pictures(serve):
    """Not even until the collector comes, which on a quiet server may be long."""
    http = serve()
    broken = io.BytesIO()
    picture(0, (1000, 1000)).save(broken, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(broken.getvalue()[:-200]).decode()}"
    good = data_url(picture(1, (1000, 1000)))
    wanted = {"model": MODEL, "input": good}
    gc.disable()
    try:
        assert http.post("/v1/chat/completions", json=chat("x", url)).status_code == 400
        assert http.post("/v1/chat/completions", json=chat("x " * 3000, good)).status_code == 400
        assert http.post("/v1/chat/completions", json=chat("x", good, max_visual_tokens=65)).status_code == 400
        assert http.post("/v1/embeddings", json=wanted | {"max_visual_tokens": 65}).status_code == 400
        assert http.post("/v1/embeddings", json=wanted).status_code == 200
        held = http.service.pictures
        assert until(lambda: held.pixels == held.decoders.count == http.service.seers.count == 0, 5)
    finally:
        gc.enable()


def test_pictures_alone_have_a_time_limit_and_hold_up_no_words(serve):
    http = serve(time_limit=4.0)
    wanted = {"model": MODEL, "input": data_url(picture(0))}
    with http.service.engine.lock, ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(http.post, "/v1/embeddings", json=wanted) for _ in range(8)]
        assert until(lambda: http.service.seers.count == 8, 5)
        wrong = chat("x", "data:image/png;base64," + "!" * 300_000)
        assert http.post("/v1/chat/completions", json=wrong).json()["error"]["code"] == "invalid_image"
        assert http.service.seers.count == 8
        replies = [reply.result() for reply in asked]
    assert {reply.status_code for reply in replies} == {503}
    assert {reply.json()["error"]["code"] for reply in replies} == {"timeout"}
    assert until(lambda: http.service.seers.count == 0, 10)
    assert until(lambda: http.post("/v1/embeddings", json=wanted).status_code == 200, 10)
