"""Connects to a vLLM server."""

from k25_train.rollout.engines.connecting import connect
from k25_train.rollout.engines.http_engine import HttpEngine
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.engines.vllm.wire import VllmWire
from k25_train.rollout.engines.wire import HttpLimits


async def connect_vllm(url: str, model: ServedModel, limits: HttpLimits) -> HttpEngine:
    """An engine of a server that `python -m k25_train.rollout serve` has started, or one like it. Raises as
    `connect`, also where the extension of its workers is missing."""
    return await connect("vLLM", VllmWire, url, model, limits)
