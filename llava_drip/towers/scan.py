"""The order in which the patches of a grid follow one another; a segment is a run along it.

raster      rows from top to bottom, each from left to right: the order in which a ViT holds its patches.
serpentine  every second row from right to left, so that consecutive patches are always neighbours (boustrophedon).
hilbert     a Hilbert curve (Hilbert, 1891), so that a run is also compact: sides of a power of two give the curve itself, others
            a curve of the same recursion over rectangles. Consecutive patches are neighbours for any number of rows and columns.

Mean outline, in patch edges, of a run of 4 and of 10 patches, over all runs of a 14 x 14 grid (the most compact shapes have 8
and 14): raster 10.4 and 23.3, serpentine 9.9 and 19.8, hilbert 9.4 and 15.7; tests/towers/test_scan.py measures it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

SCANS = ("raster", "serpentine", "hilbert")

Cells = list[tuple[int, int]]


@torch.compiler.disable  # its cache would be passed over, and the recursion traced
def scan_order(scan: str, rows: int, columns: int) -> Tensor:
    """Raster index of the i-th patch of the scan: [rows * columns] int64, on the CPU, a permutation that begins with 0.

    `x[:, scan_order(...)]` puts patches [B, N, D] from raster into scan order. The order is computed once for each grid; the
    tensor is the caller's own, whatever device or inference mode the first call was made under.

    Raises:
        ValueError: `scan` is none of `SCANS`, or the grid has no patch.
    """
    if scan not in SCANS:
        raise ValueError(f"scan must be one of {', '.join(SCANS)}, got {scan!r}")
    if rows < 1 or columns < 1:
        raise ValueError(f"a grid of {rows} x {columns} patches has no scan order")
    return torch.tensor(_order(scan, rows, columns), dtype=torch.int64, device="cpu")


@lru_cache(maxsize=256)
def _order(scan: str, rows: int, columns: int) -> tuple[int, ...]:
    if scan == "hilbert":
        # From one end of the longer side to its other, if such a path exists: neighbours differ in colour on a chessboard, and
        # the ends of an odd side do not, so none visits an even number of patches between them. Then the shorter side is even.
        if (rows > columns and _exists(rows, columns)) or not _exists(columns, rows):
            return tuple(y * columns + x for y, x in _hilbert(rows, columns))
        return tuple(y * columns + x for x, y in _hilbert(columns, rows))
    lines = [range(y * columns, (y + 1) * columns) for y in range(rows)]
    if scan == "serpentine":
        lines[1::2] = [line[::-1] for line in lines[1::2]]
    return tuple(patch for line in lines for patch in line)


def _exists(length: int, width: int) -> bool:
    """Whether a path from (0, 0) to (length - 1, 0) visits each of length * width cells once, by steps to neighbours."""
    return width == 1 or (length > 1 and (length % 2 == 0 or width % 2 == 1))


def _hilbert(length: int, width: int) -> Cells:
    """Such a path: pairs (along the length, along the width).

    A long rectangle is two, one behind the other. Any other is three: half the width up, over the whole length, and down again.
    The first piece has an even length, which lets every piece have its path wherever the whole has one.
    """
    assert _exists(length, width), (length, width)
    if width == 1:
        return [(x, 0) for x in range(length)]
    if 2 * length > 3 * width:
        half = _even_half(length)
        return _hilbert(half, width) + [(half + x, y) for x, y in _hilbert(length - half, width)]
    high, left = _even_half(width), length // 2
    up = [(x, y) for y, x in _hilbert(high, left)]
    over = [(x, high + y) for x, y in _hilbert(length, width - high)]
    down = [(length - 1 - x, high - 1 - y) for y, x in _hilbert(high, length - left)]
    return up + over + down


def _even_half(size: int) -> int:
    """The even number nearest to half of `size`, the lower of two; 1 for size 2, which is then the width of a square."""
    return max((size + 1) // 4 * 2, 1)


def in_raster_order(of_scan: Tensor, order: Tensor | None) -> Tensor:
    """[B, N] of patches in scan order → in raster order. order: scan_order's, None for a raster scan."""
    if order is None:
        return of_scan
    return torch.empty_like(of_scan).index_copy(1, order, of_scan)
