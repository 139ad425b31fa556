"""TokenLearner and TokenFuser (Ryoo et al., "TokenLearner: What Can 8 Learned Tokens Do for Images and Videos?", NeurIPS 2021).

Each computes what the authors' JAX code (Scenic, projects/token_learner) does, whose weights `load_scenic_params` reads. The ViT
with them inside is tokenlearner_vit.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Mlp, lecun_normal_
from torch import Tensor, nn

from llava_drip.towers.checks import whole

VERSIONS = ("1.1", "1.0")
gelu = partial(F.gelu, approximate="tanh")  # flax's default
_LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # flax's default
# A parameter's name → the flax paths of what it is made of, and what brings these into torch's layout.
Names = dict[str, tuple[tuple[str, ...], Callable[[Tensor], Tensor]]]


class TokenLearner(nn.Module):
    """A few tokens, each a sum of all patches weighted by a map that the module computes of the picture.

    Version 1.1, which the authors found better: an MLP on each patch, softmax over the patches, so that a token is a weighted
    mean of them. Version 1.0, of the paper's experiments: four 3x3 convolutions, sigmoid, a sum (or mean) over the patches.
    """

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        version: str = "1.1",
        bottleneck_dim: int = 64,
        dropout: float = 0.0,
        sum_pooling: bool = True,
    ):
        """
        Args:
            dim: width D of patches and tokens.
            num_tokens: S, at least 1.
            version: "1.1" or "1.0".
            bottleneck_dim: hidden width of version 1.1's MLP; version 1.0 has none.
            dropout: in version 1.1's MLP.
            sum_pooling: version 1.0 adds up the weighted patches; False divides by their number.
        Raises:
            ValueError: an unknown version, or an argument out of range or of the other version.
        """
        super().__init__()
        version = str(version)  # a program's KEY=VALUE makes a number of it
        if version not in VERSIONS:
            raise ValueError(f"version must be one of {VERSIONS}, got {version!r}")
        whole("num_tokens", num_tokens, least=1)
        whole("bottleneck_dim", bottleneck_dim, least=1)
        if version == "1.1" and not sum_pooling:
            raise ValueError('sum_pooling belongs to version="1.0": in 1.1 the weights of a token add up to 1')
        if version == "1.0" and dropout:
            raise ValueError('dropout belongs to version="1.1": 1.0 has no MLP')
        self.num_tokens, self.version, self.sum_pooling = num_tokens, version, sum_pooling
        self.norm = _LayerNorm(dim)
        if version == "1.1":
            self.token_masking = _mlp(dim, bottleneck_dim, num_tokens, dropout)
        else:
            widths = (dim, num_tokens, num_tokens, num_tokens)
            self.convs = nn.ModuleList(nn.Conv2d(n, num_tokens, 3, padding=1, bias=False) for n in widths)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors start it."""
        if _divided(self):
            return
        if self.version == "1.1":
            _reset_mlp(self.token_masking)
        else:
            for conv in self.convs:
                lecun_normal_(conv.weight)

    init_weights = reset_parameters  # what timm's ViT calls

    def maps(self, x: Tensor) -> Tensor:
        """Patches [B, H, W, D] → [B, S, H, W]: the weight of each patch in each token."""
        selected = self.norm(x)
        if self.version == "1.1":
            return self.token_masking(selected).flatten(1, 2).mT.softmax(-1).unflatten(-1, x.shape[1:3])
        selected = selected.permute(0, 3, 1, 2)
        for conv in self.convs[:-1]:
            selected = gelu(conv(selected))
        return self.convs[-1](selected).sigmoid()

    def forward(self, x: Tensor, return_maps: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Patches → tokens [B, S, D], and with return_maps their maps [B, S, H, W] too.

        x: [B, H, W, D], or [B, N, D] of a square picture in raster order.
        """
        if x.ndim == 3:
            side = math.isqrt(x.shape[1])
            if side * side != x.shape[1]:
                raise ValueError(
                    f"TokenLearner: {x.shape[1]} patches make no square; give [B, H, W, D], got {list(x.shape)}"
                )
            x = x.unflatten(1, (side, side))
        maps = self.maps(x)
        tokens = maps.flatten(2).to(x.dtype) @ x.flatten(1, 2)
        if not self.sum_pooling:
            tokens = tokens / (x.shape[1] * x.shape[2])
        return (tokens, maps) if return_maps else tokens

    def scenic_names(self) -> Names:
        """See load_scenic_params."""
        if self.version == "1.1":
            return {**norm_names("norm", "LayerNorm_0"), **_mlp_names()}
        convs = {f"convs.{i}.weight": ((f"Conv_{i}/kernel",), conv_kernel) for i in range(len(self.convs))}
        return {**norm_names("norm", "LayerNorm_0"), **convs}


class TokenFuser(nn.Module):
    """Gives what the tokens have become back to the patches: mixes the tokens, and adds to each patch a sum of them, weighted by
    gates that are computed of that patch. The caller adds the result to the patches."""

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        bottleneck_dim: int = 64,
        dropout: float = 0.0,
        use_normalization: bool = True,
    ):
        """
        Args:
            dim: width D of patches and tokens.
            num_tokens: S.
            bottleneck_dim: hidden width of the gates' MLP.
            dropout: in that MLP, and on the result.
            use_normalization: norms around the mixing of tokens, which version 1.0's sums need.
        """
        super().__init__()
        whole("num_tokens", num_tokens, least=1)
        whole("bottleneck_dim", bottleneck_dim, least=1)
        self.fuser_mix_norm1 = _LayerNorm(dim) if use_normalization else nn.Identity()
        self.mix = nn.Linear(num_tokens, num_tokens)
        self.fuser_mix_norm2 = _LayerNorm(dim) if use_normalization else nn.Identity()
        self.norm = _LayerNorm(dim)
        self.token_masking = _mlp(dim, bottleneck_dim, num_tokens, dropout)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors start it: the tokens are mixed by zeros, so that at first nothing is added to the patches."""
        if _divided(self):
            return
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)
        _reset_mlp(self.token_masking)

    init_weights = reset_parameters

    def forward(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """tokens [B, S, D], patches [B, N, D] as they were before TokenLearner → [B, N, D], what to add to the patches."""
        tokens = self.mix(self.fuser_mix_norm1(tokens).mT).mT
        tokens = self.fuser_mix_norm2(tokens)
        gates = self.token_masking(self.norm(patches)).sigmoid()  # [B, N, S]
        return self.dropout(gates @ tokens.to(gates.dtype))

    def scenic_names(self) -> Names:
        """See load_scenic_params."""
        names = {**norm_names("norm", "LayerNorm_0"), **linear_names("mix", "Dense_0"), **_mlp_names()}
        for norm in ("fuser_mix_norm1", "fuser_mix_norm2"):
            if isinstance(getattr(self, norm), nn.LayerNorm):
                names |= norm_names(norm, norm)
        return names


def load_scenic_params(module: nn.Module, flat_params: Mapping[str | tuple[str, ...], Any]) -> None:
    """Load weights of the authors' JAX code into a TokenLearner, a TokenFuser or a whole TokenLearnerViT.

    Args:
        module: of the sizes that the weights have; changed in place.
        flat_params: flax path → array (numpy, JAX or torch), as flax.traverse_util.flatten_dict gives it, its paths tuples or
            joined by "/". A leading "params" is passed over.
    Raises:
        ValueError: a path that is missing, that the module has no place for, or whose array is of another shape, named.
    """
    given = {"/".join(path) if isinstance(path, tuple) else path: array for path, array in flat_params.items()}
    if given and all(path.startswith("params/") for path in given):
        given = {path.removeprefix("params/"): array for path, array in given.items()}
    given = {path: array for path, array in given.items() if not path.startswith(getattr(module, "scenic_unread", ()))}
    names, state, kind = module.scenic_names(), module.state_dict(), type(module).__name__
    if homeless := sorted(set(state) - set(names)):
        raise ValueError(
            f"Scenic's weights have nothing for {', '.join(homeless[:4])} of this {kind}; make it without them"
        )
    paths = [path for of, _ in names.values() for path in of]
    for what, found in (
        (f"of this {kind} are missing in the weights", set(paths) - set(given)),
        (f"in the weights have no place in this {kind}", set(given) - set(paths)),
    ):
        if found:
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            raise ValueError(f"{', '.join(sorted(found)[:4])}{more} {what}")
    for name, (of, convert) in names.items():
        arrays = [torch.from_numpy(np.array(given[path], dtype=np.float32)) for path in of]
        try:
            value = torch.cat([convert(array) for array in arrays])
        except (RuntimeError, IndexError, ValueError):  # of too few or too many dimensions, or heads
            value = None
        if value is None or value.shape != state[name].shape:
            shapes = ", ".join(f"{path} {list(array.shape)}" for path, array in zip(of, arrays))
            raise ValueError(f"{shapes} does not fit {name} {list(state[name].shape)} of this {kind}")
        state[name] = value
    module.load_state_dict(state)


def norm_names(name: str, path: str) -> Names:
    """Of a LayerNorm."""
    return {f"{name}.weight": ((f"{path}/scale",), as_it_is), f"{name}.bias": ((f"{path}/bias",), as_it_is)}


def linear_names(name: str, path: str) -> Names:
    """Of a Linear, flax's Dense."""
    return {f"{name}.weight": ((f"{path}/kernel",), dense_kernel), f"{name}.bias": ((f"{path}/bias",), as_it_is)}


def as_it_is(array: Tensor) -> Tensor:
    return array


def dense_kernel(array: Tensor) -> Tensor:
    """[in, out] → [out, in]."""
    return array.t()


def conv_kernel(array: Tensor) -> Tensor:
    """[h, w, in, out] → [out, in, h, w]."""
    return array.permute(3, 2, 0, 1)


def _mlp(dim: int, hidden: int, out: int, dropout: float) -> Mlp:
    return Mlp(dim, hidden, out, act_layer=partial(nn.GELU, approximate="tanh"), drop=dropout)


def _reset_mlp(mlp: Mlp) -> None:
    for layer in (mlp.fc1, mlp.fc2):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(layer.bias, std=1e-6)


def _mlp_names() -> Names:
    return {
        **linear_names("token_masking.fc1", "token_masking/Dense_0"),
        **linear_names("token_masking.fc2", "token_masking/Dense_1"),
    }


def _divided(module: nn.Module) -> bool:
    """Built by from_pretrained under ZeRO-3: its parameters lie with the ranks already, and are about to be loaded."""
    return any(parameter.numel() == 0 for parameter in module.parameters())
