"""One attempt that somebody else's trainer makes: our environment, with JSON on its outside."""

import base64
from collections.abc import Callable, Mapping
from typing import Any

from k25_train.environments.base import Response, Status, Task
from k25_train.environments.environment import (
    Action,
    Environment,
    EnvironmentFaultError,
    Observation,
    ToolCall,
)
from k25_train.environments.family import Split
from k25_train.errors import K25Error

_TEXT = {"type": "string", "default": ""}
_CALL = {
    "type": "object",
    "properties": {"id": _TEXT, "name": {"type": "string"}, "arguments": {"type": "object"}},
    "required": ["name"],
}
ACTION = {
    "title": "Turn",
    "description": "A turn of the policy; one without calls is its answer.",
    "type": "object",
    "properties": {
        "content": _TEXT,
        "reasoning": _TEXT,
        "calls": {"type": "array", "items": _CALL, "default": []},
    },
    "additionalProperties": False,
}
"""JSON schema of actions."""
OBSERVATION = {
    "title": "Seen",
    "type": "object",
    "properties": {
        "messages": {"type": "array", "items": {"type": "object"}},
        "images": {"type": "array", "items": {"type": "string"}},
        "tools": {"type": "array", "items": {"type": "object"}},
        "verdict": {"type": ["object", "null"]},
    },
}
"""JSON schema of observations."""
STATE = {
    "title": "State",
    "type": "object",
    "properties": {"episode_id": {"type": ["string", "null"]}, "step_count": {"type": "integer"}},
}
"""JSON schema of states."""


class WrongActionError(K25Error):
    """What was sent is no action, or comes at the wrong time."""


class Attempt:
    """See the head of this file."""

    def __init__(self, task: Callable[[Split, int], Task], make: Callable[[Task], Environment]) -> None:
        """`task` makes tasks, `make` what one acts in."""
        self._make_task, self._make = task, make
        self._environment: Environment | None = None
        self._task: Task | None = None
        self._messages: list[Mapping[str, Any]] = []
        self._num_turns = self._num_calls = 0
        self._is_over = True

    async def reset(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Begin a task: `seed` is its number, `split` train or heldout. Raises ValueError for others, and
        K25Error where it cannot begin."""
        await self.close()
        number = asked.get("seed") or 0
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"seed={number!r} is no number of a task")
        self._task = self._make_task(Split(asked.get("split", Split.TRAIN)), number)
        self._environment = self._make(self._task)
        self._messages, self._num_turns, self._num_calls, self._is_over = [], 0, 0, False
        seen = await self._environment.reset()
        self._messages += seen.messages
        return {**self._shown(seen), "reward": None, "done": False}

    async def step(self, asked: object) -> dict[str, Any]:
        """A turn. Raises WrongActionError for what is none, EnvironmentFaultError for a verdict that there is
        not, and as `Environment.step`."""
        environment, task = self._environment, self._task
        if environment is None or task is None or self._is_over:
            raise WrongActionError("there is nothing to step: reset first")
        action = self._action(asked)
        self._num_turns += 1
        self._messages.append(_message(action))
        seen = await environment.step(action)
        self._messages += seen.messages
        if not seen.done and self._num_turns < (task.max_turns or self._num_turns + 1):
            return {**self._shown(seen), "reward": None, "done": False}
        self._is_over = True
        response = Response(
            text=text_of(action, thinking=task.thinking),
            num_tokens=0,
            ended=True,
            messages=tuple(self._messages),
        )
        verdict = await environment.judge(response)
        if verdict.status is Status.UNSCORED:
            raise EnvironmentFaultError(f"{task.key}: no verdict: {verdict.reason}")
        shown = self._shown(seen)
        shown["observation"]["verdict"] = verdict.as_json()
        return {**shown, "reward": verdict.reward, "done": True}

    def state(self) -> dict[str, Any]:
        """Which task it is, and how many turns there were."""
        return {"episode_id": self._task.key if self._task else None, "step_count": self._num_turns}

    async def close(self) -> None:
        """Close what it acts in. Twice is as once."""
        environment, self._environment = self._environment, None
        self._is_over = True
        if environment is not None:
            await environment.close()

    def _shown(self, seen: Observation) -> dict[str, Any]:
        assert self._environment is not None, "it was reset"
        images = [f"data:image/png;base64,{base64.b64encode(each).decode()}" for each in seen.media]
        return {
            "observation": {
                "messages": list(seen.messages),
                "images": images,
                "tools": list(self._environment.tools),
                "verdict": None,
            }
        }

    def _action(self, asked: object) -> Action:
        if not isinstance(asked, Mapping) or set(asked) - {"content", "reasoning", "calls", "metadata"}:
            raise WrongActionError("an action has content, reasoning and calls alone (GET /schema)")
        content, reasoning, calls = (
            asked.get("content", ""),
            asked.get("reasoning", ""),
            asked.get("calls", []),
        )
        if not isinstance(content, str) or not isinstance(reasoning, str) or not isinstance(calls, list):
            raise WrongActionError("content and reasoning are texts, calls is a list (GET /schema)")
        return Action(content=content, reasoning=reasoning, calls=tuple(map(self._call, calls)))

    def _call(self, asked: object) -> ToolCall:
        arguments = asked.get("arguments", {}) if isinstance(asked, Mapping) else None
        if (
            not isinstance(asked, Mapping)
            or not isinstance(asked.get("name"), str)
            or type(arguments) is not dict
        ):
            raise WrongActionError("a call has a name, and arguments that are an object (GET /schema)")
        self._num_calls += 1
        own = f"functions.{asked['name']}:{self._num_calls - 1}"
        return ToolCall(id=str(asked.get("id") or own), name=asked["name"], arguments=arguments)


def text_of(action: Action, *, thinking: bool) -> str:
    """A turn as a policy would have written it, which rules read; without its calls."""
    thought = f"{action.reasoning}</think>" if thinking else ""
    return f"{thought}{action.content}<|im_end|>"


def _message(action: Action) -> Mapping[str, Any]:
    calls = [
        {
            "id": each.id,
            "type": "function",
            "function": {"name": each.name, "arguments": dict(each.arguments)},
        }
        for each in action.calls
    ]
    thought = {"reasoning_content": action.reasoning} if action.reasoning else {}
    return {
        "role": "assistant",
        "content": action.content,
        **thought,
        **({"tool_calls": calls} if calls else {}),
    }
