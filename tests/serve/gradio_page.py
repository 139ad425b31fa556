"""What a visitor does on the chat page, and what the visitor sees."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import numpy as np
from chromium import CHROMIUM, FLAGS, needs_browser  # noqa: F401 (the tests of this folder take them from here)
from PIL import Image
from playwright.sync_api import Page, expect

FLAGS = [*FLAGS, "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a camera of moving colours
expect.set_options(timeout=20_000)  # a machine may be slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def letters(text: str) -> str:
    """Letters and digits: random weights also write control characters, which a page shows as it likes."""
    return re.sub(r"[^A-Za-z0-9]", "", text)


def clear(page: Page):
    return page.locator("#chat").get_by_role("button", name="Clear")


def longest_answer(page: Page, tokens: int) -> None:
    field = page.get_by_label(re.compile("number input for Longest answer"))
    if not field.is_visible():
        page.get_by_role("button", name="Settings").click()
    field.fill(str(tokens))
    field.press("Enter")
