"""What the literature says an image of 224 px costs, to put beside our own counts. (TokenLearner: no figure at 224 px known.)

A figure belongs to every model whose timm name its pattern matches, so that another tower appears by its name. Add papers here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TORCHVISION = "torchvision's table of models"
_DYNAMIC_VIT = "Rao et al. 2021, DynamicViT, keep ratio 0.7"
_COPIED = "tables of DRIP and of others; fvcore alone, which does not see open_clip's attention"
# SeNaTra's trunks, the backbone that grouping layers are put into: name, millions of parameters and GMACs at 224 pixels, from
# NAT's model zoo (https://github.com/SHI-Labs/Neighborhood-Attention-Transformer, classification/NAT.md; Hassani et al. 2023).
NAT = {
    "senatra_tiny_224": ("NAT-Tiny", 28, 4.3),
    "senatra_small_224": ("NAT-Small", 51, 7.8),
    "senatra_base_224": ("NAT-Base", 90, 13.7),
}
# Part of a tower that a figure may be of → the key of subjects.describe that has ours.
PARTS = {
    None: "gmacs",
    "attention left out": "gmacs_without_attention",
    "grouping left out": "gmacs_without_grouping",
}


@dataclass(frozen=True)
class Published:
    """pattern: regular expression of the whole timm name. gmacs: 1e9 multiply-accumulates of one image. part: what of the
    tower the figure is of, of PARTS; None: all. reason: why our count differs by more than 3 %."""

    pattern: str
    gmacs: float
    source: str
    part: str | None = None
    reason: str = ""

    def counted(self, row: dict) -> float:
        """The one of our figures (subjects.describe) that it is to be compared with."""
        return row[PARTS[self.part]]


PUBLISHED = (
    Published(r"(plain_)?vit_base_patch32_224", 4.41, _TORCHVISION),
    Published(r"vit_base_patch32_224", 2.96, _COPIED, part="attention left out"),
    Published(r"(plain_)?vit_base_patch16_224", 17.56, _TORCHVISION),
    Published(r"vit_base_patch16_224", 11.33, _COPIED, part="attention left out"),
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
    *(
        Published(
            name, gmacs, f"{trunk} in NAT's model zoo; SeNaTra's own figures were not at hand", part="grouping left out"
        )
        for name, (trunk, _, gmacs) in NAT.items()
    ),
)
REFERENCES = ("vit_base_patch32_224", "vit_base_patch16_224")  # timm's own, beside the presets of this package


def published(name: str) -> list[Published]:
    """The figures of a model, by its timm name; none is usual."""
    return [figure for figure in PUBLISHED if re.fullmatch(figure.pattern, name)]
