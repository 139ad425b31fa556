"""Pictures as the embeddings that a language model reads in their places, as files for servers that take them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from llava_drip.assistant.modeling import LlavaDripForConditionalGeneration
from llava_drip.assistant.processing import LlavaDripProcessor
from llava_drip.files import whole_folder
from llava_drip.images import load_image

EMBEDS = "image_embeds"


@torch.inference_mode()
def embed_pictures(
    model: LlavaDripForConditionalGeneration,
    processor: LlavaDripProcessor,
    files: list[Path],
    folder: Path,
    batch_size: int = 8,
) -> dict[str, int]:
    """Writes folder/NAME.safetensors for each picture: image_embeds [tokens, hidden] in the language model's dtype, what its
    projector gives, and thus what stands at the picture's positions. Returns {file: tokens}. The tower's device computes them.

    folder: must not be there; it appears when all of them are in it. batch_size: pictures at a time.
    Raises:
        ValueError: the folder is there; two pictures of one name; one that cannot be read.
    """
    names = [file.stem for file in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"--images: two pictures are called {twice}; their embeddings would be one file")
    dtype, counts = next(model.language_model.parameters()).dtype, {}
    with whole_folder(folder) as partial:
        for start in tqdm(range(0, len(files), batch_size), "pictures", unit="batch", disable=len(files) <= batch_size):
            batch = files[start : start + batch_size]
            pixels = processor.image_processor([load_image(file) for file in batch], return_tensors="pt")
            for file, values in zip(batch, model.encode_images(pixels["pixel_values"]).split()):
                name, metadata = f"{file.stem}.safetensors", {"image": file.name, "tokens": str(len(values))}
                save_file({EMBEDS: values.to("cpu", dtype).contiguous()}, partial / name, metadata=metadata)
                counts[str(folder / name)] = len(values)
    return counts
