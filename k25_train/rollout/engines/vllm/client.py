"""Connects to a vLLM server."""

from k25_train.rollout.engines.faults import FaultLog
from k25_train.rollout.engines.http_client import HttpClient
from k25_train.rollout.engines.http_engine import HttpEngine
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.engines.vllm.wire import VllmWire
from k25_train.rollout.engines.wire import HttpLimits


async def connect_vllm(url: str, model: ServedModel, limits: HttpLimits) -> HttpEngine:
    """An engine of a server that `python -m k25_train.rollout serve` has started, or one like it.

    Args:
        url: base URL.
        model: what it serves.
        limits: of its requests.

    Raises `EngineError` if it does not answer, lacks the extension or has a label that is no step's number.
    """
    http = HttpClient(url, FaultLog(f"vLLM at {url}"), attempts=limits.attempts)
    engine = HttpEngine(VllmWire(http, seconds=limits.update_s), http, model, limits)
    try:
        await engine.connect()
    except BaseException:
        await http.close()
        raise
    return engine
