"""What comes before the app: heads without an end, offers of other protocols, pieces of any size."""

from __future__ import annotations

import json
import socket

import pytest
from api_server import chat

from serve.http_protocol import MAX_HEAD


@pytest.fixture
def line(api):
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        yield line


def all_of(line: socket.socket) -> bytes:
    pieces = []
    try:
        while piece := line.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


CHUNKED = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"X-More: " + b"a" * 10000 + b"\r\n"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-More: ", b"a" * 10000),
        (b"GET /", b"a" * 10000),
        (CHUNKED + b"1\r\n1\r\n0\r\n", b"X-More: " + b"a" * 10000 + b"\r\n"),
        (CHUNKED + b"1\r\n1\r\n0\r\nX-More: ", b"a" * 10000),
    ],
    ids=["headers", "a header", "an address", "trailers", "a trailer"],
)
def test_what_does_not_end_is_refused(line, start, more):
    line.sendall(start)
    sent = 0
    try:
        while sent < 400 * MAX_HEAD:
            line.sendall(more)
            sent += len(more)
    except (BrokenPipeError, ConnectionResetError):
        pass
    assert sent < 400 * MAX_HEAD  # which the buffers on the way do not hold
    assert all_of(line)[:13] in (b"HTTP/1.1 400 ", b"")  # nothing: the rest of what was sent made it a reset


def test_a_long_head_at_once(line):
    line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * MAX_HEAD + b"\r\n\r\n")
    assert all_of(line)[:13] in (b"HTTP/1.1 400 ", b"")


@pytest.mark.parametrize("garbage", [b"hello\r\n", b"GET /health HTTP/9\r\n\r\n", b"\x16\x03\x01\x00\xa5\n"])
def test_what_is_no_http_is_refused_at_once(line, garbage):
    line.sendall(garbage)
    assert all_of(line).startswith(b"HTTP/1.1 400 ")


def test_pieces_of_any_size_and_one_after_the_other(line):
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for byte in request:
        line.sendall(bytes([byte]))
    line.sendall(request + request[:-2] + b"Connection: close\r\n\r\n")
    assert all_of(line).count(b"HTTP/1.1 200 ") == 3


def test_an_offer_of_another_protocol_costs_no_body(line):
    body = json.dumps(chat("Hello")).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    line.sendall(head.encode() + body)
    line.settimeout(20)
    assert line.recv(65536).startswith(b"HTTP/1.1 200 ")
