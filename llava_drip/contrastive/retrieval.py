"""Retrieval between pictures and their captions: recall at 1, 5 and 10 in both directions, beside that of a random ranking."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from open_clip import get_input_dtype
from open_clip_train.precision import get_autocast
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from llava_drip.contrastive.captions import CaptionSet
from llava_drip.contrastive.evaluator import TokenUse, evaluation
from llava_drip.contrastive.model import encode_image_tokens, tower_of
from llava_drip.images import ImageError
from llava_drip.training.skips import BadSample, Skips

KS = (1, 5, 10)
SCORES_AT_ONCE = 2**24  # of the similarity matrix; 64 MiB in fp32
RESOLUTION = 2**20  # cosines are compared to a millionth: what lies closer is rounding, and ties


class _Pictures(Dataset):
    """Index → (index, pixels, None), or (index, None, why not)."""

    def __init__(self, captions: CaptionSet, transform: Callable):
        self.captions, self.transform = captions, transform

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, tuple[str, str] | None]:
        try:
            return index, self.transform(self.captions.load(index)), None
        except (BadSample, ImageError) as error:
            return index, None, (getattr(error, "cause", "corrupt picture"), str(error))


def _collate(samples: list) -> tuple[list[int], Tensor | None, list[tuple[str, str]]]:
    good = [(index, pixels) for index, pixels, _ in samples if pixels is not None]
    pixels = torch.stack([pixels for _, pixels in good]) if good else None
    return [index for index, _ in good], pixels, [bad for _, _, bad in samples if bad is not None]


def retrieve(
    model: nn.Module,
    transform: Callable,
    tokenizer: Callable,
    captions: CaptionSet,
    *,
    batch_size: int = 64,
    workers: int = 2,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> dict:
    """Recall of an open_clip model in eval mode, on this process alone. The model's mode and torch's randomness are put back.

    Ties count as a random order of the tied would on average, so a model that gives everything one score gets chance.

    Args:
        transform: PIL picture → [3, height, width].
        tokenizer: list of texts → [n, context] token ids.
        captions: see open_captions.
        precision: as in open_clip's trainer ("fp32", "amp", "amp_bf16", ...).
    Returns:
        "image_to_text_R@1", "..@5", "..@10": share (0 .. 1) of the pictures with one of their captions among the k most similar.
        "text_to_image_R@1", ...: share of the captions with their picture among the k most similar.
        "chance": the same six figures, expected of a random ranking. "images", "captions": how many were ranked.
        "tokens_per_image", "patches_per_image", "compression", "compression_p5", "compression_p95": None for a tower that makes
        no TokenBatch. "skipped": {"counts", "examples"}: unreadable pictures, left out with their captions.
    Raises:
        ValueError: no readable picture; features that are not finite.
    """
    use, skips = TokenUse(model, device), Skips()
    with evaluation(model):
        indices, image_features = _encode_images(
            model, _Pictures(captions, transform), use, skips, batch_size, workers, precision, device
        )
        kept = [captions.captions[index] for index in indices]
        texts = [text for own in kept for text in own]
        text_features = _encode_texts(model, tokenizer, texts, batch_size, precision, device)
    counts = torch.tensor([len(own) for own in kept], device=image_features.device)
    owner = torch.repeat_interleave(torch.arange(len(kept), device=counts.device), counts)
    return {
        **recalls(image_features, text_features, owner),
        "chance": chance(counts),
        "images": len(kept),
        "captions": len(texts),
        **use.summary(),
        "skipped": skips.state(),
    }


def _encode_images(
    model: nn.Module,
    pictures: _Pictures,
    use: TokenUse,
    skips: Skips,
    batch_size: int,
    workers: int,
    precision: str,
    device: torch.device | str,
) -> tuple[list[int], Tensor]:
    """Which pictures could be read, and their unit-length features [images, dim], fp32."""
    autocast, dtype = get_autocast(precision, torch.device(device).type), get_input_dtype(precision)
    indices, features = [], []
    # Workers are of no use for a batch or two, and cost seconds to start.
    workers = workers if len(pictures) > 2 * batch_size else 0
    for own, pixels, bad in DataLoader(pictures, batch_size, num_workers=workers, collate_fn=_collate):
        for cause, message in bad:
            skips.add(cause, message)
        if pixels is None:
            continue
        pixels = pixels.to(device=device, dtype=dtype)
        with autocast():
            if tower_of(model) is None:
                encoded = model.encode_image(pixels, normalize=True)
            else:
                encoded, tokens = encode_image_tokens(model, pixels)
                use.add(tokens.lengths)
        indices += own
        features.append(encoded.float())
    if not indices:
        raise ValueError(f"{pictures.captions.source}: no readable picture: {skips}; {'; '.join(skips.examples)}")
    return indices, _finite(torch.cat(features), "pictures")


def _encode_texts(
    model: nn.Module, tokenizer: Callable, texts: Sequence[str], batch_size: int, precision: str, device
) -> Tensor:
    """Unit-length features [texts, dim], fp32."""
    autocast, features = get_autocast(precision, torch.device(device).type), []
    for start in range(0, len(texts), batch_size):
        tokens = tokenizer(list(texts[start : start + batch_size])).to(device)
        with autocast():
            features.append(model.encode_text(tokens, normalize=True).float())
    return _finite(torch.cat(features), "captions")


def _finite(features: Tensor, what: str) -> Tensor:
    bad = int((~features.isfinite().all(1)).sum())
    if bad:  # compared with NaN nothing ranks higher: all would count as found
        raise ValueError(f"the features of {bad} of {len(features)} {what} are not finite: did training diverge?")
    return features


def recalls(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float]:
    """The six recalls.

    Args:
        images: [images, dim] unit-length features. texts: [texts, dim].
        owner: [texts] int64, the picture of each text; every picture has one.
    """
    found = {
        "image_to_text": _hits(images, texts, torch.arange(len(images), device=owner.device), owner),
        "text_to_image": _hits(texts, images, owner, torch.arange(len(images), device=owner.device)),
    }
    return {f"{way}_R@{k}": float(hits[k].mean()) for way, hits in found.items() for k in KS}


def _hits(queries: Tensor, targets: Tensor, own: Tensor, theirs: Tensor) -> dict[int, Tensor]:
    """For each k, [queries] expected hits. A target belongs to a query where theirs[target] == own[query]."""
    parts = []
    for rows in torch.arange(len(queries), device=queries.device).split(max(1, SCORES_AT_ONCE // len(targets))):
        scores = (queries[rows] @ targets.T * RESOLUTION).round()
        belongs = own[rows, None] == theirs[None]
        best = scores.masked_fill(~belongs, -torch.inf).amax(1, keepdim=True)
        ties = scores == best
        parts.append(torch.stack([(scores > best).sum(1), (ties & ~belongs).sum(1), (ties & belongs).sum(1)]))
    above, wrong, right = torch.cat(parts, 1).double()
    return {k: expected_hit(above, wrong, right, k) for k in KS}


def expected_hit(above: Tensor, wrong: Tensor, right: Tensor, k: int) -> Tensor:
    """The chance that one of `right` is among the first k, when `above` others rank higher and `wrong` tie with it.

    All are [n] fp64 counts: 1 - C(wrong, m) / C(wrong + right, m) for the m = k - above places that are left.
    """
    miss = torch.ones_like(above)
    for j in range(k):
        left = j < k - above
        step = ((wrong - j) / (wrong + right - j).clamp(min=1)).clamp(min=0)
        miss = torch.where(left, miss * step, miss)
    return 1 - miss


def chance(counts: Tensor) -> dict[str, float]:
    """The six recalls expected of a random ranking. counts: [images] int64, captions of each picture."""
    counts = counts.double().cpu()
    total, images, zero = counts.sum(), torch.tensor(float(len(counts))).double(), torch.zeros_like(counts)
    by_image = {k: expected_hit(zero, total - counts, counts, k).mean() for k in KS}
    by_text = {k: expected_hit(zero[:1], (images - 1)[None], torch.ones(1).double(), k).mean() for k in KS}
    ways = {"image_to_text": by_image, "text_to_image": by_text}
    return {f"{way}_R@{k}": float(hits[k]) for way, hits in ways.items() for k in KS}
