"""scripts/measure_towers.py: what it writes, of names, directories and pretrained models; presets beside published figures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from llava_drip.measure.published import PUBLISHED, published
from llava_drip.measure.speed import Setting
from llava_drip.measure.subjects import Subject, presets
from llava_drip.measure.survey import Plan, preset_costs, read_accuracy, survey
from llava_drip.measure.survey_table import markdown, presets_markdown
from llava_drip.towers.io import save_tower


@pytest.fixture
def measure(run_script, repository):
    return lambda *arguments: run_script(repository / "scripts" / "measure_towers.py", *arguments)


def rows_of(markdown: str, heads: str) -> list[list[str]]:
    """The cells of the table whose head begins so."""
    lines = markdown.split(heads, 1)[1].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: lines.index("")]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Flat pictures and noise."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(4):
        spread = 0 if i < 2 else 80
        pixels = rng.normal(128, spread, (70, 90, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_everything_of_a_few_towers(measure, photos, tmp_path):
    torch.manual_seed(0)
    drip = timm.create_model("drip_mini_patch8_64_4x", num_classes=10)
    save_tower(drip, tmp_path / "run" / "last", (0.5,) * 3, (0.5,) * 3)
    (tmp_path / "top1.csv").write_text("name, top1\nDRIP, 61.5\nplain_vit_mini_patch8_64, 70.25\n")
    towers = ["plain_vit_mini_patch8_64", tmp_path / "run", "resnet10t", "vit_tiny_patch16_224 depth=2 patch_size=8"]
    done = measure(
        *towers,
        *(
            "--labels",
            "plain",
            "DRIP",
            "CNN",
            "ViT",
            "--img-size",
            64,
            "--num-classes",
            10,
            "--rounds",
            3,
            "--warmup",
            1,
        ),
        *("--batches", 1, 2, "--modes", "inference", "--images", photos, "--max-images", 3, "--devices", "cpu"),
        *("--accuracy", tmp_path / "top1.csv", "--output", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "towers.md").read_text()
    assert done.stdout.strip() == text.strip() and (tmp_path / "out" / "towers.png").stat().st_size > 5000
    result = json.loads((tmp_path / "out" / "towers.json").read_text())
    plain, own, cnn, vit = result["towers"]
    assert [row["label"] for row in result["towers"]] == ["plain", "DRIP", "CNN", "ViT"]
    assert vit["arguments"] == {"depth": 2, "patch_size": 8} and own["name"] == str(tmp_path / "run")
    assert [row["tokens"] for row in result["towers"]] == [64, 16, 4, 64]
    assert plain["gmacs"] == pytest.approx(plain["gmacs_closed_form"]) and cnn["gmacs_closed_form"] is None
    assert own["parameters"] == sum(p.numel() for p in drip.parameters()) and own["image_size"] == [64, 64]
    assert (plain["top1"], own["top1"], cnn["top1"]) == (0.7025, 0.615, None)
    assert plain["images"]["images"] == 3 and plain["images"]["gmacs"] == pytest.approx(plain["gmacs"])
    images = own["images"]
    assert images["tokens_p5"] < images["tokens"] < images["tokens_p95"] and images["gmacs_p5"] < images["gmacs_p95"]
    for row in result["towers"]:
        assert [one["batch"] for one in row["passes"]] == [1, 2]
        assert all(one["milliseconds"] > 0 and 0 < one["peak_memory_gib"] < 4 for one in row["passes"])
    assert rows_of(text, "| tower | parameters")[1][-1] == "61.50 %"
    assert [row[0] for row in rows_of(text, "| tower | latency, batch 1 (ms) |")] == ["plain", "DRIP", "CNN", "ViT"]
    assert "thread(s)" in text and "Load " in text and torch.__version__ in text


def test_counts_alone_are_the_same_each_time(measure, tmp_path):
    for name in "ab":
        done = measure("drip_mini_patch8_64_4x", "resnet10t", "--rounds", 0, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
    one, other = ((tmp_path / name / "towers.md").read_text() for name in "ab")
    assert one == other and "rounds" not in one
    assert (tmp_path / "a" / "towers.png").is_file()


@pytest.mark.parametrize(
    "content",
    ['{"a": 0.5, "b": 0.625}', '[{"name": "a", "top1": 50}, {"name": "b", "top1": 62.5}]', "name,top1\na,50\nb,62.5\n"],
)
def test_accuracies(content, tmp_path):
    path = tmp_path / ("top1.csv" if content.startswith("name") else "top1.json")
    path.write_text(content)
    assert read_accuracy(path) == {"a": 0.5, "b": 0.625}
    path.write_text(content.replace("top1", "top").replace("0.5", '"x"'))
    with pytest.raises(ValueError, match=r"top1\.(csv|json): not {name: top1}"):
        read_accuracy(path)


@pytest.mark.parametrize(
    "content, message",
    [
        ("name,top1\nresnet10,60\n", "--accuracy: resnet10: no such tower here; there are resnet10t"),
        ("name,top1\nresnet10t,nan\n", "resnet10t: nan is no top-1"),
        ("name,top1\nresnet10t,101\n", "resnet10t: 101.0 is no top-1"),
        ("name,top1\nresnet10t,60\nresnet10t,61\n", "resnet10t is given twice"),
        ("name,top1\nresnet10t,0.8\nother,81\n", "resnet10t: 0.8 beside percentages"),
        # A bare name does not say which of two budgets it is of.
        ("name,top1\nresnet10t,60\ndrip_mini_patch8_64_4x,50\n", "--accuracy: drip_mini_patch8_64_4x: no such tower"),
    ],
)
def test_accuracies_of_no_tower_are_refused(content, message, measure, tmp_path):
    (tmp_path / "top1.csv").write_text(content)
    towers = ("resnet10t", "drip_mini_patch8_64_4x compression=2", "drip_mini_patch8_64_4x compression=8")
    done = measure(*towers, "--rounds", 0, "--img-size", 64, "--accuracy", tmp_path / "top1.csv")
    assert done.returncode not in (0, None) and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_what_is_plotted(measure, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("llava_drip.draw.comparison.draw_comparison", lambda *a, **k: drawn.append((a, k)))
    (tmp_path / "top1.csv").write_text("name,top1\ntwo,62\neight,55\n")
    towers = ("drip_mini_patch8_64_4x compression=2", "drip_mini_patch8_64_4x compression=8", "resnet10t")
    flags = ("--labels", "two", "eight", "CNN", "--rounds", 0, "--img-size", 64, "--output", tmp_path / "out")
    for more in (("--accuracy", tmp_path / "top1.csv"), ()):
        assert measure(*towers, *flags, *more).returncode == 0
    (accurate, _), (counted, _) = drawn
    assert [(p.label, p.tokens, p.value) for p in accurate[2]] == [("two", 32, 0.62), ("eight", 8, 0.55)]
    assert [(p.label, p.tokens) for p in counted[2]] == [("two", 32), ("eight", 8), ("CNN", 4)]
    assert all(p.value > 0 for p in counted[2])


def test_a_size_that_a_model_does_not_take(measure):
    assert Subject("LeViT", "levit_128s", {}).make(img_size=64).pretrained_cfg["input_size"] == (3, 64, 64)
    done = measure("inception_v3", "--rounds", 0, "--img-size", 64)
    assert done.returncode not in (0, None) and "inception_v3: takes no pictures of 64 pixels" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_setting_is_measured_once(measure, tmp_path):
    flags = (
        "--batches",
        1,
        1,
        "--modes",
        "inference",
        "inference",
        "--rounds",
        1,
        "--no-memory",
        "--devices",
        "cpu",
        "cpu",
    )
    assert measure("plain_vit_mini_patch8_64", *flags, "--output", tmp_path).returncode == 0
    (row,) = json.loads((tmp_path / "towers.json").read_text())["towers"]
    assert len(row["passes"]) == 1


def test_a_specification():
    assert Subject.parse("a/b 'x=(1, 2)' y=z") == Subject("a/b 'x=(1, 2)' y=z", "a/b", {"x": (1, 2), "y": "z"})
    for wrong, message in (("", "an empty word"), ("a b", "'b' is not KEY=VALUE")):
        with pytest.raises(ValueError, match=message):
            Subject.parse(wrong)


def test_the_presets_are_this_packages():
    names = presets()
    assert {"drip_base_patch16_224", "plain_vit_base_patch32_224"} <= set(names) and len(names) > 40
    assert not {"vit_base_patch16_224", "resnet18"} & set(names)


def test_presets_beside_published_figures(measure, tmp_path, monkeypatch):
    monkeypatch.setattr("llava_drip.measure.survey.presets", lambda pattern: ["plain_vit_base_patch32_224"])
    result = preset_costs([], 224)
    labels = [row["label"] for row in result["towers"]]
    assert labels == ["vit_base_patch32_224", "vit_base_patch16_224", "plain_vit_base_patch32_224"]
    lines = rows_of(presets_markdown(result), "| tower | parameters")
    found = {line[0]: line for line in lines}
    assert found["vit_base_patch32_224"][4:8] == ["4.409", "0.008", "4.41", "-0.0 %"]
    assert found["vit_base_patch16_224"][4:8] == ["17.564", "0.030", "17.56", "+0.0 %"]
    assert found["vit_base_patch32_224, attention left out"][6] == "2.96"
    assert found["vit_base_patch16_224, attention left out"][6] == "11.33"
    assert all(abs(float(line[7].removesuffix(" %"))) < 1 for line in lines)
    monkeypatch.undo()
    done = measure("--presets", "drip_mini_*_4x", "--img-size", 64, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["label"] for row in json.loads((tmp_path / "presets.json").read_text())["towers"]] == [
        "drip_mini_patch8_64_4x"
    ]


def test_a_trunk_is_compared_with_the_trunk():
    (row,) = preset_costs(["senatra_tiny*"], None)["towers"]
    (figure,) = row["published"]
    assert figure["gmacs"] == 4.3 and figure["part"] == "grouping left out" and abs(figure["deviation"]) < 0.03
    assert row["gmacs"] > 1.2 * figure["counted"], "the whole tower costs more"
    assert "| senatra_tiny_224, grouping left out | " in presets_markdown({"versions": "", "towers": [row]})


def test_every_family_appears_by_its_name():
    (row,) = preset_costs(["dynamicvit_small*"], 224)["towers"]
    (figure,) = row["published"]
    assert figure["gmacs"] == 2.9 and figure["deviation"] == pytest.approx(row["gmacs"] / 2.9 - 1)
    assert abs(figure["deviation"]) < 0.03


FIGURES = {
    "dynamicvit_small_patch16_224": [2.9],
    "dynamicvit_base_patch16_224": [11.4],
    "dynamicvit_256_patch16_224": [1.3],
    "dynamicvit_tiny_patch16_224": [],
    "drip_base_patch16_224_4x": [],
    "vit_base_patch32_224": [4.41, 2.96],
}


@pytest.mark.parametrize("name", FIGURES)
def test_whose_figures_they_are(name):
    assert [figure.gmacs for figure in published(name)] == FIGURES[name]
    assert all(figure.source for figure in PUBLISHED)


def test_what_fails_is_said_and_the_rest_goes_on(monkeypatch):
    """Memory that runs out in one setting; what was measured before is handed over."""
    plan = Plan([Setting("cpu", "float32", "inference", batch) for batch in (1, 2)], rounds=1, warmup=0, memory=False)
    model = timm.create_model("plain_vit_mini_patch8_64", num_classes=0)
    forward = model.forward_features

    def limited(x, **kwargs):
        if len(x) > 1:
            raise torch.OutOfMemoryError("out of memory:\ntried to allocate 9 TiB")
        return forward(x, **kwargs)

    monkeypatch.setattr(model, "forward_features", limited)
    models = {"a": model, "b": timm.create_model("plain_vit_mini_patch8_64", num_classes=0)}
    monkeypatch.setattr(Subject, "make", lambda subject, *arguments: models[subject.label])
    seen, subjects = [], [Subject("a", "a", {}), Subject("b", "b", {})]
    result = survey(subjects, plan, after_each=lambda so_far: seen.append(json.dumps(so_far)))
    first, second = result["towers"][0]["passes"]
    assert first["milliseconds"] > 0 and first["error"] is None and len(seen) == 2
    assert second["milliseconds"] is None and second["error"] == "out of memory: tried to allocate 9 TiB"
    other = result["towers"][1]["passes"][1]
    assert other["milliseconds"] > 0 and other["error"] is None and other["speed_up"] is None, "the other tower goes on"
    assert "| failed | - | - |" in markdown(result) and "a, cpu float32, inference, batch 2: out of mem" in markdown(
        result
    )
