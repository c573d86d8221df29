"""The engine in process with random weights, and requests for it."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from k25_train.config.model import ModelConfig
from k25_train.export.hf_config import SpecialIds
from k25_train.export.stream import NamedTensor
from k25_train.rollout.engines.base import PauseMode, Request, Sampling
from k25_train.rollout.engines.in_process.engine import InProcessEngine
from tests.helpers.hf_reference import media_pad_id

END = 1
"""The id that ends a response."""


def special_ids(model: ModelConfig) -> SpecialIds:
    """Ids as the tests' model has them."""
    pad = media_pad_id(model)
    return SpecialIds(
        bos=0, eos=END, pad=pad + 1, media_begin=pad - 2, media_end=pad - 1, media_pad=pad, turn_end=None
    )


def forbidden_ids(model: ModelConfig) -> tuple[int, ...]:
    """Ids of media."""
    ids = special_ids(model)
    return ids.media_begin, ids.media_end, ids.media_pad


def build_engine(model: ModelConfig, max_running: int = 4, **arguments: Any) -> InProcessEngine:
    """An engine without weights, in float32 on the CPU."""
    chosen = {"device": "cpu", "dtype": torch.float32, "threads": 0} | arguments
    return InProcessEngine(model, ids=special_ids(model), max_running=max_running, **chosen)


def stream(state: Mapping[str, Tensor]) -> Iterator[NamedTensor]:
    """Weights in the release's names, one by one."""
    return (NamedTensor(name, tensor) for name, tensor in state.items())


async def push(engine: InProcessEngine, state: Mapping[str, Tensor], version: int) -> None:
    """Have it sample from these weights."""
    await engine.pause(PauseMode.keep)
    await engine.stage(stream(state), version)
    await engine.commit(version)
    await engine.resume()


def picture(width: int, height: int, seed: int) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def request(
    model: ModelConfig,
    number: int,
    *,
    length: int = 12,
    images: Sequence[bytes] = (),
    response_ids: tuple[int, ...] = (),
    **sampling: Any,
) -> Request:
    """A random prompt; the images' placeholders are after its first token, one other token between two."""
    rng = np.random.default_rng(number)
    ids = rng.integers(2, model.vocab_size - 8, length).tolist()
    for place in range(len(images)):
        ids[1 + 2 * place : 1 + 2 * place] = [media_pad_id(model)]
    values: dict[str, Any] = {
        "max_tokens": 8,
        "temperature": 1.0,
        "seed": 1000 + number,
        "stop_ids": (END,),
        "forbidden_ids": forbidden_ids(model),
    }
    return Request(
        key=f"task {number}",
        prompt_ids=tuple(ids),
        images=tuple(images),
        response_ids=response_ids,
        sampling=Sampling(**values | sampling),
    )
