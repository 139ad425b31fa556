"""The page: result files by benchmark, as HTML and as Markdown, each a file that needs no other."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from llava_drip.reports.evaluation import text
from llava_drip.reports.evaluation.paired import (
    NOT_RECORDED,
    Comparison,
    Records,
    compare,
    compression_of,
    flat,
    refusals,
    said,
)
from llava_drip.reports.evaluation.records import Record, read_records
from llava_drip.reports.evaluation.results import Figure, Line, Result
from llava_drip.reports.evaluation.samples import Sample

ENDINGS = (".html", ".md")


@dataclass
class Section:
    """The results of one benchmark.

    Attributes:
        records: of each result, its questions or why there are none.
        warnings: which results cannot be set beside the first, and why.
        comparisons: each further result with the first.
        samples, missing: samples.take.
    """

    results: list[Result]
    records: list[Records]
    warnings: list[str] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def benchmark(self):
        return self.results[0].benchmark

    @property
    def groups(self) -> list[tuple[str, list[tuple[str, list[Figure | None]]]]]:
        """Groups of rows: name, and (row, a figure a result)."""
        lines: dict[Line, None] = dict.fromkeys(line for result in self.results for line in result.lines)
        return [
            (group, [(line.name, [result.lines.get(line) for result in self.results]) for line in own])
            for group, own in by_group(lines, lambda line: line)
        ]

    @property
    def scale(self) -> tuple[float, float] | None:
        """From the lowest to the highest end of the headlines' intervals. None: there is nothing to draw."""
        ends = [end for result in self.results if result.headline for end in result.headline.interval or ()]
        return (min(ends), max(ends)) if ends and min(ends) < max(ends) else None

    def place(self, value: float) -> float:
        """Of a figure on the scale, in percent."""
        low, high = self.scale
        return round(min(100.0, max(0.0, 100 * (value - low) / (high - low))), 2)


def by_group(items: Iterable, line_of: Callable[[object], Line] = lambda item: item.line) -> list[tuple[str, list]]:
    """Items by the groups of their lines, in the order in which the groups first come."""
    groups: dict[str, list] = {}
    for item in items:
        groups.setdefault(line_of(item).group, []).append(item)
    return list(groups.items())


def sections(results: Sequence[Result]) -> list[Section]:
    """Results by benchmark, in the order in which the benchmarks first come; the questions read, the runs compared."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.benchmark.name, []).append(result)
    found = []
    for own in groups.values():
        section = Section(own, [_records(result) for result in own])
        for result, records in zip(own[1:], section.records[1:]):
            section.comparisons.append(compare(own[0], result, (section.records[0], records)))
            for why in refusals(own[0], result):
                section.warnings.append(f"{result.label} is not to be set beside {own[0].label}: {why}")
        found.append(section)
    return found


def _records(result: Result) -> dict[str, Record] | str:
    try:
        return read_records(result)
    except (ValueError, OSError) as error:
        return str(error)


def facts(result: Result) -> list[tuple[str, str]]:
    """What a result file says of itself, (name, value) each."""
    run, none = result.run, NOT_RECORDED
    checkpoint, prompts = run.get("checkpoint") or {}, run.get("prompts") or {}
    found = [
        ("result file", str(result.path)),
        ("checkpoint", _with_hash(checkpoint) if checkpoint else none),
        *((f"data: {name}", _with_hash(own)) for name, own in (run.get("data") or {}).items()),
        *((f"file: {name}", _path(own)) for name, own in (run.get("files") or {}).items()),
        ("prompts", f"{prompts['count']:,} texts, sha256 {prompts['sha256']}" if prompts else none),
        ("compression asked for", compression_of(result)),
        ("machine", str(run.get("machine") or none)),
        ("date", str(run.get("date") or none)),
        *([("date of the answers", said(run["answered_on"]))] if run.get("answered_on") else []),
        (
            "versions",
            ", ".join(f"{name} {version}" for name, version in (run.get("versions") or {}).items() if version),
        ),
    ]
    told = ("checkpoint", "compression", "machine", "versions")
    return found + [(name, value) for name, value in flat(result) if name.split(": ")[0] not in told]


def _path(own: str | dict | None) -> str:
    return ", ".join(map(str, own.values())) if isinstance(own, dict) else said(own)


def _with_hash(own: dict) -> str:
    where = own.get("path") or (f"{own['files']:,} files" if "files" in own else "path not recorded")
    return f"{where}, sha256 {own.get('sha256')}"


def write(found: Sequence[Section], path: Path, title: str, changed: int) -> str:
    """The page as text, HTML or Markdown by the path's ending. changed: of changed answers show so many."""
    is_html = path.suffix == ".html"
    environment = Environment(
        loader=PackageLoader("llava_drip.reports.evaluation"),
        autoescape=is_html,
        undefined=StrictUndefined,
        finalize=text.html if is_html else text.markdown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "interval": _interval,
        "by_group": by_group,
        "compression": compression_of,
        "signed": _signed,
        "probability": lambda p: "-" if p is None else ("< 0.001" if p < 0.001 else f"{p:.3f}"),
        "folded": text.folded,
        "quoted": text.quoted,
        "code_block": text.code_block,
        "facts": facts,
        "said": said,
    }
    runs = [result for section in found for result in section.results]
    return environment.get_template(f"page{path.suffix}.jinja").render(
        title=title, sections=found, runs=runs, changed_shown=changed, date=datetime.date.today().isoformat()
    )


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _signed(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    rounded = round(value, digits)
    return f"{rounded:+,.{digits}f}" if rounded else f"{0:.{digits}f}"


def _interval(pair: Iterable[float] | None, digits: int = 2, signed: bool = False) -> str:
    if pair is None:
        return "-"
    low, high = (_signed(end, digits) if signed else _number(end, digits) for end in pair)
    return f"{low} to {high}"
