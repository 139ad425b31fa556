"""Text and pictures → what the assistant takes: ids with one <image> an image, left-padded, and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from PIL import Image
from transformers import BatchFeature, CLIPImageProcessor, LlavaImageProcessor, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

IMAGE_TOKEN = "<image>"
ASPECT_RATIOS = ("square", "pad")  # of --image_aspect_ratio, as LLaVA calls them


def image_processor_for(vision: dict, aspect_ratio: str = "square") -> CLIPImageProcessor | LlavaImageProcessor:
    """Preprocessing at a tower's size and statistics.

    Args:
        vision: LlavaDripConfig.vision_config.
        aspect_ratio: "square": CLIP's (shorter side resized, centre cropped, normalised); "pad": as LLaVA-1.5 tunes, first padded
            to a square with the mean colour, so that nothing is cut off.
    """
    assert aspect_ratio in ASPECT_RATIOS, aspect_ratio
    size = vision["image_size"]
    options = {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": vision["mean"],
        "image_std": vision["std"],
    }
    return LlavaImageProcessor(do_pad=True, **options) if aspect_ratio == "pad" else CLIPImageProcessor(**options)


def aspect_ratio_of(image_processor) -> str:
    """Which of ASPECT_RATIOS an image processor makes."""
    return "pad" if getattr(image_processor, "do_pad", False) else "square"


def view(image: Image.Image, image_processor) -> Image.Image:
    """What a tower sees of a picture, at the picture's own resolution: its centre, or all of it within a padded square."""
    if aspect_ratio_of(image_processor) == "pad":
        side = max(image.size)
        colour = tuple(int(part * 255) for part in image_processor.image_mean)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square
    crop = image_processor.crop_size
    aspect = crop["width"] / crop["height"]
    width = min(image.width, round(image.height * aspect))
    height = min(image.height, round(image.width / aspect))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + max(1, width), top + max(1, height)))


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a language model's tokenizer the placeholder, unless it has it."""
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})


class LlavaDripProcessor(ProcessorMixin):
    """A tokenizer and an image processor. How many tokens an image becomes is the model's affair: one <image> each here."""

    def __init__(
        self, image_processor=None, tokenizer: PreTrainedTokenizerBase | None = None, chat_template=None, **kw
    ):
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer has no {IMAGE_TOKEN} token; add it as a special token")
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template, **kw)

    def __call__(
        self,
        images: Sequence | Image.Image | None = None,
        text: str | Sequence[str] | None = None,
        padding: bool | str = True,
        padding_side: str = "left",
        return_tensors: str = "pt",
        add_special_tokens: bool = False,
        **text_kwargs,
    ) -> BatchFeature:
        """Prepare a batch.

        The text is tokenized as it stands, in training as at inference: the start mark is the chat template's to write, or
        not, as in transformers' `tokenizer.apply_chat_template`.

        Args:
            images: one list of pictures for each row of text ([] or None for none); or a flat list, dealt to the <image>
                in order.
            text: B prompts, each with one <image> an image.
            padding: as the tokenizer's.
            padding_side: "left" for generation (default), "right" for training.
            add_special_tokens: add what the tokenizer puts around a text by itself; for text that no template wrote.
        Returns:
            input_ids and attention_mask [B, L]; pixel_values [images, 3, height, width] if there are images.
        Raises:
            ValueError: a row with an <image> too many or too few, named; lists of pictures that do not match the rows.
        """
        text = [text] if isinstance(text, str) else list(text)
        flat = self._match(text, images)
        encoded = self.tokenizer(
            text,
            padding=padding,
            padding_side=padding_side,
            return_tensors=return_tensors,
            add_special_tokens=add_special_tokens,
            **text_kwargs,
        )
        data = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        if flat:
            data["pixel_values"] = self.image_processor(flat, return_tensors=return_tensors)["pixel_values"]
        return BatchFeature(data, tensor_type=return_tensors)

    def _match(self, text: list[str], images) -> list[Image.Image]:
        """Images in the order of the placeholders, after checking their number row by row."""
        wanted = [row.count(IMAGE_TOKEN) for row in text]
        if images is None:
            images = []
        elif not isinstance(images, (list, tuple)):
            images = [images]
        if any(isinstance(row, (list, tuple)) for row in images):
            for row, pictures in enumerate(images):
                if not (pictures is None or isinstance(pictures, (list, tuple))):
                    raise ValueError(f"images[{row}] is one picture among lists; give a list for each row of text")
            if len(images) != len(text):
                raise ValueError(
                    f"images holds {len(images)} lists and text {len(text)} rows; give a list for each row"
                )
            images = [pictures or [] for pictures in images]
            for row, (n, pictures) in enumerate(zip(wanted, images)):
                if n != len(pictures):
                    raise ValueError(f"row {row} has {n} {IMAGE_TOKEN} and {len(pictures)} images; they must match")
            return list(chain.from_iterable(images))
        flat = [picture for picture in images if picture is not None]
        if sum(wanted) != len(flat):
            left = len(flat)
            for row, n in enumerate(wanted):
                left -= n
                if left < 0 or (row == len(text) - 1 and left > 0):
                    raise ValueError(
                        f"row {row} has {n} {IMAGE_TOKEN}, but {sum(wanted)} {IMAGE_TOKEN} of all rows meet "
                        f"{len(flat)} images; they must match"
                    )
        return flat

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)
