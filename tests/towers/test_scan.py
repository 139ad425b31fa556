"""Orders of the patches: each visits every patch once, by steps to neighbours, and runs along the curve are compact."""

from __future__ import annotations

import pytest
import torch

from llava_drip.towers.scan import SCANS, scan_order

SIZES = [
    (1, 1),
    (1, 7),
    (7, 1),
    (2, 2),
    (2, 3),
    (3, 2),
    (7, 7),
    (14, 14),
    (16, 12),
    (12, 16),
    (24, 24),
    (5, 8),
    (8, 5),
    (7, 24),
    (3, 40),
]


def coordinates(scan: str, rows: int, columns: int) -> torch.Tensor:
    """(row, column) of each patch along the scan: [N, 2]."""
    order = scan_order(scan, rows, columns)
    return torch.stack((order // columns, order % columns), dim=1)


def mean_outline(scan: str, rows: int, columns: int, length: int) -> float:
    """Patch edges around a run of `length` patches, the mean over all runs."""
    visits = coordinates(scan, rows, columns).tolist()
    outlines = []
    for start in range(len(visits) - length + 1):
        run = {tuple(patch) for patch in visits[start : start + length]}
        inside = sum((r + 1, c) in run for r, c in run) + sum((r, c + 1) in run for r, c in run)
        outlines.append(4 * length - 2 * inside)
    return sum(outlines) / len(outlines)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_every_patch_once_from_the_upper_left(scan, rows, columns):
    order = scan_order(scan, rows, columns)
    assert order.dtype == torch.int64 and order.device.type == "cpu" and order.shape == (rows * columns,)
    assert order.sort().values.tolist() == list(range(rows * columns))
    assert order[0] == 0


@pytest.mark.parametrize("scan", ["serpentine", "hilbert"])
def test_consecutive_patches_are_neighbours_on_any_grid(scan):
    grids = [*SIZES, *((r, c) for r in range(1, 19) for c in range(1, 19))]
    for rows, columns in grids:
        steps = coordinates(scan, rows, columns).diff(dim=0).abs().sum(dim=1)
        assert (steps == 1).all(), (rows, columns)


def test_raster_and_serpentine_are_what_their_names_say():
    assert scan_order("raster", 3, 4).tolist() == list(range(12))
    assert scan_order("serpentine", 3, 4).tolist() == [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]


def test_hilbert_is_hilberts_curve_at_powers_of_two():
    assert scan_order("hilbert", 2, 2).tolist() == [0, 2, 3, 1]
    # At 2^k x 2^k every aligned block of 2^j x 2^j patches is one run: what makes the curve compact at every length.
    for side in (4, 8, 16):
        visits = coordinates("hilbert", side, side)
        block = 2
        while block < side:
            for run in (visits // block).split(block * block):
                assert (run == run[0]).all(), (side, block)
            block *= 2


@pytest.mark.parametrize(("rows", "columns"), [(7, 7), (14, 14), (16, 12), (24, 24), (5, 8)])
@pytest.mark.parametrize("length", [4, 10])
def test_hilbert_runs_are_more_compact_than_serpentine_than_raster(rows, columns, length):
    raster, serpentine, hilbert = (mean_outline(scan, rows, columns, length) for scan in SCANS)
    assert hilbert < serpentine < raster


def test_numbers_of_the_documentation():
    measured = [round(mean_outline(scan, 14, 14, length), 1) for scan in SCANS for length in (4, 10)]
    assert measured == [10.4, 23.3, 9.9, 19.8, 9.4, 15.7]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="scan must be one of raster, serpentine, hilbert, got 'spiral'"):
        scan_order("spiral", 4, 4)
    with pytest.raises(ValueError, match="0 x 4 patches"):
        scan_order("raster", 0, 4)


def test_first_call_in_another_mode_leaves_a_plain_cpu_tensor():
    with torch.inference_mode(), torch.device("meta"):
        scan_order("hilbert", 9, 11)
    x = torch.ones(1, 99, 2, requires_grad=True)
    x[:, scan_order("hilbert", 9, 11)].sum().backward()
    assert x.grad is not None and (x.grad == 1).all()
    mine = scan_order("hilbert", 9, 11)
    mine[:] = 0  # nobody else's
    assert scan_order("hilbert", 9, 11).unique().numel() == 99
