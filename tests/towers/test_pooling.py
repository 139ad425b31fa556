"""The pure functions from boundaries to tokens against plain Python loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava_drip.tokens import Packing
from llava_drip.towers.pooling import mix_across_doubtful, pool_segments, pool_sizes, segments_from_ends


def random_ends(seed: int, rows: int = 5, patches: int = 13) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rate = torch.rand(rows, 1, generator=generator)
    ends = torch.rand(rows, patches, generator=generator) < rate
    ends[:, -1] = True
    return ends


def naive_segments(ends: Tensor) -> list[list[list[int]]]:
    """For each row the lists of patches of its segments."""
    result = []
    for row in ends.tolist():
        segments, current = [], []
        for patch, end in enumerate(row):
            current.append(patch)
            if end:
                segments.append(current)
                current = []
        assert not current
        result.append(segments)
    return result


def pool(x: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, D], [B, N] → means and sizes of all segments."""
    segments, ones = segments_from_ends(ends.flatten()), torch.ones(ends.numel())
    total = int(ends.sum())
    return pool_segments(x.flatten(0, 1), segments, total, ones), pool_sizes(segments, total, ones)


@pytest.mark.parametrize("seed", range(6))
def test_segments_and_means_match_a_loop(seed):
    ends = random_ends(seed)
    segments = segments_from_ends(ends.flatten()).view_as(ends)
    segments = segments - segments[:, :1]
    expected = naive_segments(ends)
    assert (segments[:, -1] + 1).tolist() == [len(row) for row in expected]
    for row, groups in zip(segments.tolist(), expected):
        assert [[p for p, s in enumerate(row) if s == k] for k in range(len(groups))] == groups
    x = torch.randn(*ends.shape, 4, generator=torch.Generator().manual_seed(seed))
    values, sizes = pool(x, ends)
    assert sizes.tolist() == [len(group) for row in expected for group in row]
    means = [x[b, group].mean(0) for b, row in enumerate(expected) for group in row]
    torch.testing.assert_close(values, torch.stack(means))


def test_pooling_twice_is_the_mean_over_the_patches():
    """Tokens of unequal sizes: the mean of means would be another."""
    x, ends = torch.randn(1, 6, 3), torch.tensor([[1, 0, 0, 1, 0, 1]]).bool()
    values, sizes = pool(x, ends)  # sizes 1, 3, 2
    again = torch.tensor([False, True, True])
    segments = segments_from_ends(again)
    torch.testing.assert_close(
        pool_segments(values, segments, 2, sizes), torch.stack([x[0, :4].mean(0), x[0, 4:].mean(0)])
    )
    assert pool_sizes(segments, 2, sizes).tolist() == [4, 2]


def test_no_and_all_boundaries():
    last = torch.zeros(2, 7, dtype=torch.bool)
    last[:, -1] = True
    assert segments_from_ends(last.flatten()).tolist() == [0] * 7 + [1] * 7
    assert torch.equal(segments_from_ends(torch.ones(14, dtype=torch.bool)), torch.arange(14))


def test_pooling_sums_in_fp32():
    x, ones = torch.full((4000, 1), 1.0, dtype=torch.bfloat16), torch.ones(4000)
    values = pool_segments(x, torch.zeros(4000, dtype=torch.long), 1, ones)
    assert values.dtype == torch.bfloat16 and values.item() == 1.0


def test_gradient_of_a_mean_is_shared_equally():
    ends = random_ends(1)
    x = torch.randn(*ends.shape, 3, requires_grad=True)
    pool(x, ends)[0].sum().backward()
    for b, row in enumerate(naive_segments(ends)):
        for group in row:
            torch.testing.assert_close(x.grad[b, group], torch.full((len(group), 3), 1 / len(group)))


def test_padding_and_back():
    packing = Packing((2, 5, 1), torch.device("cpu"))
    x = torch.arange(8.0)
    padded = packing.pad(x, -1.0)
    assert padded.tolist() == [[0, 1, -1, -1, -1], [2, 3, 4, 5, 6], [7, -1, -1, -1, -1]]
    assert torch.equal(packing.unpad(padded), x)
    assert packing.place_of_token.tolist() == [0, 1, 0, 1, 2, 3, 4, 0]


def naive_mix(values: Tensor, sizes: list[int], confidence: list[float]) -> Tensor:
    """Each boundary moves both its neighbours towards their common mean by 1 - confidence."""
    out = values.clone()
    for k in range(len(values) - 1):
        a, b = values[k], values[k + 1]
        common = (sizes[k] * a + sizes[k + 1] * b) / (sizes[k] + sizes[k + 1])
        out[k] += (1 - confidence[k]) * (common - a)
        out[k + 1] += (1 - confidence[k]) * (common - b)
    return out


def test_mixing_matches_a_loop_and_keeps_images_apart():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 3, generator=generator)
    sizes = torch.tensor([1, 4, 2, 3, 1, 1, 5])
    confidence = torch.rand(7, generator=generator)
    confidence[[3, 6]] = 1.0  # the last tokens of two images
    mixed = mix_across_doubtful(values, sizes, confidence)
    torch.testing.assert_close(mixed, naive_mix(values, sizes.tolist(), confidence.tolist()))
    other = values.clone()
    other[4:] += 10  # another second image
    assert torch.equal(mix_across_doubtful(other, sizes, confidence)[:4], mixed[:4])


def test_certain_boundaries_mix_nothing_and_doubt_keeps_the_total():
    values, sizes = torch.randn(5, 3), torch.tensor([1, 2, 3, 4, 5])
    assert torch.equal(mix_across_doubtful(values, sizes, torch.ones(5)), values)
    mixed = mix_across_doubtful(values, sizes, torch.tensor([0.5, 0.2, 0.9, 0.7, 1.0]))
    weigh = sizes[:, None]
    torch.testing.assert_close((mixed * weigh).sum(0), (values * weigh).sum(0))


def test_confidence_gets_a_gradient_only_where_neighbours_differ():
    values = torch.tensor([[1.0], [1.0], [5.0]])
    confidence = torch.tensor([0.5, 0.5, 1.0], requires_grad=True)
    mix_across_doubtful(values, torch.tensor([1, 1, 1]), confidence).square().sum().backward()
    assert confidence.grad[0] == 0 and confidence.grad[1] != 0
