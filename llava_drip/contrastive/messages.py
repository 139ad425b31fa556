"""One line for what went wrong."""

from __future__ import annotations


def one_line(error: BaseException, limit: int = 400) -> str:
    """The error's message without line breaks; for an error in a data-loading worker, its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "in DataLoader worker process" in lines[0]:
        kind, _, cause = lines[-1].partition(": ")
        lines = [cause or kind]
    text = " ".join(lines)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
