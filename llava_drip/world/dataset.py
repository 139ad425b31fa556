"""Write a rendered world to disk in the formats of the programs that train and test on it.

    images/train_000000.png ...  images/test_000000.png ...   the scenes
    clip/train-00000.tar ...     other scenes with texts as webdataset shards, with sizes.json, for open_clip's trainer
    caption_train.json           one caption per image, LLaVA's 558K format
    instruct_train.json          two rows per image, the LLaVA-Instruct-158K format: several questions in a conversation,
                                 and a description in detail (the id ends in _detail)
    test_questions.jsonl         questions in the form of LLaVA-Bench: question_id, image, text, category
    test_answers.jsonl           the right answers: question_id, text, category
    manifest.json                what was asked for and counts; its presence means that the folder is complete

Image names in the files are relative to images/. The same parameters give the same bytes on every run.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from llava_drip.world import scenes, texts

KIND = "llava_drip.world"  # marks a manifest as ours
SHARD_SIZE = 1000  # scenes in a webdataset shard
CAPTION_PROMPTS = ("Describe the picture.", "What is in the picture?", "Describe all shapes.", "What do you see?")

_TEXT_SEEDS = {"train": 2, "test": 3, "pretrain": 4}  # apart from those of the scenes


@dataclass(frozen=True)
class WorldPaths:
    """Where the parts of a world lie; see the module's docstring."""

    root: Path

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def clip_shards(self) -> list[Path]:
        return sorted((self.root / "clip").glob("train-*.tar"))

    @property
    def caption_train(self) -> Path:
        return self.root / "caption_train.json"

    @property
    def instruct_train(self) -> Path:
        return self.root / "instruct_train.json"

    @property
    def test_questions(self) -> Path:
        return self.root / "test_questions.jsonl"

    @property
    def test_answers(self) -> Path:
        return self.root / "test_answers.jsonl"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"


@dataclass(frozen=True)
class _Parameters:
    num_train: int
    num_test: int
    seed: int
    questions_per_scene: int


def build_world(
    out_dir: str | os.PathLike, num_train: int, num_test: int, seed: int = 0, questions_per_scene: int = 5
) -> WorldPaths:
    """Render scenes and write them with their texts; reuse the folder if the same was written there before.

    The folder appears complete or not at all. A world written with other parameters, or by another version of this
    package's scenes or texts, is replaced. What a killed run left beside it is removed, see `clear_leftovers`.

    Args:
        out_dir: Folder to write; absent, empty, or an earlier world.
        num_train: Number of training scenes for the assistant, and as many others for the tower, at least 1.
        num_test: Number of test scenes, each with a held-out pair of shapes, at least 1.
        seed: Scene i of a split depends on the seed and on i only, see `scenes.scene_at`.
        questions_per_scene: Questions per scene, at least 1.

    Raises:
        ValueError: A number is out of range, or `out_dir` holds something that is not a world.
    """
    parameters = _Parameters(num_train, num_test, seed, questions_per_scene)
    for name, least in (("num_train", 1), ("num_test", 1), ("seed", 0), ("questions_per_scene", 1)):
        if getattr(parameters, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(parameters, name)}")
    paths = WorldPaths(Path(out_dir))
    wanted = {"kind": KIND, "parameters": asdict(parameters), "code": _code_version()}
    clear_leftovers(paths.root)
    if _is_complete(paths, wanted):
        return paths
    _refuse_foreign(paths)

    paths.root.parent.mkdir(parents=True, exist_ok=True)
    with _new_partial(paths.root) as folder:
        partial = WorldPaths(folder)
        _write_world(partial, parameters, wanted)
        _move_into_place(partial, paths, wanted)
    return paths


def clear_leftovers(out_dir: str | os.PathLike) -> None:
    """Remove what killed runs left beside the world `out_dir`: `.NAME.partial-*` (half a world) and `.NAME.old-*`.

    A run that was killed while it put a new world in the old one's place leaves the old one as `.NAME.old-*` only: that is
    put back. What a run at work in another process needs stays; on a file system without locks, where none can be told from
    a killed one, everything stays.
    """
    root = Path(out_dir)
    ours = re.compile(re.escape(f".{root.name}.") + r"(?:partial|old)-([0-9a-f]{8})")
    beside = root.parent.iterdir() if root.parent.is_dir() else ()
    for run in {match[1] for path in beside if (match := ours.fullmatch(path.name))}:
        partial, old = (root.parent / f".{root.name}.{kind}-{run}" for kind in ("partial", "old"))
        try:
            with _locked(partial) as alone:
                if not alone:
                    continue
                if partial.exists() and old.exists() and not root.exists():  # killed between two renames
                    os.rename(old, root)
                shutil.rmtree(partial, ignore_errors=True)
                shutil.rmtree(old, ignore_errors=True)
        except BlockingIOError:
            continue


@contextlib.contextmanager
def _new_partial(root: Path) -> Iterator[Path]:
    """A new folder beside the world `root`, locked; at the end it is removed, unless it was renamed."""
    while True:
        folder = root.parent / f".{root.name}.partial-{uuid.uuid4().hex[:8]}"
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            folder.mkdir()
            # Until it is locked, clear_leftovers of another process may take it for a killed run's: then a new name.
            try:
                stack.enter_context(_locked(folder))
            except BlockingIOError:
                continue
            if folder.exists():
                yield folder
                return


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds a lock on a folder, which ends with the process however that ends. BlockingIOError: another process has it.

    Yields whether no other process can be at work in it: True with the lock, or where there is no folder; False where the
    file system knows no locks, or the folder may not be opened.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        yield isinstance(error, FileNotFoundError)
        return
    try:
        alone = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(handle)


def _code_version() -> str:
    """Changes with the code that decides what is written, so that an old folder never hides a changed constant."""
    digest = hashlib.sha256()
    for module in (scenes.__file__, texts.__file__, __file__):
        digest.update(Path(module).read_bytes())
    return digest.hexdigest()[:16]


def _read_manifest(paths: WorldPaths) -> dict:
    """Empty where there is none to read."""
    try:
        manifest = json.loads(paths.manifest.read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _is_complete(paths: WorldPaths, wanted: dict) -> bool:
    manifest = _read_manifest(paths)
    return all(manifest.get(key) == value for key, value in wanted.items())


def _refuse_foreign(paths: WorldPaths) -> None:
    """Replacing deletes: only ever a folder that this module wrote."""
    if paths.root.is_dir() and (_read_manifest(paths).get("kind") == KIND or not any(paths.root.iterdir())):
        return
    if paths.root.exists():
        raise ValueError(f"{paths.root} exists and is not a rendered world; name another folder or remove it")


def _move_into_place(partial: WorldPaths, paths: WorldPaths, wanted: dict) -> None:
    old = partial.root.with_name(partial.root.name.replace(".partial-", ".old-"))
    try:
        if paths.root.exists():
            os.rename(paths.root, old)
        os.rename(partial.root, paths.root)
    except BaseException as error:
        if old.exists() and not paths.root.exists():
            os.rename(old, paths.root)
        # Another process may have written the same world meanwhile.
        if not (isinstance(error, OSError) and _is_complete(paths, wanted)):
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _write_world(paths: WorldPaths, parameters: _Parameters, wanted: dict) -> None:
    paths.images.mkdir()
    (paths.root / "clip").mkdir()
    _write_shards(paths, parameters)
    captions, conversations = _write_train(paths, parameters)
    _write_json(paths.caption_train, captions)
    _write_json(paths.instruct_train, conversations)
    asked = _write_test(paths, parameters)
    trained = sum(len(row["conversations"]) // 2 for row in conversations)
    counts = {"train_questions": trained, "test_questions": asked}
    _write_json(paths.manifest, {**wanted, "counts": counts})


def _write_shards(paths: WorldPaths, parameters: _Parameters) -> None:
    """Pictures and texts for contrastive training."""
    sizes = {}
    for first in range(0, parameters.num_train, SHARD_SIZE):
        indices = range(first, min(first + SHARD_SIZE, parameters.num_train))
        shard = paths.root / "clip" / f"train-{first // SHARD_SIZE:05d}.tar"
        sizes[shard.name] = len(indices)
        with tarfile.open(shard, "w") as tar:
            for index in indices:
                scene, rng, name, data = _draw(parameters.seed, "pretrain", index)
                _add_file(tar, f"{name}.png", data)
                _add_file(tar, f"{name}.txt", texts.caption(scene, rng).encode())
    _write_json(paths.root / "clip" / "sizes.json", sizes)  # open_clip reads the number of samples here


def _write_train(paths: WorldPaths, parameters: _Parameters) -> tuple[list[dict], list[dict]]:
    captions, conversations = [], []
    for index in range(parameters.num_train):
        scene, rng, name, data = _draw(parameters.seed, "train", index)
        (paths.images / f"{name}.png").write_bytes(data)
        prompts = rng.permutation(CAPTION_PROMPTS)
        caption = texts.caption(scene, rng)
        captions.append(_conversation(name, name, [(str(prompts[0]), caption)], image_first=rng.random() < 0.5))
        turns = [(q.text, q.answer) for q in texts.questions(scene, rng, parameters.questions_per_scene)]
        conversations.append(_conversation(name, name, turns, image_first=rng.random() < 0.5))
        detail = [(str(prompts[1]), texts.caption(scene, rng))]
        conversations.append(_conversation(f"{name}_detail", name, detail, image_first=rng.random() < 0.5))
    return captions, conversations


def _write_test(paths: WorldPaths, parameters: _Parameters) -> int:
    number = 0
    with open(paths.test_questions, "w") as questions_file, open(paths.test_answers, "w") as answers_file:
        for index in range(parameters.num_test):
            scene, rng, name, data = _draw(parameters.seed, "test", index)
            (paths.images / f"{name}.png").write_bytes(data)
            for q in texts.questions(scene, rng, parameters.questions_per_scene):
                question = {"question_id": number, "image": f"{name}.png", "text": q.text, "category": q.kind}
                answer = {"question_id": number, "text": q.answer, "category": q.kind}
                questions_file.write(json.dumps(question) + "\n")
                answers_file.write(json.dumps(answer) + "\n")
                number += 1
    return number


def _draw(seed: int, split: scenes.Split, index: int) -> tuple[scenes.Scene, np.random.Generator, str, bytes]:
    """A scene, the source of randomness for its texts, its name and its picture as a PNG file."""
    scene = scenes.scene_at(seed, split, index)
    image, _ = scenes.render(scene)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return scene, np.random.default_rng([seed, _TEXT_SEEDS[split], index]), f"{split}_{index:06d}", buffer.getvalue()


def _conversation(row: str, image: str, turns: list[tuple[str, str]], image_first: bool) -> dict:
    """A row of LLaVA's JSON: the first human turn holds <image>, before or after the text."""
    spoken = []
    for number, (text, reply) in enumerate(turns):
        if number == 0:
            text = f"<image>\n{text}" if image_first else f"{text}\n<image>"
        spoken += [{"from": "human", "value": text}, {"from": "gpt", "value": reply}]
    return {"id": row, "image": f"{image}.png", "conversations": spoken}


def _add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)  # its time is 0: the same bytes on every run
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
