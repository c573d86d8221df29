"""How late an event loop is: who waits for it sees that first."""

import asyncio
from collections import deque

INTERVAL_S = 0.01
KEPT = 4096
"""Lags that are remembered, the latest ones."""


class LagMeter:
    """Sleeps, and notes by how much it overslept."""

    def __init__(self) -> None:
        self._lags: deque[float] = deque(maxlen=KEPT)

    async def run(self) -> None:
        """Measure until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            await asyncio.sleep(INTERVAL_S)
            self._lags.append(max(clock() - began - INTERVAL_S, 0.0))

    def quantile(self, share: float) -> float:
        """Seconds that a share of the latest measurements did not exceed; 0 without any."""
        lags = sorted(self._lags)
        return lags[min(int(share * len(lags)), len(lags) - 1)] if lags else 0.0
