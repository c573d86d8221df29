"""Connects to one server, whichever wire it speaks."""

from typing import Protocol

from k25_train.rollout.engines.faults import FaultLog
from k25_train.rollout.engines.http_client import HttpClient
from k25_train.rollout.engines.http_engine import HttpEngine
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.engines.wire import HttpLimits, Wire


class MakesWire(Protocol):
    """A class of wires."""

    def __call__(self, http: HttpClient, *, seconds: float) -> Wire:
        """`seconds`: of a pause, an update or a probe."""


async def connect(kind: str, wire: MakesWire, url: str, model: ServedModel, limits: HttpLimits) -> HttpEngine:
    """An engine of a running server.

    Args:
        kind: what messages call it.
        wire: that it speaks.
        url: base URL.
        model: what it serves.
        limits: of its requests.

    Raises `EngineError` if it does not answer, lacks something or has a label that is no step's number.
    """
    http = HttpClient(url, FaultLog(f"{kind} at {url}"), attempts=limits.attempts)
    engine = HttpEngine(wire(http, seconds=limits.update_s), http, model, limits)
    try:
        await engine.connect()
    except BaseException:
        await http.close()
        raise
    return engine
