"""Rollouts are admitted, ended in time, and leave nothing behind; who is stuck is named with its phase."""

import asyncio
from typing import Any

import pytest

from k25_train.errors import RolloutError
from k25_train.rollout.manager.scope import RolloutTimeoutError, Scope, trouble
from tests.helpers.managed import STUCK_S, Managed, turns


async def forever(scope: Scope) -> None:
    with scope.phase("tool", "python in sandbox 3"):
        await asyncio.Event().wait()


async def done(scope: Scope) -> str:
    return scope.name


def test_as_many_live_as_may_and_the_oldest_goes_next() -> None:
    async def trial() -> None:
        found = Managed({"max_live": 2})
        first, second = found.start("a", forever), found.start("b", forever)
        begun: list[str] = []

        async def noted(scope: Scope) -> None:
            begun.append(scope.name)

        waiting = [found.start(f"group {order}", noted, order=order) for order in (7, 3, 5)]
        await turns()
        seen = found.manager.snapshot()
        assert seen.live == seen.cap == 2 and seen.queued == {"sums": 3} and not begun
        first.cancel()
        await asyncio.gather(*waiting)
        assert begun == ["group 3", "group 5", "group 7"]
        assert found.manager.snapshot().live == 1 and not second.done()
        await found.manager.close()
        assert second.cancelled()

    asyncio.run(trial())


def test_sandboxes_hold_back_those_that_need_one_alone() -> None:
    async def trial() -> None:
        found = Managed({"max_sandboxes": 1})
        holder = found.start("holder", forever, needs_sandbox=True)
        later = found.start("later", done, needs_sandbox=True)
        assert await found.start("plain", done) == "plain"
        assert not later.done() and found.manager.snapshot().sandboxes == 1
        holder.cancel()
        assert await later == "later" and found.manager.snapshot().sandboxes == 0
        await found.manager.close()

    asyncio.run(trial())


def test_who_is_cancelled_while_it_waits_takes_no_place() -> None:
    async def trial() -> None:
        found = Managed({"max_live": 1})
        holder = found.start("holder", forever)
        gone, admitted, last = (found.start(name, done) for name in ("gone", "admitted", "last"))
        await turns()
        gone.cancel()
        holder.cancel()
        # `admitted` has its turn by now, and has not begun.
        await asyncio.sleep(0)
        admitted.cancel()
        assert await last == "last"
        await turns()
        assert found.manager.snapshot().live == 0
        await found.manager.close()

    asyncio.run(trial())


def test_a_deadline_ends_a_rollout_by_name_phase_and_what_it_did() -> None:
    async def trial() -> None:
        found = Managed({"rollout_timeout_s": 20.0})
        late = found.start("task7#2", forever)

        async def limited(scope: Scope) -> None:
            scope.limit(5)
            await forever(scope)

        short = found.start("task8#0", limited)
        await found.pass_s(6.1)
        with pytest.raises(RolloutTimeoutError, match=r"task8#0 .*after 5 s.*in phase tool \(python in"):
            await short
        assert not late.done()
        await found.pass_s(40)
        with pytest.raises(
            RolloutTimeoutError, match=r"task7#2 \(source sums\).*phase tool \(python in sandbox"
        ):
            await late
        await found.pass_s(STUCK_S)
        assert "task8#0" in found.lines[0] and "task7#2" in found.lines[1]
        assert found.manager.snapshot().failures["deadline"] == 2
        await found.manager.close()

    asyncio.run(trial())


def test_being_cancelled_is_no_deadline() -> None:
    async def trial() -> None:
        found = Managed()
        task = found.start("a", forever)
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not found.manager.snapshot().failures
        await found.manager.close()

    asyncio.run(trial())


def test_sub_rollouts_end_with_their_parent_and_by_its_deadline() -> None:
    async def trial() -> None:
        found = Managed({"rollout_timeout_s": 20.0})
        children: list[asyncio.Task[Any]] = []

        async def parent(scope: Scope) -> None:
            children.append(asyncio.ensure_future(scope.child("left", forever)))
            await scope.child("right", forever)

        async def leaves(scope: Scope) -> str:
            children.append(asyncio.ensure_future(scope.child("orphan", forever)))
            await asyncio.sleep(0)
            return "left"

        assert await found.start("leaver", leaves) == "left"
        assert children[0].cancelled()
        task = found.start("parent", parent)
        await found.pass_s(41)
        await turns(20)
        with pytest.raises(RolloutTimeoutError):
            await task
        assert children[1].done()
        assert found.manager.snapshot().live == 0 and not found.manager.snapshot().phases
        await found.manager.close()

    asyncio.run(trial())


def test_a_sub_rollout_that_is_stuck_is_named_and_its_parent_is_not() -> None:
    async def trial() -> None:
        found = Managed()
        task = found.start("parent", lambda scope: scope.child("critic", forever))
        await found.pass_s(STUCK_S * 1.3)
        (line,) = found.lines
        assert line.startswith("parent > critic (source sums): stuck, no progress for 104.0 s in phase tool")
        task.cancel()
        await found.manager.close()

    asyncio.run(trial())


def test_what_does_not_close_is_left_behind_and_named() -> None:
    async def trial() -> None:
        found = Managed({"teardown_timeout_s": 0.01})

        async def hangs() -> None:
            while True:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    if found.lines:
                        raise

        async def raises() -> None:
            raise OSError("no such sandbox")

        async def work(scope: Scope) -> str:
            await scope.teardown(raises(), "sandbox 4")
            await scope.teardown(hangs(), "environment browser")
            return "response"

        assert await found.start("task1#0", work) == "response"
        assert "sandbox 4 did not close: OSError: no such sandbox" in found.lines[0]
        await found.manager.sweep()
        found.now += 1e4
        await found.manager.sweep()
        told = "\n".join(found.lines)
        assert (
            "task1#0 (source sums): in phase teardown: environment browser did not close within 0.01 s"
            in told
        )
        assert found.manager.snapshot().failures["teardown"] == 2
        await found.manager.close()

    asyncio.run(trial())


def test_closing_goes_on_where_its_rollout_is_cancelled_meanwhile() -> None:
    async def trial() -> None:
        found, closed = Managed(), asyncio.Event()
        may_close = asyncio.Event()

        async def closing() -> None:
            await may_close.wait()
            closed.set()

        task = found.start("a", lambda scope: scope.teardown(closing(), "kernel"))
        await turns()
        task.cancel()
        await turns()
        assert task.cancelled() and not closed.is_set() and found.manager.snapshot().closing == 1
        may_close.set()
        await found.manager.close()
        assert closed.is_set()

    asyncio.run(trial())


def test_phases_are_counted_and_timed_and_left_again() -> None:
    async def trial() -> None:
        found, goes_on = Managed(), asyncio.Event()

        async def work(scope: Scope) -> None:
            with scope.phase("generate", "for an engine"):
                scope.count("tokens", 12)
                await goes_on.wait()

        task = found.start("a", work)
        await found.pass_s(7)
        seen = found.manager.snapshot()
        assert seen.phases == {"generate": 1} and seen.slowest[0].total_s == 7
        assert (seen.slowest[0].phase, seen.slowest[0].detail) == ("generate", "for an engine")
        goes_on.set()
        await task
        seen = found.manager.snapshot()
        assert not seen.phases and seen.phase_seconds["generate"] == 7 and seen.events["tokens"] == 12
        assert seen.events["admitted"] == seen.events["ended"] == 1
        await found.manager.close()

    asyncio.run(trial())


def test_progress_is_not_silence_and_silence_is_told_once() -> None:
    async def trial() -> None:
        found, goes_on = Managed(), asyncio.Event()

        async def work(scope: Scope) -> None:
            with scope.phase("tool", "make"):
                await goes_on.wait()
                scope.progress("make test")
                await asyncio.Event().wait()

        task = found.start("a", work)
        await found.pass_s(STUCK_S * 0.9)
        goes_on.set()
        await found.pass_s(STUCK_S * 0.9)
        assert not found.lines
        for _ in range(5):
            await found.pass_s(STUCK_S * 0.5)
        assert len(found.lines) == 1 and "in phase tool; make test" in found.lines[0]
        task.cancel()
        await found.manager.close()

    asyncio.run(trial())


def test_a_thousand_of_one_kind_are_a_line_and_a_number() -> None:
    async def trial() -> None:
        found = Managed()
        tasks = [found.start(f"task{number}", forever) for number in range(1000)]
        await found.pass_s(STUCK_S * 1.3)
        assert len(found.lines) == 1
        await found.pass_s(STUCK_S * 1.3)
        assert len(found.lines) == 2 and "998 more like it" in found.lines[1]
        for task in tasks:
            task.cancel()
        await found.manager.close()

    asyncio.run(trial())


def test_a_closed_manager_admits_nobody_and_waits_for_nobody() -> None:
    async def trial() -> None:
        found = Managed({"max_live": 1})
        live, waiting = found.start("a", forever), found.start("b", done)
        await turns()
        await found.manager.close()
        assert live.cancelled()
        for call in (waiting, found.start("c", done)):
            with pytest.raises(RolloutError, match="closed"):
                await call

    asyncio.run(trial())


def test_outside_of_a_rollout_trouble_is_nobody_s() -> None:
    trouble("judge_error", "500")
