"""Distillation of a DRIP from its dense original: what is learned, what stays, and that runs go on, without a label."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from llava_drip.classification import checkpoint
from llava_drip.classification.distill import make_distiller
from llava_drip.classification.distill_arguments import parse
from llava_drip.classification.distillation import DistillationLoss, Distiller
from llava_drip.fingerprint import fingerprint
from llava_drip.towers.convert import convert
from llava_drip.towers.io import load_tower, save_tower

from .helpers import (
    NAMES,
    SHORT,
    TORCHRUN,
    killed,
    losses,
    picture,
    program,
    rows,
    run,
    run_distillation,
    samples,
    weights,
    without_times,
    write_parquet,
    write_tar,
)

PROGRAM = "scripts/distill_tower.py"


@pytest.fixture(scope="module")
def teacher(flags, tmp_path_factory) -> Path:
    """A run of a dense mini tower that knows a little: 12 epochs of 6 steps."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("runs") / "dense"
    return run("--model=drip_mini_patch8_64_1x", *flags, "--epochs=12", "--scale", "0.5", "1", f"--output={output}")


@pytest.fixture(scope="module")
def short(teacher, data) -> list[str]:
    """Two epochs of six steps, evaluated."""
    pictures = [f"--train-data={data}/train", f"--val-data={data}/val", "--scale", "0.5", "1"]
    return [f"--teacher={teacher}", *pictures, "--batch-size=8", "--epochs=2", *SHORT]


@pytest.fixture(scope="module")
def distilled(short, teacher, tmp_path_factory) -> tuple[Path, dict]:
    """Eight epochs, and the fingerprint of the teacher before them."""
    before = fingerprint(teacher / "best")
    output = tmp_path_factory.mktemp("runs") / "4x"
    return run_distillation(*short, "--epochs=8", "--budgets", "2", "8", f"--output={output}"), before


def distiller(*flags: str) -> Distiller:
    return make_distiller(parse([*map(str, flags), "--train-data=.", "--output=."], "distill_tower.py", "help"))


def images(batch: int = 3, size: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


# What is learned, and what stays


def test_the_student_comes_nearer_on_held_out_pictures(distilled):
    output, _ = distilled
    epochs = rows(output, "epochs")
    assert [row["epoch"] for row in epochs] == list(range(9))
    assert 1 - epochs[-1]["similarity"] < 0.7 * (1 - epochs[0]["similarity"])
    parts = ("embedding_loss", "output_loss", "patches_loss")
    apart = [sum(row[part] for part in parts) for row in rows(output)]
    assert np.mean(apart[-6:]) < 0.7 * np.mean(apart[:6])
    for part in parts:
        assert epochs[-1][part] < epochs[1][part]
    assert 3 < epochs[-1]["compression"] < 6


def test_the_teacher_stays_and_is_measured(distilled, teacher):
    output, before = distilled
    assert fingerprint(teacher / "best") == before
    theirs = max(row["top1"] for row in rows(teacher, "epochs"))
    assert {row["teacher_top1"] for row in rows(output, "epochs")} == {theirs}


def test_what_is_frozen_is_the_teachers(distilled, teacher):
    output, _ = distilled
    ours, theirs = weights(output), weights(teacher, "best")
    frozen = [name for name in ours if name.startswith(("patch_embed.", "pos_embed", "blocks.0.", "head."))]
    assert len(frozen) == 17
    for name, value in ours.items():
        if "boundary_predictor" in name:
            continue
        assert torch.equal(value, theirs[name]) == (name in frozen), name
    fresh = convert(teacher).state_dict()
    assert not torch.equal(ours["boundary_predictor.fc1.weight"], fresh["boundary_predictor.fc1.weight"])


def test_records_and_towers_are_as_of_any_run(distilled, teacher):
    output, _ = distilled
    record = json.loads((output / "run.json").read_text())
    assert record["program"] == "distill_tower.py" and record["model"] == "drip_mini_patch8_64_4x"
    assert record["flags"]["teacher"] == str(teacher) and record["frozen_sha256"]
    tower = load_tower(str(output / "last"), num_classes=len(NAMES))
    assert record["parameters"] == sum(p.numel() for p in tower.parameters())
    assert tower.compression == 4.0 and tower.budget is None
    best = max(rows(output, "epochs")[1:], key=lambda row: row["top1"])
    state = json.loads((checkpoint.newest(output) / "trainer.json").read_text())
    assert state["best"] == best["top1"] and (output / "best" / "config.json").is_file()


def test_budgets_of_the_finished_student(distilled):
    output, _ = distilled
    two, eight = json.loads((output / "budgets.json").read_text())
    assert (two["tokens"], eight["tokens"]) == (32, 8) and two["images"] == 22
    assert {*two} >= {"budget", "top1", "similarity", "teacher_top1"} and two["budget"] == 2


def changed(module: nn.Module, before: dict) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("trained", ["late", "all", "boundaries"])
def test_a_step_changes_what_it_should(trained, short):
    flags = [*short, f"--train={trained}", "--train-data=.", "--output=."]
    args = parse(list(map(str, flags)), "distill_tower.py", "help")
    model = make_distiller(args).train()
    assert args.rate_loss_weight == 5  # the tower's own
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    features, rate_loss, _ = model(images())
    DistillationLoss(args, model)(features, None, rate_loss)["loss"].backward()
    optimizer.step()
    learned = {name.removeprefix("model.") for name in changed(model, before)}
    assert all(
        name.startswith(("blocks.", "fc_norm", "boundary_predictor", "patch_embed", "pos_embed")) for name in learned
    )
    parts = {name.partition(".")[0] for name in learned}
    assert "boundary_predictor" in parts
    assert ("blocks" in parts) == (trained != "boundaries")
    assert any(name.startswith(("blocks.0.", "patch_embed")) for name in learned) == (trained == "all")


@pytest.mark.parametrize("kwargs", [["scan=raster"], ["scan=hilbert"], ["compression=(2.0, 2.0)", "pool_after=(1, 3)"]])
@pytest.mark.parametrize("trained, layer", [("late", 0), ("all", 0), ("late", -1)])
def test_the_teachers_features(trained, layer, kwargs, short, teacher):
    """Also the teacher that goes on from the student's early blocks says what a teacher of its own would, patch by patch."""
    model = distiller(*short, f"--train={trained}", f"--patch-layer={layer}", "--model-kwargs", *kwargs).train()
    assert model.shared == (1 if trained == "late" else 0)
    assert isinstance(model.teacher.blocks[0], nn.Identity) == (trained == "late")
    dense = load_tower(str(teacher / "best"), num_classes=len(NAMES)).eval()
    x = images()
    with torch.no_grad():
        features, _, lengths = model(x)
        tokens = dense.forward_features(x)
        torch.testing.assert_close(features["teacher_output"], dense.forward_head(tokens))
        torch.testing.assert_close(features["teacher_pooled"], dense.forward_head(tokens, pre_logits=True))
        model.eval()
        features, _, lengths = model(x)
        student = model.model.forward_features(x, layer=layer or None)
        tokens = dense.forward_features(x, layer=layer or None)
    torch.testing.assert_close(features["tokens"], student.values)
    patches, first = tokens.values.unflatten(0, (3, 64)), 0
    for image in range(3):
        for token in range(int(lengths[image])):
            inside = student.segments[image] == token
            assert features["sizes"][first + token] == inside.sum()
            torch.testing.assert_close(features["teacher_tokens"][first + token], patches[image][inside].mean(0))
        first += int(lengths[image])
    assert first == len(features["tokens"])


def test_a_rotary_teacher(data, tmp_path):
    """Shared blocks hand on where their tokens lie."""
    torch.manual_seed(0)
    dense = timm.create_model("drip_mini_patch8_64_1x", num_classes=5, relative="rotary", pos_embed="none").eval()
    save_tower(dense, tmp_path, (0.5,) * 3, (0.5,) * 3)
    model = distiller(f"--teacher={tmp_path}", "--model-kwargs", "scan=hilbert").train()
    with torch.no_grad():
        features, _, _ = model(images())
        torch.testing.assert_close(features["teacher_output"], dense(images()))


def test_at_the_teachers_features_nothing_is_left_to_learn(short):
    model = distiller(*short, "--rate-loss-weight=0")
    args = parse([*short, "--output=.", "--rate-loss-weight=0"], "distill_tower.py", "help")
    model.model.set_compression(1.0)
    features, rate_loss, _ = model.eval()(images())
    parts = DistillationLoss(args, model)(features, None, rate_loss)
    assert rate_loss is None and {*parts} == {"loss", "embedding_loss", "output_loss", "patches_loss"}
    assert all(abs(part.item()) < 1e-5 for part in parts.values())


# Without labels


def test_labels_do_not_matter(short, data, tmp_path):
    """Shards without labels, parquet without labels, and a flat folder train what the labelled ones train."""
    pictures = samples(48)
    write_tar(tmp_path / "0.tar", [(content, None) for content, _ in pictures])
    for name in ("labelled", "a", "b", "flat"):
        (tmp_path / name).mkdir()
    write_tar(tmp_path / "labelled" / "0.tar", pictures)
    for name, label in (("a", "nobody knows"), ("b", 3)):
        write_parquet(tmp_path / name / "train.parquet", [(content, label) for content, _ in pictures])
    flat = tmp_path / "flat"
    for path in (data / "train").rglob("*.jpg"):  # in the order of the folder with classes
        shutil.copy(path, flat / f"{path.parent.name}-{path.name}")

    def curve(place: Path, *more: str) -> list[float]:
        output = tmp_path / "runs" / place.relative_to(place.anchor).as_posix().replace("/", "-")
        return losses(run_distillation(*short, "--epochs=1", f"--train-data={place}", f"--output={output}", *more))

    count = ["--train-num-samples=48"]
    assert curve(tmp_path / "0.tar", *count) == curve(tmp_path / "labelled", *count)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert curve(flat) == curve(data / "train")


def test_pictures_without_labels_are_evaluated_by_similarity(short, tmp_path):
    for i in range(5):
        path = tmp_path / "val" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(i, i))
    output = run_distillation(*short, f"--val-data={tmp_path}/val", f"--output={tmp_path}/out")
    epochs = rows(output, "epochs")
    assert all("top1" not in row and row["val_images"] == 5 for row in epochs)
    state = json.loads((checkpoint.newest(output) / "trainer.json").read_text())
    assert state["best"] == max(row["similarity"] for row in epochs[1:])


def test_labelled_shards_need_names(short, data, tmp_path, caplog):
    shards = [*short, f"--val-data={data}/val_shards", "--epochs=1"]
    named = run_distillation(*shards, f"--classes={data}/shards/names.txt", f"--output={tmp_path}/named")
    assert "top1" in rows(named, "epochs")[0]
    caplog.set_level("INFO")
    unnamed = run_distillation(*shards, f"--output={tmp_path}/unnamed")
    assert "top1" not in rows(unnamed, "epochs")[0]
    assert "no top-1: --val-data does not tell the names of its classes; --classes does" in caplog.text
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="--classes: has 2 names, the teacher 6 classes"):
        run_distillation(*shards, f"--classes={tmp_path}/names.txt", f"--output={tmp_path}/wrong")
    with pytest.raises(ValueError, match="--label-key: has no use, --val-data does not tell the names of its classes"):
        run_distillation(*shards, "--label-key=cls", f"--output={tmp_path}/wrong")


def test_pictures_of_other_classes_are_evaluated_by_similarity(short, tmp_path, caplog):
    for i in range(4):
        (tmp_path / "val" / NAMES[i]).mkdir(parents=True)
        (tmp_path / "val" / NAMES[i] / "0.jpg").write_bytes(picture(i, i))
    caplog.set_level("INFO")
    output = run_distillation(*short, "--epochs=1", f"--val-data={tmp_path}/val", f"--output={tmp_path}/out")
    assert {*rows(output, "epochs")[-1]} >= {"similarity"} and "top1" not in rows(output, "epochs")[-1]
    assert "no top-1: --val-data has 4 classes, the teacher 6" in caplog.text


@pytest.mark.parametrize("flag", ["--classes={data}/shards/names.txt", "--label-key=label"])
def test_labels_are_of_no_use_without_a_classifier(flag, data, tmp_path):
    torch.manual_seed(0)
    save_tower(timm.create_model("drip_mini_patch8_64_1x", num_classes=0), tmp_path / "dense", (0.5,) * 3, (0.5,) * 3)
    flags = [f"--teacher={tmp_path}/dense", f"--train-data={data}/train", *SHORT, "--batch-size=8", "--epochs=1"]
    flags += [f"--val-data={data}/train.parquet", flag.format(data=data), f"--output={tmp_path}/out"]
    with pytest.raises(ValueError, match=f"{flag.partition('=')[0]}: has no use, the teacher classifies nothing"):
        run_distillation(*flags)


# A CLIP as the teacher


def test_a_clip_is_distilled_to_its_image_embedding(data, tmp_path):
    torch.manual_seed(0)
    vision = {"image_size": 64, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32}
    text = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 100, "context_length": 8}
    # As many outputs as there are classes: they are no classes all the same.
    config = {"embed_dim": len(NAMES), "vision_cfg": vision, "text_cfg": text}
    clip = open_clip.model.CLIP(**config).eval()
    with torch.no_grad():  # fresh ones say nearly the same of all pictures
        for block in clip.visual.transformer.resblocks:
            for weight in (block.attn.in_proj_weight, block.attn.out_proj.weight, block.mlp.c_proj.weight):
                weight.mul_(2)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save(clip.state_dict(), tmp_path / "clip" / "open_clip_pytorch_model.bin")
    flags = [f"--teacher={tmp_path}/clip", f"--train-data={data}/train", f"--val-data={data}/val", "--batch-size=8"]
    # Without the rate loss, which changes how many tokens there are while the output loss is watched.
    flags += ["--epochs=10", "--lr=1e-3", "--rate-loss-weight=0", "--pool-after=1"]
    output = run_distillation(*flags, *SHORT, f"--output={tmp_path}/out")
    epochs = rows(output, "epochs")
    assert "top1" not in epochs[-1] and epochs[-1]["similarity"] > epochs[0]["similarity"]
    assert epochs[-1]["output_loss"] < epochs[1]["output_loss"] < 2
    tower = load_tower(str(output / "last"), num_classes=len(NAMES))
    assert torch.equal(tower.head.weight, clip.visual.proj.T) and not tower.head.bias.any()


def test_a_teacher_without_head(data, tmp_path):
    torch.manual_seed(0)
    headless = timm.create_model("drip_mini_patch8_64_1x", num_classes=0)
    save_tower(headless, tmp_path / "dense", (0.5,) * 3, (0.5,) * 3)
    flags = [f"--teacher={tmp_path}/dense", f"--train-data={data}/train", *SHORT, "--batch-size=8", "--epochs=1"]
    output = run_distillation(*flags, f"--output={tmp_path}/out")
    assert "output_loss" not in rows(output)[0] and rows(output, "epochs")[0]["epoch"] == 1  # nothing was evaluated
    with pytest.raises(ValueError, match="a teacher without head has no outputs"):
        run_distillation(*flags, "--embedding-loss-weight=0", "--patch-loss-weight=0", f"--output={tmp_path}/none")


# Resume, ranks


@pytest.fixture(scope="module")
def everything(short) -> list[str]:
    """With all on that draws numbers, over shared blocks that draw none."""
    more = ["--mixup=0.2", "--aa=rand-m9-mstd0.5-inc1", "--drop-path=0.1", "--grad-accum-steps=2", "--batch-size=4"]
    return [*short, *more, "--elastic", "2", "8", "--save-every-n-steps=2"]


@pytest.fixture(scope="module")
def whole(everything, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return run_distillation(*everything, f"--output={tmp_path_factory.mktemp('whole')}")


@pytest.mark.parametrize(
    "where, goes_on_at",
    [
        ("step:5", 4),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (("step:1", None), ("step:11", 10))),
    ],
)
def test_after_a_kill(where, goes_on_at, everything, whole, tmp_path):
    flags = [*everything, f"--output={tmp_path}/run"]
    killed(where, flags)
    last = checkpoint.newest(tmp_path / "run")
    assert (last and last.name) == (goes_on_at and f"step-{goes_on_at}")
    output = run_distillation(*flags, "--resume")
    assert losses(output) == losses(whole)
    assert list(map(without_times, rows(output, "epochs"))) == list(map(without_times, rows(whole, "epochs")))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(output)[name]), name


def test_what_was_before_is_not_said_where_nobody_looked(short, data, tmp_path, caplog):
    """Evaluated from a resume on."""
    unseen = [flag for flag in short if not flag.startswith("--val-data")]
    output = tmp_path / "run"
    killed("step:11", [*unseen, "--save-every-n-steps=5", f"--output={output}"])
    caplog.set_level("INFO")
    more = [f"--val-data={data}/val", "--resume", "--save-every-n-steps=5"]
    run_distillation(*unseen, *more, f"--output={output}")
    assert [row["epoch"] for row in rows(output, "epochs") if "similarity" in row] == [2]
    assert "student after: top-1" in caplog.text and "student before" not in caplog.text


def test_another_distillation_is_refused(everything, whole, tmp_path):
    output = shutil.copytree(whole, tmp_path / "run")
    wrong = {
        "--train=all": "--resume: --train was late, now all",
        "--embedding-loss-weight=2": "--resume: --embedding-loss-weight was",
        "--compression=8": "--resume: --compression was None, now 8.0",
    }
    for flag, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            run_distillation(*everything, f"--output={output}", "--resume", flag)


@pytest.mark.slow
def test_two_processes_train_what_one_would(short, data, tmp_path):
    one = run_distillation(*short, "--batch-size=16", f"--output={tmp_path}/one")
    done = program(*TORCHRUN, PROGRAM, *short, "--batch-size=8", f"--output={tmp_path}/two")
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(one), atol=1e-4)
    for ours, theirs in zip(rows(tmp_path / "two", "epochs"), rows(one, "epochs"), strict=True):
        for name in ("top1", "similarity", "teacher_top1", "val_images"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, atol=2e-4, rtol=0)


# The program


@pytest.mark.slow
def test_two_commands(teacher, data, tmp_path):
    """README's: the recipe, a dense run, and what is said at the end."""
    flags = [f"--train-data={data}/train", f"--val-data={data}/val", "--device=cpu", "--workers=0", "--epochs=1"]
    recipe = ["scripts/recipes/distill_cpu.yaml", f"--teacher={teacher}", "--batch-size=8", f"--output={tmp_path}/out"]
    done = program(PROGRAM, *recipe, *flags, "--precision=fp32", "--budgets", "2", "--log-every-n-steps=2")
    assert done.returncode == 0, done.stderr[-3000:]
    for said in (
        "student before: top-1",
        "student after: top-1",
        "teacher: top-1",
        "student at 2x: top-1",
        "frozen weights unchanged",
    ):
        assert said in done.stderr, done.stderr[-3000:]


WRONG = {
    "--compression=1": "^compression 1: a student at compression 1 is the teacher",
    "--model-kwargs=compression=1": "^compression 1: a student at compression 1 is the teacher",
    "--model-kwargs=budget=1": "^budget 1: a student at compression 1 is the teacher",
    "--model-kwargs=source=1": "--teacher: .*source",
    "--label-key=label": "--val-data: .*leave out --label-key",
    "--teacher=no/such/place": "--teacher: no/such/place: neither a directory",
    "--model-kwargs=elastic=(1.0,2.0)": "--model-kwargs: elastic has a flag of its own",
    "--model-kwargs=embed_dim=3": "--teacher: .*embed_dim=3: the dense original decides it",
    "--train-data=no/such/place": "--train-data: .*no/such/place",
    "--patch-layer=-4": "--patch-layer: layer -4 lies before pooling",
    "--pool-after=9": "pool_after must be between 0 and depth 4",
}


@pytest.mark.parametrize("flag", WRONG)
def test_a_wrong_value_is_named(flag, short, tmp_path):
    more = ["--elastic", "1", "2"] if "elastic" in flag else []
    with pytest.raises(ValueError, match=WRONG[flag]):
        run_distillation(*short, *more, flag, f"--output={tmp_path}/out")


WRONG_FLAGS = {
    "--budgets=0.5": "--budgets must be at least 1",
    "--budgets=inf": "--budgets must be at least 1, and finite",
    "--patch-loss-weight=-1": "--patch-loss-weight must be at least 0",
    "--patch-layer=1": "--patch-layer counts from the end",
    "--temperature=0": "--temperature must be above 0",
    "--smoothing=0.1": "unrecognized arguments: --smoothing",
    "--fsdp": "unrecognized arguments: --fsdp",
}


@pytest.mark.parametrize("flag", WRONG_FLAGS)
def test_a_wrong_flag_is_named_in_one_line(flag, short, capsys):
    with pytest.raises(SystemExit) as end:
        parse([*short, "--output=.", flag], "distill_tower.py", "help")
    error = capsys.readouterr().err
    assert end.value.code == 2 and WRONG_FLAGS[flag] in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "flag, said", [("--budgets=2", "nothing to evaluate"), ("--classes=x.txt", "only labels of --val-data")]
)
def test_evaluation_without_pictures(flag, said, short, capsys):
    flags = [flag for flag in short if not flag.startswith("--val-data")]
    with pytest.raises(SystemExit):
        parse([*flags, "--output=.", flag], "distill_tower.py", "help")
    assert f"{flag.partition('=')[0]}: " in (error := capsys.readouterr().err) and said in error


def test_a_teacher_that_pools_already(trained, short, tmp_path):
    with pytest.raises(ValueError, match="--teacher: .*pools already, at compression 4.0"):
        run_distillation(*short, f"--teacher={trained}", f"--output={tmp_path}/out")


def test_an_empty_folder(short, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "drawing.notapicture", "PNG")
    with pytest.raises(ValueError, match="--train-data: .*no picture in it"):
        run_distillation(*short, f"--train-data={tmp_path}/pictures", f"--output={tmp_path}/out")
