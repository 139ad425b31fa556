from __future__ import annotations

import json

import numpy as np
import pytest

from llava_drip.evaluation.relative import bootstrap, read_reviews, summarise, table

# (category, reference's score, model's score), summed by hand:
#   conv:    9 8 10 7    = 34 / 4 = 8.5     7 6 9 4      = 26 / 4 = 6.5      6.5 / 8.5    = 76.470588... %
#   detail:  8 6 7       = 21 / 3 = 7       8 3.5 2      = 13.5 / 3 = 4.5    4.5 / 7      = 64.285714... %
#   complex: 9 10 8      = 27 / 3 = 9       9 10 9.5     = 28.5 / 3 = 9.5    9.5 / 9      = 105.555555... %
#   all:     82 / 10 = 8.2                  68 / 10 = 6.8                    6.8 / 8.2    = 82.926829... %
TEN = [
    ("conv", 9, 7),
    ("conv", 8, 6),
    ("conv", 10, 9),
    ("conv", 7, 4),
    ("detail", 8, 8),
    ("detail", 6, 3.5),
    ("detail", 7, 2),
    ("complex", 9, 9),
    ("complex", 10, 10),
    ("complex", 8, 9.5),
]
BY_HAND = {
    "all": (10, 6.8, 8.2, 82.92682926829268),
    "conv": (4, 6.5, 8.5, 76.47058823529412),
    "detail": (3, 4.5, 7.0, 64.28571428571429),
    "complex": (3, 9.5, 9.0, 105.55555555555556),
}


def rows(prefix: str = "") -> list[dict]:
    return [
        {"id": i + 1, "question_id": i, "category": prefix + category, "content": f"{a} {b}\n...", "tuple": [a, b]}
        for i, (category, a, b) in enumerate(TEN)
    ]


def written(tmp_path, lines: list[dict]):
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("prefix", ["", "llava_bench_"])
def test_ten_rows_by_hand(tmp_path, prefix):
    summary = summarise(read_reviews(written(tmp_path, rows(prefix))))
    assert list(summary) == list(BY_HAND)
    for name, (n, model, reference, relative) in BY_HAND.items():
        group = summary[name]
        assert (group["n"], group["failed"]) == (n, 0)
        assert [group["model"], group["reference"], group["relative"]] == pytest.approx([model, reference, relative])
        assert group["interval"][0] < relative < group["interval"][1]
    assert "82.9" in table(summary) and "105.6" in table(summary)


def test_failed_reviews_are_no_numbers(tmp_path):
    lines = rows()
    lines[0]["tuple"], lines[4]["tuple"], lines[7]["tuple"] = [-1, -1], None, [9, 11]
    lines[4]["reason"] = "cut off"
    reviews = read_reviews(written(tmp_path, lines))
    assert [review.reason for review in reviews if review.scores is None] == [
        "scores [-1, -1] are not of 1 to 10",
        "cut off",
        "scores [9, 11] are not of 1 to 10",
    ]
    summary = summarise(reviews)
    assert {name: (group["n"], group["failed"]) for name, group in summary.items()} == {
        "all": (7, 3),
        "conv": (3, 1),
        "detail": (2, 1),
        "complex": (2, 1),
    }
    assert summary["conv"]["relative"] == pytest.approx(100 * (6 + 9 + 4) / (8 + 10 + 7))
    for line in lines:
        line["tuple"] = None
    nothing = summarise(read_reviews(written(tmp_path, lines)))["all"]
    assert (nothing["n"], nothing["failed"], nothing["relative"], nothing["interval"]) == (0, 10, None, None)


def test_both_orders_count_once_and_their_difference_is_told(tmp_path):
    """First order: 8.2 and 6.8 as above; second: the reference 1 lower, the model as before."""
    first = [{**row, "order": "reference_first"} for row in rows()]
    second = [{**row, "order": "model_first", "tuple": [row["tuple"][0] - 1, row["tuple"][1]]} for row in rows()]
    group = summarise(read_reviews(written(tmp_path, first + second)))["all"]
    assert group["n"] == 10 and group["reference"] == pytest.approx(7.7) and group["model"] == pytest.approx(6.8)
    assert group["relative"] == pytest.approx(100 * 6.8 / 7.7)
    assert group["reference_first"] == pytest.approx(100 * 6.8 / 8.2)
    assert group["model_first"] == pytest.approx(100 * 6.8 / 7.2)
    assert group["difference"] == pytest.approx(100 * 6.8 / 8.2 - 100 * 6.8 / 7.2)
    # one order of a question is not enough
    group = summarise(read_reviews(written(tmp_path, first + second[1:])))["all"]
    assert (group["n"], group["failed"]) == (9, 1)


def test_rows_without_category_or_id(tmp_path):
    """As in the reviews of text-only questions: "score", nothing else."""
    summary = summarise(read_reviews(written(tmp_path, [{"score": [8, 4]}, {"score": [8, 6]}])))
    assert list(summary) == ["all"] and summary["all"]["relative"] == pytest.approx(62.5)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question_id": 5, "tuple": [8, 7]}, "line 11: question_id 5 again, first at .*line 6"),
        ({"question_id": 99, "tuple": ["8", "7"]}, "line 11: not a review"),
        ({"question_id": 99, "tuple": [8]}, "line 11: not a review"),
        ({"question_id": 99, "tuple": [True, 8]}, "line 11: not a review"),
        ({"question_id": 99, "text": "8 7"}, "line 11: not a review"),
        ({"question_id": 99, "tuple": [8, 7], "order": "random"}, "line 11: not a review"),
    ],
)
def test_what_is_no_review_is_named(tmp_path, row, words):
    with pytest.raises(ValueError, match=words):
        read_reviews(written(tmp_path, rows() + [row]))
    with pytest.raises(ValueError, match="holds no reviews"):
        read_reviews(written(tmp_path, []))


def test_the_interval_repeats_and_covers():
    """A normal mean of 50 draws: the interval is as wide as theory has it, and contains the truth as often as it says."""
    rng, inside, widths = np.random.default_rng(0), 0, []
    for _ in range(40):
        low, high = bootstrap(rng.normal(5, 1, 50), lambda drawn: drawn.mean(-1), seed=1)
        inside += low < 5 < high
        widths.append(high - low)
    assert inside >= 34 and np.mean(widths) == pytest.approx(2 * 1.96 / 50**0.5, rel=0.08)
    values = rng.normal(5, 1, 50)
    first = bootstrap(values, lambda drawn: drawn.mean(-1), seed=1)
    assert bootstrap(values, lambda drawn: drawn.mean(-1), seed=1) == first
    assert bootstrap(values, lambda drawn: drawn.mean(-1), seed=2) != first


def test_pairs_are_drawn_together():
    """Where the model always has half the reference's score, the relative score has no spread at all."""
    scores = np.linspace(2, 10, 30)[:, None] * [1, 0.5]
    statistic = lambda drawn: 100 * drawn[..., 1].mean(-1) / drawn[..., 0].mean(-1)  # noqa: E731
    assert bootstrap(scores, statistic, seed=0) == pytest.approx([50, 50])
