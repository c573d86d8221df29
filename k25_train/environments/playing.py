"""Plays turns that are known beforehand in a task's environment, as a policy's would be.

script ─► reset, step, step, … ─► conversation: what was said, and what came of it ─► verdict
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from k25_train.environments.base import Response, Task, Verdict
from k25_train.environments.environment import Action, Environment, Tool
from k25_train.environments.reply import END, as_message, as_reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A conversation that has come to its end."""

    messages: tuple[dict[str, Any], ...]
    """All of it, the prompt first and the last turn last."""
    media: tuple[bytes, ...]
    """Image files, one for each image part of the messages, in reading order."""
    tools: tuple[Tool, ...]
    """What could be called."""
    last: Action
    """The last turn."""
    thinking: bool
    """Whether turns begin within an open thought."""

    @property
    def response(self) -> Response:
        """What a judge sees of it; as tokens, its characters are counted."""
        text = as_reply(self.last, thinking=self.thinking)
        return Response(text=text + END, num_tokens=len(text), ended=True, messages=self.messages)


async def play(task: Task, environment: Environment, script: Sequence[Action]) -> Played:
    """Play a script from `reset` to its end, or to where the environment ends it. The caller closes the
    environment. Raises as the environment does."""
    observation = await environment.reset()
    messages = [dict(message) for message in observation.messages]
    media = list(observation.media)
    action = script[0]
    for number, action in enumerate(script):
        messages.append(as_message(action))
        observation = await environment.step(action)
        if observation.done or number == len(script) - 1:
            break
        messages += [dict(message) for message in observation.messages]
        media += observation.media
    return Played(
        messages=tuple(messages),
        media=tuple(media),
        tools=environment.tools,
        last=action,
        thinking=task.thinking,
    )


async def verdict_on(
    task: Task, environment: Environment, script: Sequence[Action]
) -> tuple[Played, Verdict]:
    """Play a script and have it judged; the environment is closed."""
    try:
        played = await play(task, environment, script)
        return played, await environment.judge(played.response)
    finally:
        await environment.close()
