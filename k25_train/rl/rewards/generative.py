"""The generative reward model of a run, as configured.

    environment.tasks.NAME.rubrics ─► a recipe for each rule of NAME's tasks: verified · (1 + Σ bonus · score)
    rollout.judge_url, judge_model ─► a vLLM server, its vocabulary ─► EngineChat ─► a RubricJudge a set

Its weights are pinned by `rollout.judge_version`, also when a run is gone on with; a server that is given
others in the middle of a run scores nothing more.
"""

import json
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from k25_train.config.environment import EnvironmentConfig
from k25_train.config.rollout import RolloutConfig
from k25_train.config.vision import VisionConfig
from k25_train.data.tokenizer import load_tokenizer
from k25_train.environments.environment import Chat
from k25_train.errors import ConfigError
from k25_train.rl.rewards.composite import Recipe, RubricCheck, with_rubrics
from k25_train.rl.rewards.judges import LENGTH_PENALTY
from k25_train.rl.rewards.references import UNIT_TESTS
from k25_train.rl.rewards.rubrics.cache import RubricCache
from k25_train.rl.rewards.rubrics.engine_chat import EngineChat
from k25_train.rl.rewards.rubrics.judge import RubricJudge
from k25_train.rl.rewards.rubrics.rubric import SETS
from k25_train.rl.rewards.text_rules import RULES
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.engines.vllm.client import connect_vllm
from k25_train.rollout.engines.wire import HttpLimits
from k25_train.rollout.prompts import Prompts

VOCABULARIES = ("tiktoken.model", "tokenizer.json")
"""Files of a served folder, one of which it has."""
REPLIES_IN_TIME = 2
"""Replies that take their longest fit `rollout.judge_timeout_s`, so that a slow one is told by its name. Our
choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rubrics:
    """What `open_judges` needs for the rubrics of a run."""

    checks: Mapping[str, RubricCheck]
    """By the names of their sets."""
    recipes: Mapping[str, Recipe]
    """Judges that put them on top of rules."""
    chats: Mapping[str, Chat]
    """The model itself, as `judge`; empty where none is configured."""
    close: Callable[[], Coroutine[Any, Any, None]]
    """Ends the connection; the server goes on."""


async def open_rubrics(
    rollout: RolloutConfig, environment: EnvironmentConfig, vision: VisionConfig
) -> Rubrics:
    """The rubrics of all sources of tasks; empty, and connected to nothing, where none has any.

    Args:
        vision: of the policy. Images are named to the judging model, and never shown.

    Raises `ConfigError` for a set of rubrics that there is not, a folder that says nothing of a model, and a
    server of another version; `EngineError` for one that does not answer.
    """
    bonuses = {
        name: source.rubrics for name, source in environment.tasks.items() if source.weight and source.rubrics
    }
    for name, each in bonuses.items():
        if unknown := sorted(each.keys() - SETS):
            raise ConfigError(
                f"environment.tasks.{name}.rubrics: {', '.join(unknown)}: no such set of rubrics\n"
                f"  -> use some of {', '.join(sorted(SETS))} (k25_train/rl/rewards/README.md)"
            )
    if rollout.judge_url is None:
        return Rubrics(checks={}, recipes={}, chats={}, close=_nothing)
    recipes = {
        with_rubrics(rule, name): Recipe(rules={rule: 1.0}, length_penalty=LENGTH_PENALTY, rubrics=each)
        for name, each in bonuses.items()
        for rule in (*RULES, UNIT_TESTS)
    }
    chat, close = await _connect(rollout, vision)
    cache = RubricCache()
    checks = {
        name: RubricJudge(
            SETS[name],
            chat,
            version=str(rollout.judge_version),
            cache=cache,
            attempts=rollout.max_attempts,
            timeout_s=rollout.judge_timeout_s / REPLIES_IN_TIME,
        )
        for name in sorted({name for each in bonuses.values() for name in each})
    }
    return Rubrics(checks=checks, recipes=recipes, chats={"judge": chat}, close=close)


async def _connect(
    rollout: RolloutConfig, vision: VisionConfig
) -> tuple[EngineChat, Callable[[], Coroutine[Any, Any, None]]]:
    """The model that judges, and what ends the connection."""
    assert rollout.judge_url is not None and rollout.judge_model is not None
    folder = Path(rollout.judge_model)
    vocab_size, context = _sizes(folder)
    path = _vocabulary(folder)
    tokenizer = load_tokenizer(path)
    # The engine's own limit of a request is that of a reply: what comes later is of no use.
    limits = replace(
        HttpLimits.of(rollout), request_s=rollout.judge_timeout_s, update_s=rollout.judge_timeout_s
    )
    served = ServedModel(vocab_size=vocab_size, media_pad=tokenizer.media_pad, vision=vision)
    prompts = Prompts(tokenizer, path, served, context)
    async with AsyncExitStack() as opened:
        engine = await connect_vllm(rollout.judge_url, served, limits)
        opened.push_async_callback(engine.close)
        chat = EngineChat(engine, prompts, rollout.judge_max_tokens, context - rollout.judge_max_tokens)
        if (version := await chat.version()) != str(rollout.judge_version):
            raise ConfigError(
                f"rollout.judge_version={rollout.judge_version}: {rollout.judge_url} serves version "
                f"{version}\n  -> name that one, or serve the other"
            )
        return chat, opened.pop_all().aclose


def _sizes(folder: Path) -> tuple[int, int]:
    """Ids of a released folder's model, and tokens of its context."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        text = config.get("text_config", config)
        return int(text["vocab_size"]), int(text["max_position_embeddings"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"rollout.judge_model={folder}: {path} describes no model ({type(error).__name__}: {error})\n"
            "  -> name the folder that the server of rollout.judge_url serves"
        ) from error


def _vocabulary(folder: Path) -> str:
    found = [folder / name for name in VOCABULARIES if (folder / name).is_file()]
    if not found:
        raise ConfigError(
            f"rollout.judge_model={folder}: has neither {' nor '.join(VOCABULARIES)}\n"
            "  -> name the folder that the server of rollout.judge_url serves, with its vocabulary"
        )
    return str(found[0])


async def _nothing() -> None:
    """Nothing is connected."""
