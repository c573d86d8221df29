"""Units of bytes, and large counts in words; torch-free."""

from parallel.units import GB, GIB, MIB

__all__ = ["GB", "GIB", "MIB", "format_count"]


def format_count(number: int) -> str:
    """A count in three or more digits with its unit: 1026.4B, 471.1M, 14.9K."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)
