"""Gauges of a server, from the Prometheus text of its `/metrics`."""


def gauge(metrics: str, name: str) -> int:
    """Sum of a gauge over all of its labels. Raises ValueError if the text has none of this name."""
    lines = [line for line in metrics.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    if not lines:
        raise ValueError(f"/metrics has no {name}")
    return int(sum(float(line.rpartition(" ")[2]) for line in lines))
