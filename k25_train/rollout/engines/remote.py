"""The engines of `rollout.urls`, connected."""

import asyncio

from k25_train.config.rollout import EngineKind, RolloutConfig
from k25_train.rollout.engines.http_engine import HttpEngine
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.engines.sglang.client import connect_sglang
from k25_train.rollout.engines.vllm.client import connect_vllm
from k25_train.rollout.engines.wire import HttpLimits

CONNECT = {EngineKind.vllm: connect_vllm, EngineKind.sglang: connect_sglang}


async def connect_engines(rollout: RolloutConfig, model: ServedModel) -> list[HttpEngine]:
    """Every server of a configuration whose engine is not in process, in the order of its URLs.

    Args:
        rollout: kind, URLs and limits.
        model: what they serve.

    Raises `EngineError` that names the first one which does not answer or lacks something; none stays
    connected then.
    """
    limits, connect = HttpLimits.of(rollout), CONNECT[rollout.engine]
    found = await asyncio.gather(
        *(connect(url, model, limits) for url in rollout.urls), return_exceptions=True
    )
    errors = [each for each in found if isinstance(each, BaseException)]
    engines = [each for each in found if not isinstance(each, BaseException)]
    if errors:
        for engine in engines:
            await engine.close()
        raise errors[0]
    return engines
