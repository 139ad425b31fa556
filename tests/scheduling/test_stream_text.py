"""Tokens become text as they come: nothing is lost, no character is broken, stop strings are cut off."""

from __future__ import annotations

import random

import pytest

from llava_drip.scheduling.text import Detokenizer, StopStrings, checked_stops

TEXTS = [
    "The circle is red.",
    "naïve café — 日本語 и 👩‍👩‍👧 flags 🇫🇷",
    "  two  spaces\n\tand a tab ",
    "</s> a <s> b",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_whole(tiny_tokenizer, text):
    ids = tiny_tokenizer(text)["input_ids"]
    detokenizer = Detokenizer(tiny_tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.end() == tiny_tokenizer.decode(ids, skip_special_tokens=True)
    assert sum(map(bool, pieces)) >= len(text) // 8  # they did come one by one


def test_a_character_that_is_cut_off_is_told_at_the_end_only(tiny_tokenizer):
    ids = tiny_tokenizer("a👩")["input_ids"][:-1]
    detokenizer = Detokenizer(tiny_tokenizer)
    assert "".join(detokenizer.push(token) for token in ids) == "a"
    assert detokenizer.end() == tiny_tokenizer.decode(ids, skip_special_tokens=True)[1:] != ""
    assert detokenizer.end() == ""


class Counting:
    """A tokenizer, and how many tokens it has decoded."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids, **options) -> str:
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, **options)


@pytest.mark.parametrize("text", ["</s>", "日"], ids=["an end mark", "the first byte of a character"])
def test_what_prints_nothing_is_not_decoded_again_and_again(tiny_tokenizer, text):
    """Work grows as the reply does; no text is lost, before it or after."""
    counting = Counting(tiny_tokenizer)
    detokenizer = Detokenizer(counting)
    words, nothing = tiny_tokenizer("The circle")["input_ids"], tiny_tokenizer(text)["input_ids"][0]
    ids = [*words, *[nothing] * 2000, *words]
    said = "".join(detokenizer.push(token) for token in ids) + detokenizer.end()
    assert said == tiny_tokenizer.decode(ids, skip_special_tokens=True)
    assert counting.decoded < 100 * len(ids)


def test_text_ends_before_the_first_stop_string():
    """However it is cut into pieces; against str.find on the whole."""
    chance = random.Random(0)
    cut = 0
    for _ in range(2000):
        text = "".join(chance.choices("ab", k=12))
        stops = tuple("".join(chance.choices("ab", k=chance.randint(1, 5))) for _ in range(chance.randint(0, 3)))
        found, said, rest = StopStrings(stops), "", text
        while rest and not found.found:
            size = chance.randint(1, 3)
            said += found.push(rest[:size])
            rest = rest[size:]
            assert text.startswith(said)
        said += found.end()
        # of several, the one whose end is read first; then the longest cut
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        assert found.found == bool(ends)
        if not ends:
            assert said == text
        else:
            cut += 1
            assert not any(stop in said for stop in stops)
            assert any(text.startswith(said + stop) for stop in stops)
    assert cut > 500


def test_nothing_is_held_back_longer_than_needed():
    stops = StopStrings(["###"])
    assert [stops.push(piece) for piece in ("a", "#", "b", "##", "c", "##")] == ["a", "", "#b", "", "##c", ""]
    assert stops.end() == "##" and not stops.found


@pytest.mark.parametrize(
    ("stop", "words"), [(["a"] * 5, "at most 4"), (["b", ""], "not empty"), ("", "not empty"), ([3], "strings")]
)
def test_stop_strings_are_checked(stop, words):
    assert checked_stops(None) == () and checked_stops("end") == ("end",) and checked_stops(["a", "b"]) == ("a", "b")
    with pytest.raises(ValueError, match=f"stop: .*{words}"):
        checked_stops(stop)
