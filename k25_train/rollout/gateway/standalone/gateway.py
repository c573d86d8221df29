"""A gateway before engines that somebody else runs: sessions by an admin endpoint, traces in a folder."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from k25_train.config.rollout import EngineKind, RolloutConfig
from k25_train.config.schema import Config
from k25_train.data.open_sources import tokenizer_path
from k25_train.data.tokenizer import load_tokenizer
from k25_train.errors import ConfigError
from k25_train.rollout.asking import Asking
from k25_train.rollout.engines.pool import EnginePool
from k25_train.rollout.engines.remote import connect_engines
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.gateway.registry import KEY_PREFIX, Registry
from k25_train.rollout.gateway.server import Gateway, serve_app
from k25_train.rollout.gateway.standalone.admin import Admin
from k25_train.rollout.gateway.standalone.health import Health
from k25_train.rollout.gateway.standalone.traces import Traces, keep_config
from k25_train.rollout.prompts import Prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOrder:
    """What a standalone gateway is to do."""

    config_path: Path
    """`config.yaml` of the run whose weights the engines serve."""
    config: Config
    """What is in it."""
    urls: Sequence[str]
    """Of the engines; none for those of the configuration."""
    folder: Path
    """Where traces go."""
    host: str
    port: int
    health_s: float
    """Seconds between two looks at the engines, and that an answer may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A gateway that serves."""

    url: str
    """Base URL."""
    admin_key: str
    """With which sessions are opened; told once."""


@contextlib.asynccontextmanager
async def standalone_gateway(order: GatewayOrder, tell: Callable[[str], None]) -> AsyncIterator[Serving]:
    """Serve within the block; `tell` gets to know of engines that are fenced off, or serve again.

    Raises `ConfigError` for a configuration without rollouts or engines, `EngineError` for an engine that
    does not answer at first, `RolloutError` for a damaged journal or a port that is taken.
    """
    path = tokenizer_path(order.config.data)
    tokenizer = load_tokenizer(path)
    model = ServedModel(
        vocab_size=order.config.model.vocab_size,
        media_pad=tokenizer.media_pad,
        vision=order.config.model.vision,
    )
    rollout = _rollout_of(order)
    engines = await connect_engines(rollout, model)
    async with contextlib.AsyncExitStack() as opened:
        pool = EnginePool.of(engines, rollout.update_timeout_s)
        opened.push_async_callback(pool.close)
        health = Health(pool, order.health_s)
        for text in await health.look():
            tell(text)

        prompts = Prompts(tokenizer, path, model, rollout.max_prompt_tokens)
        keep_config(order.config_path, order.folder)
        asking = Asking(rollout, order.config.model.vocab_size, pool, count=lambda _: None)
        traces = Traces(order.folder, asking, prompts)
        opened.callback(traces.close)

        registry, key = Registry(), KEY_PREFIX + "admin-" + secrets.token_urlsafe(32)
        admin = Admin(registry, traces, health, key, max_turns=rollout.manager.max_turns)
        opened.push_async_callback(admin.close)
        app = Gateway(registry, lambda: _how(pool, health)).app()
        admin.add_to(app)
        runner, url = await serve_app(app, order.host, [order.port])
        opened.push_async_callback(runner.cleanup)
        looking = asyncio.create_task(_look(pool, health, order.health_s, tell))
        opened.callback(looking.cancel)
        yield Serving(url=url, admin_key=key)


def _rollout_of(order: GatewayOrder) -> RolloutConfig:
    rollout = order.config.rollout
    if rollout is None:
        raise ConfigError(
            f"{order.config_path}: has no rollout section\n  -> name the config.yaml of a run of k25-rl"
        )
    if not order.urls and not rollout.urls:
        raise ConfigError(
            f"{order.config_path}: its engine is in the run's own process\n  -> start one with `k25-rollout "
            "serve`, and name it with --url"
        )
    if not order.urls:
        return rollout
    kind = EngineKind.vllm if rollout.engine is EngineKind.in_process else rollout.engine
    return replace(rollout, engine=kind, urls=list(order.urls))


def _how(pool: EnginePool, health: Health) -> dict[str, object]:
    """What `/health` says of engines."""
    return {"version": health.version, "engines_serving": pool.num_serving, "engines_fenced": pool.fenced()}


async def _look(pool: EnginePool, health: Health, seconds: float, tell: Callable[[str], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        # First what requests have found out.
        for text in [*pool.take_events(), *await health.look()]:
            tell(text)
