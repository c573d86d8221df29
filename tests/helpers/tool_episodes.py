"""Episodes of the environment `tools` with a policy that follows a script, in real sandboxes."""

from collections.abc import Mapping, Sequence
from typing import Any

from k25_train.environments.base import Response, Task, Verdict
from k25_train.environments.environment import Action, Observation, Services, ToolCall
from k25_train.environments.sandboxes.base import SandboxLimits
from k25_train.environments.sandboxes.bubblewrap import BubblewrapSandboxes, open_bubblewrap
from k25_train.environments.tool_environment import ToolEnvironment
from k25_train.rollout.episode import as_message

LIMITS = SandboxLimits(
    cpus=1.0, memory_bytes=1 << 30, disk_bytes=64 << 20, processes=64, output_bytes=1 << 20, ttl_s=600.0
)
Call = tuple[str, Mapping[str, Any]]
"""Name of a tool and its arguments."""


def sandboxes(most: int = 4) -> BubblewrapSandboxes:
    """Those of this machine."""
    return open_bubblewrap(LIMITS, run="test", most=most, secret=[])


class NoJudges:
    """Judges of episodes that are not judged."""

    async def judge(self, task: Task, response: Response) -> Verdict:
        """Fails."""
        raise AssertionError(f"{task.key} is judged")


def action(number: int, *calls: Call) -> Action:
    """A turn that makes calls, numbered from there on."""
    made = tuple(
        ToolCall(id=f"functions.{name}:{number + place}", name=name, arguments=arguments)
        for place, (name, arguments) in enumerate(calls)
    )
    return Action(content="", calls=made)


def text_of(observation: Observation, place: int = 0) -> str:
    """The text of a result."""
    content = observation.messages[place]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


async def called(environment: ToolEnvironment, name: str, **arguments: Any) -> Observation:
    """The result of one call."""
    return await environment.step(action(0, (name, arguments)))


async def played(
    task: Task, services: Services, turns: Sequence[Sequence[Call]], answer: str = "Done."
) -> tuple[Verdict, list[Observation]]:
    """The verdict on a scripted attempt, and what it got to see."""
    environment = ToolEnvironment(task, services)
    try:
        seen = [await environment.reset()]
        messages: list[Mapping[str, Any]] = [*seen[0].messages]
        for number, turn in enumerate(turns):
            done = action(100 * number, *turn)
            seen.append(await environment.step(done))
            messages += [as_message(done), *seen[-1].messages]
        response = Response(text=f"{answer}<|im_end|>", num_tokens=10, ended=True, messages=tuple(messages))
        return await environment.judge(response), seen
    finally:
        await environment.close()
