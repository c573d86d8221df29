"""The environment of a task without tools: a prompt, one response, a judge."""

from k25_train.environments.base import Response, Task, Verdict
from k25_train.environments.environment import Action, Observation, Services, Tool


class OneTurn:
    """See `Environment`."""

    tools: tuple[Tool, ...] = ()
    is_replayable = True

    def __init__(self, task: Task, services: Services) -> None:
        self._task, self._services = task, services

    async def reset(self) -> Observation:
        """The task's own prompt."""
        return Observation(messages=self._task.messages, media=self._task.media)

    async def step(self, action: Action) -> Observation:
        """Nothing: the first turn is the last."""
        return Observation(done=True)

    async def judge(self, response: Response) -> Verdict:
        """The verdict of the judge that the task names."""
        return await self._services.judging.judge(self._task, response)

    async def close(self) -> None:
        """It holds nothing."""
