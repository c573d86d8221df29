"""Log-probabilities of the engine in process are the trainer's own, of text and of images."""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.sampled_engine import picture

TOLERANCE = 1e-5
"""Nats, in float32: what an embedded engine has to keep."""
PICTURES = (picture(56, 56, 1), picture(140, 84, 2), picture(300, 200, 3))


def gaps(context: RankContext, kind: str) -> list[float]:
    """The largest difference of each response, rollout against a training forward of its very tokens."""
    from k25_train.export.released import to_ours
    from k25_train.model.weights import load_global_state
    from tests.helpers.hf_reference import random_checkpoint, tiny_model_config
    from tests.helpers.model_chunks import SERIAL, WHOLE_MODEL, build_whole_model, start, train_config

    model = tiny_model_config()
    ours = build_whole_model(model, train_config(), start(context, SERIAL, model.num_layers)).eval()
    weights = random_checkpoint(model)
    load_global_state(ours, WHOLE_MODEL, to_ours(weights))
    return asyncio.run(_generate_and_compare(ours, model, weights, kind))


async def _generate_and_compare(ours: Any, model: Any, weights: dict[str, Tensor], kind: str) -> list[float]:
    from tests.helpers.sampled_engine import build_engine, push, request

    images = {"text": (), "images": PICTURES}[kind]
    engine = build_engine(model, max_running=3)
    await push(engine, weights, 0)
    wanted = [request(model, each, length=6 + 9 * each, images=images, max_tokens=20) for each in range(5)]
    found = await asyncio.gather(*(engine.generate(each) for each in wanted))
    await engine.close()
    return [
        float(np.abs(got.logprobs - _trained(ours, model, got, each.images)).max())
        for each, got in zip(wanted, found, strict=True)
    ]


def _trained(ours: Any, model: Any, got: Any, images: tuple[bytes, ...]) -> np.ndarray:
    """[n] of the new tokens, by the model that trains."""
    from k25_train.model.packed_documents import PackedDocuments
    from k25_train.rollout.engines.images import load_image
    from tests.helpers.hf_reference import media_pad_id

    tokens = torch.from_numpy(np.concatenate([got.prompt_ids, got.token_ids])).long()
    places = (tokens == media_pad_id(model)).nonzero().squeeze(1)
    items = [load_image(data, model.vision) for data in images]
    with torch.no_grad():
        logits = ours(
            tokens,
            PackedDocuments.of((len(tokens),), tokens.device),
            None,
            places,
            torch.cat([item.patches for item in items]) if items else None,
            [item.grid for item in items],
        )
    logprobs = torch.log_softmax(logits.float().view(len(tokens), -1), -1)
    return logprobs[range(len(tokens) - 1), tokens[1:]][-len(got.token_ids) :].numpy()


@pytest.mark.parametrize("kind", ["text", "images"])
def test_log_probabilities_are_the_trainers(kind: str) -> None:
    (found,) = run_ranks(gaps, 1, kind)
    assert max(found) <= TOLERANCE, found
