"""What the first rank has of reinforcement learning: engines, judges, the journal and the step files, on an
event loop of its own. `loop.py` says in which order it is used."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from k25_train.checkpoint.data_state import read_data_state
from k25_train.checkpoint.folders import sound_checkpoints, step_folder, step_of
from k25_train.checkpoint.storage.kinds import Place
from k25_train.config.algorithm import AlgorithmConfig
from k25_train.config.schema import Config
from k25_train.data.trajectories.rows import Trajectories
from k25_train.data.trajectories.source import rollouts_of
from k25_train.errors import RolloutError
from k25_train.rl.controller import Answered, Controller
from k25_train.rl.conversations import Answer, answers_path, write_answers
from k25_train.rl.counts import Counts
from k25_train.rl.event_loop import EventLoop
from k25_train.rl.figures import evaluation_figures, group_figures, sign_figures, verdict_of, work_figures
from k25_train.rl.placement import open_rollouts
from k25_train.rl.step_files import FIGURES, GROUPS, TOGGLE, StepFiles, groups_of
from k25_train.rl.step_rows import step_rows, toggle_group
from k25_train.rl.tasks import TaskOrder
from k25_train.rl.toggle import StartSample, Toggle, make_toggle
from k25_train.rl.workplace import Workplace
from k25_train.rollout.engines.base import ProbeSequence
from k25_train.rollout.engines.pool import EnginePool
from k25_train.rollout.journal import Journal
from k25_train.rollout.journal_state import consumed
from k25_train.rollout.manager.loops import calm_collector
from k25_train.rollout.status.server import StatusServer
from k25_train.rollout.trajectory import Group
from k25_train.rollout.work import Rollouts

END_S = 60.0
"""Longest time that engines and judges get to end: what hangs then has nothing that is missed. Our choice."""
CORRECT = 0.5
"""Accuracy from which on a response of the start pass counts as correct. Our choice."""
PROBE_TOKENS = 48
"""Drawn ids behind the prompt of a sequence of the probe. Our choice."""
JOURNAL = "journal"
"""Folder of the journal, next to the step files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a room is furnished with."""

    pool: EnginePool
    """Engines."""
    workplace: Workplace
    """Prompts, judges, sandboxes."""
    tasks: TaskOrder
    """Which task comes when."""
    close: Callable[[], Coroutine[Any, Any, None]]
    """Ends engines and judges."""


class Room:
    """Coroutines are for its event loop (`submit`), all else for the main thread."""

    def __init__(
        self,
        config: Config,
        loop: EventLoop,
        parts: Parts,
        checkpoints: Place,
        notice: Callable[[str], None],
    ) -> None:
        """
        Args:
            loop: on which everything runs.
            checkpoints: of the run.
            notice: tells what there is to know.
        """
        assert config.algorithm is not None and config.rollout is not None
        self._config, self._rollout = config, config.rollout
        self._algorithm: AlgorithmConfig = config.algorithm
        self._loop = loop
        self._parts = parts
        self._checkpoints = checkpoints
        self._notice = notice
        self._folder = rollouts_of(config)
        self._counts = Counts()
        self.files = StepFiles(self._folder, self._algorithm.steps_per_rollout)
        """Step files of the run."""
        self.rollouts: Rollouts
        """Makes responses, from `begin` on."""
        self.status: StatusServer
        """Tells how they are, from `begin` on."""
        self.journal: Journal
        """Of the run, from `begin` on."""
        self.controller: Controller
        """Gives out groups, from `begin` on."""
        self.toggle: Toggle
        """Budgets of tokens, from `begin` on."""

    def submit[T](self, call: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a call of this room; the one method for other threads, with `end`."""
        return self._loop.submit(call)

    def wait(self, call: Awaitable[Any]) -> Any:
        """Run a call of engines on the event loop, from another thread; returns or raises what it does."""

        async def done() -> Any:
            return await call

        return self._loop.wait(done())

    @property
    def pool(self) -> EnginePool:
        """The engines."""
        return self._parts.pool

    def probe_sequences(self) -> list[ProbeSequence]:
        """Prompts of held-out tasks, images and all, with ids behind them that no model would generate: so
        every expert has something to do. At least one."""
        prompts, found = self._parts.workplace.prompts, []
        # As a response, they fit a sequence of training.
        num_tokens = min(PROBE_TOKENS, self._rollout.max_tokens)
        for number, task in enumerate(self._parts.tasks.probes(self._rollout.probe_sequences)):
            draws = np.random.default_rng(number).integers(0, self._config.model.vocab_size, num_tokens)
            allowed = draws[~np.isin(draws, prompts.forbidden_ids)].tolist()
            found.append(ProbeSequence((*prompts.encode(task), *allowed), task.media))
        return found

    async def begin(self, step: int) -> None:
        """Open the journal of a run that goes on behind `step`, and bring it to what the step files say.

        Raises `RolloutError` where the two, or the journal and the run, do not belong together.
        """
        self.journal = Journal(
            self._folder / JOURNAL,
            has_data=lambda each: each <= step or self.files.has(each),
            notice=self._notice,
        )
        state, following = self.journal.state, self.files.following(step)
        for each in following:
            # A kill between a file and its record.
            if each not in state.consumed:
                self.journal.append(consumed(each, groups_of(self.files.state(each))))
        last = following[-1] if following else step
        if state.num_consumed != (due := last * self._algorithm.prompts_per_step):
            raise RolloutError(
                f"{self._folder / JOURNAL}: {state.num_consumed:,} groups were given to steps, but the run "
                f"has had {due:,} by step {last}: bring the journal and the step files of the run back, or "
                "start in another run.dir"
            )
        if following:
            self._notice(f"steps {step + 1} to {last} are trained again from what was rolled out for them")
        if state.open:
            self._notice(f"{len(state.open):,} groups are open in the journal, and go on")
        self.rollouts = await open_rollouts(
            self._config,
            self._parts.workplace,
            self._parts.pool,
            count=self._counts.add,
            notice=self._notice,
        )
        self.toggle = make_toggle(self._algorithm.toggle, self._toggle_state(last))
        self.status = StatusServer(str(self._folder.parent), self.rollouts.snapshot)
        await self.status.start(self._rollout.manager.status_port)
        calm_collector()
        self.controller = Controller(
            self._algorithm,
            self._config.train.steps,
            self._parts.tasks,
            self.journal,
            self._parts.pool,
            self.rollouts,
            self._counts,
        )

    async def start_pass(self) -> list[StartSample]:
        """Responses from which budgets are estimated."""
        tasks = self._parts.tasks
        wanted = self.toggle.start_tasks(await asyncio.to_thread(tasks.problems))
        self._notice(f"{len(wanted):,} responses are sampled to estimate budgets of tokens")
        answers = await self.controller.answer_once(
            [(tasks.numbered(number), sample) for number, sample in wanted], "start"
        )
        return [_start_sample(each) for each in answers]

    def shares(self, groups: Sequence[Group]) -> list[list[Group]]:
        """The groups of a phase, divided among its steps in their order."""
        size = self._algorithm.prompts_per_step
        return [list(groups[first : first + size]) for first in range(0, len(groups), size)]

    def weighted(self, step: int, groups: Sequence[Group]) -> Trajectories:
        """Trajectories of a step's groups with their rewards, held against budgets, and advantages."""
        tasks = [self._parts.tasks.draw(group.number).task for group in groups]
        return step_rows(groups, tasks, self.toggle, self._algorithm, version=step - 1)

    def write(self, step: int, groups: Sequence[Group], rows: Trajectories) -> None:
        """Write the file of a step, with where the run is behind it."""
        tasks = [self._parts.tasks.draw(group.number).task for group in groups]
        budgets = [toggle_group(*pair) for pair in zip(groups, tasks, strict=True)]
        figures = group_figures(groups, step) | self.toggle.figures(budgets)
        figures |= sign_figures(groups, self._parts.workplace.prompts.decode)
        state = {
            GROUPS: [group.number for group in groups],
            TOGGLE: self.toggle.to_json(),
            FIGURES: figures,
        }
        self.files.write(step, rows, state)

    def consumed(self, step: int, shares: Sequence[Sequence[Group]]) -> None:
        """Say in the journal that the steps of a phase have their files, and drop what nobody needs."""
        for number, groups in enumerate(shares):
            self.journal.append(consumed(step + number, tuple(group.number for group in groups)))
        self.journal.flush()
        if self.journal.num_files > 1:
            kept = [step_of(folder) for folder in sound_checkpoints(self._checkpoints)]
            self.journal.prune(min(kept, default=0))

    async def figures(self, step: int) -> dict[str, float]:
        """What the row of a step says of its groups, and of the work since the row before."""
        states = await self._parts.pool.states()
        for event in self._parts.pool.take_events():
            self._notice(event)
        return {
            **self.files.state(step)[FIGURES],
            **work_figures(self._counts.take()),
            "engine_idle": 1 - self._parts.pool.take_busy_share(),
            "engines": float(len(states)),
        }

    async def evaluate(self, step: int) -> dict[str, float]:
        """Figures of held-out tasks, each answered once, with the same draws each time; the answers are kept
        next to the step files."""
        tasks = self._parts.tasks.heldout(self._rollout.eval_tasks)
        answers = await self.controller.answer_once([(task, 0) for task in tasks], "heldout")
        path = answers_path(self._folder, step)
        try:
            write_answers(path, [self._answer(each) for each in answers])
        except OSError as error:
            self._notice(f"warning: {path}: answers of the evaluation are not kept ({error})")
        return evaluation_figures(answers)

    def _answer(self, answered: Answered) -> Answer:
        response = answered.response
        return Answer(
            task=answered.task,
            text=self._parts.workplace.prompts.decode(response.conversation),
            num_tokens=len(response.token_ids),
            verdict=verdict_of(response),
        )

    async def pushed(self) -> None:
        """Engines have new weights."""
        await self.rollouts.announce(self._parts.pool.version)
        self.controller.pushed()

    def end(self) -> None:
        """End everything, from the main thread. What was appended to the journal is in it."""
        self._loop.wait(self._end())
        self._loop.close()

    async def _end(self) -> None:
        if hasattr(self, "controller"):
            await self.controller.close()
        if hasattr(self, "journal"):
            self.journal.close()
        # Each has its own time: what hangs keeps nothing else from ending.
        for what, held in (("rollouts", "rollouts"), ("the status page", "status")):
            if hasattr(self, held):
                await self._ended(what, getattr(self, held).close())
        await self._ended("engines or judges", self._parts.close())

    async def _ended(self, what: str, closing: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(END_S):
                await closing
        except TimeoutError:
            self._notice(f"warning: {what} did not end within {END_S:g} s")

    def _toggle_state(self, step: int) -> Any:
        """The state of Toggle behind a step: of its file, or else of its checkpoint; None at the start."""
        if not step:
            return None
        if self.files.has(step):
            return self.files.state(step)[TOGGLE]
        return read_data_state(step_folder(self._checkpoints, step)).loader.get(TOGGLE)


def _start_sample(answered: Answered) -> StartSample:
    response = answered.response
    return StartSample(
        problem=answered.task.problem or answered.task.key,
        num_tokens=len(response.token_ids),
        is_correct=verdict_of(response).accuracy >= CORRECT,
    )
