"""What rows of answers tell of their making."""

from __future__ import annotations

import pytest

from llava_drip.evaluation.provenance import check_inputs, made, made_here, settings_of


def row(**metadata) -> dict:
    settings = {"bench": "pope_random", "checkpoint": "aa", "compression": 4.0, "questions": "q", "images": "i"}
    usual = {"settings": settings, "batch_size": 8, **made_here("cpu"), "seconds": 0.5}
    return {"metadata": {**usual, **metadata}}


def test_a_resumed_run_lists_every_machine_and_version():
    rows = {1: row(), 2: row(machine="another", versions="torch 1.0", date="2000-01-01", batch_size=4), 3: row()}
    here, found = made_here("cpu"), made(rows, {"a.jpg": 4, "b.jpg": 7}, "file", None)
    assert found["machines"] == sorted([here["machine"], "another"]) and found["devices"] == ["cpu"]
    assert found["answered_with"] == sorted([here["versions"], "torch 1.0"]) and found["batch_sizes"] == [4, 8]
    assert found["answered_on"] == ["2000-01-01", here["date"]]
    assert (found["seconds"], found["tokens_per_image"], found["compression"]) == (1.5, 5.5, 4.0)
    assert found["checkpoint"] == {"path": None, "sha256": "aa"}


@pytest.mark.parametrize("strange", [None, "1", [1], {}, True, float("nan"), float("inf"), 10**400])
def test_what_is_of_another_kind_is_not_told(strange):
    found = made({1: row(), 2: row(seconds=strange)}, {"a.jpg": strange}, "file", None)
    assert found["seconds"] is found["tokens_per_image"] is None and found["machines"]
    found = made({1: row(batch_size=strange, settings=strange)}, {}, "file", None)
    assert found["batch_sizes"] == (["1"] if strange == "1" else None)
    assert found["checkpoint"] is found["compression"] is found["answering"] is None
    assert made({}, {}, "file", None)["machines"] is None


def test_answers_of_one_run():
    first = row()["metadata"]["settings"]
    popular = {**first, "bench": "pope_popular", "questions": "p", "images": "j"}
    assert settings_of({1: row(), 2: row(settings=popular)}, "file") == first
    other = {**first, "checkpoint": "bb"}
    with pytest.raises(
        ValueError, match=r"file: the answers to 1 and 2 are of different runs \(checkpoint aa and bb\)"
    ):
        settings_of({1: row(), 2: row(settings=other)}, "file")
    theirs = {"model_id": "theirs", "metadata": {}}
    assert settings_of({1: theirs, 2: theirs}, "file") is None
    with pytest.raises(ValueError, match="model_id theirs and another"):
        settings_of({1: theirs, 2: {"model_id": "another"}}, "file")
    with pytest.raises(ValueError, match="of different runs"):
        settings_of({1: row(), 2: theirs}, "file")


def test_answers_to_what_is_given_now():
    check_inputs({1: row(), 2: {}}, {"questions": "q", "images": "i", "problems": "none of theirs"}, "file")
    with pytest.raises(ValueError, match=r"file: the answer to 1 was made of other images \(i, now k\)"):
        check_inputs({1: row()}, {"questions": "q", "images": "k"}, "file")
