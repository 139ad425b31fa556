"""Every way of attending over packed tokens against one plain masked softmax."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

from llava_drip.tokens import Packing
from llava_drip.towers import attention
from llava_drip.towers.attention import PackedAttention, packed_attention, with_size_bias
from llava_drip.towers.places import Relative, rotary_angles, rotate

RAGGED, UNIFORM = (5, 1, 9, 3), (4, 4, 4)


def qkv(total: int, heads: int = 2, dim: int = 8, **kwargs) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(total, heads, dim, generator=generator).to(**kwargs).requires_grad_() for _ in range(3)]


def packing_of(lengths: tuple[int, ...], device: str = "cpu") -> Packing:
    return Packing(lengths, torch.device(device))


def reference(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, causal: bool = False, bias: Tensor | float = 0.0
) -> Tensor:
    """softmax over all tokens of the batch, those of other images masked out. bias: [T] of the keys."""
    image = packing.image_of_token
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5 + bias
    hidden = image[:, None] != image[None]
    if causal:
        hidden |= torch.ones_like(hidden).triu(1)
    scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


WAYS = {
    "packed_attention": packed_attention,
    "image by image": attention._attend_image_by_image,
    "padded": attention._attend_padded,
    "equal lengths": attention._attend_equal_lengths,
}


CASES = [(way, n) for way in WAYS for n in (RAGGED, UNIFORM, (6,)) if (way, n) != ("equal lengths", RAGGED)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("way, lengths", CASES)
def test_values_and_gradients_match_the_reference(way, lengths, causal):
    packing = packing_of(lengths)
    inputs, twins = qkv(sum(lengths)), qkv(sum(lengths))
    out = WAYS[way](*inputs, packing, 0.0, causal)
    expected = reference(*twins, packing, causal)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for got, want in zip(inputs, twins):
        torch.testing.assert_close(got.grad, want.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("way, lengths", CASES)
def test_half_precision_on_a_cpu_matches_the_reference(way, lengths, causal):
    """Which takes its own way through softmax and matrix products."""
    packing = packing_of(lengths)
    inputs, twins = qkv(sum(lengths), dtype=torch.bfloat16), qkv(sum(lengths))
    inputs, twins = ([t.detach().requires_grad_() for t in side] for side in (inputs, twins))
    out, expected = WAYS[way](*inputs, packing, 0.0, causal), reference(*twins, packing, causal)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=3e-2, rtol=3e-2)
    out.float().square().sum().backward()
    expected.square().sum().backward()
    for got, want in zip(inputs, twins):
        torch.testing.assert_close(got.grad.float(), want.grad, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("heads, dim", [(3, 32), (12, 64)])  # below and above what is worth a call for each image
def test_tower_widths_match_the_reference(heads, dim):
    lengths = (20, 9, 31)
    inputs = [t.detach() for t in qkv(sum(lengths), heads, dim)]
    packing = packing_of(lengths)
    torch.testing.assert_close(packed_attention(*inputs, packing), reference(*inputs, packing), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["packed_attention", "image by image", "padded"])
def test_dropout_acts_on_the_weights(way):
    """With v = 1 the output is the sum of the kept weights over 1 - p: 1 on average, and not 1 each time."""
    torch.manual_seed(0)
    q, k, _ = qkv(200)
    packing = packing_of((120, 80))
    out = torch.stack([WAYS[way](q, k, torch.ones_like(q), packing, 0.5, False).detach() for _ in range(20)])
    assert out.mean() == pytest.approx(1, abs=0.01)
    assert out.std() > 0.02
    torch.testing.assert_close(WAYS[way](q, k, torch.ones_like(q), packing, 0.0, False), torch.ones_like(q))


@pytest.mark.parametrize("lengths", [RAGGED, UNIFORM])
def test_layer_equals_timms_on_each_image(lengths):
    torch.manual_seed(0)
    dense = timm.layers.Attention(16, num_heads=4, qkv_bias=True, qk_norm=True, norm_layer=torch.nn.LayerNorm).eval()
    packed = PackedAttention(16, num_heads=4, qkv_bias=True, qk_norm=True, norm_layer=torch.nn.LayerNorm).eval()
    packed.load_state_dict(dense.state_dict())
    x = torch.randn(sum(lengths), 16)
    expected = torch.cat([dense(part[None])[0] for part in x.split(lengths)])
    torch.testing.assert_close(packed(x, packing_of(lengths)), expected, atol=1e-5, rtol=1e-5)


def test_layers_dropout_only_in_training():
    torch.manual_seed(0)
    layer = PackedAttention(16, num_heads=4, attn_drop=0.5)
    x, packing = torch.randn(9, 16), packing_of((6, 3))
    assert not torch.equal(layer.train()(x, packing), layer(x, packing))
    assert torch.equal(layer.eval()(x, packing), layer(x, packing))


def test_sizes_weigh_like_so_many_tokens():
    """A token of size 3 is attended to as three tokens of its content are."""
    q, k, v = (t.detach() for t in qkv(9))
    sizes = torch.tensor([1.0, 3, 1, 2, 1, 1, 5, 1, 1])
    packing = packing_of((5, 4))
    out = packed_attention(*with_size_bias(q, k, v, sizes.log()), packing)
    torch.testing.assert_close(out[..., :8], reference(q, k, v, packing, bias=sizes.log()), atol=1e-5, rtol=1e-5)
    assert (out[..., 8:] == 0).all()
    copies = torch.arange(9).repeat_interleave(sizes.long())
    many = reference(q[copies], k[copies], v[copies], packing_of((8, 8)))
    torch.testing.assert_close(out[..., :8], many[sizes.long().cumsum(0) - 1], atol=1e-5, rtol=1e-5)


def test_rotary_attention_sees_differences_of_places_only():
    q, k, _ = (t.detach() for t in qkv(2, heads=3, dim=16))

    def logit(first: list[float], second: list[float]) -> Tensor:
        angles = rotary_angles(torch.tensor([first, second]), 16)
        relative = Relative(angles.cos(), angles.sin())
        return (rotate(q, relative)[0] * rotate(k, relative)[1]).sum(-1)

    torch.testing.assert_close(logit([1.5, 2.0], [3.0, 7.25]), logit([4.5, 0.0], [6.0, 5.25]), atol=1e-4, rtol=1e-4)
    assert (logit([1.5, 2.0], [3.0, 7.25]) - logit([2.5, 2.0], [3.0, 7.25])).abs().max() > 1e-2
    assert (logit([0.0, 2.0], [0.0, 0.0]) - logit([2.0, 0.0], [0.0, 0.0])).abs().max() > 1e-2, "rows are not columns"
    torch.testing.assert_close(logit([0.0, 0.0], [0.0, 0.0]), (q[0] * k[1]).sum(-1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the variable-length kernel runs only there")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_variable_length_kernel(dtype, monkeypatch):
    calls, kernel = [], attention.varlen_attn
    monkeypatch.setattr(attention, "varlen_attn", lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs))
    packing = packing_of(RAGGED, "cuda")
    inputs = qkv(sum(RAGGED), heads=4, dim=64, device="cuda", dtype=dtype)
    inputs = [t.detach().requires_grad_() for t in inputs]
    twins = [t.detach().float().requires_grad_() for t in inputs]
    out, expected = packed_attention(*inputs, packing), reference(*twins, packing)
    assert calls, "the kernel did not run"
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    out.float().square().sum().backward()
    expected.square().sum().backward()
    for got, want in zip(inputs, twins):
        torch.testing.assert_close(got.grad.float(), want.grad, atol=5e-2, rtol=5e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: fp32 on CUDA takes the padded path")
def test_fp32_on_cuda_takes_the_padded_path():
    packing = packing_of(RAGGED, "cuda")
    inputs = [t.detach() for t in qkv(sum(RAGGED), device="cuda")]
    torch.testing.assert_close(packed_attention(*inputs, packing), reference(*inputs, packing), atol=1e-4, rtol=1e-4)
