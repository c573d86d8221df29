"""Connects to an SGLang server."""

from k25_train.rollout.engines.faults import FaultLog
from k25_train.rollout.engines.http_client import HttpClient
from k25_train.rollout.engines.http_engine import HttpEngine
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.engines.sglang.wire import SglangWire
from k25_train.rollout.engines.wire import HttpLimits


async def connect_sglang(url: str, model: ServedModel, limits: HttpLimits) -> HttpEngine:
    """An engine of a running server, started with `--weight-version 0 --enable-metrics`.

    Args:
        url: base URL.
        model: what it serves.
        limits: of its requests.

    Raises `EngineError` if it does not answer or has a label that is no step's number.
    """
    http = HttpClient(url, FaultLog(f"SGLang at {url}"), attempts=limits.attempts)
    engine = HttpEngine(SglangWire(http, seconds=limits.update_s), http, model, limits)
    try:
        await engine.connect()
    except BaseException:
        await http.close()
        raise
    return engine
