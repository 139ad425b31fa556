"""TokenBatch and Packing: nothing is lost or mixed up between images."""

from __future__ import annotations

import pytest
import torch

from llava_drip.tokens import Packing, TokenBatch

RAGGED, UNIFORM = (3, 1, 5, 2), (4, 4, 4)


def batch(lengths: tuple[int, ...], dim: int = 6, **kwargs) -> TokenBatch:
    values = torch.randn(sum(lengths), dim, generator=torch.Generator().manual_seed(0))
    return TokenBatch(values, torch.tensor(lengths), **kwargs)


@pytest.mark.parametrize("lengths", [RAGGED, UNIFORM, (1,), (7,)])
def test_padding_and_back(lengths):
    tokens = batch(lengths)
    padded, mask = tokens.to_padded()
    assert padded.shape == (len(lengths), max(lengths), 6) and mask.shape == padded.shape[:2]
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == list(lengths)
    assert (padded[~mask] == 0).all()
    start = 0
    for row, n in zip(padded, lengths):
        assert torch.equal(row[:n], tokens.values[start : start + n])
        start += n
    back = TokenBatch.from_padded(padded, mask)
    assert torch.equal(back.values, tokens.values) and torch.equal(back.lengths, tokens.lengths)


def test_padding_on_any_side_can_be_packed():
    tokens = torch.arange(12.0).view(2, 6, 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1]]).bool()
    packed = TokenBatch.from_padded(tokens, mask)
    assert packed.lengths.tolist() == [4, 3]
    assert packed.values.flatten().tolist() == [2, 3, 4, 5, 6, 8, 11]


@pytest.mark.parametrize("lengths", [RAGGED, UNIFORM])
def test_split_and_mean(lengths):
    tokens = batch(lengths)
    parts = tokens.split()
    assert [len(part) for part in parts] == list(lengths) == list(tokens.packing.lengths)
    assert torch.equal(torch.cat(parts), tokens.values)
    assert parts[0].data_ptr() == tokens.values.data_ptr(), "views, not copies"
    expected = torch.stack([part.mean(0) for part in parts])
    torch.testing.assert_close(tokens.mean(), expected)


def test_mean_keeps_dtype_and_sums_in_fp32():
    tokens = TokenBatch(torch.full((3001, 1), 1.0, dtype=torch.bfloat16), torch.tensor([3000, 1]))
    mean = tokens.mean()
    assert mean.dtype == torch.bfloat16
    assert mean.tolist() == [[1.0], [1.0]]  # bf16 sums of ones stop growing at 256


def test_gradient_passes_through_padding_and_mean():
    tokens = batch(RAGGED)
    tokens.values.requires_grad_()
    tokens.to_padded()[0].sum().backward()
    assert torch.equal(tokens.values.grad, torch.ones_like(tokens.values))
    tokens.values.grad = None
    tokens.mean().sum().backward()
    expected = torch.cat([torch.full((n, 6), 1 / n) for n in RAGGED])
    torch.testing.assert_close(tokens.values.grad, expected)


def test_with_values_keeps_the_places_and_drops_the_prefix():
    segments = torch.zeros(len(RAGGED), 9, dtype=torch.long)
    tokens = batch(RAGGED, segments=segments, rate_loss=torch.ones(4), prefix=torch.zeros(4, 1, 6))
    wide = tokens.with_values(torch.zeros(sum(RAGGED), 20))
    assert wide.values.shape == (11, 20) and wide.prefix is None
    assert torch.equal(wide.lengths, tokens.lengths) and wide.segments is segments
    assert torch.equal(wide.rate_loss, torch.ones(4)) and tokens.prefix is not None
    with pytest.raises(AssertionError, match="10 values for 11 tokens"):
        tokens.with_values(torch.zeros(10, 20))


def test_defaults():
    tokens = batch(RAGGED)
    assert len(tokens) == 4 and tokens.segments is None and tokens.prefix is None
    assert tokens.rate_loss.tolist() == [0, 0, 0, 0] and tokens.rate_loss.dtype == torch.float32


@pytest.mark.parametrize("mask", [torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 6)])
def test_a_mask_of_wrong_shape_or_type_is_named(mask):
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(2, 6\)"):
        TokenBatch.from_padded(torch.zeros(2, 6, 1), mask)


@pytest.mark.parametrize("lengths", [RAGGED, UNIFORM, ()])
def test_packing(lengths):
    packing = Packing.of(torch.tensor(lengths, dtype=torch.long))
    assert packing.total == sum(lengths) and packing.longest == max(lengths, default=0)
    assert packing.uniform == (len(set(lengths)) <= 1)
    cumulative = packing.cu_seqlens
    assert cumulative.dtype == torch.int32 and cumulative.tolist() == [
        sum(lengths[:i]) for i in range(len(lengths) + 1)
    ]
    assert packing.image_of_token.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]


def test_dropped_patches():
    """Segments of -1: zeros in a map over the image, in no token's size, in no mean."""
    segments = torch.tensor([[0, -1, 1, 1, 2, -1], [-1, -1, -1, 0, -1, -1], [0, 0, 1, 1, 1, 1]])
    tokens = batch((3, 1, 2), segments=segments)
    tokens.values.requires_grad_()
    first, second, third = tokens.split()
    assert tokens.sizes.tolist() == [1, 2, 1, 1, 2, 4]
    unpooled = tokens.unpool()
    zero = torch.zeros(6)
    torch.testing.assert_close(unpooled[0], torch.stack([first[0], zero, first[1], first[1], first[2], zero]))
    torch.testing.assert_close(unpooled[1], torch.stack([zero] * 3 + [second[0]] + [zero] * 2))
    torch.testing.assert_close(unpooled[2], third[[0, 0, 1, 1, 1, 1]])
    expected = [(first[0] + 2 * first[1] + first[2]) / 4, second[0], (2 * third[0] + 4 * third[1]) / 6]
    torch.testing.assert_close(tokens.mean("patches"), torch.stack(expected))
    patches = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1))
    means = [patches[0, 0], patches[0, 2:4].mean(0), patches[0, 4], patches[1, 3], patches[2, :2].mean(0)]
    torch.testing.assert_close(tokens.means_of(patches), torch.stack([*means, patches[2, 2:].mean(0)]))
    unpooled.sum().backward()
    assert tokens.values.grad[:, 0].tolist() == tokens.sizes.tolist()
    with pytest.raises(ValueError, match="sizes: these tokens carry no segments"):
        _ = batch(RAGGED).sizes
