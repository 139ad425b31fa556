"""The plugin in the real lmms-eval: `python -m lmms_eval` on local tasks, at batch sizes 1 and 4.

lmms-eval does not go with constraints.txt. Another environment's Python that has it, beside what we need, is given by
LLAVA_DRIP_LMMS_EVAL (`.ci/run all` makes one).
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from PIL import Image

from llava_drip.conversation import user_turn
from llava_drip.engine import Engine
from llava_drip.fingerprint import fingerprint
from llava_drip.world import questions, render, scene_at

PYTHON = os.environ.get("LLAVA_DRIP_LMMS_EVAL") or (sys.executable if importlib.util.find_spec("lmms_eval") else None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None,
        reason="no lmms-eval here, and LLAVA_DRIP_LMMS_EVAL names no Python that has it (docs/guides/evaluation.md)",
    ),
]
COMPRESSION = 4
GREEDY = {"max_new_tokens": 10, "temperature": 0, "do_sample": False}
UTILS = '''
from difflib import SequenceMatcher


def visual(doc):
    return doc["images"]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    """How alike answer and reference are, 0 .. 1: of a model that knows nothing too a number for each answer."""
    return {"alike": SequenceMatcher(None, str(results[0]), doc["answer"]).ratio()}


def rounds(doc, previous_output=None, round_idx=None, previous_round_info=None, lmms_eval_specific_kwargs=None):
    """Asks a second time, with the first answer in the question; documents of one picture once more, without any."""
    if round_idx is None:
        return doc["question"]
    asked = previous_round_info or 0
    if round_idx > (2 if len(doc["images"]) == 1 else 1):
        return None, None, True, previous_output, None
    shown = doc["images"] if round_idx == 1 else []
    return shown, f"{round_idx}{asked}: {previous_output[-1]}?", False, previous_output, asked + 1
'''


@dataclass
class Document:
    question: str
    answer: str
    images: list[Image.Image]


def documents() -> list[Document]:
    """Questions about scenes, of very different lengths, with one picture, two, or none."""
    found = []
    for i, count in enumerate((1, 2, 1, 0, 1, 2)):
        scenes = [scene_at(0, "test", 10 * i + j) for j in range(max(1, count))]
        question = questions(scenes[0], np.random.default_rng(i), 1)[0]
        images = [Image.fromarray(render(scene)[0]) for scene in scenes[:count]]
        found.append(Document(" ".join([question.text] * (1 + 3 * (i % 3))), question.answer, images))
    return found


def write_tasks(folder: Path, rows: list[Document]) -> None:
    """A data set as the Hub has them, Parquet with pictures inside, and three tasks on it."""

    def png(image: Image.Image) -> dict:
        data = io.BytesIO()
        image.save(data, "PNG")
        return {"bytes": data.getvalue(), "path": "shown.png"}

    text = {"dtype": "string", "_type": "Value"}
    features = {"images": {"feature": {"_type": "Image"}, "_type": "List"}, "question": text, "answer": text}
    picture = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    schema = pyarrow.schema(
        {"images": pyarrow.list_(picture), "question": pyarrow.string(), "answer": pyarrow.string()},
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    table = [{"images": list(map(png, row.images)), "question": row.question, "answer": row.answer} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table, schema), folder / "test.parquet")
    (folder / "utils.py").write_text(UTILS)
    base = {
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(folder / "test.parquet")}},
        "test_split": "test",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "alike", "aggregation": "mean", "higher_is_better": True}],
    }
    kinds = {
        "shapes": ("text", "generate_until", GREEDY),
        "sampled": ("text", "generate_until", {"max_new_tokens": 10, "temperature": 0.9, "until": ["e"], "top_k": 5}),
        "rounds": ("rounds", "generate_until_multi_round", GREEDY),
    }
    for name, (asks, kind, generation) in kinds.items():
        task = {"task": f"llava_drip_{name}", "output_type": kind, "generation_kwargs": generation, **base}
        functions = {"doc_to_visual": "visual", "doc_to_text": asks, "process_results": "score"}
        lines = "".join(f"{key}: !function utils.{function}\n" for key, function in functions.items())
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task) + lines)


@dataclass
class Run:
    results: dict
    samples: dict[str, list[dict]]  # of each task
    record: dict


@pytest.fixture(scope="module")
def runs(tiny_checkpoint, tmp_path_factory, repository) -> dict[int, Run]:
    """By batch size. One process for both, as --config has it: most of its time goes into importing and indexing tasks."""
    folder = tmp_path_factory.mktemp("lmms_eval")
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks", documents())
    names = [f"llava_drip_{name}" for name in ("shapes", "sampled", "rounds")]
    configurations = [
        {
            "model": "llava_drip",
            "model_args": f"pretrained={tiny_checkpoint},compression={COMPRESSION},record={folder}/record_{size}.json",
            "tasks": ",".join(names),
            "include_path": str(folder / "tasks"),
            "batch_size": str(size),
            "device": "cpu",
            "output_path": str(folder / f"out_{size}"),
            "log_samples": True,
        }
        for size in (1, 4)
    ]
    (folder / "runs.yaml").write_text(yaml.safe_dump(configurations))
    environment = {
        **os.environ,
        "PYTHONPATH": str(repository),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [PYTHON, "-m", "lmms_eval", "--config", str(folder / "runs.yaml")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "Error during evaluation" not in done.stdout, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count("llava_drip_sampled that nothing is made of: top_k") == 2, done.stdout[-4000:]
    found = {}
    for size in (1, 4):
        (results,) = (folder / f"out_{size}").rglob("*_results.json")
        samples = {}
        for name in names:
            (file,) = (folder / f"out_{size}").rglob(f"*_samples_{name}.jsonl")
            samples[name] = [json.loads(line) for line in file.read_text().splitlines()]
        record = json.loads((folder / f"record_{size}.json").read_text())
        found[size] = Run(json.loads(results.read_text()), samples, record)
    return found


def test_batch_sizes_give_the_same_answers_and_scores(runs):
    for name, samples in runs[1].samples.items():
        answers = [[sample["filtered_resps"] for sample in run.samples[name]] for run in (runs[1], runs[4])]
        assert answers[0] == answers[1], name
        assert len({str(answer) for answer in answers[0]}) == len(samples) == 6
        scores = [run.results["results"][name]["alike,none"] for run in (runs[1], runs[4])]
        assert scores[0] == scores[1] > 0, name
    assert runs[1].results["config"]["batch_size"] == "1" and runs[4].results["config"]["batch_size"] == "4"


@pytest.fixture(scope="module")
def engine(tiny_checkpoint) -> Engine:
    return Engine.load(tiny_checkpoint, "cpu", compression=COMPRESSION)


def test_they_are_the_answers_of_our_own_engine(runs, engine):
    """Each document's pictures are its own, and nothing stands around the question but the chat template."""
    for row, sample in zip(documents(), runs[4].samples["llava_drip_shapes"], strict=True):
        request = ([user_turn(row.question, len(row.images))], row.images)
        (reply,) = engine.answer_batch([request], max_new_tokens=GREEDY["max_new_tokens"])
        assert sample["filtered_resps"] == reply.text
        assert sample["token_counts"] == [
            {"input_tokens": reply.usage.prompt_tokens, "output_tokens": reply.usage.new_tokens}
        ]


def test_a_task_in_rounds_hears_what_was_said(runs, engine):
    for row, sample in zip(documents(), runs[4].samples["llava_drip_rounds"], strict=True):
        said, text, images = [], row.question, row.images
        for number in range(1, 4 if len(row.images) == 1 else 3):
            request = ([user_turn(text, len(images))], images)
            (reply,) = engine.answer_batch([request], max_new_tokens=GREEDY["max_new_tokens"])
            said.append(reply.text)
            text, images = f"{number}{number - 1}: {reply.text}?", row.images if number == 1 else []
        assert sample["filtered_resps"] == said


def test_sampled_answers_end_where_the_task_says(runs):
    answers = [sample["filtered_resps"] for sample in runs[1].samples["llava_drip_sampled"]]
    assert not any("e" in answer for answer in answers)
    greedy = [sample["filtered_resps"] for sample in runs[1].samples["llava_drip_shapes"]]
    assert answers != [answer.split("e")[0] for answer in greedy]


def test_results_tell_visual_tokens_and_the_record_what_ours_do(runs, tiny_checkpoint):
    header, answers = runs[4].record["run"], runs[4].record["answers"]
    assert header["checkpoint"]["sha256"] == fingerprint(tiny_checkpoint)
    assert header["compression"] == COMPRESSION and header["tokens_per_image"] == 64 / COMPRESSION
    assert header["versions"]["lmms_eval"] and header["seconds"] > 0 and "--config" in header["command"]
    assert header["settings"] == {"batch_size": 4, "dtype": "torch.float32", "seed": 0}
    assert header["prompts"] == runs[1].record["run"]["prompts"]
    assert header["pictures"] == runs[1].record["run"]["pictures"]
    shapes = [row for row in answers if row["task"] == "llava_drip_shapes"]
    assert [row["doc_id"] for row in shapes] == list(range(6))
    assert [row["visual_tokens"] for row in shapes] == [16 * len(row.images) for row in documents()]
    assert header["tasks"]["llava_drip_rounds"] == sum(3 if len(row.images) == 1 else 2 for row in documents())
    # Seconds are those of a batch, divided: it was one.
    assert len({row["seconds"] for row in shapes[:4]}) == 1
    throughput = runs[4].results["throughput"]
    assert throughput["avg_visual_tokens_per_image"] == 16 and throughput["avg_patches_per_image"] == 64
