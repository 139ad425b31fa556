"""llava_drip: a LLaVA-style assistant whose vision tower pools image segments into 2x to 10x fewer tokens.

Importing it registers the towers with timm, the DRIP-* models with open_clip, and the assistant with transformers' Auto classes.
"""

import llava_drip.assistant
import llava_drip.contrastive
from llava_drip.tokens import TokenBatch
from llava_drip.towers import Drip

llava_drip.contrastive.register()

__version__ = "0.1.0"
__all__ = ["Drip", "TokenBatch"]
