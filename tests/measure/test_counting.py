"""Counts against closed forms, torch's own counter, and published figures; fvcore's gaps are the ones that are said."""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_drip.measure.counting import count
from llava_drip.measure.flops import block_macs, has_plain_blocks, tower_macs


def counted_by_torch(model: nn.Module, x: torch.Tensor) -> float:
    """On a CPU it sees attention only in its plain form."""
    with torch.enable_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.eval()(x)
    return counter.get_total_flops() / 2


SMALL = {"img_size": 64, "depth": 3, "num_classes": 10}
CLOSED = {
    "timm": ("vit_tiny_patch16_224", SMALL),
    "plain": ("plain_vit_tiny_patch16_224", SMALL),
    "dense": ("drip_tiny_patch16_224", {**SMALL, "compression": 1.0}),
    "drip": ("drip_tiny_patch16_224", SMALL),
    "two depths": ("drip_tiny_patch16_224", {**SMALL, "compression": (2.0, 2.0), "pool_after": (1, 2)}),
    "entropy": ("drip_tiny_patch16_224", {**SMALL, "boundary": "entropy"}),
}


@pytest.mark.parametrize("kind", CLOSED)
def test_closed_forms(kind):
    name, arguments = CLOSED[kind]
    model = timm.create_model(name, **arguments).train()
    found = count(model)
    assert has_plain_blocks(model) and model.training
    # The closed form has attention's extra dimensions (size_bias) and rules; what is pooled by a matrix product it leaves out.
    assert found.products == pytest.approx(tower_macs(model), rel=1e-9 if kind in ("timm", "plain", "dense") else 0.002)
    assert found.tokens == (4 if kind in ("drip", "two depths", "entropy") else 16)
    assert count(model) == found, "the same each time"
    assert getattr(model, "budget", None) is None


OTHERS = {
    "CNN": ("resnet18", {}),
    "windows": ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 2, 1)}),
    "gated, normed by RMS": ("vit_base_patch16_rope_reg1_gap_256", {"depth": 1}),
    "attention pooling": ("vit_tiny_patch16_224", {"depth": 1, "global_pool": "map", "class_token": False}),
    "convolutions in attention": ("coatnet_nano_rw_224", {}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_torchs_counter_agrees(kind):
    name, arguments = OTHERS[kind]
    model = timm.create_model(name, num_classes=10, **arguments)
    found = count(model)
    x = torch.zeros(1, *timm.data.resolve_model_data_config(model)["input_size"])
    assert found.products == pytest.approx(counted_by_torch(model, x), rel=1e-6)
    assert 0 < found.other < 0.1 * found.products and found.tokens == {
        "CNN": 49, "windows": 49, "gated, normed by RMS": 256, "attention pooling": 196, "convolutions in attention": 49
    }[kind]  # fmt: skip


class Small(nn.Module):
    """An image in, something of nn.* within."""

    def __init__(self, inner: nn.Module, dim: int = 16):
        super().__init__()
        self.embed, self.inner = nn.Linear(3, dim), inner
        self.pretrained_cfg = {"input_size": (3, 4, 5)}

    def forward(self, x):
        return self.inner(self.embed(x.flatten(2).transpose(1, 2)))


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


N, D, EMBED = 20, 16, 20 * 3 * 16
INNER = {
    "multi-head attention": (SelfAttention(D, 2, batch_first=True), 4 * N * D**2 + 2 * N**2 * D),
    "a layer around it": (
        nn.TransformerEncoderLayer(D, 2, 24, batch_first=True, dropout=0.0),
        4 * N * D**2 + 2 * N**2 * D + 2 * N * D * 24,
    ),
}


@pytest.mark.parametrize("kind", INNER)
def test_fast_paths_of_torch(kind):
    inner, macs = INNER[kind]
    model = Small(inner).eval()
    assert count(model).products == EMBED + macs
    with torch.no_grad():
        alone = FlopCountAnalysis(model, torch.zeros(1, 3, 4, 5)).unsupported_ops_warnings(False)
        missed = 4 * N * D**2 + 2 * N**2 * D
        assert alone.by_operator()["linear"] == EMBED + macs - missed, "what fvcore alone sees"


class Everything(nn.Module):
    """Each operator once, of known size."""

    def forward(self, x):
        x = x.flatten(1)[:, :60].reshape(6, 10)  # 60 elements
        pooled = torch.zeros(3, 10).index_add(0, torch.tensor([0, 0, 1, 1, 2, 2]), x)  # 60 read
        scattered = torch.zeros(6, 10).scatter_add(1, torch.zeros(6, 10, dtype=torch.int64), x)  # 60
        normed = nn.functional.layer_norm(x, (10,))  # 240: fvcore's 4, without weights
        mean = x.mean(0)  # 60
        both = x * scattered  # 60
        similar = torch.einsum("nd,md->nm", normed, pooled)  # 180 products
        weights = similar.softmax(1)  # 18
        return (weights @ pooled + both + mean).sum()  # 180 products, 60, 60, 60


def test_pooling_and_elements():
    model = Everything()
    model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    model.pretrained_cfg = {"input_size": (3, 4, 5)}
    found = count(model)
    assert found.products == 360 and found.other == 60 + 60 + 240 + 60 + 60 + 18 + 3 * 60
    assert found.by_operator["index_add"] == 60 and found.by_operator["scatter_add"] == 60


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x @ x.T

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class WithOwn(nn.Module):
    def forward(self, x):
        return Own.apply(x.flatten(1))


def test_what_cannot_be_seen_into_is_named():
    model = WithOwn()
    model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    model.pretrained_cfg = {"input_size": (3, 4, 5)}
    with pytest.raises(ValueError, match="WithOwn: what prim::PythonOp.* costs is not known"):
        count(model)


@pytest.mark.parametrize(
    "name, all_of_it, copied", [("vit_base_patch32_224", 4.409, 2.96), ("vit_base_patch16_224", 17.564, 11.33)]
)
def test_figures_that_leave_attention_out(name, all_of_it, copied):
    with torch.device("meta"):
        model = timm.create_model(name)
    found = count(model)
    assert found.products / 1e9 == pytest.approx(all_of_it, abs=0.001)
    assert (found.products - found.attention) / 1e9 == pytest.approx(copied, rel=0.01)
    width, tokens = 768, found.tokens + 1
    assert found.attention == 12 * (block_macs(tokens, width) - 8 * tokens * width**2)


def test_where_the_copied_figure_comes_from():
    """fvcore on open_clip's ViT-B/32, whose attention takes torch's fast path."""
    with torch.no_grad():
        tower = open_clip.create_model("ViT-B-32").visual.eval()
        alone = FlopCountAnalysis(tower, torch.zeros(1, 3, 224, 224)).unsupported_ops_warnings(False).total()
    tower.pretrained_cfg = {"input_size": (3, 224, 224)}
    found = count(tower)
    assert alone / 1e9 == pytest.approx(2.96, rel=0.005) and found.products / 1e9 == pytest.approx(4.409, abs=0.001)


@torch.no_grad()
def test_an_image_decides():
    torch.manual_seed(0)
    tower = timm.create_model("drip_tiny_patch16_224", **SMALL).eval()
    flat, noise = torch.zeros(1, 3, 64, 64), torch.randn(1, 3, 64, 64)
    found = [count(tower, image) for image in (flat, noise)]
    for image, one in zip((flat, noise), found):
        assert one.tokens == int(tower.forward_features(image).lengths)
        assert one.products == pytest.approx(tower_macs(tower, one.tokens), rel=0.002)
    assert tower.budget is None
    tower.set_compression(2.0)
    assert count(tower).tokens == 8 and tower.budget == 2.0, "a budget that is asked of it holds"
