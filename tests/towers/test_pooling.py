"""The pure functions from boundaries to tokens against plain Python loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava_drip.towers.boundaries import GumbelBoundaries, UniformBoundaries, most_probable, tokens_for_budget
from llava_drip.towers.pooling import mix_across_doubtful, pool_segments, segments_from_ends


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


@pytest.mark.parametrize("seed", range(6))
def test_segments_and_means_match_a_loop(seed):
    ends = random_ends(seed)
    segments, lengths = segments_from_ends(ends)
    expected = naive_segments(ends)
    assert lengths.tolist() == [len(row) for row in expected]
    for row, groups in zip(segments.tolist(), expected):
        assert [[p for p, s in enumerate(row) if s == k] for k in range(len(groups))] == groups
    x = torch.randn(*ends.shape, 4, generator=torch.Generator().manual_seed(seed))
    values, sizes = pool_segments(x, segments, lengths, int(lengths.sum()))
    assert sizes.tolist() == [len(group) for row in expected for group in row]
    means = [x[b, group].mean(0) for b, row in enumerate(expected) for group in row]
    torch.testing.assert_close(values, torch.stack(means))


def test_no_and_all_boundaries():
    last = torch.zeros(2, 7, dtype=torch.bool)
    last[:, -1] = True
    segments, lengths = segments_from_ends(last)
    assert lengths.tolist() == [1, 1] and (segments == 0).all()
    segments, lengths = segments_from_ends(torch.ones(2, 7, dtype=torch.bool))
    assert lengths.tolist() == [7, 7] and torch.equal(segments, torch.arange(7).expand(2, 7))


def test_pooling_sums_in_fp32():
    x = torch.full((1, 4000, 1), 1.0, dtype=torch.bfloat16)
    values, sizes = pool_segments(x, torch.zeros(1, 4000, dtype=torch.long), torch.tensor([1]), 1)
    assert values.dtype == torch.bfloat16 and values.item() == 1.0 and sizes.item() == 4000


def test_gradient_of_a_mean_is_shared_equally():
    ends = random_ends(1)
    segments, lengths = segments_from_ends(ends)
    x = torch.randn(*ends.shape, 3, requires_grad=True)
    values, _ = pool_segments(x, segments, lengths, int(lengths.sum()))
    values.sum().backward()
    for b, row in enumerate(naive_segments(ends)):
        for group in row:
            torch.testing.assert_close(x.grad[b, group], torch.full((len(group), 3), 1 / len(group)))


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


def test_most_probable_against_sorting():
    logits = torch.tensor([[0.1, 0.9, 0.5, 0.9], [0.0, 0.0, 0.0, 0.0], [4.0, 3.0, 2.0, 1.0]])
    chosen = most_probable(logits, torch.tensor([2, 3, 0]))
    assert chosen.tolist() == [[False, True, False, True], [True, True, True, False], [False] * 4]


def test_tokens_for_budget():
    compression = torch.tensor([1.0, 4.0, 10.0, 1000.0])
    assert tokens_for_budget(compression, 64).tolist() == [64, 16, 6, 1]


def test_uniform_cuts_are_even_and_meet_the_budget():
    predictor = UniformBoundaries(8, compression=4.0)
    logits = predictor(torch.zeros(2, 50, 8))
    for budget in (None, torch.tensor([7.0, 50.0])):
        ends = torch.cat([predictor.decide(logits, budget), torch.ones(2, 1, dtype=torch.bool)], 1)
        expected = [12, 12] if budget is None else [7, 1]
        assert ends.sum(1).tolist() == expected
        for row in naive_segments(ends):
            sizes = [len(group) for group in row]
            assert max(sizes) - min(sizes) <= 1


def test_eval_spends_the_expected_number_of_boundaries():
    predictor = GumbelBoundaries(8, compression=4.0)
    logits = torch.randn(16, 63, generator=torch.Generator().manual_seed(0)) - 3  # all but a few below 0
    expected = torch.sigmoid(logits).sum(1)
    decided = predictor.decide(logits, None)
    assert (decided.sum(1) - expected).abs().max() <= 0.5
    torch.manual_seed(0)
    drawn = torch.stack([predictor.sample(logits)[0].sum(1).float() for _ in range(400)]).mean(0)
    torch.testing.assert_close(drawn, expected, atol=0.6, rtol=0)


def test_a_sample_is_drawn_where_it_exceeds_one_half():
    predictor = GumbelBoundaries(8, compression=4.0)
    logits = torch.zeros(4, 1000, requires_grad=True)
    drawn, soft = predictor.sample(logits)
    assert torch.equal(drawn, soft > 0.5) and ((soft >= 0) & (soft <= 1)).all()
    assert drawn.float().mean() == pytest.approx(0.5, abs=0.05)
    soft.sum().backward()
    assert (logits.grad >= 0).all() and (logits.grad > 0).float().mean() > 0.99  # fp32 saturates at the far ends
