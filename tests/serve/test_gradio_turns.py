"""Stop, Clear, Ask again and two visitors at once on the chat page, in a real browser and over a slow connection."""

from __future__ import annotations

import html
import re
import subprocess
import time

import psutil
from gradio_page import answers, ask, attach, box, clear, finish, letters, longest_answer, needs_browser, picture
from playwright.sync_api import Page, Request, expect

RETURN = """() => {  // counts how often a message is in the chat although it was cleared
    window.returned = 0;
    new MutationObserver(() => {
        window.returned += document.querySelectorAll("#chat [data-testid=bot], #chat [data-testid=user]").length;
    }).observe(document.querySelector("#chat"), { subtree: true, childList: true, characterData: true });
}"""


def stop(page: Page):
    return page.locator("#ask .stop-button")


def delay(page: Page) -> None:
    """From now on every order to the server takes 0.2 s longer, as over a long way; its stream of pieces does not."""
    page.route(re.compile("/(run|queue/join|cancel|reset)"), lambda route: (time.sleep(0.2), route.continue_()))


def ask_and_read(page: Page, text: str) -> list[tuple[str, str]]:
    """Asks; returns the conversation that the server was sent, as (role, letters)."""

    def has_chat(request: Request) -> bool:
        return "queue/join" in request.url and isinstance(request.post_data_json["data"][0], list)

    with page.expect_request(has_chat) as caught:
        ask(page, text)
    chat = caught.value.post_data_json["data"][0]
    parts = [(item["role"], part) for item in chat for part in item["content"]]
    return [(role, letters(html.unescape(part["text"]))) for role, part in parts if part["type"] == "text"]


def load(server: subprocess.Popen, seconds: float) -> float:
    """How many cores the server keeps busy for the next `seconds`."""
    return psutil.Process(server.pid).cpu_percent(seconds) / 100


@needs_browser
def test_stop_keeps_what_was_said_and_frees_the_engine(page, server, tmp_path):
    longest_answer(page, 1024)
    attach(page, picture(tmp_path / "a.png", 0))
    delay(page)
    ask(page, "Go on and on.")
    expect(answers(page)).to_have_count(1)
    assert load(server, 0.5) > 0.2
    stop(page).click()
    stopped = finish(page, 1)  # final as soon as the box takes the next question
    time.sleep(0.5)
    assert load(server, 1) < 0.15, "the engine goes on"
    page.wait_for_timeout(1000)
    assert answers(page).first.inner_text() == stopped != ""
    longest_answer(page, 16)
    sent = ask_and_read(page, "More?")
    assert sent == [("user", "Goonandon"), ("assistant", letters(stopped)), ("user", "More")]
    finish(page, 2)
    assert answers(page).first.inner_text() == stopped


@needs_browser
def test_clear_in_the_middle_of_an_answer(page):
    longest_answer(page, 1024)
    delay(page)
    ask(page, "Go on and on.")
    expect(answers(page)).to_have_count(1)
    clear(page).click()
    expect(answers(page)).to_have_count(0)
    page.evaluate(RETURN)
    expect(page.get_by_test_id("submit-button")).to_be_visible()
    page.wait_for_timeout(1500)
    expect(page.locator("#chat [data-testid=user], #chat [data-testid=bot]")).to_have_count(0)
    assert page.evaluate("window.returned") == 0
    expect(page.locator("#tokens")).to_contain_text("Add a picture")
    longest_answer(page, 16)
    assert ask_and_read(page, "Anew?") == [("user", "Anew")]
    finish(page, 1)


@needs_browser
def test_clear_before_the_answer_begins(page):
    longest_answer(page, 16)
    ask(page, "First?")
    finish(page, 1)
    delay(page)
    ask(page, "Second?")
    clear(page).click()
    expect(page.locator("#chat [data-testid=user], #chat [data-testid=bot]")).to_have_count(0)
    page.evaluate(RETURN)
    page.wait_for_timeout(1500)
    assert page.evaluate("window.returned") == 0
    expect(page.locator("#tokens")).to_contain_text("Add a picture")
    ask(page, "Anew?")
    finish(page, 1)


@needs_browser
def test_enter_twice_asks_once(page):
    longest_answer(page, 16)
    delay(page)
    box(page).fill("Once?")
    box(page).press("Enter")
    page.wait_for_timeout(300)
    box(page).press("Enter")
    finish(page, 1)
    page.wait_for_timeout(1000)
    expect(page.locator("#chat [data-testid=user]")).to_have_count(1)
    expect(answers(page)).to_have_count(1)
    expect(page.get_by_test_id("toast-body")).to_have_count(0)


@needs_browser
def test_two_visitors_are_answered_at_the_same_time(tab):
    first, second = tab(), tab()
    for page in first, second:
        longest_answer(page, 1024)
        ask(page, "Go on and on.")
    for page in first, second:
        expect(answers(page)).to_have_count(1)
    before = [len(answers(page).first.inner_text()) for page in (first, second)]
    for page, length in zip((first, second), before):
        page.wait_for_function(
            "n => document.querySelector('#chat [data-testid=bot]').innerText.length > n + 20", arg=length
        )
    for page in first, second:  # neither had to end for the other to go on
        expect(stop(page)).to_be_visible()
        stop(page).click()
        finish(page, 1)


@needs_browser
def test_asked_again_after_stop(page):
    """The answer that was stopped goes, its question stays, and what stands in the box is not lost."""
    longest_answer(page, 1024)
    ask(page, "Go on and on.")
    expect(answers(page)).to_have_count(1)
    stop(page).click()
    finish(page, 1)
    longest_answer(page, 16)
    box(page).fill("Not sent yet")
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator("#chat [data-testid=user]")).to_have_count(1)
    finish(page, 1)
    expect(box(page)).to_have_value("Not sent yet")


@needs_browser
def test_the_keyboard_is_never_left_alone(page):
    """From the box to Stop while an answer is made, and back to the box after it; not after a tap."""
    longest_answer(page, 1024)
    box(page).click()
    page.keyboard.type("Go on")
    page.keyboard.press("Enter")
    expect(stop(page)).to_be_visible()
    expect(page.locator("#ask")).to_be_focused()
    for _ in range(3):
        page.keyboard.press("Tab")
        if stop(page).evaluate("element => element === document.activeElement"):
            break
    expect(stop(page)).to_be_focused()
    page.keyboard.press("Enter")
    finish(page, 1)
    expect(box(page)).to_be_focused()
    page.keyboard.type("And then?")
    expect(box(page)).to_have_value("And then?")
    longest_answer(page, 16)
    page.get_by_test_id("submit-button").click()
    finish(page, 2)
    expect(box(page)).not_to_be_focused()
