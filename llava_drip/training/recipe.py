"""YAML recipes: a file of `flag: value` lines, as the flags of a program.

batch-size: 512            →  --batch-size 512
betas: [0.9, 0.98]         →  --betas 0.9 0.98
local-loss: true           →  --local-loss          (false and null: left out, or --no-local-loss, see below)
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml


def with_recipe(argv: list[str], negative: bool = False, skip: Collection[str] = ()) -> list[str]:
    """argv, whose first word may be a recipe (*.yaml), as flags alone: the recipe's first, so that later flags win.

    Args:
        negative: `flag: false` becomes --no-flag, for parsers that know it; else it is left out.
        skip: names that a recipe may hold for another program, and this one leaves out.
    Raises:
        ValueError: no such recipe, or not one.
    """
    if not argv or argv[0].startswith("-"):
        return argv
    return [*flags_of(Path(argv[0]).expanduser(), negative, skip), *argv[1:]]


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a name given twice, of which YAML's would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = [name for i, name in enumerate(names) if name in names[:i]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> dict[str, Any]:
    """Name → value of a recipe. ValueError: no such file, or none of this form."""
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: a recipe must be a .yaml file; flags begin with --")
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe")
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: must hold 'flag: value' lines")
    for key in recipe:
        if not isinstance(key, str):  # YAML reads `on`, `no` and bare numbers as something else
            raise ValueError(f"{path}: {key!r} is no name of a flag; put it in quotes if it is meant")
    return recipe


def flags_of(path: Path, negative: bool = False, skip: Collection[str] = ()) -> list[str]:
    """The flags of a recipe."""
    flags = []
    for key, value in read_recipe(path).items():
        if isinstance(value, dict):
            raise ValueError(f"{path}: {key}: must be a number, a text, true, false or a list")
        if isinstance(value, list) and not all(type(item) in (str, int, float) for item in value):
            raise ValueError(f"{path}: {key}: a list must hold numbers or texts")
        if key in skip:
            continue
        if value is None or value is False:
            flags += [f"--no-{key}"] if value is False and negative else []
        elif value is True:
            flags.append(f"--{key}")
        elif isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        else:
            # "=": a value such as -1 is not taken for a flag.
            flags.append(f"--{key}={value}")
    return flags
