"""What tests of the engine in process share: a model, two versions of its weights, requests, a reference."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
import torch

from k25_train.rollout.engines.base import Generated, ProbeSequence, Request
from k25_train.rollout.engines.in_process.engine import InProcessEngine
from k25_train.rollout.engines.in_process.responses import expand
from tests.helpers.hf_reference import hf_logits, random_checkpoint, tiny_model_config
from tests.helpers.sampled_engine import picture, push, request

MODEL = tiny_model_config()
WEIGHTS = (random_checkpoint(MODEL, 0), random_checkpoint(MODEL, 1))
"""Of two versions."""
PICTURES = (picture(56, 56, 1), picture(100, 40, 2))
TOLERANCE = 1e-5
"""Nats."""


def run[T](engine: InProcessEngine, body: Coroutine[Any, Any, T]) -> T:
    """With the first weights, and not paused."""

    async def whole() -> T:
        await push(engine, WEIGHTS[0], 0)
        return await asyncio.wait_for(body, 300)

    return asyncio.run(whole())


def requests(number: int, **sampling: Any) -> list[Request]:
    """Of unlike lengths, every third one with two images."""
    return [
        request(
            MODEL,
            each,
            length=5 + 7 * (each % 4),
            images=PICTURES if each % 3 == 1 else (),
            **({"max_tokens": 4 + 3 * (each % 3)} | sampling),
        )
        for each in range(number)
    ]


async def together(engine: InProcessEngine, wanted: list[Request]) -> list[Generated]:
    return await asyncio.gather(*(engine.generate(each) for each in wanted))


def whole(wanted: Request, got: Generated) -> ProbeSequence:
    """Prompt, earlier tokens and new ones, with one placeholder for each image."""
    return ProbeSequence((*wanted.prompt_ids, *wanted.response_ids, *got.token_ids.tolist()), wanted.images)


def assert_same(ones: list[Generated], others: list[Generated]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.prompt_ids.tolist() == other.prompt_ids.tolist()
        assert one.finish_reason is other.finish_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=TOLERANCE)


def full_logprobs(reference: torch.nn.Module, sequence: ProbeSequence) -> np.ndarray:
    """[n - 1] of every token but the first."""
    expanded = expand(sequence, "test", MODEL.vision, MODEL.vocab_size - 2)
    ids = torch.tensor(expanded.ids)
    pixels = [image.patches / 127.5 - 1 for image in expanded.images]
    grids = [(1, image.grid.h, image.grid.w) for image in expanded.images]
    with torch.no_grad():
        logits = hf_logits(reference, ids, [len(ids)], torch.cat(pixels) if pixels else None, grids)
    return torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]].numpy()
