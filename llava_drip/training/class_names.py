"""Names of classes in the order of their labels, in the formats in which people keep them."""

from __future__ import annotations

import json
from pathlib import Path


def read_names(path: str | Path) -> list[str]:
    """Class names by label.

    Args:
        path: a text file with one name a line, or JSON: a list of names, a list of objects with "index" and "class_name" (or
            "name"), or an object {"0": name, ...}.
    Raises:
        ValueError: naming the file and what is wrong.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: no such file of class names")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            names = [line.strip() for line in text.splitlines() if line.strip()]
        else:
            names = _from_json(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a list of class names ({type(error).__name__}: {error})") from error
    if not names:
        raise ValueError(f"{path}: not a list of class names (it is empty)")
    return names


def _from_json(content) -> list[str]:
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return content
    if isinstance(content, dict):
        by_index = {int(index): name for index, name in content.items()}
    else:
        by_index = {int(row["index"]): row.get("class_name") or row["name"] for row in content}
    if sorted(by_index) != list(range(len(by_index))):
        raise ValueError(f"the indices are not 0 .. {len(by_index) - 1}")
    return [str(by_index[index]) for index in sorted(by_index)]
