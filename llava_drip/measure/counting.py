"""What a forward pass of any model costs, counted operator by operator: fvcore's tracer, and handles for what it misses.

The unit is the multiply-accumulate (MAC): one multiplication and one addition count as one, as in fvcore, timm and the papers
that write "GFLOPs" for it. Products (convolutions, linear layers, matrix products, attention) are the figure that is quoted; the
rest (norms, pooling, element by element) is counted apart, one for each element read or written, norms as fvcore has them.

fvcore by itself misses scaled_dot_product_attention, and the whole of nn.MultiheadAttention on its fast path: a CLIP ViT-B/16
then has 11.3 G in place of 17.6 (ViT-B/32: 2.96 in place of 4.41), figures that are often copied.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from llava_drip.tokens import TokenBatch
from llava_drip.towers.contract import evaluating, lacks_of_tower
from llava_drip.towers.inputs import input_size

with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # its losses, of no use here, are compiled by torch.jit as it is imported
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import elementwise_flop_counter, get_shape


@dataclass(frozen=True)
class Count:
    """One image's pass.

    Attributes:
        products: MACs of convolutions, linear layers, matrix products and attention, projections included.
        other: operations of norms, pooling and element by element.
        attention: the part of `products` within attention modules (classes whose name has "Attention" in it, but no "Block").
        by_operator: everything, by operator.
        tokens: that come out: of a tower the TokenBatch's, of another model the positions of its forward_features, prefix tokens
            left out; None where it has none.
    """

    products: float
    other: float
    attention: float
    by_operator: dict[str, float]
    tokens: int | None


# Operators


def _attention(inputs: list, outputs: list) -> float:
    """q [..., N, d], k [..., M, d], v [..., M, e]: q kᵀ and the sum over v."""
    q, k, v = (get_shape(value) for value in inputs[:3])
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _multi_head_attention(inputs: list, outputs: list) -> float:
    """nn.MultiheadAttention's fast path, self-attention [B, N, D]: four projections, q kᵀ, the sum over v."""
    B, N, D = get_shape(inputs[0])
    return B * N * (4 * D**2 + 2 * N * D)


_PRODUCTS = {
    **dict.fromkeys(
        (
            "aten::scaled_dot_product_attention",
            "aten::_scaled_dot_product_flash_attention",
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            "aten::_scaled_dot_product_efficient_attention",
            "aten::_scaled_dot_product_cudnn_attention",
            "aten::_scaled_dot_product_attention_math",
        ),
        _attention,
    ),
    "aten::_native_multi_head_attention": _multi_head_attention,
    "aten::baddbmm": lambda inputs, outputs: prod(get_shape(inputs[1])) * get_shape(inputs[2])[-1],
    "aten::mv": lambda inputs, outputs: prod(get_shape(inputs[0])),
    "aten::dot": lambda inputs, outputs: prod(get_shape(inputs[0])),
}
_OWN_PRODUCTS = {"conv", "linear", "matmul", "mm", "bmm", "addmm", "einsum"}  # fvcore's
PRODUCTS = _OWN_PRODUCTS | {name.removeprefix("aten::") for name in _PRODUCTS}

# One operation for each element that is read, or written.
_READ = (
    "mean",
    "sum",
    "cumsum",
    "prod",
    "max_pool2d",
    "avg_pool2d",
    "avg_pool1d",
    "adaptive_avg_pool1d",
    "var",
    "amax",
)
_READ += ("norm", "linalg_vector_norm", "segment_reduce", "logsumexp")
_WRITTEN = (
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "pow",
    "sqrt",
    "rsqrt",
    "exp",
    "log",
    "reciprocal",
    "neg",
    "abs",
    "square",
)
_WRITTEN += ("gelu", "silu", "relu", "tanh", "sigmoid", "softmax", "_softmax", "log_softmax", "softplus", "hardswish")
_SCATTERED = ("index_add", "scatter_add", "scatter_reduce", "index_reduce")  # inputs: self, dim, index, source


def _source(inputs: list, outputs: list) -> float:
    return prod(get_shape(inputs[3]))


HANDLES = {
    **{f"aten::{name}": elementwise_flop_counter(1, 0) for name in _READ},
    **{f"aten::{name}{end}": elementwise_flop_counter(0, 1) for name in _WRITTEN for end in ("", "_")},
    **{f"aten::{name}{end}": _source for name in _SCATTERED for end in ("", "_")},
    "aten::rms_norm": elementwise_flop_counter(4, 0),  # fvcore: 5 for a layer norm
    **_PRODUCTS,
}


# Models


@torch.no_grad()
def count(model: nn.Module, image: Tensor | None = None) -> Count:
    """Counts a forward pass of one image, in eval mode, on the CPU or where the model is; the model is left as it was.

    Args:
        model: a tower or any model of timm, or whatever takes an image. On the meta device a copy whose weights are zeros is run.
        image: [1, 3, height, width]. None: noise, and a tower with a budget (set_compression) that has none asked of it spends
            exactly its own compression, so that the count is the same each time.
    Raises:
        ValueError: an operator of no library that is counted here, named.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        model = copy.deepcopy(model).to_empty(device="cpu")
        for value in [*model.parameters(), *model.buffers()]:
            value.zero_()
    simulated = image is None
    if image is None:
        parameter = next(model.parameters())
        image = torch.randn(1, *input_size(model), generator=torch.Generator().manual_seed(0)).to(parameter)
    with evaluating(model), exact_budget(model) if simulated else evaluating(model):
        wrapped = _Traced(model)
        analysis = FlopCountAnalysis(wrapped, image).set_op_handle(**HANDLES)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        # Below the top level scopes are counted in full: an attention's projections are modules of their own.
        analysis.ancestor_mode("caller")
        by_module = analysis.by_module_and_operator()
        uncounted = sorted(name for name in analysis.unsupported_ops() if not name.startswith("aten::"))
    if uncounted:
        raise ValueError(
            f"{type(model).__name__}: what {', '.join(uncounted)} costs is not known (measure/counting.py)"
        )
    operators = {name: float(value) for name, value in by_module[""].items()}
    products = sum(value for name, value in operators.items() if name in PRODUCTS)
    attention = sum(
        value
        for scope in _outermost_attention(wrapped)
        for name, value in by_module.get(scope, {}).items()
        if name in PRODUCTS
    )
    return Count(products, sum(operators.values()) - products, float(attention), operators, wrapped.tokens)


@contextmanager
def exact_budget(model: nn.Module) -> Iterator[None]:
    """A tower that would let the image decide spends exactly its compression."""
    if not getattr(model, "counts_vary", False) or model.budget is not None:
        yield
        return
    model.set_compression(model.compression)
    try:
        yield
    finally:
        model.set_compression(None)


class _Traced(nn.Module):
    """Answers with a tensor, as tracing wants it, and notes how many tokens there were."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.tokens = model, None

    def forward(self, x: Tensor) -> Tensor:
        if not lacks_of_tower(self.model):
            tokens: TokenBatch = self.model.forward_features(x)
            self.tokens = int(tokens.packing.total)  # a tensor while traced
            return self.model.forward_head(tokens)
        if hasattr(self.model, "forward_features") and hasattr(self.model, "forward_head"):
            features = self.model.forward_features(x)
            if isinstance(features, Tensor):
                self.tokens = positions(self.model, features)
            return _first(self.model.forward_head(features))
        return _first(self.model(x))


def positions(model: nn.Module, features: Tensor) -> int | None:
    """Tokens of one image in a timm model's features: [1, N, D] without prefix tokens, or the places of a map."""
    if features.ndim == 3:
        return int(features.shape[1]) - getattr(model, "num_prefix_tokens", 0)
    if features.ndim == 4:
        channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return prod(map(int, features.shape[1:3] if channels_last else features.shape[2:]))
    return None


def _first(answer: Tensor | tuple) -> Tensor:
    return answer if isinstance(answer, Tensor) else answer[0]


def _outermost_attention(model: nn.Module) -> list[str]:
    found: list[str] = []
    for name, module in model.named_modules():
        kind = type(module).__name__  # open_clip's ResidualAttentionBlock is more than its attention
        if "Attention" in kind and "Block" not in kind and not any(name.startswith(f"{other}.") for other in found):
            found.append(name)
    return found
