"""Who gets which task, and when a group may train: the first rank's part of the loop, on one event loop.

    admit    in the order of tasks, at most so many groups that each trains within the staleness bound
    respond  K responses to each, at once; every segment and verdict goes to the journal
    take     a step is given its groups once all their responses ended and have a reward, oldest first

With weights of version v, groups below (v + n + s) · P are admitted: P groups a step, n steps a phase, s
versions of staleness. That is arithmetic on numbers, so the same whenever a run is killed.

    synchronous     (s = 0) a phase generates while nothing trains; every group of a step is of its weights
    partial         (token_cap) another n · P groups are in progress; those that are complete train, oldest
                    first, and the others go on in the next phase, before new ones
    asynchronous    (s > 0) generation goes on during training; step t has the groups (t - 1) · P to t · P,
                    in their order: no response is left behind because it is long
"""

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any

from k25_train.config.algorithm import AlgorithmConfig
from k25_train.environments.base import Task
from k25_train.errors import RolloutError
from k25_train.rl.counts import Counts
from k25_train.rl.tasks import Draw, TaskOrder
from k25_train.rl.toggle import Toggle
from k25_train.rollout.engines.pool import EnginePool
from k25_train.rollout.journal import Journal
from k25_train.rollout.journal_state import admitted, grouped
from k25_train.rollout.records import Record
from k25_train.rollout.response_records import ENDED, JUDGED, RESTARTED, apply_record
from k25_train.rollout.trajectory import Group, Response
from k25_train.rollout.work import Rollouts, Round, Work

ROUNDS = 2**16
"""Most rounds of a phase: what tells the round of one phase from that of another."""

OF_NO_GROUP = -1
"""In the place of a group's number: responses of evaluations are nobody's, and older than all."""
TURNS = 32
"""Turns of the event loop in which all that is asked at once has reached the engines. Our choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A task with its only response, of an evaluation or a start pass."""

    task: Task
    """What was asked."""
    response: Response
    """What was answered, with its verdict."""


class Controller:
    """Admits, has responded to and gives out the groups of a run."""

    def __init__(
        self,
        algorithm: AlgorithmConfig,
        num_steps: int,
        tasks: TaskOrder,
        journal: Journal,
        pool: EnginePool,
        rollouts: Rollouts,
        counts: Counts,
    ) -> None:
        """`num_steps`: of the run; nothing is rolled out for steps behind the last."""
        self._algorithm = algorithm
        self._num_groups = num_steps * algorithm.prompts_per_step
        self._tasks = tasks
        self._journal = journal
        self._pool = pool
        self._rollouts = rollouts
        self._counts = counts
        self._ahead: asyncio.Task[None] | None = None
        self._changed, self._pushed = asyncio.Event(), asyncio.Event()

    @property
    def groups_per_phase(self) -> int:
        """Groups that are taken at once."""
        return self._algorithm.prompts_per_step * self._algorithm.steps_per_rollout

    def limit(self, version: int) -> int:
        """Groups below this number may be generated with weights of `version`."""
        algorithm = self._algorithm
        ahead = algorithm.steps_per_rollout + algorithm.max_staleness
        if algorithm.token_cap is not None:
            ahead += algorithm.steps_per_rollout
        return min((version + ahead) * algorithm.prompts_per_step, self._num_groups)

    async def take(self, step: int, toggle: Toggle) -> list[Group]:
        """The groups of the phase that begins with `step`, complete and in their order.

        They are open until `consumed` says that they were written. Raises `RolloutError` or `EngineError` if
        they cannot be had; then the journal has all that there is.
        """
        if self._algorithm.max_staleness:
            return await self._take_in_order(step, toggle)
        self.admit(toggle)
        with self._counts.during("rollout"):
            return await self._phase(step)

    def admit(self, toggle: Toggle) -> None:
        """Give out the groups that the engines' weights allow."""
        state, size = self._journal.state, self._algorithm.group_size
        for number in range(state.num_admitted, self.limit(self._pool.version)):
            draw = self._tasks.draw(number)
            group = Group(
                number=number,
                task=draw.task.key,
                epoch=draw.epoch,
                version=self._pool.version,
                stamp={"phase": str(toggle.phase(number // self._algorithm.prompts_per_step + 1))},
                responses=[Response() for _ in range(size)],
            )
            self._journal.append(admitted(group))

    async def answer_once(self, tasks: Iterable[tuple[Task, int]], purpose: str) -> list[Answered]:
        """One response to each pair of a task and the number of its sample, judged; it is of no group."""
        numbers = count()

        async def one(task: Task, sample: int) -> Answered:
            response, media = Response(), dict[str, bytes]()
            work = Work(
                task=task,
                group=OF_NO_GROUP,
                sample=next(numbers),
                seed=self._tasks.seed_of(task.key, 0, sample, purpose),
                source=purpose,
                allowed=Round(number=0),
                response=response,
                media=media,
            )
            await self._rollouts.respond(work, lambda record: apply_record(record, response, media))
            return Answered(task=task, response=response)

        return await self._while_paused([one(task, sample) for task, sample in tasks])

    def pushed(self) -> None:
        """The engines have other weights, which may allow more groups."""
        self._pushed.set()

    async def close(self) -> None:
        """End what is generated in the background; the journal has what it was acknowledged."""
        if self._ahead is not None:
            self._ahead.cancel()
            await asyncio.gather(self._ahead, return_exceptions=True)

    # Synchronous phases, with or without a cap

    async def _phase(self, step: int) -> list[Group]:
        state, cap = self._journal.state, self._algorithm.token_cap
        wanted = min(self.groups_per_phase, self._num_groups - state.num_consumed)
        # What the rounds of a phase begin with is the same when it is gone on with after a kill.
        for number in range(step * ROUNDS, (step + 1) * ROUNDS):
            now = Round(number=number, cap=cap)
            groups = [state.open[each] for each in sorted(state.open)]
            await self._while_paused([self._respond(group, sample, now) for group, sample in _all(groups)])
            complete = [group for group in groups if _was_complete_in(group, number)]
            if len(complete) >= wanted:
                return complete[:wanted]
        raise RolloutError(f"step {step}: {ROUNDS:,} rounds of algorithm.token_cap={cap} completed too few")

    async def _respond(self, group: Group, sample: int, now: Round) -> None:
        """Have a response go on as far as the round allows, and judge it when it has ended."""
        response = group.responses[sample]
        if response.last_round > now.number or (response.is_finished and response.is_judged):
            return
        draw = self._draw(group)
        work = Work(
            task=draw.task,
            group=group.number,
            sample=sample,
            seed=self._tasks.seed_of(group.task, group.epoch, sample),
            source=draw.source,
            allowed=now,
            response=response,
            media=group.media,
        )
        judging = ExitStack()

        def append(record: Record) -> None:
            self._journal.append(record)
            kind = record.header["kind"]
            if kind == ENDED:
                judging.enter_context(self._counts.during("judge"))
            elif kind in (RESTARTED, JUDGED):
                judging.close()
            if kind == JUDGED and group.is_complete:
                self._journal.append(grouped(group.number))

        with judging:
            await self._rollouts.respond(work, append)

    def _draw(self, group: Group) -> Draw:
        """A group's task. Raises `RolloutError` if the order has another in its place by now."""
        draw = self._tasks.draw(group.number)
        if draw.task.key != group.task:
            raise RolloutError(
                f"group {group.number} was admitted with task {group.task}, but environment.tasks has "
                f"{draw.task.key} in its place: use the tasks that the run began with, or another run.dir"
            )
        return draw

    async def _while_paused[T](self, calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """Run all of them; engines begin when they have every request, so that batches form alike each time
        they are asked."""
        await self._pool.pause()
        running = asyncio.ensure_future(all_of(calls))
        for _ in range(TURNS):
            await asyncio.sleep(0)
        try:
            await self._pool.resume()
        except BaseException:
            running.cancel()
            raise
        return await running

    # Generation that goes on during training

    async def _take_in_order(self, step: int, toggle: Toggle) -> list[Group]:
        """Wait for the groups of the phase; engines go on with later ones meanwhile, and afterwards."""
        first = (step - 1) * self._algorithm.prompts_per_step
        numbers = range(first, min(first + self.groups_per_phase, self._num_groups))
        if self._ahead is None:
            self._ahead = asyncio.create_task(self._run_ahead(toggle))
        state = self._journal.state
        while not all(number in state.open and state.open[number].is_complete for number in numbers):
            self._changed.clear()
            changed = asyncio.create_task(self._changed.wait())
            await asyncio.wait([self._ahead, changed], return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            if self._ahead.done() and (error := self._ahead.exception()):
                raise error
        return [state.open[number] for number in numbers]

    async def _run_ahead(self, toggle: Toggle) -> None:
        """Generate whatever the weights allow, for as long as the run lasts."""
        running: dict[int, asyncio.Task[None]] = {}
        try:
            while True:
                self.admit(toggle)
                limit = self.limit(self._pool.version)
                for number in sorted(self._journal.state.open):
                    group = self._journal.state.open[number]
                    if number < limit and number not in running and not group.is_complete:
                        running[number] = asyncio.create_task(self._whole(group))
                pushed = asyncio.create_task(self._pushed.wait())
                await asyncio.wait([pushed, *running.values()], return_when=asyncio.FIRST_COMPLETED)
                pushed.cancel()
                self._pushed.clear()
                for number in [each for each, task in running.items() if task.done()]:
                    # Raises what it raised.
                    running.pop(number).result()
                self._changed.set()
        finally:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)

    async def _whole(self, group: Group) -> None:
        step = group.number // self._algorithm.prompts_per_step + 1
        now = Round(number=step * ROUNDS)
        with self._counts.during("rollout"):
            await all_of([self._respond(group, sample, now) for group, sample in _all([group])])


def _all(groups: Iterable[Group]) -> list[tuple[Group, int]]:
    return [(group, sample) for group in groups for sample in range(len(group.responses))]


def _was_complete_in(group: Group, number: int) -> bool:
    """Whether a group was complete at the end of a round, whatever has come since."""
    return group.is_complete and all(response.last_round <= number for response in group.responses)


async def all_of[T](calls: Sequence[Awaitable[T]]) -> list[T]:
    """Run all at once; the first that raises ends the others, and is raised."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
