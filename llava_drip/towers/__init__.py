"""Towers: image → TokenBatch. Importing this package registers them with timm."""

from llava_drip.towers import plain as _plain  # noqa: F401  (registers)
from llava_drip.towers import presets as _presets  # noqa: F401  (registers)
from llava_drip.towers.drip import Drip
from llava_drip.towers.dynamicvit import DynamicViT
from llava_drip.towers.senatra import Senatra
from llava_drip.towers.tokenlearner import TokenFuser, TokenLearner
from llava_drip.towers.tokenlearner_vit import TokenLearnerViT
from llava_drip.towers.vit import PackedVisionTransformer

__all__ = ["Drip", "DynamicViT", "PackedVisionTransformer", "Senatra", "TokenFuser", "TokenLearner", "TokenLearnerViT"]
