"""KEY=VALUE arguments of programs: what values are read as, and what may not be said twice."""

from __future__ import annotations

import pytest

from llava_drip.cli import key_values, merged


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("(2.0, 2.0)", (2.0, 2.0)),
        ("hilbert", "hilbert"),
        ("'no'", "no"),
        ("True", True),
        ("true", True),
        ("yes", True),
        ("false", False),
        ("no", False),
        ("null", None),
        ("None", None),
        ("a: [", "a: ["),
        ("2026-01-01", "2026-01-01"),
    ],
)
def test_values_are_literals_or_what_yaml_switches_are(text, value):
    (read,) = key_values([f"key={text}"], "--model-kwargs").values()
    assert read == value and type(read) is type(value)


def test_an_argument_with_a_flag_of_its_own_is_given_once():
    assert merged({"scan": "hilbert"}, {"compression": 2.0, "img_size": None}) == {
        "scan": "hilbert",
        "compression": 2.0,
    }
    with pytest.raises(ValueError, match="^--model-kwargs: compression has a flag of its own; leave one of them out$"):
        merged({"compression": None}, {"compression": 2.0})
