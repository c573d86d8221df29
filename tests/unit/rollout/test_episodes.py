"""Rollouts of several turns: the same wherever a process is killed, and never a reward for what failed."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from k25_train.environments.base import Response, Verdict, failed, scored
from k25_train.environments.environment import EnvironmentFaultError, Observation
from k25_train.environments.sandboxes.base import SandboxError
from k25_train.errors import RolloutError
from k25_train.rollout.agents import Acted
from k25_train.rollout.branches import NOT_DRAWN
from k25_train.rollout.manager.notices import Notices
from k25_train.rollout.records import Record
from k25_train.rollout.response_records import ENDED, JUDGED, OBSERVED, RESTARTED, SEGMENT
from k25_train.rollout.trajectory import Ended
from k25_train.rollout.turns import ROOT, Observed, Place
from k25_train.rollout.work import Round
from tests.helpers import played
from tests.helpers.played import KilledError, Play, counted_task, told_of

TURNS = 4


def kinds(play: Play) -> list[str]:
    return [record.header["kind"] for record in play.records]


def test_a_response_is_what_engines_saw_and_drew() -> None:
    play = Play(counted_task(TURNS))
    response = play.process()
    (branch,) = response.branches
    assert response.ended is Ended.STOP and response.num_turns == TURNS and response.num_answers == TURNS
    assert kinds(play) == [SEGMENT, OBSERVED] * TURNS + [ENDED, JUDGED]
    for request, (start, _) in zip(play.engine.asked, branch.turns(), strict=True):
        assert list(request.prompt_ids) == branch.token_ids[:start].tolist()
        assert request.response_ids == ()
    assert len({request.sampling.seed for request in play.engine.asked}) == TURNS
    assert play.engine.asked[0].sampling.seed == 7, "a first turn draws as when there was no other"
    assert (branch.versions[~branch.drawn] == NOT_DRAWN).all() and (branch.logprobs[~branch.drawn] == 0).all()
    drawn = sum(stop - start for start, stop in branch.turns())
    assert response.verdict is not None and response.verdict.reward == drawn == len(response.token_ids)
    assert response.num_observed == len(branch.token_ids) - branch.prompt_tokens - drawn
    assert [each.is_closed for each in play.environments] == [True]


@pytest.mark.parametrize("dies_at", range(2 * TURNS + 2))
@pytest.mark.parametrize("replayable", [True, False])
def test_a_process_that_is_killed_before_any_record_changes_nothing(dies_at: int, replayable: bool) -> None:
    whole = Play(counted_task(TURNS)).process()
    play = Play(counted_task(TURNS, replayable=replayable))
    with pytest.raises(KilledError):
        play.process(dies_at=dies_at)
    assert all(each.is_closed for each in play.environments)
    response = play.process()
    assert told_of(response) == told_of(whole)
    assert kinds(play).count(ENDED) == 1 + (not replayable and dies_at == 2 * TURNS + 1)
    assert kinds(play).count(JUDGED) == 1
    assert response.attempt == (not replayable and dies_at > 0) and response.num_failures == 0
    if replayable:
        assert kinds(play) == [SEGMENT, OBSERVED] * TURNS + [ENDED, JUDGED]


@pytest.mark.parametrize("dies_at", [None, 1, 4, 7, 10])
def test_rounds_that_cut_turns_draw_the_same(dies_at: int | None) -> None:
    whole = Play(counted_task(TURNS)).process()
    play = Play(counted_task(TURNS))
    rounds = [Round(number=number, cap=3) for number in range(40)]
    if dies_at is not None:
        with pytest.raises(KilledError):
            play.process(rounds, dies_at=dies_at)
    assert told_of(play.process(rounds)) == told_of(whole)
    for request in play.engine.asked:
        assert request.sampling.max_tokens - len(request.response_ids) <= 3
    assert kinds(play).count(SEGMENT) > TURNS
    assert len(play.environments) == 1 + (dies_at is not None), "it is kept between rounds"


def test_what_has_a_sandbox_is_not_cut() -> None:
    task = counted_task(TURNS)
    play = Play(replace(task, needs_sandbox=True))
    response = play.process([Round(number=0, cap=1)])
    assert response.is_judged and response.last_round == 0


@pytest.mark.parametrize("length", [5, 24, 40])
def test_all_behind_the_prompt_counts_against_its_limit(length: int) -> None:
    play = Play(counted_task(100), rollout={"max_tokens": length}, manager={"max_turns": 100})
    response = play.process()
    (branch,) = response.branches
    assert response.ended is Ended.LENGTH
    assert len(branch.token_ids) - branch.prompt_tokens <= length
    for request in play.engine.asked:
        assert len(request.prompt_ids) + request.sampling.max_tokens == branch.prompt_tokens + length
    assert told_of(Play(counted_task(100), rollout={"max_tokens": length}, manager={"max_turns": 100},
                        records=play.records[:-2]).process()) == told_of(response)  # fmt: skip


def test_turns_are_counted() -> None:
    response = Play(counted_task(100), manager={"max_turns": 3}).process()
    assert response.ended is Ended.TURNS and response.num_turns == 3


FAULTS: list[Exception] = [
    EnvironmentFaultError("gone"),
    SandboxError("no room"),
    TimeoutError(),
    KeyError("x"),
]


@pytest.mark.parametrize("method", ["reset", "step", "judge"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_what_fails_starts_over_and_is_worth_what_it_would_have_been(method: str, fault: Exception) -> None:
    whole = Play(counted_task(TURNS)).process()
    play = Play(counted_task(TURNS, faults={method: [fault, fault]}), manager={"max_restarts": 2})
    response = play.process()
    assert told_of(response) == told_of(whole)
    is_judges = method == "judge" and isinstance(fault, TimeoutError | KeyError)
    assert play.counts.count("restarted/failed") == response.num_failures == (0 if is_judges else 2)
    assert all(each.is_closed for each in play.environments)
    assert kinds(play).count(RESTARTED) == response.attempt


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_what_stays_broken_ends_the_run_with_task_and_cause(fault: Exception) -> None:
    play = Play(counted_task(TURNS, faults={"step": [fault] * 9}), manager={"max_restarts": 2})
    with pytest.raises(
        RolloutError, match=rf"task counted/0: given up after 2 restarts.*{type(fault).__name__}"
    ):
        play.process()
    assert JUDGED not in kinds(play)
    # It has had its restarts, in whichever process.
    with pytest.raises(RolloutError, match="given up after 2 restarts"):
        play.process()
    assert kinds(play).count(RESTARTED) == 2


@pytest.mark.parametrize("kind", [SEGMENT, OBSERVED, ENDED, JUDGED])
def test_a_record_that_is_refused_is_named_with_task_and_phase(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    play, lines = Play(counted_task(TURNS)), list[str]()
    monkeypatch.setattr(Notices, "say", lambda _self, _kind, text, _now: lines.append(text))

    def refuse(record: Record, *_: object) -> None:
        if record.header["kind"] == kind:
            raise RolloutError("No space left on device")

    monkeypatch.setattr(played, "apply_record", refuse_first(refuse, played.apply_record))
    with pytest.raises(RolloutError, match="No space left"):
        play.process()
    (line,) = lines
    assert line.startswith("counted/0#0") and f"failed in phase record ({kind})" in line


def refuse_first(refuse: Callable[..., None], call: Callable[..., None]) -> Callable[..., None]:
    """What refuses, before it calls."""

    def both(*arguments: Any) -> None:
        refuse(*arguments)
        call(*arguments)

    return both


def test_an_environment_that_answers_otherwise_starts_over() -> None:
    play = Play(counted_task(TURNS))
    with pytest.raises(KilledError):
        play.process(dies_at=4)
    play.task = counted_task(TURNS, suffix="!")
    response = play.process()
    assert response.attempt == 1 and play.counts == ["restarted/lost"]
    assert told_of(response) == told_of(Play(counted_task(TURNS, suffix="!")).process())


def test_time_counts_from_the_first_turn_and_what_is_late_is_judged_as_not_ended() -> None:
    slow = {"reset": [0.2], "step": [0.0, 9.0]}
    play = Play(counted_task(TURNS, faults=slow), manager={"rollout_timeout_s": 0.4})
    response = play.process()
    assert response.ended is Ended.TIMEOUT and response.num_turns == 2
    assert response.verdict is not None and response.verdict.reward == len(response.token_ids) > 0
    again = Play(counted_task(TURNS), records=play.records[:-1])
    assert told_of(again.process()) == told_of(response), "judged alike after a kill"


class Agent:
    """Leads two conversations that have their beginning in common."""

    def __init__(self, turns: int = 3) -> None:
        self.turns = turns

    async def act(self, task: Any, environment: Any, opening: Observation, session: Any, scope: Any) -> Acted:
        first = await session.turn(Observed((1, 2, 3)), ROOT)
        ends = await asyncio.gather(
            session.turn(Observed((4,)), first.place), session.turn(Observed((5, 6)), Place(0, 2))
        )
        assert ends[0].place.branch == 0 and ends[1].place.branch == 1
        if self.turns > 3:
            await asyncio.sleep(30)
        return Acted(ended=Ended.STOP, messages=({"role": "user", "content": "."},))

    async def close(self) -> None:
        """Nothing to end."""


class Leaving(Agent):
    """Leaves what it is told to."""

    def __init__(self, left: dict[str, bytes], cause: str = "") -> None:
        super().__init__()
        self.left, self.cause = left, cause

    async def act(self, *arguments: Any) -> Acted:
        acted = await super().act(*arguments)
        return replace(acted, files=self.left, cause=self.cause)


def test_what_an_agent_leaves_reaches_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    async def judge(_: Any, response: Response) -> Verdict:
        seen.append(response.files)
        return scored(1.0, {})

    monkeypatch.setattr(played.Counted, "judge", judge)
    task = replace(counted_task(0), agent=("mini",))
    assert Play(task, agents=Leaving({"made": b"7"})).process().verdict == scored(1.0, {})
    assert seen == [{"made": b"7"}]
    # What is too large to be judged is the agent's doing, and no fault of a judge.
    verdict = Play(task, agents=Leaving({}, "too much left: 1 GB")).process().verdict
    assert verdict == failed("too much left: 1 GB") and len(seen) == 1


def test_an_agent_acts_in_branches_and_is_not_cut() -> None:
    task = replace(counted_task(0), agent=("mini",))
    play = Play(task, agents=Agent())
    response = play.process([Round(number=0, cap=1)])
    first, second = response.branches
    assert response.is_judged and response.num_turns == 3
    assert second.num_shared == 2 and second.token_ids[:4].tolist() == [1, 2, 5, 6]
    assert first.own.sum() + second.own.sum() == len(response.token_ids)
    assert not np.array_equal(first.token_ids[first.turns()[-1][0] :], second.token_ids[4:])
    with pytest.raises(RolloutError, match="names an agent, mini, but there is no gateway"):
        Play(task).process()
    late = Play(task, agents=Agent(4), manager={"rollout_timeout_s": 0.2}).process()
    assert late.ended is Ended.TIMEOUT and late.is_judged
