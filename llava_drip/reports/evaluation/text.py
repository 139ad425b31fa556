"""Text of any origin (questions, answers, paths) made safe for a page: nothing in it is markup, and nothing breaks the file."""

from __future__ import annotations

import re
import unicodedata

from markupsafe import Markup, escape

# What Markdown reads as markup anywhere (an underscore within a word is none), and at the beginning of a line.
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")
_BEGINNING = re.compile(r"^(\d{0,9})([#=.)](?!\d)|[-+](?!\d))")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})  # not every dialect knows a backslash before these
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def clean(text: object) -> str:
    """The text without what a page cannot hold or that would write over other text: control characters (models of random
    weights write them), lone halves of surrogate pairs, and marks that turn the direction of what follows."""
    return "".join(_REPLACEMENT if _unfit(letter) else letter for letter in str(text).replace("\r\n", "\n"))


def _unfit(letter: str) -> bool:
    category = unicodedata.category(letter)
    if category == "Cc":
        return letter not in "\n\t"
    return category == "Cs" or letter in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def html(text: object) -> object:
    """For Jinja's `finalize` before its own escaping."""
    return text if isinstance(text, Markup) else clean(text)


def markdown(text: object) -> str:
    """For Jinja's `finalize`: one line, in which everything stands for itself."""
    if isinstance(text, Markup):
        return text
    line = " ".join(clean(text).split())
    line = _BEGINNING.sub(r"\1\\\2", _MARKUP.sub(r"\\\g<0>", line))
    return line.translate(_ENTITIES)


def code_block(text: object) -> Markup:
    """A fenced block of Markdown, as it is."""
    body = clean(text)
    longest = max((len(run) for run in re.findall("`+", body)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}\n{body}\n{fence}")


def quoted(text: object) -> Markup:
    """A block quote of Markdown: the lines of the text, each standing for itself."""
    lines = [markdown(line) for line in clean(text).split("\n")]
    return Markup("\n".join(f"> {line}\\" for line in lines).removesuffix("\\"))


def folded(text: object) -> Markup:
    """For HTML: places after slashes and the like at which a long path may be broken."""
    return Markup(re.sub(r"([/,=_-]|&amp;)(?=\w)", r"\1<wbr>", str(escape(clean(text)))))
