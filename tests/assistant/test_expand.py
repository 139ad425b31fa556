"""Placeholder expansion against a plain Python loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava_drip.assistant.expand import IGNORE_INDEX, check_placeholders, expand_placeholders

IMAGE, PAD = 99, 0


def naive(rows: list[list[int]], labels: list[list[int]], counts: list[int], left: bool) -> tuple[list, ...]:
    """Expand row by row, then pad. Returns ids, mask, labels, is_image as lists."""
    remaining, out = list(counts), []
    for row, row_labels in zip(rows, labels):
        ids, marks, seen = [], [], []
        for token, label in zip(row, row_labels):
            n = remaining.pop(0) if token == IMAGE else 1
            ids += [token] * n
            marks += [IGNORE_INDEX if token == IMAGE else label] * n
            seen += [token == IMAGE] * n
        out.append((ids, [1] * len(ids), marks, seen))
    longest = max(len(row[0]) for row in out)

    def pad(values: list, fill) -> list:
        filler = [fill] * (longest - len(values))
        return filler + values if left else values + filler

    fills = (PAD, 0, IGNORE_INDEX, False)
    return tuple([pad(row[i], fill) for row in out] for i, fill in enumerate(fills))


def random_case(seed: int) -> tuple[list[list[int]], list[list[int]], list[int]]:
    generator = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    rows = [[IMAGE if below(4) == 0 else 1 + below(50) for _ in range(1 + below(8))] for _ in range(1 + below(5))]
    labels = [[IGNORE_INDEX if below(2) else token for token in row] for row in rows]
    counts = [1 + below(6) for row in rows for token in row if token == IMAGE]
    return rows, labels, counts


def padded(rows: list[list[int]], fill: int, left: bool) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[fill] * (longest - len(r)) + r if left else r + [fill] * (longest - len(r)) for r in rows])


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_random_cases_match_the_loop(seed, left):
    rows, labels, counts = random_case(seed)
    ids, mask = padded(rows, PAD, left), padded([[1] * len(r) for r in rows], 0, left)
    out = expand_placeholders(ids, mask, IMAGE, torch.tensor(counts, dtype=torch.long), padded(labels, -100, left))
    expected = naive(rows, labels, counts, left or len({len(row) for row in rows}) == 1)  # without padding, left
    got = (out.input_ids, out.attention_mask, out.labels, out.is_image)
    assert [t.tolist() for t in got] == list(expected)
    assert out.is_image.dtype == torch.bool and int(out.is_image.sum()) == sum(counts)


def test_without_labels_and_without_images():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    out = expand_placeholders(ids, torch.ones_like(ids), IMAGE, torch.zeros(0, dtype=torch.long))
    assert out.labels is None and torch.equal(out.input_ids, ids) and not out.is_image.any()


def test_a_placeholder_id_on_padding_is_padding():
    """Some tokenizers pad with a token that means something elsewhere."""
    ids = torch.tensor([[IMAGE, IMAGE, 5, IMAGE]])
    mask = torch.tensor([[0, 0, 1, 1]])
    out = expand_placeholders(ids, mask, IMAGE, torch.tensor([2]))
    assert out.input_ids.tolist() == [[5, IMAGE, IMAGE]] and out.is_image.tolist() == [[False, True, True]]


@pytest.mark.parametrize(
    "per_row, images, message",
    [
        ([1, 2, 1], 3, "row 2, which has 1 <image>"),
        ([1, 2, 1], 2, "row 1, which has 2 <image>"),
        ([1, 0, 0], 2, "over after row 0"),
        ([0, 0], 1, "over after row 0"),
        ([1, 1], 0, "row 0"),
    ],
)
def test_a_wrong_number_names_the_row(per_row, images, message):
    with pytest.raises(ValueError, match=message) as error:
        check_placeholders(torch.tensor(per_row), images)
    assert f"{sum(per_row)} <image> placeholders and {images} images" in str(error.value)


def test_the_right_number_passes():
    check_placeholders(torch.tensor([0, 2, 1]), 3)
