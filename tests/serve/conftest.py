"""The real servers of the chat page and of the API as processes with a small random checkpoint, and headless Chromium."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest
from api_server import MODEL, client_of, on_loopback, process
from gradio_page import CHROMIUM, FLAGS, box, free_port, is_foreign
from playwright.sync_api import Browser, Page, sync_playwright

from llava_drip.engine import Engine
from serve.api import make_app
from serve.service import Settings


@pytest.fixture(scope="session")
def checkpoint(endless_checkpoint):
    return endless_checkpoint


@pytest.fixture(scope="session")
def api(checkpoint, repository) -> Iterator[subprocess.Popen]:
    """The API's process, as `process` gives it."""
    with process(repository, checkpoint) as server:
        yield server


@pytest.fixture(scope="session")
def client(api) -> openai.OpenAI:
    """The official client, which does not try again."""
    return client_of(api.url)


@pytest.fixture(scope="session")
def loaded(checkpoint) -> Engine:
    return Engine.load(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def engine(loaded) -> Iterator[Engine]:
    """A module's own, for an app closes its engine with itself."""
    engine = Engine(loaded.model, loaded.processor)
    yield engine
    engine.close()


@pytest.fixture
def serve(engine) -> Iterator[Callable]:
    """serve(limits, **settings): an app with an engine of its own over the same weights, as a client of httpx; its `service`."""
    opened = []

    def serve(limits: dict | None = None, **settings) -> httpx.Client:
        own = Engine(engine.model, engine.processor, **(limits or {}))
        app = make_app(own, Settings(MODEL, **settings))
        context = on_loopback(app)
        client = httpx.Client(base_url=context.__enter__(), trust_env=False, timeout=60)
        client.service = app.state.service
        opened.append((context, client))
        return client

    yield serve
    for context, client in opened:
        client.close()
        context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def server(checkpoint, repository, tmp_path_factory) -> Iterator[subprocess.Popen]:
    """The running server; its `url` says where, and `uploads` where it keeps pictures."""
    command = [sys.executable, "-m", "serve.gradio_app", "--device", "cpu", "--model", checkpoint]
    command += ["--port", str(free_port())]
    uploads = tmp_path_factory.mktemp("uploads")
    options = {"cwd": repository, "env": {**os.environ, "GRADIO_TEMP_DIR": str(uploads)}, "text": True}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    server.uploads = uploads
    try:
        lines = []
        for line in server.stdout:
            lines.append(line)
            if found := re.search(r"chat at (http://\S+)", line):
                break
        assert lines and found, f"the server ended before it was ready: {''.join(lines)}"
        server.url = found[1]
        yield server
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(30)  # an answer may be under way, on a slow machine
        except subprocess.TimeoutExpired:
            server.kill()
            raise


@pytest.fixture(scope="module")
def url(server) -> str:
    return server.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, url) -> Iterator[Callable[[], Page]]:
    """Opens the page as another visitor does."""
    contexts = []

    def tab() -> Page:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 860}))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.foreign = []  # requests to anywhere but the server
        page.on("request", lambda request: page.foreign.append(request.url) if is_foreign(request.url, url) else None)
        page.goto(url)
        box(page).wait_for()
        return page

    yield tab
    for context in contexts:
        context.close()


@pytest.fixture
def page(tab) -> Page:
    return tab()
