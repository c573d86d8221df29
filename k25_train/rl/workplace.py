"""What rollouts need wherever their event loop is: prompts, judges, sandboxes; and rollouts made with it."""

import os
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from k25_train.config.schema import Config
from k25_train.data.open_sources import tokenizer_path
from k25_train.data.tokenizer import Tokenizer, load_tokenizer
from k25_train.environments.adapters.verifiers_server import stop_servers
from k25_train.environments.environment import Services
from k25_train.rl.rewards.agentic import AgenticJudge
from k25_train.rl.rewards.generative import open_rubrics
from k25_train.rl.rewards.judges import Judges, open_judges
from k25_train.rl.sandboxes import sandboxes_of
from k25_train.rollout import local
from k25_train.rollout.asking import Asking, Generates
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.gateway.agents import GatewayAgents
from k25_train.rollout.local import LocalRollouts
from k25_train.rollout.manager.engines_seen import Engines
from k25_train.rollout.manager.manager import RolloutManager
from k25_train.rollout.prompts import Prompts

MOST_WORKERS = 8
"""Processes that apply rules; more where a site's rules are slow. Our choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """What one event loop's rollouts are made with."""

    model: ServedModel
    """What is known of the model that engines serve."""
    tokenizer: Tokenizer
    """Its vocabulary."""
    prompts: Prompts
    """Between messages and ids."""
    judges: Judges
    """Judges of all tasks."""
    services: Services
    """What environments may use."""
    close: Callable[[], Coroutine[Any, Any, None]]
    """Ends what it has started."""


async def open_workplace(config: Config, shards: int = 1) -> Workplace:
    """Open judges and sandboxes, for one of so many event loops. Raises as they do for what the machine
    lacks."""
    rollout, environment = config.rollout, config.environment
    assert rollout is not None and environment is not None
    path = tokenizer_path(config.data)
    tokenizer = load_tokenizer(path)
    model = served_model(config, tokenizer)
    async with AsyncExitStack() as opened:
        opened.push_async_callback(stop_servers)
        rubrics = await open_rubrics(rollout, environment, config.model.vision)
        opened.push_async_callback(rubrics.close)
        sandboxes = sandboxes_of(config, shards)
        opened.push_async_callback(sandboxes.close)
        workers = min(MOST_WORKERS, os.cpu_count() or 1)
        judges = open_judges(
            rollout.judge_timeout_s,
            workers,
            # As many as the model that judges is asked for at once.
            places=rollout.max_running if rubrics.checks else workers,
            rubrics=rubrics.checks,
            recipes=rubrics.recipes,
            others=[
                AgenticJudge(chat, sandboxes, rollout.manager.tool_timeout_s)
                for chat in rubrics.chats.values()
            ],
        )
        opened.push_async_callback(judges.close)
        return Workplace(
            model=model,
            tokenizer=tokenizer,
            prompts=Prompts(tokenizer, path, model, rollout.max_prompt_tokens),
            judges=judges,
            services=Services(
                sandboxes=sandboxes,
                judging=judges,
                tool_timeout_s=rollout.manager.tool_timeout_s,
                chats=rubrics.chats,
            ),
            close=opened.pop_all().aclose,
        )


def rollouts_at(
    config: Config,
    workplace: Workplace,
    engines: Generates,
    *,
    seen: Engines,
    shards: int,
    count: Callable[[str], None],
    notice: Callable[[str], None],
) -> LocalRollouts:
    """Rollouts of this event loop.

    Args:
        config: of the run.
        workplace: of this event loop.
        engines: what generates.
        seen: how full it is.
        shards: event loops that share what may live at once.
        count: told what has happened, by kind.
        notice: tells what there is to know.
    """
    rollout = config.rollout
    assert rollout is not None
    share = replace(
        rollout.manager,
        max_live=max(1, rollout.manager.max_live // shards),
        max_sandboxes=max(1, rollout.manager.max_sandboxes // shards),
    )
    return LocalRollouts(
        rollout,
        local.Parts(
            asking=Asking(rollout, config.model.vocab_size, engines, count),
            prompts=workplace.prompts,
            services=workplace.services,
            manager=RolloutManager(share, engines=seen, notice=notice),
            count=count,
            agents=GatewayAgents(
                workplace.prompts, workplace.services.sandboxes, share, count, shards=shards
            ),
        ),
    )


def served_model(config: Config, tokenizer: Tokenizer) -> ServedModel:
    """What is known of the model that engines serve."""
    return ServedModel(
        vocab_size=config.model.vocab_size, media_pad=tokenizer.media_pad, vision=config.model.vision
    )
