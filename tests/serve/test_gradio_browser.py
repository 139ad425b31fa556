"""The chat page in a real browser."""

from __future__ import annotations

import io
import re
import runpy
import socket
import sys

import pytest
from gradio_page import answers, ask, attach, box, clear, finish, letters, longest_answer, needs_browser, picture
from PIL import Image
from playwright.sync_api import expect

from llava_drip.engine import Engine
from llava_drip.images import load_image

WATCH = """() => {  // keeps every text that the answer has while it grows
    window.seen = [];
    new MutationObserver(() => {
        const text = document.querySelector("#chat [data-testid=bot]")?.textContent;
        if (text && text !== window.seen.at(-1)) window.seen.push(text);
    }).observe(document.querySelector("#chat"), { subtree: true, childList: true, characterData: true });
}"""
TOKEN_LINE = re.compile(r"(\d+) of (\d+) tokens used, first token after (\d+) ms")


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
    assert letters(whole) == letters(reply.text)
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
    expect(page.locator("#tokens")).to_contain_text("of 128 tokens used")
    expect(page.locator("#pictures img")).to_have_count(2)
    ask(page, "And why?")
    finish(page, 2)
    expect(page.locator("#tokens")).to_contain_text("of 128 tokens used")
    attach(page, picture(tmp_path / "c.png", 3))
    ask(page, "And this one?")
    finish(page, 3)
    expect(page.locator("#tokens")).to_contain_text("of 192 tokens used")
    expect(page.locator("#pictures img")).to_have_count(3)
    assert page.locator("#chat [data-testid=user] img").count() == 3
    clear(page).click()
    expect(answers(page)).to_have_count(0)
    expect(page.locator("#pictures img")).to_have_count(0)
    ask(page, "Without a picture?")
    finish(page, 1)
    expect(page.locator("#tokens")).to_contain_text("No picture")


@needs_browser
def test_text_is_shown_as_it_was_written(page, tmp_path):
    longest_answer(page, 16)
    attach(page, picture(tmp_path / "a.png", 0))
    text = "Is <image> </s> 2 < 3 <b>bold</b> <img src='http://192.0.2.1/x.png'> &lt; *so*?"
    ask(page, text)
    finish(page, 1)
    expect(page.locator("#chat [data-testid=user]").last).to_have_text(text)
    expect(page.locator("#tokens")).to_contain_text("of 64 tokens used")  # the written <image> is none
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
def test_the_slider_sets_the_budget_of_the_next_answer(page, tmp_path):
    longest_answer(page, 16)
    attach(page, picture(tmp_path / "a.png", 0))
    ask(page, "What is it?")
    finish(page, 1)
    slider, own = page.get_by_role("slider", name="Budget"), page.get_by_label("Let the model choose")
    expect(own).to_be_checked()
    for key, tokens in ("Home", 64), ("End", 6):  # all of them; one for ten patches
        slider.press(key)
        expect(own).not_to_be_checked()
        page.get_by_role("button", name="Ask again").click()
        expect(page.locator("#tokens b")).to_have_text(str(tokens))
        finish(page, 1)  # the new answer stands in the place of the old one
        expect(page.locator("#pictures figcaption")).to_have_text(f"{tokens} of 64 tokens")
        expect(page.locator("#chat [data-testid=user] img")).to_have_count(1)


@needs_browser
def test_an_example_is_asked_at_a_click(page):
    longest_answer(page, 16)
    page.get_by_role("button", name="Select example 3").click()
    finish(page, 1)
    expect(page.locator("#chat [data-testid=user]").last).to_have_text("How many shapes are there?")
    expect(page.locator("#tokens")).to_contain_text("of 64 tokens used")
    assert page.foreign == []


@needs_browser
def test_a_photo_of_the_camera_goes_into_the_question(page):
    page.context.grant_permissions(["camera"])
    page.get_by_role("button", name="Camera").click()
    page.locator("#camera").get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#camera video')?.videoWidth > 0")  # the camera shows something
    page.locator("#camera").get_by_role("button", name="capture photo").click()
    expect(page.locator("#ask .thumbnail-item, #ask .thumbnail-image")).not_to_have_count(0)
    longest_answer(page, 16)
    ask(page, "Who is it?")
    finish(page, 1)
    expect(page.locator("#tokens")).to_contain_text("of 64 tokens used")


@needs_browser
def test_controls_have_names_and_tab_reaches_them_in_order(page):
    expect(page.get_by_role("textbox", name="Your question")).to_be_focused()
    expect(page.get_by_role("status", name="Tokens used")).to_have_attribute("aria-live", "polite")
    assert page.locator("html").get_attribute("lang") == "en"
    nameless = """() => [...document.querySelectorAll("button, input:not([type=hidden]), textarea")].filter((element) =>
        element.checkVisibility() && !element.computedName && !element.ariaLabel && !element.textContent.trim()
        && !element.labels?.length && !element.title).map((element) => element.outerHTML)"""
    assert page.evaluate(nameless) == []
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.ariaLabel || document.activeElement.labels?.[0]?.innerText")
        )
    found = [next((i for i, name in enumerate(reached) if word in (name or "")), None) for word in ("choose", "Budget")]
    assert None not in found and found == sorted(found), reached


def contrast(text: str, ground: str) -> float:
    """Of two colours as CSS writes them (WCAG 2.1)."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts))

    darker, lighter = sorted((luminance(text), luminance(ground)))
    return (lighter + 0.05) / (darker + 0.05)


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
    tops = [page.locator(name).bounding_box()["y"] for name in ("#chat", "#tokens", "#ask", "#pictures", "#budget")]
    assert tops == sorted(tops), "what an answer took is not right below it"

    def colour(element: str, name: str) -> str:
        return page.locator(element).first.evaluate(f"element => getComputedStyle(element).{name}")

    ground = colour("body", "backgroundColor")
    assert (
        contrast(ground, "rgb(255, 255, 255)" if scheme == "dark" else "rgb(0, 0, 0)") > 15
    )  # of the scheme asked for
    for element in "#tokens b", "#tokens .note", "#title p", "#pictures figcaption", "#chat [data-testid=bot] span":
        assert contrast(colour(element, "color"), ground) >= 4.5, element
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


@needs_browser
def test_an_upload_that_was_deleted_is_named_without_its_folder(page, server, tmp_path):
    longest_answer(page, 16)
    attach(page, picture(tmp_path / "mine.png", 3))
    ask(page, "What is it?")
    finish(page, 1)
    uploaded = list(server.uploads.rglob("mine.png"))
    assert uploaded
    for path in uploaded:
        path.unlink()  # what gradio does after a day
    ask(page, "And now?")
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text("mine.png: no such image file")
    assert str(server.uploads) not in toast.inner_text()
    expect(box(page)).to_have_value("And now?")
    expect(page.get_by_test_id("submit-button")).to_be_visible()
    expect(page.locator("#chat")).not_to_contain_text("And now?")  # in the box only: asked again, it is there once
    expect(answers(page)).to_have_count(1)
    clear(page).click()
    expect(answers(page)).to_have_count(0)
    ask(page, "And without?")
    finish(page, 1)
