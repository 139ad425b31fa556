"""A CLIP that, in training, also answers with its tower's rate loss and token counts.

open_clip's trainer passes a model's whole output dictionary to the loss (`loss(**model(images, texts))`), and under
gradient accumulation concatenates every entry along the batch. So what the boundary loss needs travels as [B] entries.

Accumulation (--accum-freq above 1) runs every batch twice: once for features to cache, once for gradients beside the other
batches' cached ones. Both passes draw the same boundaries (run.StepNoise).
"""

from __future__ import annotations

import torch.nn.functional as F
from open_clip import CustomTextCLIP
from torch import Tensor, nn

from llava_drip.tokens import TokenBatch
from llava_drip.towers.contract import lacks_of_tower


def tower_of(model: nn.Module) -> nn.Module | None:
    """The timm tower inside an open_clip model, where it is one that makes a TokenBatch (towers/contract.py); else None."""
    trunk = getattr(getattr(model, "visual", None), "trunk", None)
    return None if trunk is None or lacks_of_tower(trunk) else trunk


def has_boundaries(model: nn.Module) -> bool:
    """Whether the model's image tower pools or drops patches, and may have a rate loss (TokenBatch.rate_loss)."""
    tower = tower_of(model)
    return hasattr(tower, "has_boundary_loss") and not tower.is_dense


def patches_of(tower: nn.Module) -> int:
    """Patches of one image at the tower's input size."""
    height, width = tower.patch_embed.grid_size
    return height * width


def encode_image_tokens(model: nn.Module, images: Tensor) -> tuple[Tensor, TokenBatch]:
    """Images [B, 3, height, width] → unit-length features [B, embed_dim] and the tokens they were pooled from.

    The features are those of `model.encode_image(images, normalize=True)`; the tower runs once.
    """
    tower = tower_of(model)
    assert tower is not None, "encode_image_tokens needs a tower that makes a TokenBatch"
    tokens = tower.forward_features(images)
    features = model.visual.head(tower.forward_head(tokens))
    return F.normalize(features, dim=-1), tokens


class BoundaryCLIP(CustomTextCLIP):
    """open_clip's CustomTextCLIP (same modules, same state dict) with a tower that has boundaries.

    In training its output dictionary has two more entries:
        rate_loss: [B] fp32, what the tower asks for its boundaries in each image: the rate loss plus detail_weight times the
            detail loss; of the entropy rule its head's cross-entropy.
        num_tokens: [B] int64, tokens of each image.
    In eval, or without output_dict, it answers exactly as CustomTextCLIP does.
    """

    @classmethod
    def adopt(cls, model: nn.Module) -> BoundaryCLIP:
        """Turn a model that open_clip's factory has built into this class, in place.

        The factory picks the class by itself and offers no hook; the subclass adds no attribute, so changing the class
        of the finished object is enough.

        Raises:
            ValueError: the model was built as another class.
        """
        if type(model) is not CustomTextCLIP:
            raise ValueError(
                f"a tower with boundaries trains inside a CustomTextCLIP, this model is a {type(model).__name__}: "
                'set "custom_text": true in its JSON configuration'
            )
        model.__class__ = cls
        return model

    def forward(self, image: Tensor | None = None, text: Tensor | None = None):
        if not (self.training and self.output_dict and image is not None):
            return super().forward(image, text)
        output = super().forward(None, text)
        output["image_features"], tokens = encode_image_tokens(self, image)
        output["rate_loss"], output["num_tokens"] = tokens.rate_loss, tokens.lengths
        return output
