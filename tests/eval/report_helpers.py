"""The report program in this process, and what its pages hold."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from report_results import run_program

from llava_drip.reports.evaluation.paired import compare
from llava_drip.reports.evaluation.records import read_records
from llava_drip.reports.evaluation.results import read_result


class Page(HTMLParser):
    """Tags of a page with their attributes, and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.words.append("" if tag == "wbr" else " ")

    def handle_endtag(self, tag):
        self.words.append(" ")

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def report(tmp_path, files, *flags, code=0):
    outputs = [tmp_path / "page.html", tmp_path / "page.md"]
    done = run_program("report.py", *files, "--output", *outputs, *flags, code=code)
    return done if code else (Page(outputs[0]), outputs[1].read_text(encoding="utf-8"), done)


def compared(files, read=True):
    own = [read_result(path) for path in files]
    return compare(*own, tuple(read_records(result) if read else "not read" for result in own))
