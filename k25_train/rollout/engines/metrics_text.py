"""Gauges of a server, from the Prometheus text of its `/metrics`."""


def gauge(metrics: str, name: str) -> int:
    """Sum of a gauge over all of its labels. Raises ValueError if the text has none of this name."""
    return int(sum(_values(metrics, name)))


def highest(metrics: str, name: str) -> float:
    """Highest value of a gauge over all of its labels, such as of the fullest of several caches. Raises
    ValueError if the text has none of this name."""
    return max(_values(metrics, name))


def _values(metrics: str, name: str) -> list[float]:
    lines = [line for line in metrics.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    if not lines:
        raise ValueError(f"/metrics has no {name}")
    return [float(line.rpartition(" ")[2]) for line in lines]
