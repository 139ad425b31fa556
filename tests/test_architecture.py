"""The walls of the house: which room may import which, how long a file may grow, what is shipped, and how programs start."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from functools import lru_cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "llava_drip"
PROGRAM_FOLDERS = ("scripts", "serve", "eval")

# Room → the rooms it may import, besides itself. Imports run one way (docs/ARCHITECTURE.md).
BASE = {"tokens", "images", "cli", "files", "jsonl", "fingerprint", "machine", "record"}
TRAINED = BASE | {"towers"}
MAY_IMPORT = {
    "tokens": set(),
    "images": set(),
    "cli": set(),
    "files": set(),
    "fingerprint": set(),
    "jsonl": set(),
    "machine": set(),
    "record": {"fingerprint", "machine"},
    "world": {"images"},
    "towers": BASE,
    "training": TRAINED,
    "contrastive": TRAINED | {"training"},
    "classification": TRAINED | {"training"},
    "assistant": TRAINED,
    "measure": TRAINED | {"training", "world"},
    "draw": TRAINED | {"training"},
    "conversation": TRAINED | {"assistant"},
    "doctor": TRAINED,
    "reports": TRAINED | {"training", "measure", "instruct", "engine", "evaluation", "draw"},
    "datasets": BASE,
    "scheduling": TRAINED | {"assistant"},
    "engine": TRAINED | {"assistant", "conversation", "scheduling"},
    "instruct": TRAINED | {"training", "assistant", "conversation", "measure"},
    "serving_cost": TRAINED
    | {"training", "world", "measure", "assistant", "conversation", "scheduling", "engine", "instruct"},
    "evaluation": TRAINED | {"engine", "conversation", "instruct", "assistant", "training"},
    "__init__": {"tokens", "towers", "assistant", "contrastive"},  # the public names, and to register them
}


@lru_cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def module_file(name: str) -> bool:
    """Whether a dotted name below the repository is a module or a package."""
    path = REPOSITORY.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, also inside functions; relative imports made absolute."""
    names = set()
    package = path.relative_to(REPOSITORY).with_suffix("").parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module or "") if part)
            for alias in node.names:  # "from llava_drip import cli" imports a module, "from x import name" may not
                full = f"{base}.{alias.name}"
                names.add(full if base.split(".")[0] == "llava_drip" and module_file(full) else base)
    return names


def room(module: str) -> str | None:
    """llava_drip.towers.drip → towers; llava_drip itself → __init__; others → None."""
    top, _, rest = module.partition(".")
    return None if top != "llava_drip" else rest.split(".")[0] or "__init__"


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_room_is_known():
    rooms = {room_of(path) for path in sources(PACKAGE)}
    assert rooms <= set(MAY_IMPORT), f"say in MAY_IMPORT what {rooms - set(MAY_IMPORT)} may import"
    assert rooms == set(MAY_IMPORT), f"MAY_IMPORT speaks of {set(MAY_IMPORT) - rooms}, which do not exist"


def test_a_room_that_lists_its_files_lists_them_all():
    for path in sorted(PACKAGE.rglob("__init__.py")):
        listed = re.findall(r"^ +(\w+\.py)\b", ast.get_docstring(tree(path)) or "", re.MULTILINE)
        if listed:
            there = {other.name for other in path.parent.glob("*.py")} - {"__init__.py"}
            assert set(listed) == there and len(listed) == len(there), f"{path.relative_to(REPOSITORY)}: {listed}"


def test_documents_that_sources_point_at_exist():
    for path in sources(PACKAGE) + sources(*(REPOSITORY / folder for folder in (*PROGRAM_FOLDERS, "tests"))):
        for name in re.findall(r"\bdocs/[\w/]+\.md\b", path.read_text(encoding="utf-8")):
            assert (REPOSITORY / name).is_file(), f"{path.relative_to(REPOSITORY)} points at {name}"


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = room_of(path)
    used = {room(module) for module in imported(path)} - {None, own}
    assert used <= MAY_IMPORT[own], f"{own} may not import {used - MAY_IMPORT[own]}"
    assert not {module.split(".")[0] for module in imported(path)} & {*PROGRAM_FOLDERS, "tests"}


def test_only_the_plugin_needs_lmms_eval():
    """It is installed in few places, and in none of ours."""
    plugin = PACKAGE / "evaluation" / "lmms"
    names = {path: imported(path) for path in sources(PACKAGE) if "lmms" in path.read_text(encoding="utf-8")}
    users = {path for path in names if "lmms_eval" in {name.split(".")[0] for name in names[path]}}
    assert users == {plugin / "__init__.py", plugin / "model.py"}
    others = {name for path in names if plugin not in path.parents for name in names[path]}
    assert not {name for name in others if name.startswith("llava_drip.evaluation.lmms")}


def test_the_allowed_imports_have_no_circle():
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        ready = [name for name, needs in MAY_IMPORT.items() if name not in order and needs <= set(order)]
        assert ready, f"a circle among {set(MAY_IMPORT) - set(order)}"
        order += ready


def test_the_reader_of_imports_sees_them():
    """A check of the check: known edges are found."""
    edges = {path.relative_to(PACKAGE).as_posix(): {room(m) for m in imported(path)} for path in sources(PACKAGE)}
    assert "tokens" in edges["towers/drip.py"] and "assistant" in edges["instruct/stage.py"]
    assert "conversation" in edges["engine.py"] and "world" not in edges["instruct/stage.py"]


PROGRAM_SOURCES = sources(*(REPOSITORY / folder for folder in PROGRAM_FOLDERS))


@pytest.mark.parametrize("path", sources(PACKAGE) + PROGRAM_SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_files_stay_short_and_say_what_they_are(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{lines} lines: this is two rooms"
    assert path.stat().st_size == 0 or ast.get_docstring(tree(path))


# Programs


def programs() -> list[Path]:
    return [path for path in PROGRAM_SOURCES if path.name != "__init__.py" and "__main__" in path.read_text()]


def command(path: Path) -> list[str]:
    """How the program's docstring says to start it."""
    relative = path.relative_to(REPOSITORY)
    if relative.parts[0] == "serve":
        return [sys.executable, "-m", ".".join(relative.with_suffix("").parts)]
    return [sys.executable, str(relative)]


def test_there_are_programs():
    assert {"pretrain_projector.py", "finetune.py", "train_clip.py", "gradio_app.py", "llava_bench.py"} <= {
        path.name for path in programs()
    }


@pytest.mark.parametrize("path", programs(), ids=lambda path: path.name)
def test_a_programs_docstring_has_the_command_that_runs_it(path):
    text = ast.get_docstring(tree(path)) or ""
    relative = path.relative_to(REPOSITORY)
    target = rf"-m {'.'.join(relative.with_suffix('').parts)}" if relative.parts[0] == "serve" else str(relative)
    assert re.search(rf"^ *(python|deepspeed|torchrun)\b.* ?{re.escape(target)}\b", text, re.MULTILINE), target


@pytest.mark.parametrize("path", programs(), ids=lambda path: path.name)
def test_every_program_answers_help(path, run_script):
    done = run_script(path, "--help")
    assert not done.returncode, done.stderr[-2000:]
    assert "usage:" in done.stdout and "--" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "eval/zero_shot.py",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("scripts/draw_boundaries.py", "serve/gradio_app.py")),
    ],
)
def test_a_program_of_each_folder_starts_by_itself(name):
    """In a process of its own, which has imported nothing of ours and has the program's folder first on its path."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    start = [*command(REPOSITORY / name), "--help"]
    done = subprocess.run(start, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr[-2000:]
    assert "Traceback" not in done.stderr


# What is shipped


def test_the_wheel_holds_the_package_only(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel here needs setuptools >= 77")
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "llava_drip", *PROGRAM_FOLDERS, "tests"):
        if (REPOSITORY / name).exists():
            (copy / name).symlink_to(REPOSITORY / name)
    build = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=copy, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"llava_drip"}
    shipped = {name for name in files if name.startswith("llava_drip/")}
    expected = {path.relative_to(REPOSITORY).as_posix() for path in sources(PACKAGE)}
    expected |= {
        path.relative_to(REPOSITORY).as_posix() for path in (PACKAGE / "contrastive" / "configs").glob("*.json")
    }
    templates = (PACKAGE / "reports" / "evaluation" / "templates").iterdir()
    expected |= {path.relative_to(REPOSITORY).as_posix() for path in templates}
    assert shipped == expected and any(name.endswith("DRIP-B-16-4x.json") for name in shipped)
