"""Connects to an SGLang server."""

from k25_train.rollout.engines.connecting import connect
from k25_train.rollout.engines.http_engine import HttpEngine
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.engines.sglang.wire import SglangWire
from k25_train.rollout.engines.wire import HttpLimits


async def connect_sglang(url: str, model: ServedModel, limits: HttpLimits) -> HttpEngine:
    """An engine of a running server, started with `--weight-version 0 --enable-metrics`. Raises as
    `connect`."""
    return await connect("SGLang", SglangWire, url, model, limits)
