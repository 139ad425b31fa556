"""The chat page in a real browser: the real server as its own process, a small random checkpoint, headless Chromium."""

from __future__ import annotations

import io
import json
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from llava_drip.engine import Engine
from llava_drip.images import load_image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no browser: install chromium (apt-get install chromium)")
WATCH = """() => {  // keeps every text that the answer has while it grows
    window.seen = [];
    new MutationObserver(() => {
        const text = document.querySelector("#chat [data-testid=bot]")?.textContent;
        if (text && text !== window.seen.at(-1)) window.seen.push(text);
    }).observe(document.querySelector("#chat"), { subtree: true, childList: true, characterData: true });
}"""
TOKEN_LINE = re.compile(r"(\d+) of (\d+) visual tokens, first token after (\d+) ms")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint, tmp_path_factory) -> Path:
    """The small checkpoint without an end-of-text token, so that answers are long enough to watch."""
    directory = tmp_path_factory.mktemp("endless") / "small-model"
    shutil.copytree(tiny_checkpoint, directory)
    path = directory / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))
    return directory


@pytest.fixture(scope="module")
def url(checkpoint, repository) -> Iterator[str]:
    command = [sys.executable, "-m", "serve.gradio_app", "--device", "cpu", "--model", checkpoint]
    command += ["--port", str(free_port())]
    server = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        lines = []
        for line in server.stdout:
            lines.append(line)
            if found := re.search(r"chat at (http://\S+)", line):
                break
        assert lines and found, f"the server ended before it was ready: {''.join(lines)}"
        yield found[1]
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            raise


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.foreign = []  # requests to anywhere but the server
    page.on("request", lambda request: page.foreign.append(request.url) if is_foreign(request.url, url) else None)
    page.goto(url)
    box(page).wait_for()
    yield page
    context.close()


def is_foreign(address: str, url: str) -> bool:
    return not address.startswith((url, "data:", "blob:"))


def picture(path: Path, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((120, 90), Image.Resampling.NEAREST).save(path)
    return path


def box(page: Page):
    return page.get_by_placeholder("Ask about the picture")


def attach(page: Page, *paths: Path) -> None:
    page.locator("#ask input[type=file]").set_input_files(paths)
    expect(page.locator("#ask .thumbnail-item, #ask .thumbnail-image")).not_to_have_count(0)


def ask(page: Page, text: str) -> None:
    box(page).fill(text)
    page.get_by_test_id("submit-button").click()


def answers(page: Page):
    return page.locator("#chat [data-testid=bot]")


def finish(page: Page, count: int) -> str:
    """Waits until `count` answers are there and the box takes the next question; returns the last answer."""
    expect(answers(page)).to_have_count(count)
    expect(page.get_by_test_id("submit-button")).to_be_visible()
    return answers(page).nth(count - 1).inner_text()


def longest_answer(page: Page, tokens: int) -> None:
    field = page.get_by_label(re.compile("number input for Longest answer"))
    if not field.is_visible():
        page.get_by_role("button", name="Settings").click()
    field.fill(str(tokens))
    field.press("Enter")


@needs_browser
def test_upload_ask_and_watch_the_answer_stream_in(page, checkpoint, tmp_path):
    path = picture(tmp_path / "a.png", 0)
    attach(page, path)
    longest_answer(page, 512)
    page.evaluate(WATCH)
    ask(page, "What color is the circle?")
    expect(page.locator("#chat [data-testid=user] img")).to_be_visible()
    whole = finish(page, 1)
    seen = page.evaluate("window.seen")
    assert len(seen) >= 4, "the answer did not come in pieces"
    assert sorted(seen, key=len) == seen and len(seen[0]) < len(whole) / 2

    # what the page shows is what the engine says
    engine = Engine.load(checkpoint, device="cpu")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is the circle?"}]}]
    reply = engine.answer_batch([(messages, [load_image(path)])], 512)[0]
    # Letters and digits: random weights also write control characters, which a page shows as it likes.
    assert re.sub(r"[^A-Za-z0-9]", "", whole) == re.sub(r"[^A-Za-z0-9]", "", reply.text)
    shown, patches, milliseconds = map(int, TOKEN_LINE.search(page.locator("#tokens").inner_text()).groups())
    assert (shown, patches) == (reply.usage.visual_tokens, 64) and milliseconds > 0
    drawing = page.locator("#pictures img")
    expect(drawing).to_have_count(1)
    assert drawing.evaluate("image => image.naturalWidth") >= 448
    expect(page.locator("#pictures figcaption")).to_have_text(f"{shown} of 64 tokens")
    assert page.foreign == [], "the page asked another host for something"


@needs_browser
def test_several_pictures_and_turns_then_clear(page, tmp_path):
    longest_answer(page, 16)
    attach(page, picture(tmp_path / "a.png", 1), picture(tmp_path / "b.png", 2))
    ask(page, "What do they share?")
    finish(page, 1)
    expect(page.locator("#tokens")).to_contain_text("of 128 visual tokens")
    expect(page.locator("#pictures img")).to_have_count(2)
    ask(page, "And why?")
    finish(page, 2)
    expect(page.locator("#tokens")).to_contain_text("of 128 visual tokens")
    attach(page, picture(tmp_path / "c.png", 3))
    ask(page, "And this one?")
    finish(page, 3)
    expect(page.locator("#tokens")).to_contain_text("of 192 visual tokens")
    expect(page.locator("#pictures img")).to_have_count(3)
    assert page.locator("#chat [data-testid=user] img").count() == 3
    page.locator("#chat").get_by_title("Clear").click()
    expect(answers(page)).to_have_count(0)
    expect(page.locator("#pictures img")).to_have_count(0)
    ask(page, "Without a picture?")
    finish(page, 1)
    expect(page.locator("#tokens")).to_contain_text("No picture")


@needs_browser
def test_stop_keeps_what_was_said_and_frees_the_engine(page, tmp_path):
    longest_answer(page, 1024)
    attach(page, picture(tmp_path / "a.png", 0))
    ask(page, "Go on and on.")
    expect(answers(page)).to_have_count(1)
    page.locator("#ask .stop-button").click()
    stopped = finish(page, 1)
    time.sleep(0.5)
    assert answers(page).first.inner_text() == stopped != ""
    longest_answer(page, 16)
    started = time.perf_counter()
    ask(page, "More?")
    finish(page, 2)
    assert time.perf_counter() - started < 10
    assert answers(page).first.inner_text() == stopped


@needs_browser
def test_clear_in_the_middle_of_an_answer(page):
    longest_answer(page, 1024)
    ask(page, "Go on and on.")
    expect(answers(page)).to_have_count(1)
    for _ in range(10):  # each piece of the answer draws the chat anew, and a click on the old button is lost
        if page.locator("#chat").get_by_title("Clear").count():
            page.locator("#chat").get_by_title("Clear").click()
        page.wait_for_timeout(1000)
        if answers(page).count() == 0:
            break
    expect(answers(page)).to_have_count(0)
    expect(page.get_by_test_id("submit-button")).to_be_visible()
    time.sleep(0.5)
    expect(page.locator("#chat [data-testid=user], #chat [data-testid=bot]")).to_have_count(0)
    expect(page.locator("#tokens")).to_contain_text("Upload a picture")


@needs_browser
def test_text_is_shown_as_it_was_written(page, tmp_path):
    longest_answer(page, 16)
    attach(page, picture(tmp_path / "a.png", 0))
    text = "Is <image> </s> 2 < 3 <b>bold</b> <img src='http://192.0.2.1/x.png'> &lt; *so*?"
    ask(page, text)
    finish(page, 1)
    expect(page.locator("#chat [data-testid=user]").last).to_have_text(text)
    expect(page.locator("#tokens")).to_contain_text("of 64 visual tokens")  # the written <image> is none
    assert page.foreign == []


@needs_browser
def test_a_broken_picture_is_named_and_may_be_replaced(page, tmp_path):
    buffer = io.BytesIO()
    Image.open(picture(tmp_path / "a.png", 0)).resize((300, 300)).save(buffer, "JPEG", quality=95)
    (tmp_path / "broken.jpg").write_bytes(buffer.getvalue()[:-3000])
    attach(page, tmp_path / "broken.jpg")
    ask(page, "What is it?")
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text("broken.jpg: truncated or corrupt")
    assert "/" not in toast.inner_text()  # where the server keeps uploads is nobody's business
    expect(box(page)).to_have_value("What is it?")  # nothing is lost
    expect(answers(page)).to_have_count(0)
    page.get_by_role("button", name="Remove file").click()
    longest_answer(page, 16)
    attach(page, picture(tmp_path / "good.png", 0))
    ask(page, "What is it?")
    finish(page, 1)


@needs_browser
def test_a_conversation_longer_than_the_context_says_so(page):
    longest_answer(page, 16)
    ask(page, "word " * 2500)
    expect(page.get_by_test_id("toast-body")).to_contain_text("the conversation is too long")
    expect(page.get_by_test_id("submit-button")).to_be_visible()
    expect(box(page)).to_have_value(("word " * 2500).strip())
    ask(page, "Shorter.")
    finish(page, 1)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_and_colours(browser, url, tmp_path, scheme):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.goto(url)
    box(page).wait_for()
    attach(page, picture(tmp_path / "a.png", 0))
    longest_answer(page, 32)
    ask(page, "What is it?")
    finish(page, 1)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
    expect(page.locator("#pictures img")).to_be_visible()

    def brightness(element: str, colour: str) -> float:
        script = f"element => getComputedStyle(element).{colour}"
        return sum(map(float, re.findall(r"[\d.]+", page.locator(element).first.evaluate(script))[:3])) / 3

    text, ground = brightness("#tokens b", "color"), brightness("body", "backgroundColor")
    assert (text < 100 and ground > 200) if scheme == "light" else (text > 200 and ground < 100)
    context.close()


def test_mistakes_are_named_in_one_line(repository, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(repository)
    (tmp_path / "empty").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, arguments in {
            "empty: has no config.json": ["--model", str(tmp_path / "empty")],
            "--prot": ["--model", str(tiny_checkpoint), "--prot", "80"],
            "--port 0": ["--model", str(tiny_checkpoint), "--port", "0"],
            port: ["--model", str(tiny_checkpoint), "--device", "cpu", "--port", port],
        }.items():
            monkeypatch.setattr(sys, "argv", ["gradio_app", *arguments])
            with pytest.raises(SystemExit) as exited:
                runpy.run_module("serve.gradio_app", run_name="__main__")
            printed = capsys.readouterr()
            errors = [line for line in printed.err.splitlines() if "error" in line]
            assert exited.value.code in (1, 2) and printed.out == "" and len(errors) == 1 and words in errors[0], (
                printed
            )
