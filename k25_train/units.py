"""Units of bytes, and large counts and durations in words; torch-free."""

from parallel.units import GB, GIB, MIB

__all__ = ["GB", "GIB", "MIB", "format_count", "format_duration"]


def format_count(number: int) -> str:
    """A count in three or more digits with its unit: 1026.4B, 471.1M, 14.9K."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def format_duration(seconds: float) -> str:
    """A duration for people: 45s, 3m12s, 2h05m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 24 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
