"""Gymnasium's registered environments, in this process: spaces of text, or of few numbers, as one tool.

    family: gymnasium    options: {id: FrozenLake-v1, actions: 'left,down,right,up', prompt: …}

The task's number is the seed of `reset`; with it, the same actions give the same observations, so that a
rollout that was interrupted goes on. Source: gymnasium 1.4, `Env.reset` and `Env.step`.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from k25_train.environments.adapters.messages import (
    as_text,
    content_of,
    is_reward,
    refusal,
    result,
    tool,
    verdict_of,
)
from k25_train.environments.adapters.sources import need, read_object, read_text, reward_rule, seeded_task
from k25_train.environments.adapters.spaces import UnsupportedSpaceError, element_of, plain, schema_of
from k25_train.environments.base import Response, Task, Verdict
from k25_train.environments.environment import Action, EnvironmentFaultError, Observation, Services, Tool
from k25_train.environments.family import Options, Split, read_range
from k25_train.errors import ConfigError, MachineError

NAME = "gymnasium"
STEP = "step"
"""The one tool."""
_COLOURED = re.compile(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m", re.DOTALL)


class GymnasiumTasks:
    """Every seed of one registered environment is a task."""

    name = NAME

    def __init__(self, options: Mapping[str, str]) -> None:
        """Options: `id` (required), `kwargs` (JSON for `gymnasium.make`), `actions` (names of a Discrete
        space's actions, in order, by commas), `prompt`, `reward` (sum | last), `max_turns`. Raises
        ConfigError, for an id that is not registered and for spaces that have no form, too."""
        need(NAME, options, "id", "FrozenLake-v1")
        given = Options(NAME, options)
        self._id = given.take("id", "FrozenLake-v1", read_text, "must be an id of gymnasium's registry")
        kwargs = given.take("kwargs", "{}", read_object, "must be a JSON object")
        names = given.take("actions", "", _read_names, "must be different names, by commas")
        self._prompt = given.take(
            "prompt", "Reach the goal. Each turn, call step once.", read_text, "is empty"
        )
        rule = reward_rule(given)
        self._max_turns = given.take("max_turns", "100", read_range, "must be 1 or more")[-1]
        given.end()
        self._setup: dict[str, Any] = {
            "id": self._id,
            "kwargs": kwargs,
            "actions": list(names),
            "reward": rule,
        }
        self._check()

    def task(self, split: Split, number: int) -> Task:
        """The task of a seed."""
        family = f"{NAME}/{self._id}"
        return seeded_task(
            NAME, family, split, number, prompt=self._prompt, setup=self._setup, max_turns=self._max_turns
        )

    def _check(self) -> None:
        try:
            environment = _make(self._setup)
        except MachineError:
            raise
        except Exception as error:
            raise ConfigError(
                f"options.id={self._id} of the family {NAME}: {type(error).__name__}: {error}\n"
                "  -> `python -c 'import gymnasium; gymnasium.pprint_registry()'` lists ids; `kwargs` go to "
                "gymnasium.make"
            ) from error
        names, space = self._setup["actions"], environment.action_space
        environment.close()
        try:
            schema_of(space, names)
            schema_of(environment.observation_space)
        except UnsupportedSpaceError as error:
            raise ConfigError(
                f"options.id={self._id} of the family {NAME}: {error}\n"
                "  -> wrap it so that it has spaces of text or few numbers, or use its own family"
            ) from error
        if names and len(names) != getattr(space, "n", None):
            raise ConfigError(
                f"options.actions of the family {NAME}: {len(names)} names, and {self._id} has {space}\n"
                "  -> give one name for each action, in order"
            )


class GymnasiumEnvironment:
    """See `Environment`."""

    is_replayable = True

    def __init__(self, task: Task, services: Services) -> None:
        self._task, self._setup = task, task.setup
        self._timeout_s = services.tool_timeout_s
        self._environment: Any = None
        self._rewards: list[float] = []
        self._is_over = False
        self.tools: tuple[Tool, ...] = ()

    async def reset(self) -> Observation:
        """The prompt, with what is seen at first."""
        self._environment = await self._limited("make", partial(_make, self._setup))
        names, space = self._setup["actions"], self._environment.action_space
        schema = {"action": schema_of(space, names)}
        parameters = {"type": "object", "properties": schema, "required": ["action"]}
        self.tools = (tool(STEP, "Does one action; answers with what is seen then.", parameters),)
        seen, _ = await self._limited("reset", partial(self._environment.reset, seed=self._setup["seed"]))
        (first, *others) = self._task.messages
        text = f"{first['content']}\n\n{await self._text(seen)}"
        return Observation(messages=({**first, "content": content_of(text, ())}, *others))

    async def step(self, action: Action) -> Observation:
        """What comes of its calls, one after another; a turn without any is the last."""
        told = refusal(action, [STEP])
        if told is not None:
            return told
        if not action.calls:
            return Observation(done=True)
        messages = []
        for call in action.calls:
            if self._is_over:
                messages.append(result(call, "not done: it is over"))
                continue
            try:
                done = element_of(
                    self._environment.action_space, call.arguments.get("action"), self._setup["actions"]
                )
            except (ValueError, TypeError, OverflowError) as error:
                messages.append(result(call, f"no action: {error}"))
                continue
            messages.append(result(call, await self._step(done)))
        return Observation(messages=tuple(messages), done=self._is_over)

    async def judge(self, response: Response) -> Verdict:
        """What its rewards amount to."""
        return verdict_of(self._rewards, self._setup["reward"])

    async def close(self) -> None:
        """Close it."""
        environment, self._environment = self._environment, None
        if environment is not None:
            await self._limited("close", environment.close)

    async def _step(self, done: Any) -> str:
        seen, reward, terminated, truncated, _ = await self._limited(
            "step", partial(self._environment.step, done)
        )
        if not is_reward(reward := float(reward)):
            raise EnvironmentFaultError(
                f"gymnasium {self._setup['id']}, step: the reward is {reward}\n  -> it has to be finite"
            )
        self._rewards.append(reward)
        self._is_over = bool(terminated or truncated)
        over = " It is over." if self._is_over else ""
        return f"{await self._text(seen)}\nReward: {reward:g}.{over}"

    async def _text(self, seen: object) -> str:
        if self._environment.render_mode == "ansi":
            return without_colours(str(await self._limited("render", self._environment.render)).strip())
        return as_text(plain(seen))

    async def _limited(self, asked: str, call: Any) -> Any:
        """What a call of it returns, made in a thread: it may compute for long.

        Raises EnvironmentFaultError for what it raises, and where it takes too long.
        """
        name = f"gymnasium {self._setup['id']}, {asked}"
        try:
            return await asyncio.wait_for(asyncio.to_thread(call), self._timeout_s)
        except TimeoutError as error:
            raise EnvironmentFaultError(
                f"{name}: nothing within {self._timeout_s:g} s (rollout.manager.tool_timeout_s)\n"
                "  -> raise the limit, or serve it in a process of its own (OpenEnv)"
            ) from error
        except MachineError:
            raise
        except Exception as error:
            raise EnvironmentFaultError(
                f"{name}: {type(error).__name__}: {error}\n  -> see its code"
            ) from error


def without_colours(text: str) -> str:
    """A text of a terminal whose colours say something: what is behind one is in brackets instead: `[S]` for
    a coloured ground, such as where one is, `*R*` for bold, and `<Y>` for other letters."""
    return _COLOURED.sub(lambda found: _marked(found[1].split(";"), found[2]), text)


def _marked(codes: Sequence[str], inner: str) -> str:
    left, right = ("[", "]") if any(code.startswith("4") for code in codes) else ("<", ">")
    return f"*{inner}*" if "1" in codes else f"{left}{inner}{right}"


def _make(setup: Mapping[str, Any]) -> Any:
    """One of gymnasium's environments, which renders text where it can."""
    try:
        import gymnasium
    except ImportError as error:
        raise MachineError("gymnasium is not installed: `pip install k25-train[agents]`") from error
    entry = gymnasium.spec(setup["id"]).entry_point
    creator = gymnasium.envs.registration.load_env_creator(entry) if isinstance(entry, str) else entry
    modes = getattr(creator, "metadata", {}).get("render_modes", ())
    render = {"render_mode": "ansi"} if "ansi" in modes else {}
    return gymnasium.make(setup["id"], **{**render, **setup["kwargs"]})


def _read_names(text: str) -> tuple[str, ...]:
    names = tuple(each.strip() for each in text.split(",")) if text else ()
    if len(set(names)) < len(names) or not all(names):
        raise ValueError(text)
    return names
