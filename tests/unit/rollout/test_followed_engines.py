"""Engines whose weights another process pushes: clients follow the versions, and refuse older ones."""

import asyncio

import pytest

from k25_train.rollout.engines.base import Engine, EngineError, Request, Sampling
from k25_train.rollout.engines.http_engine import HttpEngine
from k25_train.rollout.engines.served_model import ServedModel
from tests.helpers.engine_subjects import over_vllm_wire
from tests.helpers.scripted_engine import ScriptedEngine
from tests.helpers.tiny_shards import tiny_vision_config

REQUEST = Request(
    key="t",
    prompt_ids=(1, 2),
    sampling=Sampling(max_tokens=4, temperature=1.0, seed=5, stop_ids=(250,), forbidden_ids=(251,)),
)


async def version_of(client: Engine) -> int:
    return (await client.generate(REQUEST)).spans[0].version


def test_a_client_follows_versions_that_it_has_not_pushed() -> None:
    async def trial() -> None:
        engine = ScriptedEngine()
        engine.version = 0
        model = ServedModel(vocab_size=256, media_pad=252, vision=tiny_vision_config())
        async with over_vllm_wire(engine, model) as client:
            assert isinstance(client, HttpEngine)
            assert await version_of(client) == 0
            # Pushed by somebody else: unknown until that is said.
            engine.version = 1
            with pytest.raises(EngineError, match="version"):
                await version_of(client)
            client.follow(1)
            assert await version_of(client) == 1
            # Who pushes may be ahead of who says so, and never behind.
            engine.version = 2
            assert await version_of(client) == 2
            client.follow(2)
            engine.version = 1
            with pytest.raises(EngineError, match="version"):
                await version_of(client)

    asyncio.run(trial())
