"""Text of any origin on a page of Markdown or HTML."""

from __future__ import annotations

import pytest
from jinja2 import Environment
from markdown_it import MarkdownIt

from llava_drip.reports.evaluation import text

LINES = [
    "plain",
    "49.60",
    "-3.7 to +3.7",
    "-",
    "---",
    "+ a",
    "# a",
    "=",
    "1. a",
    "12) a",
    "1986. A year",
    "a_b _c_ *d*",
]
LINES += [
    "<b>a</b> &amp; & > x",
    "[a](b) ![c](d)",
    "`a` ``b``",
    "a | b",
    "\\",
    "\\*a\\*",
    "~~a~~ $x$",
    "a  \nb",
    "www.a.invalid",
]


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_markdown_stands_for_itself(line):
    render = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render
    whole = " ".join(line.split())
    expected = whole.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert render(text.markdown(line)) == f"<p>{expected}</p>\n"
    assert render(f"- {text.markdown(line)}") == f"<ul>\n<li>{expected}</li>\n</ul>\n"
    assert f"<td>{expected}</td>" in render(f"| a | b |\n| --- | --- |\n| {text.markdown(line)} | c |")


def test_quotes_keep_their_lines_and_code_its_fence():
    render = MarkdownIt("commonmark", {"html": True}).render
    assert render(text.quoted("# a\n\n1. b\n> c")) == (
        "<blockquote>\n<p># a<br />\n<br />\n1. b<br />\n&gt; c</p>\n</blockquote>\n"
    )
    assert render(text.code_block("a ``` b\n```\n<c>")) == "<pre><code>a ``` b\n```\n&lt;c&gt;\n</code></pre>\n"


def test_what_a_page_cannot_hold_is_replaced():
    assert text.clean("a\x00b\ud800c\u202ed\te\r\nf") == "a\ufffdb\ufffdc\ufffdd\te\nf"
    assert text.clean("\U0001f600 שלום ﷽") == "\U0001f600 שלום ﷽"
    environment = Environment(autoescape=True, finalize=text.html)
    environment.filters["folded"] = text.folded
    assert environment.from_string("{{ a }}").render(a="<b>\x07") == "&lt;b&gt;\ufffd"
    assert environment.from_string("{{ a | folded }}").render(a="/a/<b>_c") == "/<wbr>a/&lt;b&gt;_<wbr>c"
