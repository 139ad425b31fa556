"""SeNaTra, the Native Segmentation Vision Transformer (Brasó, Ošep and Leal-Taixé, NeurIPS 2025, arXiv 2505.16993).

    attention.py     transformer blocks on a grid of tokens: neighborhood attention, linear in pixels, and global attention
    assignment.py    which output token each input token went to: sparse or dense, composed over stages
    grouping.py      the spatial grouping layer
    model.py         the four-stage backbone
    presets.py       timm entry points

Docs: docs/guides/towers/senatra.md.
"""

from llava_drip.towers.senatra import presets as _presets  # noqa: F401  (registers)
from llava_drip.towers.senatra.assignment import Assignment
from llava_drip.towers.senatra.grouping import SpatialGrouping
from llava_drip.towers.senatra.model import Segmentation, Senatra

__all__ = ["Assignment", "Segmentation", "Senatra", "SpatialGrouping"]
