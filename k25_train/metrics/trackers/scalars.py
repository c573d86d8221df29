"""What of a row goes to a service: its numbers. Lists of layers are for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

from k25_train.metrics.sinks import Row, is_finite


def scalars_of(row: Row) -> dict[str, float]:
    """Name -> number, without the step and what is not finite."""
    return {
        key: value
        for key, value in row.items()
        if key != "step" and not isinstance(value, Sequence) and value is not None and is_finite(value)
    }
