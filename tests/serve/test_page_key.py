"""The chat page behind a key: every route of gradio's app refuses without it, a browser gets in by the form. Real HTTP."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import pytest
from gradio_page import ask, box, finish, free_port, longest_answer, needs_browser
from playwright.sync_api import expect

from serve import gradio_app
from serve.backends import LocalBackend
from serve.chat_page import make_page

KEY = "a-key of the page"
BEARER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def page_behind(engine, tmp_path_factory) -> Iterator:
    """The page's Blocks, launched as the program does; its `url`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        page = make_page(LocalBackend(engine, "small"))
        page.url = gradio_app.launch(page, "127.0.0.1", free_port(), KEY).rstrip("/")
        yield page
        page.close()


@pytest.fixture
def http(page_behind) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=page_behind.url, trust_env=False, timeout=20) as http:
        yield http


def test_without_a_key_a_page_on_this_machine_answers_to_its_own_name(engine):
    """Else a page from elsewhere, whose name has come to point to 127.0.0.1, could ask it (DNS rebinding)."""
    page = make_page(LocalBackend(engine, "small"))
    url = gradio_app.launch(page, "127.0.0.1", free_port(), None).rstrip("/")
    try:
        with httpx.Client(base_url=url, trust_env=False, timeout=20) as http:
            for host, status in (("evil.example", 403), ("127.0.0.1.evil.example:80", 403), ("localhost", 200)):
                assert http.get("/config", headers={"Host": host}).status_code == status
            assert http.get("/").status_code == 200
            assert http.get("/", headers={"X-Long": "a" * 2**17}).status_code == 400  # as of the API
    finally:
        page.close()


def every_route(page) -> set[tuple[str, str]]:
    """Method and address of all that the app answers, its routers' too."""

    def walk(routes, prefix: str = "") -> Iterator[tuple[str, str]]:
        for route in routes:
            path = prefix + getattr(route, "path", "")
            inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
            if inner:
                yield from walk(inner, path)
            else:
                for method in getattr(route, "methods", None) or {"GET"}:
                    yield method, re.sub(r"\{[^}]*\}", "x", path)

    return set(walk(page.app.routes))


def test_every_route_is_closed(page_behind, http):
    routes = every_route(page_behind)
    paths = {path for _, path in routes}
    assert {"/", "/config", "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/upload"} <= paths
    assert {"/gradio_api/file=x", "/gradio_api/startup-events", "/theme.css"} <= paths and len(routes) > 40
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": "llava_drip_key=wrong"}):
        for method, path in routes:
            answer = http.request(method, path, headers=headers)
            assert answer.status_code == 401, (method, path)
            assert "gradio" not in answer.text
    assert "<form" in http.get("/").text and "<form" not in http.get("/config").text
    for path in ("/", "/config", "/theme.css", "/gradio_api/startup-events"):
        assert http.get(path, headers=BEARER).status_code == 200


def test_uploads_are_closed(http):
    sent = {"files": ("a.txt", b"words of a visitor")}
    assert http.post("/gradio_api/upload", files=sent).status_code == 401
    (place,) = http.post("/gradio_api/upload", files=sent, headers=BEARER).json()
    assert http.get(f"/gradio_api/file={place}").status_code == 401
    assert http.get(f"/gradio_api/file={place}", headers=BEARER).text == "words of a visitor"


def test_websockets_are_closed(page_behind):
    with socket.create_connection(("127.0.0.1", page_behind.server_port), timeout=5) as line:
        head = "GET /gradio_api/queue/join HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        line.sendall(
            (head + "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n").encode()
        )
        assert re.match(rb"HTTP/1.1 40[13] ", line.recv(100))


def test_the_form(http):
    for given in ({"key": "wrong"}, {}, {"key": "schlüssel"}, {"key": "x" * 5000}):
        refused = http.post("/key", data=given)
        assert refused.status_code == 401 and "That is not the key." in refused.text and not http.cookies
    let_in = http.post("/key", data={"key": f" {KEY} "})
    assert let_in.status_code == 303 and let_in.headers["location"] == "./"
    cookie = let_in.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie and KEY not in cookie
    http.cookies.set("other", '"{a b}', domain="127.0.0.1")  # of another program on this host
    assert http.get("/").status_code == 200 and "gradio" in http.get("/").text
    assert http.get("/config").json()["title"].startswith("small")


@needs_browser
def test_a_visitor_with_the_key(browser, page_behind):
    context = browser.new_context()
    tab = context.new_page()
    tab.set_default_timeout(20_000)
    tab.goto(page_behind.url)
    for given in ("wrong", KEY):
        tab.get_by_label("This page asks for a key.").fill(given)
        tab.get_by_role("button", name="Open").click()
        if given == "wrong":
            expect(tab.get_by_role("alert")).to_have_text("That is not the key.")
    box(tab).wait_for()
    longest_answer(tab, 16)
    ask(tab, "Hello?")
    assert finish(tab, 1)
    context.close()


def test_whose_key_it_is(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text("of-the-file\n")

    def key(**given) -> str | None:
        return gradio_app.page_key(SimpleNamespace(**{"api_url": None, "api_key_file": None, **given}))

    monkeypatch.setenv("LLAVA_DRIP_API_KEY", "of-the-environment")
    assert key(api_url="http://x") is None and key(api_url="http://x", api_key_file=file) == "of-the-file"
    with pytest.raises(ValueError, match="both given"):
        key(api_key_file=file)
    monkeypatch.setenv("LLAVA_DRIP_API_KEY", "of-the-environment")
    assert key() == "of-the-environment" and key() is None and key(api_key_file=file) == "of-the-file"
    file.write_text("schlüssel")
    with pytest.raises(ValueError, match="ASCII"):
        key(api_key_file=file)
