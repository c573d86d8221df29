"""Bytes in words; torch-free."""

_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3))


def in_units(num_bytes: int) -> str:
    """Bytes in three digits with their decimal unit."""
    for unit, size in _UNITS:
        if num_bytes >= size:
            return (
                f"{num_bytes / size:.3g} {unit}"
                if num_bytes < 999.5 * size
                else f"{num_bytes / size:,.0f} {unit}"
            )
    return f"{num_bytes} B"
