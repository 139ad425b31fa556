"""The report in a real browser: nothing asked of anybody, nothing wrong, readable on a phone, in the dark, and by keyboard."""

from __future__ import annotations

from pathlib import Path

import pytest
from chromium import CHROMIUM, FLAGS, needs_browser
from report_results import run_program

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = needs_browser
LUMINANCE = (
    """() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"""
)
# Pairs of text and the paper behind it, as WCAG counts their contrast.
CONTRAST = """() => {
    const light = colour => {
        const [r, g, b] = colour.match(/[\\d.]+/g).map(part => part / 255)
            .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const paper = element => {
        while (element && /, 0\\)|transparent/.test(getComputedStyle(element).backgroundColor)) element = element.parentElement;
        return getComputedStyle(element || document.body).backgroundColor;
    };
    return [...document.querySelectorAll("p, th, td, dt, dd, a, caption span, figcaption, .badge, summary, li")].map(element => {
        const [a, b] = [light(getComputedStyle(element).color), light(paper(element))];
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.outerHTML.slice(0, 80)];
    }).sort((a, b) => a[0] - b[0])[0];
}"""


@pytest.fixture(scope="module")
def page_file(results, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    files = [*results.science_qa, *results.pope, *results.judged, *results.zero_shot, *results.retrieval]
    run_program("report.py", *files, "--samples", 1, "--device", "cpu", "--output", path)
    return path


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, page_file):
    """opened(width, scheme): the page in a window of its own; `said` has what went wrong, `asked` what it asked for."""
    contexts = []

    def opened(width: int, scheme: str):
        contexts.append(browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(page_file.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_shows_itself(opened, page_file, width, scheme):
    page = opened(width, scheme)
    assert page.said == [] and [url for url in page.asked if not url.startswith("data:")] == [page_file.as_uri()]
    wide, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= inner == width
    beyond = "figure, p, pre, summary, h1, h2, h3, h4, dd, caption span"
    reach = f"Math.max(...[...document.querySelectorAll('{beyond}')].map(one => one.getBoundingClientRect().right))"
    assert page.evaluate(reach) <= width  # but for cells of tables, which scroll in their own boxes
    shown = (
        "[...document.images].map(image => [image.complete, image.naturalWidth, image.getBoundingClientRect().width])"
    )
    pictures = page.evaluate(shown)
    assert len(pictures) == 2 * 3 + 1 and all(complete and natural > 0 < broad for complete, natural, broad in pictures)
    assert (page.evaluate(LUMINANCE) < 150) == (scheme == "dark")
    contrast, where = page.evaluate(CONTRAST)
    assert contrast >= 4.5, where


def test_tables_scroll_by_keyboard_and_links_lead_somewhere(opened):
    page = opened(390, "light")
    table = page.get_by_role("region", name="The runs. Score: AVG")
    assert table.evaluate("one => one.scrollWidth > one.clientWidth")
    table.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("one => one.scrollLeft > 0", arg=table.element_handle())
    name = table.get_by_role("rowheader").first
    assert name.bounding_box()["x"] >= 0  # the run's name stays
    assert page.get_by_role("table", name="The runs. Score: AVG").count() == 1
    page.get_by_role("link", name="What the files say of themselves").click()
    assert page.evaluate("location.hash") == "#files"
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = false)")
    page.get_by_role("link", name="better").first.click()
    opened = page.locator("details[open]")
    assert opened.count() == 1 and "reviews" in opened.inner_text()  # what the file says of itself unfolds
    page.get_by_text("Answers that changed").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details", has_text="Answers that changed").first.evaluate("one => one.open")
