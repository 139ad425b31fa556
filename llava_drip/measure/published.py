"""What the literature says an image of 224 px costs, to put beside our own counts. (TokenLearner: no figure at 224 px known.)

A figure belongs to every model whose timm name its pattern matches, so that another tower appears by its name. Add papers here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TORCHVISION = "torchvision's table of models"
_DYNAMIC_VIT = "Rao et al. 2021, DynamicViT, keep ratio 0.7"
_COPIED = "tables of DRIP and of others; fvcore alone, which does not see open_clip's attention"
_NAT = "Hassani et al. 2023, {}, whose trunk it is; SeNaTra's own figures were not at hand"
_GROUPING = "grouping layers are another 23 to 24 % of the trunk, pairs that tiles mask 5 to 9 % of all"


@dataclass(frozen=True)
class Published:
    """pattern: regular expression of the whole timm name. gmacs: 1e9 multiply-accumulates of one image. attention: whether
    attention is part of the figure. reason: why our count differs by more than 3 %."""

    pattern: str
    gmacs: float
    source: str
    attention: bool = True
    reason: str = ""

    def counted(self, row: dict) -> float:
        """The one of our figures (subjects.describe) that it is to be compared with."""
        return row["gmacs" if self.attention else "gmacs_without_attention"]


PUBLISHED = (
    Published(r"(plain_)?vit_base_patch32_224", 4.41, _TORCHVISION),
    Published(r"vit_base_patch32_224", 2.96, _COPIED, attention=False),
    Published(r"(plain_)?vit_base_patch16_224", 17.56, _TORCHVISION),
    Published(r"vit_base_patch16_224", 11.33, _COPIED, attention=False),
    Published(r"(plain_)?vit_large_patch32_224", 15.38, _TORCHVISION),
    Published(r"(plain_)?vit_large_patch16_224", 61.55, _TORCHVISION),
    Published(r"dynamicvit_small_patch16_224", 2.9, f"{_DYNAMIC_VIT} (DeiT-S)"),
    Published(r"dynamicvit_base_patch16_224", 11.4, f"{_DYNAMIC_VIT} (DeiT-B)"),
    Published(
        r"dynamicvit_256_patch16_224",
        1.3,
        f"{_DYNAMIC_VIT} (DeiT-256)",
        reason="the three of the paper look cut, not rounded, to one decimal",
    ),
    Published(r"senatra_tiny_224", 4.3, _NAT.format("NAT-Tiny"), reason=_GROUPING),
    Published(r"senatra_small_224", 7.8, _NAT.format("NAT-Small"), reason=_GROUPING),
    Published(r"senatra_base_224", 13.7, _NAT.format("NAT-Base"), reason=_GROUPING),
)
REFERENCES = ("vit_base_patch32_224", "vit_base_patch16_224")  # timm's own, beside the presets of this package


def published(name: str) -> list[Published]:
    """The figures of a model, by its timm name; none is usual."""
    return [figure for figure in PUBLISHED if re.fullmatch(figure.pattern, name)]
