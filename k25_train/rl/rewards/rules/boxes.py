"""Grounding: F1 of boxes, in which a pair counts by its IoU.

Source: K2.5, section 4.4 ("F1 with IoU-based soft matching"). The floor, the optimal matching and labels that
have to agree are not disclosed, our choice.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from k25_train.environments.base import ACCURACY, Verdict, scored
from k25_train.rl.rewards.faults import ResponseFaultError
from k25_train.rl.rewards.rules.matching import best_total

IOU_FLOOR = 0.5
"""IoU below which a pair counts nothing, where a task does not say. Source: our choice (COCO's)."""
MAX_FOUND = 1_000
"""Most boxes or points in a response. Source: our choice."""


class Box(NamedTuple):
    """A box in any unit; one whose corners are the wrong way round has no area and overlaps nothing."""

    left: float
    top: float
    right: float
    bottom: float
    label: str = ""
    """Of what it is a box; boxes of different labels do not match."""


def box_f1(found: Sequence[Box], expected: Sequence[Box], iou_floor: float) -> Verdict:
    """2 · Σ IoU of matched pairs / (boxes found + boxes expected); 1 if there are none of both.

    Coordinates are finite. Raises ResponseFaultError for more than `MAX_FOUND` boxes.
    """
    check_number(len(found), "boxes")
    if not found and not expected:
        return scored(1.0, {ACCURACY: 1.0, "matched": 0.0})
    # Sorted, so that order changes nothing, not even the last bit.
    overlap_FE = overlaps(sorted(found), sorted(expected))
    matched = best_total(np.where(overlap_FE < iou_floor, 0.0, overlap_FE))
    f1 = 2 * matched / (len(found) + len(expected))
    return scored(f1, {ACCURACY: f1, "matched": matched})


def check_number(num_found: int, what: str) -> None:
    """Raises ResponseFaultError for more of something than is judged."""
    if num_found > MAX_FOUND:
        raise ResponseFaultError(f"huge: {num_found} {what}, more than {MAX_FOUND}")


def overlaps(found: Sequence[Box], expected: Sequence[Box]) -> np.ndarray:
    """[F, E] float64: IoU of every pair, 0 where labels differ."""
    found_F4 = np.array([box[:4] for box in found], dtype=np.float64).reshape(-1, 4)
    expected_E4 = np.array([box[:4] for box in expected], dtype=np.float64).reshape(-1, 4)
    low_FE2 = np.maximum(found_F4[:, None, :2], expected_E4[None, :, :2])
    high_FE2 = np.minimum(found_F4[:, None, 2:], expected_E4[None, :, 2:])
    shared_FE = np.clip(high_FE2 - low_FE2, 0.0, None).prod(axis=2)
    union_FE = _areas(found_F4)[:, None] + _areas(expected_E4)[None, :] - shared_FE
    iou_FE = np.divide(shared_FE, union_FE, out=np.zeros_like(union_FE), where=union_FE > 0)
    same_FE = [[one.label == other.label for other in expected] for one in found]
    return np.where(np.array(same_FE, dtype=bool).reshape(iou_FE.shape), iou_FE, 0.0)


def _areas(boxes_N4: np.ndarray) -> np.ndarray:
    return np.clip(boxes_N4[:, 2:] - boxes_N4[:, :2], 0.0, None).prod(axis=1)
