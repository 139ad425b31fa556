"""Where segments should end, known from a scene's mask, and how well predicted boundaries agree with it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class BoundaryScores(NamedTuple):
    """Agreement of predicted with true boundaries, each in 0..1; `chance_*` is for the same number put at random."""

    precision: float
    recall: float
    f1: float
    chance_precision: float
    chance_f1: float


def shown_by_patches(mask: ArrayLike, grid_size: tuple[int, int]) -> np.ndarray:
    """What each patch shows: the id that covers most of its pixels (the lowest of them in a tie).

    Args:
        mask: [H, W] integer ids per pixel, 0 to 255; as the tower sees the image, i.e. after resizing and cropping.
        grid_size: (rows, columns) of patches; they must divide H and W.

    Returns:
        [patches] ids, in raster order.

    Raises:
        ValueError: The mask is not [H, W] of ids, or the grid does not divide it.
    """
    mask = np.asarray(mask)
    rows, columns = grid_size
    if mask.ndim != 2 or not np.issubdtype(mask.dtype, np.integer):
        raise ValueError(f"mask must be [H, W] integers, got shape {mask.shape} of {mask.dtype}")
    if rows < 1 or columns < 1 or mask.shape[0] % rows or mask.shape[1] % columns:
        raise ValueError(f"a grid of {rows} x {columns} patches does not divide a mask of {mask.shape} pixels")
    height, width = mask.shape[0] // rows, mask.shape[1] // columns
    patches = mask.reshape(rows, height, columns, width).swapaxes(1, 2).reshape(rows * columns, height * width)
    ids = np.unique(mask)
    covered = (patches[:, :, None] == ids).sum(axis=1)  # [patches, ids] pixels
    return ids[covered.argmax(axis=1)]


def true_boundaries(mask: ArrayLike, grid_size: tuple[int, int], order: ArrayLike | None = None) -> np.ndarray:
    """Whether the thing shown changes between consecutive patches of a scan.

    Args:
        mask, grid_size: As `shown_by_patches` takes them.
        order: [patches] raster index of the i-th patch of the scan, a permutation (`towers.scan.scan_order` gives it); None is
            the raster scan.

    Returns:
        [patches - 1] bool; entry i is the place between the scan's patch i and its patch i + 1.

    Raises:
        ValueError: As `shown_by_patches`, or the order is no permutation of the patches.
    """
    return changes_along(shown_by_patches(mask, grid_size), order)


def changes_along(shown: np.ndarray, order: ArrayLike | None = None) -> np.ndarray:
    """Where what is shown changes along a scan: [..., patches] ids in raster order → [..., patches - 1] bool.

    order: As `true_boundaries` takes it. ValueError: It is no permutation of the patches.
    """
    if order is not None:
        order = np.asarray(order)
        if not np.array_equal(np.sort(order), np.arange(shown.shape[-1])):
            raise ValueError(f"order must be a permutation of {shown.shape[-1]} patches, got shape {order.shape}")
        shown = shown[..., order]
    return shown[..., 1:] != shown[..., :-1]


def score_boundaries(pred: ArrayLike, truth: ArrayLike) -> BoundaryScores:
    """Precision, recall and F1 of boundaries, over all entries together.

    Args:
        pred: [..., patches - 1] bool; e.g. `segments[:, 1:] != segments[:, :-1]`.
        truth: The same shape, from `true_boundaries`; arrays of several images may be stacked.

    Returns:
        A ratio without a denominator (nothing predicted, nothing true) is 0.

    Raises:
        ValueError: The shapes differ, or are empty.
    """
    pred, truth = np.asarray(pred), np.asarray(truth)
    if pred.shape != truth.shape or pred.size == 0:
        raise ValueError(f"pred and truth must have the same, non-empty shape, got {pred.shape} and {truth.shape}")
    pred, truth = pred.astype(bool), truth.astype(bool)
    hits = int((pred & truth).sum())
    predicted, true = int(pred.sum()), int(truth.sum())
    chance_hits = predicted * true / pred.size
    return BoundaryScores(
        precision=_ratio(hits, predicted),
        recall=_ratio(hits, true),
        f1=_ratio(2 * hits, predicted + true),
        chance_precision=_ratio(chance_hits, predicted),
        chance_f1=_ratio(2 * chance_hits, predicted + true),
    )


def boundary_f1(pred: ArrayLike, truth: ArrayLike) -> float:
    """F1 of `score_boundaries`."""
    return score_boundaries(pred, truth).f1


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
