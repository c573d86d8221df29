"""Engines to which one set of tests is put, whatever is between them and the caller."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from PIL import Image
from safetensors.torch import save_file

from k25_train.config.vision import VisionConfig
from k25_train.rollout.engines.base import Engine, PauseMode, Request, Sampling
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.engines.server import run_server
from k25_train.rollout.engines.sglang.client import connect_sglang
from k25_train.rollout.engines.vllm.client import connect_vllm
from k25_train.rollout.engines.wire import HttpLimits
from tests.helpers.hf_reference import random_checkpoint, tiny_model_config
from tests.helpers.sampled_engine import build_engine, special_ids
from tests.helpers.sglang_stub import SglangStub
from tests.helpers.table_engine import MEDIA_PAD, TableEngine, served_model, table_tensors

LIMITS = HttpLimits(request_s=60.0, update_s=30.0, max_running=4, attempts=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An engine under test."""

    open: Callable[[], AbstractAsyncContextManager[Engine]]
    """Connects; it has the first weights, or those that an earlier test has committed."""
    model: ServedModel
    weights: tuple[Path, Path]
    """Folders of two versions."""
    prompt: tuple[int, ...]
    image_prompt: tuple[int, ...]
    """With one placeholder."""
    num_tokens: int
    """So many take long enough for a pause in their middle."""
    tolerance: float
    """Largest difference between a token's log-probability when it was drawn and the probe's, in nats."""
    same_draws: bool
    """Whether a draw depends on seed and position alone."""

    def request(self, **changes: object) -> Request:
        """A request for a few tokens; `changes` of its fields and of its sampling's."""
        sampling = {"max_tokens": 8, "temperature": 1.0, "seed": 1, "stop_ids": (), "forbidden_ids": ()}
        values: dict[str, object] = {"key": "task/0", "prompt_ids": self.prompt}
        for name, value in changes.items():
            (sampling if name in sampling else values)[name] = value
        if values.get("images") and "prompt_ids" not in changes:
            values["prompt_ids"] = self.image_prompt
        return Request(**values, sampling=Sampling(**sampling))  # type: ignore[arg-type]


def picture(shade: int, size: tuple[int, int] = (84, 56)) -> bytes:
    """A PNG of one shade of grey."""
    file = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def table_weights(work: Path) -> tuple[Path, Path]:
    """Two versions of the table engine's weights."""
    folders = work / "old", work / "new"
    for seed, folder in enumerate(folders):
        folder.mkdir()
        save_file(dict(table_tensors(seed)), folder / "model-00001.safetensors")
    return folders


def table_subject(
    vision: VisionConfig,
    weights: tuple[Path, Path],
    through: Callable[[Engine, ServedModel], object],
    *,
    same_draws: bool,
) -> Subject:
    """The table engine behind what `through` puts between."""
    model = served_model(vision)

    def open_() -> AbstractAsyncContextManager[Engine]:
        return through(TableEngine(model, step_s=0.002), model)  # type: ignore[return-value]

    return Subject(
        open=open_,
        model=model,
        weights=weights,
        prompt=(1, 2, 3),
        image_prompt=(1, MEDIA_PAD, 5),
        num_tokens=60,
        tolerance=1e-6,
        same_draws=same_draws,
    )


@contextlib.contextmanager
def in_process_subject(work: Path, through: Callable[[Engine, ServedModel], object]) -> Iterator[Subject]:
    """The in-process engine with random weights behind what `through` puts between."""
    model, ids = tiny_model_config(), special_ids(tiny_model_config())
    folders = work / "old", work / "new"
    for seed, folder in enumerate(folders):
        folder.mkdir()
        save_file(random_checkpoint(model, seed), folder / "model-00001.safetensors")
    engine = build_engine(model)
    served = ServedModel(vocab_size=model.vocab_size, media_pad=ids.media_pad, vision=model.vision)
    asyncio.run(_begin(engine, folders[0]))
    try:
        yield Subject(
            open=lambda: through(engine, served),  # type: ignore[arg-type,return-value]
            model=served,
            weights=folders,
            prompt=(10, 11, 12),
            image_prompt=(10, ids.media_pad, 12),
            num_tokens=40,
            tolerance=1e-5,
            same_draws=True,
        )
    finally:
        asyncio.run(engine.close())


async def _begin(engine: Engine, folder: Path) -> None:
    await engine.pause(PauseMode.keep)
    await engine.stage(folder, 0)
    await engine.commit(0)
    await engine.resume()


@contextlib.asynccontextmanager
async def directly(engine: Engine, _: ServedModel) -> AsyncIterator[Engine]:
    """Nothing between."""
    yield engine


@contextlib.asynccontextmanager
async def over_vllm_wire(engine: Engine, model: ServedModel) -> AsyncIterator[Engine]:
    """Our server and the vLLM client."""
    runner = await run_server(engine, model, "127.0.0.1", 0)
    client = await connect_vllm(f"http://127.0.0.1:{runner.addresses[0][1]}", model, LIMITS)
    try:
        yield client
    finally:
        await client.close()
        await runner.cleanup()


@contextlib.asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    """Serve an application on a free port of this host; its URL."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def over_sglang_wire(engine: Engine, model: ServedModel) -> AsyncIterator[Engine]:
    """A stub of SGLang and its client."""
    async with serving(SglangStub(engine, model).app()) as url:
        client = await connect_sglang(url, model, LIMITS)
        try:
            yield client
        finally:
            await client.close()
