"""Pictures from addresses: what is fetched, and what must never be dialled. Real servers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.server
import io
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from api_server import MODEL, asking, on_loopback, picture, until

from serve import remote
from serve.api import make_app
from serve.remote import Fetcher, RemoteRefused, is_public
from serve.service import Settings

HERE = [ipaddress.ip_network("127.0.0.1/32")]


def png() -> bytes:
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    return buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Host"), dict(self.headers)))
        data, status, headers = png(), 200, {}
        match self.path.strip("/").split("/", 1):
            case ["to", place]:
                data, status, headers = b"", 302, {"Location": place}
            case ["large"]:
                data = bytes(remote.MAX_BYTES + 1)
            case ["packed"]:
                data, headers = gzip.compress(data), {"Content-Encoding": "gzip"}
            case ["slow"]:
                self.server.wait.wait(3)
            case ["missing"]:
                status = 404
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the fetcher has left
            self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def site() -> Iterator[http.server.ThreadingHTTPServer]:
    """A server of pictures on 127.0.0.1; `seen`: what it was asked."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.wait, server.daemon_threads = [], threading.Event(), True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.wait.set()
    server.shutdown()
    server.server_close()


def fetch(url: str, **options) -> bytes:
    return asyncio.run(Fetcher(**options).fetch(url))


NOT_PUBLIC = [
    "127.0.0.1",
    "localhost",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0x7f.0.0.1",
    "0177.0.0.1",
    "0.0.0.0",
    "127.255.255.254",
    "\u2460\u2461\u2466.0.0.1",  # digits in circles
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "[2001:0:7f00:1::]",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "169.254.169.254",
    "[::ffff:169.254.169.254]",
    "2852039166",
    "168.63.129.16",
    "192.0.0.192",
    "[fd00:ec2::254]",
    "[fe80::1]",
    "[fec0::1]",
    "224.0.0.1",
    "255.255.255.255",
    "240.0.0.1",
    "[ff02::1]",
]


@pytest.mark.parametrize("host", NOT_PUBLIC)
def test_addresses_that_are_not_public(site, host):
    with pytest.raises(RemoteRefused, match="not one of the public internet|not a valid address"):
        fetch(f"http://{host}:{site.server_port}/a.png")
    assert not site.seen


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://example.com/a", "gopher://x/", "http://", "http:///a", "http://u:p@1.1.1.1/", "a b"],
)
def test_addresses_that_are_none_for_pictures(url):
    with pytest.raises(RemoteRefused, match="http|host|valid"):
        fetch(url)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111"])
def test_the_internet_is_public(address):
    assert is_public(ipaddress.ip_address(address))


def test_a_picture_is_fetched_by_the_name_that_was_given(site):
    url = f"http://localhost:{site.server_port}/a.png?b=c"
    permitted = [*HERE, ipaddress.ip_network("::1/128")]
    assert fetch(url, permitted=permitted) == png()
    ((path, host, headers),) = site.seen
    assert path == "/a.png?b=c" and host == f"localhost:{site.server_port}"
    assert set(headers) == {"Host", "Accept", "Accept-Encoding", "User-Agent"}


def test_redirects_are_checked_each(site):
    port = site.server_port
    assert fetch(f"http://127.0.0.1:{port}/to//a.png", permitted=HERE) == png()
    for place in ("http://127.0.0.2/", "http://169.254.169.254/latest/meta-data/", "http://[::1]/", "//localhost.:1/"):
        with pytest.raises(RemoteRefused, match="public internet|cannot be found"):
            fetch(f"http://127.0.0.1:{port}/to/{place}", permitted=HERE)
    with pytest.raises(RemoteRefused, match="only http"):
        fetch(f"http://127.0.0.1:{port}/to/file:///etc/passwd", permitted=HERE)
    for place in ("http://a:b/", "http://[::1/", "%00" * 30_000):
        with pytest.raises(RemoteRefused, match="not a valid address|cannot be reached"):
            fetch(f"http://127.0.0.1:{port}/to/{place}", permitted=HERE)
    with pytest.raises(RemoteRefused, match="redirects more than 3"):
        fetch(f"http://127.0.0.1:{port}/to//to//to//to//to//a.png", permitted=HERE)


def test_what_was_checked_is_dialled(site, monkeypatch):
    """A name that turns from a good address to a bad one between two look-ups is looked up once."""
    asked = []

    def look_up(host: str, port: int) -> list[tuple]:
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(remote, "look_up", look_up)
    assert fetch(f"http://turning.example:{site.server_port}/a.png", permitted=HERE) == png()
    assert asked == ["turning.example"] and site.seen[0][1] == f"turning.example:{site.server_port}"
    with pytest.raises(RemoteRefused, match="public internet"):
        fetch(f"http://turning.example:{site.server_port}/a.png", permitted=HERE)


def test_one_bad_address_among_good_ones_is_enough(site, monkeypatch):
    def look_up(host: str, port: int) -> list[tuple]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("127.0.0.1", "10.0.0.1")]

    monkeypatch.setattr(remote, "look_up", look_up)
    with pytest.raises(RemoteRefused, match="public internet"):
        fetch(f"http://both.example:{site.server_port}/a.png", permitted=HERE)


def test_a_name_server_that_takes_its_time_holds_up_no_other_work(site, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(remote, "look_up", lambda *_: over.wait(10) and [])
    monkeypatch.setattr(remote, "SECONDS", 0.3)

    fetcher = Fetcher()

    async def fetched() -> float:
        fetches = (fetcher.fetch(f"http://{number}.example/") for number in range(20))
        errors = await asyncio.gather(*fetches, return_exceptions=True)
        assert all(isinstance(error, RemoteRefused) and "within" in str(error) for error in errors)
        started = time.monotonic()
        await asyncio.to_thread(int)
        return time.monotonic() - started

    try:
        assert asyncio.run(fetched()) < 1
    finally:
        over.set()
    assert until(lambda: fetcher.backend.lookups.count == 0, 5)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("large", "more than 10,000,000 bytes"),
        ("packed", "compressed"),
        ("missing", "404"),
        ("slow", "within 1 seconds"),
    ],
)
def test_limits(site, path, words, monkeypatch):
    monkeypatch.setattr(remote, "SECONDS", 1.0)
    with pytest.raises(RemoteRefused, match=words):
        fetch(f"http://127.0.0.1:{site.server_port}/{path}", permitted=HERE)


def test_proxies_of_the_environment_are_not_asked(site, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{site.server_port}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{site.server_port}")
    with pytest.raises(RemoteRefused):
        fetch("http://10.0.0.1/a.png")
    assert not site.seen


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_tls_keeps_the_name(site, tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=pictures.example",
    ]
    command += ["-addext", "subjectAltName=DNS:pictures.example", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context, names = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), []
    context.load_cert_chain(certificate, key)
    context.sni_callback = lambda _, name, __: names.append(name)
    site.socket = context.wrap_socket(site.socket, server_side=True)

    def look_up(host: str, port: int) -> list[tuple]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(remote, "look_up", look_up)
    trust = ssl.create_default_context(cafile=certificate)
    port = site.server_port
    assert fetch(f"https://pictures.example:{port}/a.png", permitted=HERE, trust=trust) == png()
    assert names == ["pictures.example"]
    for url, options in (
        (f"https://other.example:{port}/", {"trust": trust}),
        (f"https://pictures.example:{port}/", {}),
    ):
        with pytest.raises(RemoteRefused, match="cannot be reached"):
            fetch(url, permitted=HERE, **options)


def test_over_the_api(engine, site):
    """With the flag: refused where it points inside, by a message without an address."""
    app = make_app(engine, Settings(MODEL, remote_images=True))
    with on_loopback(app) as url:
        for address in (
            f"http://127.0.0.1:{site.server_port}/a.png",
            "http://169.254.169.254/latest",
            "file:///etc/passwd",
        ):
            body = {"model": MODEL, "messages": asking("What?", address)}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False)
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["param"] == "messages[0].content[0].image_url.url"
            assert error["code"] in ("remote_image_refused", "invalid_image") and address not in error["message"]
        assert not site.seen
        app.state.service.pictures.fetcher = Fetcher(HERE)
        body = {
            "model": MODEL,
            "messages": asking("What?", f"http://127.0.0.1:{site.server_port}/a.png"),
            "max_tokens": 2,
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False).json()
        assert answer["usage"]["patches"] == 64 and len(site.seen) == 1
