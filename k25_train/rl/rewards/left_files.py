"""Judges of what an agent has left in its sandbox; nothing of it is read where the agent was.

left_files   files and answer against what they have to be
left_code    a file of code against hidden unit tests, in sandboxes of their own (`unit_tests.py`)
"""

from k25_train.environments.base import ACCURACY, Response, Task, Verdict, failed, scored, unscored
from k25_train.environments.families.chores import wrong_with_files
from k25_train.rl.rewards.answer import Answer, answer_of
from k25_train.rl.rewards.faults import ResponseFaultError
from k25_train.rl.rewards.unit_tests import UnitTests


class LeftFiles:
    """See `Judge`; the reference is that of `wrong_with_files`."""

    name = "left_files"

    async def judge(self, task: Task, response: Response) -> Verdict:
        """1 if all is as it has to be."""
        try:
            answer = answer_of(task, response)
        except ResponseFaultError as error:
            return failed(str(error))
        try:
            wrong = wrong_with_files(task.reference, answer.content, response.files)
        except ValueError as error:
            return unscored(f"malformed reference: {error}")
        return scored(float(not wrong), {ACCURACY: float(not wrong)}, wrong)


class LeftCode:
    """See `Judge`; the reference is that of unit tests, with the path of the code as `file`."""

    name = "left_code"

    def __init__(self, unit_tests: UnitTests) -> None:
        self._unit_tests = unit_tests

    async def judge(self, task: Task, response: Response) -> Verdict:
        """What the tests give; `failed` without the file."""
        path = task.reference.get("file") if isinstance(task.reference, dict) else None
        if not isinstance(path, str):
            return unscored("malformed reference: it names no file")
        answer = Answer(reasoning="", content="", calls=(), files=response.files)
        return await self._unit_tests(answer, task.reference)
