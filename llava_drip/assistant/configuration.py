"""Configuration of the assistant: which tower, which projector, which language model."""

from __future__ import annotations

from transformers import AutoConfig, PreTrainedConfig

PROJECTORS = ("mlp2x_gelu", "linear")


class LlavaDripConfig(PreTrainedConfig):
    """What `LlavaDripForConditionalGeneration` is made of.

    Attributes:
        text_config: configuration of any causal language model that transformers knows (or its dict).
        vision_config: {"architecture": timm name, "model_args": {...}, "image_size", "mean", "std"} (towers.io.describe_tower);
            and optionally "budget", the patches per visual token that set_compression is called with.
        projector_type: "mlp2x_gelu" or "linear", LLaVA's names.
        vision_feature_layer: tower layer whose tokens are projected, counted from the end; LLaVA's is -2.
        segment_positions: tell the language model where each visual token's segment lies (projector.segment_places). Not in
            LLaVA; False loads its projectors.
        image_token_id: id of the <image> placeholder.
    """

    model_type = "llava_drip"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        text_config=None,
        vision_config: dict | None = None,
        projector_type: str = "mlp2x_gelu",
        vision_feature_layer: int | None = -2,
        segment_positions: bool = False,
        image_token_id: int = 0,
        **kwargs,
    ):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        elif text_config is None:
            text_config = AutoConfig.for_model("llama")
        if projector_type not in PROJECTORS:
            raise ValueError(f"projector_type must be one of {PROJECTORS}, got {projector_type!r}")
        self.text_config = text_config
        self.vision_config = vision_config or {"architecture": "drip_base_patch16_224", "model_args": {}}
        self.projector_type = projector_type
        self.vision_feature_layer = vision_feature_layer
        self.segment_positions = segment_positions
        self.image_token_id = image_token_id
        # Tying is the language model's own affair; it is declared here for code that asks the outer configuration.
        kwargs["tie_word_embeddings"] = getattr(text_config, "tie_word_embeddings", False)
        # The base class would set both to None in text_config too, and a finished language model would fall back to eager.
        for kind in ("attn_implementation", "experts_implementation"):
            kwargs.setdefault(kind, {"text_config": getattr(text_config, f"_{kind}", None)})
        super().__init__(**kwargs)
