"""Five planted faults: the log names task, phase and cause of each within the time of silence."""

import asyncio
import errno
from pathlib import Path

import numpy as np
import pytest

from k25_train.environments.base import Verdict, scored, unscored
from k25_train.errors import RolloutError
from k25_train.rollout.engines.base import EngineState
from k25_train.rollout.journal import Journal
from k25_train.rollout.manager.roll_call import RollCall
from k25_train.rollout.manager.scope import Scope
from k25_train.rollout.records import Record
from k25_train.rollout.tries import AttemptError, tried
from tests.helpers.managed import STUCK_S, Managed, turns


def said(found: Managed, *words: str) -> None:
    """One line has all of these."""
    assert any(all(word in line for word in words) for line in found.lines), found.lines


def test_a_tool_that_hangs() -> None:
    async def trial() -> None:
        found = Managed()

        async def work(scope: Scope) -> None:
            with scope.phase("tool", "python in sandbox task7"):
                await asyncio.Event().wait()

        task = found.start("task7#1", work, source="files")
        await found.pass_s(STUCK_S * 1.2)
        said(found, "task7#1", "source files", "stuck", "phase tool", "python in sandbox task7")
        task.cancel()
        await found.manager.close()

    asyncio.run(trial())


def test_an_engine_that_does_not_answer() -> None:
    async def trial() -> None:
        found = Managed()
        found.engines.lost["http://a:1"] = "probe failed: 500"

        async def work(scope: Scope) -> None:
            with scope.phase("generate", "for an engine"):
                await asyncio.Event().wait()

        task = found.start("task7#1", work)
        await found.pass_s(1)
        await found.pass_s(STUCK_S * 1.2)
        said(found, "task7#1", "phase generate", "http://a:1: fenced off (probe failed: 500)")
        task.cancel()
        await found.manager.close()

    asyncio.run(trial())


def test_a_judge_that_answers_500() -> None:
    async def trial() -> None:
        found = Managed()

        async def judged() -> Verdict:
            verdict = unscored("judge_error: http://judge answered 500: out of memory")
            raise AttemptError(verdict.kind, verdict.reason)

        async def work(scope: Scope) -> Verdict:
            with scope.phase("judge", "rubric"):
                return await tried(
                    "task task7", judged, max_attempts=2, count=lambda _: None, is_hopeless=lambda: False
                )
            return scored(1.0, {})

        with pytest.raises(RolloutError):
            await found.start("task7#1", work)
        said(found, "task7#1", "phase judge (rubric)", "tried again", "answered 500: out of memory")
        said(found, "task7#1", "failed in phase judge (rubric)", "given up after 2 tries")
        assert found.manager.snapshot().failures["judge_error"] == 2
        await found.manager.close()

    asyncio.run(trial())


def test_engines_with_stale_weights() -> None:
    async def trial() -> None:
        found = Managed()
        found.engines.version = 5
        found.engines.said = {
            "http://a:1": EngineState(version=5, running=1, waiting=0, busy_share=1, kv_use=0.2),
            "http://b:1": EngineState(version=4, running=1, waiting=0, busy_share=1, kv_use=0.2),
        }

        async def work(scope: Scope) -> None:
            with scope.phase("generate", "for an engine"):
                await asyncio.Event().wait()

        task = found.start("task7#1", work)
        await found.pass_s(1)
        # An update may take a while: nothing is said yet.
        assert not found.lines
        await found.pass_s(STUCK_S * 1.2)
        said(
            found,
            "http://b:1: stale weights",
            "version 4, where version 5 is due",
            "phase generate",
            "task7#1",
        )
        assert not any(line.startswith("http://a:1") for line in found.lines)
        await found.pass_s(STUCK_S * 1.2)
        assert found.manager.snapshot().failures["stale_weights"] == 1
        task.cancel()
        await found.manager.close()

    asyncio.run(trial())


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def trial() -> None:
        found, journal = Managed(), Journal(tmp_path / "journal")
        monkeypatch.setattr("k25_train.rollout.journal.os.fsync", full)

        async def work(scope: Scope) -> None:
            with scope.phase("record", "segment 3"):
                header = {"kind": "grouped", "group": 0}
                journal.append(Record(header, {"ids": np.zeros(1, np.int32)}))
                await asyncio.to_thread(journal.flush)

        with pytest.raises(RolloutError, match="No space left"):
            await found.start("task7#1", work)
        said(found, "task7#1", "failed in phase record (segment 3)", "No space left on device", "make room")
        monkeypatch.undo()
        journal.close()
        await found.manager.close()

    asyncio.run(trial())


def test_a_group_that_nobody_makes() -> None:
    """Its work was given to a shard, which has lost it: no rollout is stuck, since there is none."""

    async def trial() -> None:
        now, lines = [0.0], list[str]()
        roll_call = RollCall(10.0, lambda: {"task8#0"}, lines.append, lambda: now[0])
        lost = asyncio.ensure_future(_given(roll_call, "task7#1", 12))
        made = asyncio.ensure_future(_given(roll_call, "task8#0", 13))
        await turns()
        now[0] = 9.0
        roll_call.look()
        assert not lines
        now[0] = 11.0
        roll_call.look()
        roll_call.look()
        (line,) = lines
        for words in ("task7#1", "group 12", "lost", "no record for 11.0 s", "phase judged"):
            assert words in line
        lost.cancel(), made.cancel()
        await asyncio.gather(lost, made, return_exceptions=True)
        now[0] = 99.0
        roll_call.look()
        assert len(lines) == 1

    asyncio.run(trial())


async def _given(roll_call: RollCall, name: str, group: int) -> None:
    with roll_call.given(name, group) as entry:
        entry.heard("judged")
        await asyncio.Event().wait()
