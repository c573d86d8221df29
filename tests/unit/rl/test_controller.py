"""Which groups a step gets: in the order of tasks, complete, of the right weights, whatever was killed."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from k25_train.environments.base import Status, failed, scored, unscored
from k25_train.errors import RolloutError
from k25_train.rl.controller import _was_complete_in
from k25_train.rl.toggle import NoToggle
from k25_train.rollout.engines.base import EngineError
from k25_train.rollout.trajectory import Ended
from tests.helpers.scripted_engine import ScriptedEngine
from tests.helpers.scripted_rollouts import (
    LengthJudge,
    Rollouts,
    algorithm_config,
    rollout_config,
    told,
)

MODES: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "two steps a phase": {"steps_per_rollout": 2},
    "partial": {"token_cap": 4},
    "partial, two steps": {"token_cap": 3, "steps_per_rollout": 2},
}


class KilledError(Exception):
    """Passes through everything."""


async def all_steps(rollouts: Rollouts) -> list[Any]:
    per_phase = rollouts.algorithm.steps_per_rollout
    found = []
    for step in range(1, rollouts.num_steps + 1, per_phase):
        found += told(await rollouts.step(step))
    return found


@pytest.mark.parametrize("mode", MODES)
def test_every_group_trains_once_with_all_of_its_responses(mode: str, tmp_path: Path) -> None:
    rollouts = Rollouts(tmp_path, algorithm_config(**MODES[mode]))
    found = rollouts.run(all_steps)
    numbers = [number for number, *_ in found]
    assert sorted(numbers) == [number for number in range(8) for _ in range(3)]
    assert len({task for _, task, *_ in found}) == 8
    assert not rollouts.journal.state.open


def test_synchronous_steps_are_of_their_own_weights_and_responses_of_their_own_seeds(tmp_path: Path) -> None:
    found = Rollouts(tmp_path).run(all_steps)
    for number, _, tokens, _, versions, _ in found:
        assert set(versions) == {number // 2}
        assert len(tokens) == len(versions) >= 1
    assert len({tuple(tokens) for _, _, tokens, *_ in found}) == len(found)


def test_a_response_goes_on_where_its_round_has_cut_it(tmp_path: Path) -> None:
    rollouts = Rollouts(tmp_path, algorithm_config(token_cap=4), engine=ScriptedEngine(mean_length=12))
    found = rollouts.run(all_steps)
    versions = [versions for *_, versions, _ in found]
    assert any(len(set(each)) > 1 for each in versions), "some response has tokens of several weights"
    assert all(each == sorted(each) for each in versions)
    for request in rollouts.engine.asked:
        assert request.sampling.max_tokens - len(request.response_ids) <= 4
    whole = {tuple(tokens) for _, _, tokens, *_ in found}
    assert any(len(tokens) > 4 for tokens in whole)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not(mode: str, share: float, tmp_path: Path) -> None:
    """What an engine was in the middle of is generated again, alike; what the journal has is not."""
    algorithm = algorithm_config(**MODES[mode])
    uninterrupted = Rollouts(tmp_path / "whole", algorithm)
    whole = uninterrupted.run(all_steps)
    num_requests = len(uninterrupted.engine.asked)

    class Killed(ScriptedEngine):
        left = int(share * num_requests)

        async def _generate(self, request: Any, fault: str) -> Any:
            self.left -= 1
            if self.left < 0:
                raise KilledError
            return await super()._generate(request, fault)

    found: list[Any] = []

    async def until_killed(rollouts: Rollouts) -> None:
        for step in range(1, 5, algorithm.steps_per_rollout):
            found.extend(told(await rollouts.step(step)))

    killed = Rollouts(tmp_path / "killed", algorithm, engine=Killed())
    with pytest.raises(KilledError):
        killed.run(until_killed)

    async def go_on(rollouts: Rollouts) -> None:
        done = rollouts.journal.state.num_consumed // 2
        for step in range(done + 1, 5, algorithm.steps_per_rollout):
            found.extend(told(await rollouts.step(step)))

    again = Rollouts(tmp_path / "killed", algorithm)
    again.run(go_on)
    assert found == whole
    assert len(again.engine.asked) <= num_requests - int(share * num_requests) + 6 * 4


class TestAsynchronous:
    """Generation goes on while steps train."""

    def test_no_token_is_older_than_the_bound_and_order_is_kept(self, tmp_path: Path) -> None:
        async def use(rollouts: Rollouts) -> list[Any]:
            found = []
            for step in range(1, 9):
                groups = await rollouts.step(step)
                assert [group.number for group in groups] == [2 * step - 2, 2 * step - 1]
                for group in groups:
                    for response in group.responses:
                        found += [step - 1 - version for version in response.versions.tolist()]
                await asyncio.sleep(0.005)
            return found

        rollouts = Rollouts(tmp_path, algorithm_config(max_staleness=2), num_steps=8)
        staleness = rollouts.run(use)
        assert max(staleness) == 2, "the bound is used"
        assert min(staleness) >= 0

    def test_groups_are_admitted_up_to_the_bound_and_no_further(self, tmp_path: Path) -> None:
        async def use(rollouts: Rollouts) -> None:
            await rollouts.step(1)
            await asyncio.sleep(0.05)
            assert rollouts.journal.state.num_admitted == (0 + 1 + 2) * 2
            await rollouts.push(1)
            await asyncio.sleep(0.05)
            assert rollouts.journal.state.num_admitted == (1 + 1 + 2) * 2

        Rollouts(tmp_path, algorithm_config(max_staleness=2), num_steps=8).run(use)

    def test_after_a_resume_to_older_weights_no_response_goes_on_too_early(self, tmp_path: Path) -> None:
        algorithm = algorithm_config(max_staleness=2)

        async def get_ahead(rollouts: Rollouts) -> None:
            for step in range(1, 4):
                await rollouts.step(step)
            await rollouts.push(3)
            await asyncio.sleep(0.002)

        slow = Rollouts(tmp_path, algorithm, engine=ScriptedEngine(pause_s=0.0005), num_steps=8)
        slow.run(get_ahead)

        async def go_on(rollouts: Rollouts) -> int:
            await rollouts.push(0)
            task = asyncio.create_task(rollouts.controller.take(4, NoToggle()))
            await asyncio.sleep(0.05)
            task.cancel()
            return max([int(request.key.split("#")[1], 16) for request in rollouts.engine.asked], default=-1)

        again = Rollouts(tmp_path, algorithm, num_steps=8)
        assert again.run(go_on) == -1, "groups 6 and later may be generated with weights 1 and later"

    def test_what_ends_generation_in_the_background_ends_the_step(self, tmp_path: Path) -> None:
        rollouts = Rollouts(
            tmp_path, algorithm_config(max_staleness=1), engine=ScriptedEngine(faults=["raise"] * 99)
        )
        with pytest.raises(RolloutError, match="given up after 3 tries"):
            rollouts.run(lambda each: each.step(1))


class TestFaults:
    """Each is named and counted, done again, and ends the run when it stays."""

    @pytest.mark.parametrize(
        ("fault", "kind"),
        [
            ("raise", "engine_error"),
            ("nan", "bad_logprobs"),
            ("truncated", "truncated"),
            ("empty", "empty"),
            ("forbidden", "bad_ids"),
            ("hang", "timeout"),
        ],
    )
    def test_an_answer_that_cannot_be_used_is_asked_for_again(
        self, fault: str, kind: str, tmp_path: Path
    ) -> None:
        rollout = rollout_config(request_timeout_s=0.3) if fault == "hang" else rollout_config()
        whole = Rollouts(tmp_path / "whole").run(all_steps)
        rollouts = Rollouts(tmp_path / "faulty", rollout=rollout, engine=ScriptedEngine(faults=[fault] * 2))
        assert rollouts.run(all_steps) == whole
        assert rollouts.counts.take()[f"retried/{kind}"] == 2

    def test_a_fault_that_stays_ends_the_run_with_the_task_and_loses_nothing(self, tmp_path: Path) -> None:
        rollouts = Rollouts(tmp_path, engine=ScriptedEngine(faults=["", "", *["nan"] * 99]))
        with pytest.raises(RolloutError, match=r"task sums/train/\d+: given up after 3 tries.*nan"):
            rollouts.run(all_steps)
        whole = Rollouts(tmp_path / "whole").run(all_steps)
        assert Rollouts(tmp_path).run(all_steps) == whole

    def test_an_engine_with_old_weights_is_fenced_off(self, tmp_path: Path) -> None:
        rollouts = Rollouts(tmp_path, engine=ScriptedEngine(faults=["old"]))
        with pytest.raises(EngineError, match="generates with version -1 where 0 is due"):
            rollouts.run(all_steps)

    @pytest.mark.parametrize(
        ("fault", "kind"),
        [
            (ValueError("division"), "judge_raised"),
            (unscored("engine: status 500"), "engine"),
        ],
    )
    def test_what_is_not_scored_is_judged_again_and_never_zero(
        self, fault: Any, kind: str, tmp_path: Path
    ) -> None:
        whole = Rollouts(tmp_path / "whole").run(all_steps)
        rollouts = Rollouts(tmp_path / "faulty", judge=LengthJudge([fault, fault]))
        assert rollouts.run(all_steps) == whole
        counts = rollouts.counts.take()
        assert counts[f"retried/{kind}"] == 2 and counts["judge_s"] > 0
        assert len(rollouts.engine.asked) == 24, "nothing is generated again for it"

    def test_a_judge_that_never_judges_ends_the_run(self, tmp_path: Path) -> None:
        rollouts = Rollouts(tmp_path, judge=LengthJudge([unscored("offline: no route")] * 999))
        with pytest.raises(RolloutError, match=r"judge answer: given up after 3 tries.*offline: no route"):
            rollouts.run(all_steps)

    def test_a_failed_response_has_its_zero_and_trains(self, tmp_path: Path) -> None:
        rollouts = Rollouts(tmp_path, judge=LengthJudge([failed("no_answer: nothing in it")]))
        groups = rollouts.run(lambda each: each.step(1))
        verdicts = [response.verdict for group in groups for response in group.responses]
        assert [verdict.status for verdict in verdicts if verdict].count(Status.FAILED) == 1
        assert len(verdicts) == 6

    def test_a_response_at_its_limit_is_judged_as_one(self, tmp_path: Path) -> None:
        rollouts = Rollouts(tmp_path, engine=ScriptedEngine(mean_length=10**9))
        groups = rollouts.run(lambda each: each.step(1))
        for group in groups:
            for response in group.responses:
                assert response.ended is Ended.LENGTH
                assert len(response.token_ids) == 16
                assert response.verdict is not None

    def test_a_group_short_of_one_verdict_does_not_train(self, tmp_path: Path) -> None:
        async def use(rollouts: Rollouts) -> None:
            await rollouts.push(0)
            rollouts.controller.admit(NoToggle())
            group = rollouts.journal.state.open[0]
            for response in group.responses:
                response.ended = Ended.STOP
                response.verdict = scored(1.0, {})
            assert group.is_complete
            for response in group.responses:
                response.verdict = unscored("offline: no route")
                assert not group.is_complete
                with pytest.raises(ValueError, match="2 rewards of 3"):
                    group.rewards()
                response.verdict, response.ended = scored(1.0, {}), None
                assert not group.is_complete
                response.ended = Ended.STOP

        Rollouts(tmp_path).run(use)


def test_what_was_complete_in_a_round_does_not_change_with_later_ones(tmp_path: Path) -> None:
    """A kill in the second round of a phase: some groups have ended in it by then, and the first round, which
    is looked at again, must not count them."""
    algorithm = algorithm_config(token_cap=2)
    (group, *_) = Rollouts(tmp_path, algorithm).run(lambda each: each.step(1))
    last = max(response.last_round for response in group.responses)
    assert _was_complete_in(group, last) and not _was_complete_in(group, last - 1)


def test_another_set_of_tasks_is_refused(tmp_path: Path) -> None:
    async def admit(rollouts: Rollouts) -> None:
        await rollouts.push(0)
        rollouts.controller.admit(NoToggle())

    Rollouts(tmp_path).run(admit)
    with pytest.raises(RolloutError, match="group 0 was admitted with task sums/train/"):
        Rollouts(tmp_path, num_tasks=500).run(lambda each: each.step(1))
