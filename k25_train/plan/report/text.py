"""How the planner writes shapes, layers and bytes."""

from collections.abc import Iterable

from k25_train.units import GB


def format_shape(shape: Iterable[int]) -> str:
    """A shape: 4096 x 7168; empty for a scalar."""
    return " x ".join(map(str, shape))


def format_layers(layers: range) -> str:
    """A chunk's layers: 3-5, 4, or a dash."""
    if len(layers) < 2:
        return str(layers.start) if layers else "-"
    return f"{layers.start}-{layers.stop - 1}"


def format_gb(num_bytes: float) -> str:
    """Bytes in GB, without the unit."""
    size = num_bytes / GB
    return f"{size:,.0f}" if abs(size) >= 100 else f"{size:.2f}" if abs(size) >= 0.1 else f"{size:.4f}"
