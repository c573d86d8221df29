"""Runs of reinforcement learning whose tasks have turns, or whose agents fork, with a real engine."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from k25_train.environments.base import Response, Task, Verdict, scored
from k25_train.environments.environment import Action, Observation, Services, Tool
from tests.helpers.ranks import RankContext
from tests.helpers.rl_runs import REAL, fit_rl

FORKING = "agent"


class Repeats:
    """Says the beginning of each turn back, twice; an odd number of tokens is rewarded."""

    tools: tuple[Tool, ...] = ()
    is_replayable = True

    def __init__(self, task: Task, services: Services) -> None:
        self._task, self._num_turns = task, 0

    async def reset(self) -> Observation:
        return Observation(messages=self._task.messages)

    async def step(self, action: Action) -> Observation:
        self._num_turns += 1
        said = f"turn {self._num_turns}: {len(action.content)}"
        return Observation(messages=({"role": "user", "content": said},), done=self._num_turns > 2)

    async def judge(self, response: Response) -> Verdict:
        return scored(float(response.num_tokens % 2), {"accuracy": float(response.num_tokens % 2)})

    async def close(self) -> None:
        pass


def fit_in_turns(context: RankContext, arguments: Sequence[str], kind: str) -> int:
    """Reinforce on tasks of several turns, or of an agent that goes back to its prompt."""
    from k25_train.environments import registry
    from k25_train.environments.families.sums import Sums
    from k25_train.rollout.episode import Player
    from k25_train.rollout.prompts import Prompts
    from k25_train.rollout.trajectory import Ended
    from k25_train.rollout.turns import ROOT, Place

    registry.ENVIRONMENTS["repeats"] = Repeats
    made = Sums.make
    agent = ("agent",) if kind == FORKING else ()

    def make(*given: Any) -> Task:
        return replace(made(*given), environment="repeats", agent=agent, thinking=False)

    async def act(self: Player, episode: Any, session: Any, scope: Any) -> Ended:
        opening = self._seen(episode, ROOT)
        first = await session.turn(opening, ROOT, max_tokens=4)
        more = self._prompts.following(
            "t", [{"role": "user", "content": "More."}], (), thinking=False, last_id=0
        )
        within = Place(0, len(session.response.branches[0].token_ids) - 2)
        await asyncio.gather(
            session.turn(more, first.place, max_tokens=3), session.turn(more, within, max_tokens=3)
        )
        return Ended.STOP

    prepared = Prompts.__init__

    def prepare(self: Prompts, *given: Any) -> None:
        prepared(self, *given)
        # A model that has learned nothing hardly ever ends a turn by itself.
        self.stop_ids = (*self.stop_ids, *range(60))  # type: ignore[assignment]

    Prompts.__init__ = prepare  # type: ignore[method-assign]
    Sums.make = make  # type: ignore[method-assign, assignment]
    Player._have_agent_act = act  # type: ignore[method-assign]
    return fit_rl(context, arguments, REAL)
