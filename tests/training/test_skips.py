"""Counts by cause."""

from __future__ import annotations

import json
import pickle

from llava_drip.training.skips import EXAMPLES, BadSample, Skips


def test_counts_examples_and_words():
    skips = Skips()
    assert str(skips) == "none skipped" and skips.total == 0
    for n in range(1200):
        skips.add("corrupt picture", f"picture {n}")
    skips.add("missing caption", "caption")
    assert skips.total == 1201 and skips.examples == [f"picture {n}" for n in range(EXAMPLES)]
    assert str(skips) == "1,201 skipped (1,200 corrupt picture, 1 missing caption)"


def test_take_and_merge():
    skips, other = Skips(), Skips({"a": 2}, ["x", "y"])
    skips.add("a", "z")
    taken = skips.take()
    assert skips.total == 0 and skips.examples == []
    skips.add("b", "later")
    taken.merge(other)
    assert taken.state() == {"counts": {"a": 3}, "examples": ["z", "x", "y"]}
    assert other.state() == {"counts": {"a": 2}, "examples": ["x", "y"]}  # as it was
    taken.merge(Skips({"c": 1}, list("uvw")))
    assert len(taken.examples) == EXAMPLES
    assert Skips(**json.loads(json.dumps(taken.state()))).state() == taken.state()


def test_a_bad_sample_travels_between_processes():
    error = pickle.loads(pickle.dumps(BadSample("corrupt picture", "a.tar: 7")))
    assert (error.cause, str(error)) == ("corrupt picture", "a.tar: 7")
