"""Segmentation: IoU of the areas of polygons, both drawn on one grid.

Source: K2.5, section 4.4 ("rasterized" IoU). Grid, frame and rule of filling are not disclosed, our choice:
the frame is the bounding box of both sides, so that neither unit nor place matters; a polygon is filled by
the even-odd rule; several polygons are their union.
"""

from collections.abc import Sequence

import numpy as np

from k25_train.environments.base import ACCURACY, Verdict, scored
from k25_train.rl.rewards.faults import ResponseFaultError

GRID = 256
"""Cells of the grid in each direction; the IoU of ordinary shapes is within some 0.5% of the exact one."""
MAX_VERTICES = 10_000
"""Most vertices in a response. Source: our choice."""

Polygon = Sequence[tuple[float, float]]
"""At least three vertices (x, y), closed by itself."""


def polygon_iou(found: Sequence[Polygon], expected: Sequence[Polygon], grid: int = GRID) -> Verdict:
    """Cells in both areas / cells in either; 1 if there are no polygons on both sides.

    Vertices are finite. Raises ResponseFaultError for more vertices than are judged.
    """
    num_vertices = sum(len(polygon) for polygon in found)
    if num_vertices > MAX_VERTICES:
        raise ResponseFaultError(f"huge: {num_vertices} vertices, more than {MAX_VERTICES}")
    if not found and not expected:
        return scored(1.0, {ACCURACY: 1.0})
    if not found or not expected:
        return scored(0.0, {ACCURACY: 0.0})
    corners_N2 = np.array([vertex for polygon in (*found, *expected) for vertex in polygon], dtype=np.float64)
    low, high = corners_N2.min(axis=0), corners_N2.max(axis=0)
    centres = (np.arange(grid) + 0.5) / grid
    columns_G, rows_G = (low[axis] + centres * (high[axis] - low[axis]) for axis in (0, 1))
    found_GG, expected_GG = (_area(polygons, columns_G, rows_G) for polygons in (found, expected))
    union = int(np.count_nonzero(found_GG | expected_GG))
    iou = int(np.count_nonzero(found_GG & expected_GG)) / union if union else 0.0
    return scored(iou, {ACCURACY: iou}, "" if union else "empty area: no cell of the grid lies in a polygon")


def _area(polygons: Sequence[Polygon], columns_G: np.ndarray, rows_G: np.ndarray) -> np.ndarray:
    """[G, G] bool: whose centre lies in one of the polygons."""
    inside_GG = np.zeros((len(rows_G), len(columns_G)), dtype=bool)
    for polygon in polygons:
        inside_GG |= _filled(np.array(polygon, dtype=np.float64), columns_G, rows_G)
    return inside_GG


def _filled(vertices_V2: np.ndarray, columns_G: np.ndarray, rows_G: np.ndarray) -> np.ndarray:
    """[G, G] bool: to the right of whose centre the outline passes an odd number of times."""
    # 1. Edges from their lower end to their upper one, so that the way round changes no bit.
    starts_V2, ends_V2 = vertices_V2, np.roll(vertices_V2, -1, axis=0)
    upward_V1 = starts_V2[:, 1:] <= ends_V2[:, 1:]
    low_V2 = np.where(upward_V1, starts_V2, ends_V2)
    high_V2 = np.where(upward_V1, ends_V2, starts_V2)

    # 2. Where they pass each row: half open, so that a vertex on a row counts once.
    passes_VG = (low_V2[:, 1:] <= rows_G) & (rows_G < high_V2[:, 1:])
    edges, rows = np.nonzero(passes_VG)
    low, high = low_V2[edges], high_V2[edges]
    run, rise = high[:, 0] - low[:, 0], high[:, 1] - low[:, 1]
    # Multiplied first: on whole numbers this is exact.
    passed_at = low[:, 0] + (rows_G[rows] - low[:, 1]) * run / rise

    # 3. Every pass turns all cells to its left over.
    num_left = np.searchsorted(columns_G, passed_at, side="left")
    width = len(columns_G) + 1
    turns = np.bincount(rows * width + num_left, minlength=len(rows_G) * width).reshape(-1, width)
    odd = (turns & 1).astype(bool)
    return np.logical_xor.accumulate(odd[:, :0:-1], axis=1)[:, ::-1]
