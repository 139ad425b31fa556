"""Which files of a directory are the model: no optimizer states, no logs, no paths of the machine that trained it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llava_drip.files import read_object
from llava_drip.reports.run import RUN_FILE, Run, find_run, open_run

TOWER, CLIP, ASSISTANT = "tower", "clip", "assistant"
_CLIP_CONFIG = "open_clip_config.json"
_PATTERNS = {
    TOWER: ("config.json", "model.safetensors"),
    CLIP: (
        *(_CLIP_CONFIG, "open_clip_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt"),
    ),
    ASSISTANT: (
        *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
        *("image_processor_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
        *(
            "adapter_config.json",
            "adapter_model.safetensors",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
        ),
        *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.*"),
        "additional_chat_templates/*",
    ),
}
_WEIGHTS = {TOWER: "model.safetensors", CLIP: "open_clip_model.safetensors", ASSISTANT: "model*.safetensors"}
_CONFIGS = ("config.json", _CLIP_CONFIG, "tokenizer_config.json", "processor_config.json", "adapter_config.json")
# A path from the root or a home directory, with at least two parts: all of a value of a configuration (</s> is none) ...
_VALUE = re.compile(r"(?:file://)?(?:/|~[\w.-]*/)[^/\n]+(?:/[^/\n]*)+")
# ... or, in a command, from where a value begins; a comma within braces belongs to it.
_WORD = re.compile(r"(?:^|(?<=[\s=:,|'\"(\[]))(?:file://)?(?:/|~[\w.-]*/)(?!/)(?:\{[^}\s]*\}|[^\s:,;|'\"()\[\]{}])*")


@dataclass(frozen=True)
class Bundle:
    """A model to publish.

    kind: TOWER (timm's format), CLIP (open_clip's) or ASSISTANT (transformers').
    run: what trained it. None for an assistant, whose programs keep no such record: one in a run's folder is not that run's.
    """

    kind: str
    directory: Path
    files: list[Path]
    config: dict
    run: Run | None


def find_bundle(path: str | Path) -> Bundle:
    """The model in a directory. Of an ImageNet run's folder it is best/, else last/; of a CLIP run's folder, the CLIP itself.

    Raises:
        ValueError: no such directory, no model in it, one without weights, or a CLIP whose configuration names a local tower.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise ValueError(f"{path}: no such run or model directory")
    if not (directory / _CLIP_CONFIG).is_file() and not (directory / "config.json").is_file():
        chosen = next(
            (directory / name for name in ("best", "last") if (directory / name / "config.json").is_file()), None
        )
        if chosen is None:
            if (directory / RUN_FILE).is_file():
                open_run(directory)  # says so where no epoch has ended
            raise ValueError(
                f"{path}: no model in it; give a run's folder with best/ or last/, a tower's directory (config.json), a CLIP run "
                f"({_CLIP_CONFIG}) or an assistant's directory"
            )
        directory = chosen
    clip = (directory / _CLIP_CONFIG).is_file()
    config = read_object(directory / (_CLIP_CONFIG if clip else "config.json"))
    if clip:
        kind = CLIP
        tower = str(config.get("model_cfg", {}).get("vision_cfg", {}).get("timm_model_name", ""))
        if tower.startswith("local-dir:"):
            raise ValueError(
                f"{directory}/{_CLIP_CONFIG}: its tower is {tower}, which is on this machine alone: nobody could load the CLIP; "
                "give the run's tower/ instead, or name a registered tower there"
            )
    elif "model_type" in config:
        kind = ASSISTANT
        if config["model_type"] != "llava_drip":
            raise ValueError(
                f"{directory}/config.json: model_type {config['model_type']!r}, not an assistant of llava_drip"
            )
    elif "architecture" in config:
        kind = TOWER
    else:
        raise ValueError(
            f"{directory}/config.json: neither a timm tower ('architecture') nor an assistant ('model_type')"
        )
    if not list(directory.glob(_WEIGHTS[kind])):
        raise ValueError(f"{directory}: weights are missing ({_WEIGHTS[kind]})")
    files = {file for pattern in _PATTERNS[kind] for file in directory.glob(pattern) if file.is_file()}
    return Bundle(kind, directory, sorted(files), config, None if kind == ASSISTANT else find_run(directory))


def stage(bundle: Bundle, target: Path, place: Callable[[Path, Path], object] = shutil.copyfile) -> list[Path]:
    """Puts the bundle's files into the folder `target`; configurations without local paths. Returns all that lies there.

    place: how weights get there, place(source, target): a copy, or a link that lives shortly.
    """
    for source in bundle.files:
        goal = target / source.relative_to(bundle.directory)
        goal.parent.mkdir(parents=True, exist_ok=True)
        if source.name in _CONFIGS:
            content = read_object(source)
            cleaned = without_local_paths(content)
            goal.write_text(
                source.read_text(encoding="utf-8") if cleaned == content else json.dumps(cleaned, indent=2) + "\n",
                encoding="utf-8",
            )
        else:
            place(source.resolve(), goal)
    return sorted(path for path in target.rglob("*") if path.is_file())


def without_local_paths(value):
    """A JSON value with every string that is an absolute local path replaced by the path's last component."""
    if isinstance(value, dict):
        return {key: without_local_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_local_paths(item) for item in value]
    return _last(value) if isinstance(value, str) and _VALUE.fullmatch(value) else value


def word_without_local_paths(word: str) -> str:
    """A word of a command line (--flag=/a/b.tar::/c/d.tar) with absolute local paths shown as their last component."""
    if _VALUE.fullmatch(word) and ":" not in word.removeprefix("file:"):  # may hold spaces
        return _last(word)
    return _WORD.sub(lambda found: _last(found[0]), word)


def _last(path: str) -> str:
    parts = [part for part in re.split(r"/(?![^{]*\})", path) if part]  # not within braces
    return parts[-1] if parts else path
