"""The in-process engine alone in a process, behind vLLM's wire."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import torch

from k25_train.config.model import ModelConfig
from k25_train.errors import CheckpointError
from k25_train.export.hf_config import SpecialIds
from k25_train.export.model_of import model_of
from k25_train.rollout.engines.base import PauseMode
from k25_train.rollout.engines.in_process.engine import InProcessEngine
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.engines.server import run_server
from k25_train.rollout.serve.folder import DTYPES
from k25_train.rollout.serve.orders import ServeOrder


def serve_in_process(order: ServeOrder, ready: Callable[[], None]) -> int:
    """Serve until the process is interrupted; returns the exit status.

    Args:
        order: what and how.
        ready: called once it serves the labelled weights.

    Raises `CheckpointError` for a released folder, whose model no configuration describes, `EngineError` if
    its weights do not fit.
    """
    if order.folder.checkpoint == order.folder.path:
        raise CheckpointError(
            f"{order.folder.path}: --engine in_process serves checkpoints of this system\n  -> `k25-convert "
            "import` makes one of a released folder; vLLM serves it as it is"
        )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(order, model_of(order.folder.checkpoint), ready))
    return 0


async def _serve(order: ServeOrder, model: ModelConfig, ready: Callable[[], None]) -> None:
    ids = special_ids(order.folder.config)
    engine = InProcessEngine(
        model,
        ids=ids,
        max_running=order.max_running,
        device=order.device,
        dtype=getattr(torch, DTYPES[order.weights]),
        threads=order.threads,
        name=f"in-process engine at {order.url}",
    )
    try:
        await engine.pause(PauseMode.keep)
        await engine.stage(order.folder.path, order.label)
        await engine.commit(order.label)
        await engine.resume()
        served = ServedModel(vocab_size=model.vocab_size, media_pad=ids.media_pad, vision=model.vision)
        runner = await run_server(engine, served, order.host, order.port)
        try:
            ready()
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()
    finally:
        await engine.close()


def special_ids(config: dict[str, Any]) -> SpecialIds:
    """Ids of an exported folder's config.json."""
    return SpecialIds(
        bos=config["bos_token_id"],
        eos=config["eos_token_id"],
        pad=config["pad_token_id"],
        media_begin=config["vision_start_token_id"],
        media_end=config["vision_end_token_id"],
        media_pad=config["media_placeholder_token_id"],
        turn_end=None,
    )
