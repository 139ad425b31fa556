"""The assistant for transformers: tower → projector → language model, with a variable number of visual tokens an image."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava_drip.assistant.configuration import LlavaDripConfig
from llava_drip.assistant.expand import Expanded, expand_placeholders
from llava_drip.assistant.packing import ATTENTION, pack, why_not_packed
from llava_drip.assistant.projector import Projector, segment_places
from llava_drip.tokens import TokenBatch
from llava_drip.towers.contract import check_budget, check_tower


class LlavaDripForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """LLaVA (Liu et al., 2023) with any tower whose forward_features returns a TokenBatch, and any causal language model.

    From GenerationMixin it takes that from_pretrained reads generation_config.json; `generate` is its own.
    """

    config_class = LlavaDripConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["PackedBlock"]

    def __init__(self, config: LlavaDripConfig, vision_tower: nn.Module | None = None, language_model=None):
        """vision_tower, language_model: the parts themselves, with weights; built from the configuration when absent."""
        super().__init__(config)
        vision = config.vision_config
        if vision_tower is None:
            vision_tower = timm.create_model(vision["architecture"], num_classes=0, **vision["model_args"])
        check_tower(vision_tower, vision["architecture"])
        self.vision_tower = vision_tower
        if vision.get("budget") is not None:
            with torch.device("cpu"):  # from_pretrained builds on "meta", where the value cannot be checked
                self.set_compression(vision["budget"])
        self.multi_modal_projector = Projector(
            config.projector_type, vision_tower.num_features, config.text_config.hidden_size, config.segment_positions
        )
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.language_model = language_model
        self.generation_config = GenerationConfig.from_model_config(config.text_config)
        self._attention_before: str | None = None  # while samples are packed
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Only the projector is initialised here: the tower and the language model do it themselves, when they are made."""
        if isinstance(module, nn.Linear) and any(module is part for part in self.multi_modal_projector):
            # nn.Linear's own, as LLaVA has it: a projector that starts at std 0.02 learns later (its tokens are too faint).
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def train(self, mode: bool = True) -> LlavaDripForConditionalGeneration:
        """A frozen tower stays in eval: its boundaries must be those of inference, without noise."""
        super().train(mode)
        if not any(p.requires_grad for p in self.vision_tower.parameters()):
            self.vision_tower.eval()
        return self

    def set_compression(self, compression: float | Tensor | None) -> None:
        """Visual-token budget of a tower that has one (see Drip.set_compression).

        Kept in the configuration, so that save_pretrained saves it; but not a tensor with one value an image, which belongs
        to its batch: an assistant saved then lets each image decide.
        """
        check_budget(self.vision_tower, self.config.vision_config["architecture"])
        self.vision_tower.set_compression(compression)
        if compression is None or (isinstance(compression, Tensor) and compression.ndim):
            self.config.vision_config.pop("budget", None)
        else:
            self.config.vision_config["budget"] = float(compression)

    def pack_samples(self, mode: bool = True) -> None:
        """In training, whether the samples of a batch stand in one row without padding (see packing.py). The loss is the same;
        the logits are those of the positions that learn. While it is on, nothing can be generated.

        Raises:
            ValueError: a language model that is not known to keep packed samples apart (packing.PACKED_FAMILIES).
        """
        if mode == self.packs_samples:
            return
        if mode and (why := why_not_packed(self.config.text_config)):
            raise ValueError(f"samples cannot be packed: {why}")
        now, before = self.language_model.config._attn_implementation, self._attention_before
        self.language_model.set_attn_implementation(ATTENTION if mode else before)
        self._attention_before = now if mode else None

    @property
    def packs_samples(self) -> bool:
        return self._attention_before is not None

    def encode_images(self, pixel_values: Tensor) -> TokenBatch:
        """pixel_values [images, 3, height, width] → TokenBatch of projected tokens, language-model width."""
        parameter = next(self.vision_tower.parameters())
        frozen = not any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            pixels = pixel_values.to(parameter.device, parameter.dtype)
            tokens = self.vision_tower.forward_features(pixels, layer=self.config.vision_feature_layer)
        places = None
        if self.config.segment_positions:
            places = segment_places(tokens, self.vision_tower.patch_embed.grid_size)
        return tokens.with_values(self.multi_modal_projector(tokens.values, places))

    def _encode_blank(self, device: torch.device) -> TokenBatch:
        """One black image, whatever the budgets are of the images that are not there."""
        size = self.config.vision_config["image_size"]
        pixels = torch.zeros(1, 3, size, size, device=device)
        budget = getattr(self.vision_tower, "budget", None)
        if not (isinstance(budget, Tensor) and budget.ndim):
            return self.encode_images(pixels)
        self.vision_tower.set_compression(None)
        try:
            return self.encode_images(pixels)
        finally:
            self.vision_tower.set_compression(budget, self.vision_tower.over)

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Expanded]:
        """Text and images → embeddings [B, L', D] with the visual tokens in place, and the sequences they belong to."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        has_images = pixel_values is not None and len(pixel_values) > 0
        if not has_images and self.training:
            # Every rank must use the same parameters in every step, and in the same order (ZeRO-3 and DDP wait for each
            # other): a blank image, of which nothing is used.
            images = self._encode_blank(input_ids.device)
        else:
            images = self.encode_images(pixel_values) if has_images else None
        counts = images.lengths if has_images else input_ids.new_zeros(0)
        expanded = expand_placeholders(input_ids, attention_mask, self.config.image_token_id, counts, labels)
        embeds = self.splice(expanded, images.values if has_images else None)
        if not has_images and images is not None:
            embeds = embeds + 0.0 * images.values.sum().to(embeds)
        return embeds, expanded

    def splice(self, expanded: Expanded, tokens: Tensor | None) -> Tensor:
        """Embeddings [B, L', D] of expanded sequences, with the images' tokens [T, D] (None: there are none) in place."""
        embeds = self.get_input_embeddings()(expanded.input_ids.masked_fill(expanded.is_image, 0))
        if tokens is None:
            return embeds
        # A scatter, not an index_put: the projector's gradient comes back as a gather.
        return embeds.masked_scatter(expanded.is_image[..., None], tokens.to(embeds))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """One pass over whole sequences.

        Args:
            input_ids: [B, L] int64 with one <image> an image.
            attention_mask: [B, L]; rows may be padded on either side.
            pixel_values: [images, 3, height, width], in the order of the placeholders; None for text alone.
            labels: [B, L] int64, -100 where nothing is learned.
        Returns:
            loss, and logits [B, L', vocabulary] over the expanded sequences (L' counts the visual tokens); while samples are
            packed, [1, K, vocabulary] of the positions that learn.
        Raises:
            ValueError: placeholders and images differ in number (names the row).
        """
        embeds, expanded = self.embed(input_ids, attention_mask, pixel_values, labels)
        if self.training:
            kwargs.setdefault("use_cache", False)
        if self.packs_samples:
            if expanded.labels is None:
                raise ValueError("packed samples are for training: give labels, or pack_samples(False)")
            packed = pack(embeds, expanded)
            return self.language_model(
                inputs_embeds=packed.embeds,
                position_ids=packed.position_ids,
                packing=packed.packing,
                logits_to_keep=packed.read,
                labels=packed.targets,
                shift_labels=packed.targets,
                **kwargs,
            )
        return self.language_model(
            inputs_embeds=embeds, attention_mask=expanded.attention_mask, labels=expanded.labels, **kwargs
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs,
    ):
        """transformers' generate on left-padded prompts, with all its arguments (beams, sampling, streamer, ...).

        The images are encoded once. Returns ids [B · num_return_sequences, L + new] that begin with the prompt as it was
        given, so `out[:, input_ids.shape[1]:]` is the answer (or generate's output object, with such sequences).

        The language model gets embeddings, so whatever looks up ids does not see the prompt, only what was generated:
        repetition_penalty and no_repeat_ngram_size (and their encoder_ variants), bad_words_ids and sequence_bias of several
        tokens, custom logits processors, prompt_lookup_num_tokens and assistant_model (of no use here).
        """
        out = self.generate_from(*self.embed(input_ids, attention_mask, pixel_values), **kwargs)
        sequences = out if isinstance(out, Tensor) else out.sequences
        prompts = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0)
        sequences = torch.cat([prompts, sequences.to(prompts.device)], dim=1)
        if isinstance(out, Tensor):
            return sequences
        out.sequences = sequences
        return out

    @torch.no_grad()
    def generate_from(self, embeds: Tensor, expanded: Expanded, defaults: GenerationConfig | None = None, **kwargs):
        """The half of generate after `embed`, whose results it takes; returns what the language model generates, [B, new].

        defaults: what fills the settings that are None among the arguments; the checkpoint's when None.
        """
        if self.packs_samples:
            raise ValueError("samples are packed, for training; pack_samples(False) before anything is generated")
        # from_pretrained sets the outer one only
        self.language_model.generation_config = self.generation_config if defaults is None else defaults
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=expanded.attention_mask, **kwargs)
